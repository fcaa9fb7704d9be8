"""Training steps on JAX, which pass all state along."""

import functools

import jax
import jax.numpy as jnp
import keras

from keras_adafisher.backend import constrain_layout
from keras_adafisher.backend.jax import nearly_zeros


def run(make_step, inner, optimizers, function, args, kwargs, once):
    state = _State(optimizers, function, args, kwargs)
    with keras.StatelessScope(state.mapping):
        wanted = {
            id(optimizer): optimizer.measures_factors() for optimizer in inner
        }
        measures = [optimizer.measures_anything() for optimizer in inner]
    is_static = any(answer is True for answer in measures)
    measures = is_static or functools.reduce(
        jnp.logical_or, measures or [False]
    )
    values = {id(variable): value for variable, value in state.mapping}

    returned = []

    def run_in(mode):
        with make_step(mode, wanted, values):
            args, kwargs = state.with_probes()
            results = state.laid_out(
                state.without_probes(function(*args, **kwargs))
            )
        returned.append(mode)
        return results

    if not isinstance(measures, jax.core.Tracer):
        return run_in("measure" if measures else "plain")
    if not once:
        return run_in("conditional")
    try:
        return jax.lax.cond(
            measures, lambda: run_in("measure"), lambda: run_in("plain")
        )
    except TypeError as error:
        if len(returned) < 2:
            # It is the function's own.
            raise
        raise TypeError(
            f"`{_name(function)}` must return the same structure of arrays, of "
            "the same shapes and dtypes, on steps that measure Kronecker "
            "factors and on those that don't: one condition is around it "
            '(`keras_adafisher.set_decision_scope("layer")` has none). '
            f"Received: {error}"
        ) from error


class _State:
    """The arguments of a training step, with the values of variables in them.

    Args:
        optimizers: List of Keras optimizers that the step applies.
        function: Callable, the step.
        args: Tuple, its arguments.
        kwargs: Dict, its keyword arguments.

    Attributes:
        mapping: List of pairs of an optimizer's variable and its value.
    """

    def __init__(self, optimizers, function, args, kwargs):
        for optimizer in optimizers:
            if not optimizer.built:
                raise ValueError(
                    f"Optimizer '{optimizer.name}' must be built before "
                    f"`{_name(function)}` is called: "
                    "`optimizer.build(model.trainable_variables)`"
                )
        # Keras has no public name for the variables that an optimizer is
        # built with. The probes are behind the others.
        trained = [optimizer._trainable_variables for optimizer in optimizers]
        weights = [[v for v in vs if not _is_probe(v)] for vs in trained]
        probes = [[v for v in vs if _is_probe(v)] for vs in trained]
        own = [optimizer.variables for optimizer in optimizers]
        searched = list(map(_shapes, [*weights, *own]))
        self._nodes, self._structure = jax.tree.flatten(
            (args, kwargs),
            is_leaf=lambda node: any(_fits(node, s) for s in searched),
        )
        self._taken = set()
        # By the place of weights' values, what to put behind them.
        self._probes = {}
        self._lists = []
        self._owners = [*own, *weights]
        self.mapping = []
        for number, optimizer in enumerate(optimizers):
            place = self._find(own[number])
            if place is None:
                raise _not_found(
                    function, "optimizer.variables", optimizer, args, kwargs
                )
            values = self._nodes[place]
            self.mapping += zip(own[number], values, strict=True)
            if not probes[number]:
                continue
            place = self._find(weights[number])
            if place is None:
                raise _not_found(
                    function,
                    "model.trainable_variables",
                    optimizer,
                    args,
                    kwargs,
                )
            shapes = _shapes(probes[number])
            self._probes[place] = shapes
            self._lists.append((_shapes(weights[number]), shapes))
        # What is combined with the weights entry by entry, an average or a sum
        # of gradients, has to be as long. (`keras_hooks.py` cuts what a model
        # is called with.)
        for shapes, of_probes in self._lists:
            for place, node in enumerate(self._nodes):
                if _fits(node, shapes):
                    self._probes.setdefault(place, of_probes)

    def _find(self, variables):
        """The place of the values of some variables, `None` if there is none.

        Of several lists of the same shapes the first one that no optimizer
        before has taken.
        """
        shapes = _shapes(variables)
        places = [
            n for n, node in enumerate(self._nodes) if _fits(node, shapes)
        ]
        free = [place for place in places if place not in self._taken]
        found = next(iter(free or places), None)
        self._taken.add(found)
        return found

    def with_probes(self):
        """The arguments, with the probes' zeros behind weights' values."""
        nodes = list(self._nodes)
        for place, shapes in self._probes.items():
            zeros = map(nearly_zeros, shapes)
            nodes[place] = type(nodes[place])([*nodes[place], *zeros])
        return jax.tree.unflatten(self._structure, nodes)

    def without_probes(self, results):
        """What the step returned, without probes behind weights' values."""
        for weights, probes in self._lists:
            count = len(weights)
            results = _replace(
                results,
                weights + probes,
                lambda node, count=count: node[:count],
                # Gradients too, if they are returned.
                only_first=False,
            )
        return results

    def laid_out(self, results):
        """What the step returned, with values laid out like variables.

        In a branch, the compiler may choose another layout, and send the
        values to where they belong behind it.
        """
        if keras.distribution.distribution() is None:
            return results
        for variables in self._owners:
            results = _replace(
                results,
                _shapes(variables),
                lambda node, variables=variables: type(node)(
                    map(constrain_layout, node, variables)
                ),
            )
        return results


def _is_probe(variable):
    # `probe_of`, which imports this package.
    return getattr(variable, "adafisher_probe", None) is not None


def _shapes(variables):
    return [tuple(variable.shape) for variable in variables]


def _fits(node, shapes):
    """Whether a node of nested arguments is a list of values of some shapes."""
    return (
        _is_flat(node)
        and len(node) == len(shapes)
        and [tuple(value.shape) for value in node] == shapes
    )


def _replace(tree, shapes, change, only_first=True):
    """Change lists of values of some shapes in nested arguments."""
    is_done = False

    def change_if_it_fits(node):
        nonlocal is_done
        if is_done or not _fits(node, shapes):
            return node
        # The moving averages of normalizations may have the weights' shapes.
        is_done = only_first
        return change(node)

    return jax.tree.map(
        change_if_it_fits, tree, is_leaf=lambda node: _fits(node, shapes)
    )


def _name(function):
    return getattr(function, "__name__", str(function))


def _not_found(function, what, optimizer, args, kwargs):
    built_with = sum(not _is_probe(v) for v in optimizer._trainable_variables)
    lengths = [
        len(node)
        for node in jax.tree.leaves(
            (args, kwargs), is_leaf=lambda node: _is_flat(node)
        )
        if _is_flat(node)
    ]
    return ValueError(
        f"`{_name(function)}` must be called with the values of `{what}`, "
        f"`[v.value for v in {what}]`, as a list or a tuple among its "
        f"arguments. Received: none for optimizer '{optimizer.name}', which "
        f"was built with {built_with} weights, and lists of {lengths} arrays. "
        "After a change of what is trained, compile the model again, or make "
        "a new optimizer"
    )


def _is_flat(node):
    # A named tuple has room for its fields only.
    return (
        isinstance(node, list | tuple)
        and not hasattr(node, "_fields")
        and all(hasattr(value, "shape") for value in node)
    )
