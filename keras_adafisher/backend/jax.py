"""JAX' exceptions: `keras.distribution` spreads variables over devices."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.interpreters.ad import JVPTracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from keras import ops

from keras_adafisher.backend import common


def differentiate(compute_loss, data, probes, variables):
    probed = [probe.variable for probe in probes]
    ids = set(map(id, probed))
    variables = [v for v in variables if id(v) not in ids]

    # All as arguments: XLA would compute with constants while it compiles.
    def loss_of(answers, values, data):
        mapping = [
            *zip(variables, values, strict=True),
            *zip(probed, answers, strict=True),
        ]
        with keras.StatelessScope(mapping, collect_losses=True):
            return compute_loss(*data)

    values = [v.value for v in variables]
    # Compiling all at once takes less than half as long as one by one.
    return jax.jit(jax.grad(loss_of))([v.value for v in probed], values, data)


def evaluator(compute_loss, data, variables):
    # Without a compiler, a small network takes half a second.
    @jax.jit
    def stateless(values, data):
        mapping = zip(variables, values, strict=True)
        with keras.StatelessScope(mapping, collect_losses=True):
            return compute_loss(*data)

    return lambda: stateless([v.value for v in variables], data)


def tap(z, h, probe, request):
    # Nothing is measured in forward mode, and JAX can't push a tangent through
    # a function with a backward pass of its own. Its name isn't documented, but
    # there is no other way to tell.
    if isinstance(z, JVPTracer):
        return z
    vector = ops.convert_to_tensor(probe.variable)
    h = jax.lax.stop_gradient(ops.convert_to_tensor(h, sparse=False))
    split = sum(probe.sizes[:2])

    def first_part():
        return probe.measure_activations(h)

    def whole(first, s):
        answer = jnp.concatenate([first[:split], probe.measure_gradients(s)])
        return keep_layout(answer, probe.variable)

    if request is True:
        # In the forward pass: the backward pass may have another form of `h`
        # only, and needn't keep this one alive.
        first = first_part()
    else:
        # Where no answer is wanted, there is the probe itself, which is as good
        # as zero: zeros made anew would be one kernel more for each size.
        zeros = jax.lax.stop_gradient(vector)
        first = jax.lax.cond(
            request,
            lambda: keep_layout(
                jnp.concatenate([first_part(), zeros[split:]]), probe.variable
            ),
            lambda: zeros,
        )

    @jax.custom_vjp
    def identity(z, vector, first, request):
        return z

    def forward(z, vector, first, request):
        return z, (first, request)

    def backward(residuals, s):
        first, request = residuals
        if request is None:
            answer = whole(first, s)
        else:
            answer = jax.lax.cond(
                request, lambda: whole(first, s), lambda: first
            )
        return s, answer, None, None

    identity.defvjp(forward, backward)
    return identity(z, vector, first, None if request is True else request)


def run_step(make_step, inner, optimizers, function, args, kwargs, once):
    state = _State(optimizers, function, args, kwargs)
    with keras.StatelessScope(state.mapping):
        wanted = {id(one): one.measures_factors() for one in inner}
        measures = [one.measures_anything() for one in inner]
    is_static = any(one is True for one in measures)
    measures = is_static or functools.reduce(
        jnp.logical_or, measures or [False]
    )
    values = {id(variable): value for variable, value in state.mapping}

    returned = []

    def run(mode):
        with make_step(mode, wanted, values):
            args, kwargs = state.with_probes()
            results = state.laid_out(
                state.without_probes(function(*args, **kwargs))
            )
        returned.append(mode)
        return results

    if not isinstance(measures, jax.core.Tracer):
        return run("measure" if measures else "plain")
    if not once:
        return run("ask")
    try:
        return jax.lax.cond(
            measures, lambda: run("measure"), lambda: run("plain")
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
        # of gradients, has to be as long. (`hooks.py` cuts what a model is
        # called with.)
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
            zeros = map(_nearly_zeros, shapes)
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
                    map(keep_layout, node, variables)
                ),
            )
        return results


def _nearly_zeros(shape):
    # Of a constant whose entries are all equal, XLA makes a kernel that fills
    # memory, one more to compile for each size. Others are in the program.
    values = np.zeros(shape, "float32")
    values[0] = np.finfo("float32").tiny
    return values


def _is_probe(variable):
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


def is_traced(tensor):
    return isinstance(tensor, jax.core.Tracer)


def has_accelerator():
    return jax.default_backend() != "cpu"


def window_mean(*args):
    # Accelerators multiply in less than single precision if they may.
    with jax.default_matmul_precision("highest"):
        return common.window_mean(*args)


def part(vector, start, size):
    # XLA compiles equal kernels once. A slice is part of the kernel that reads
    # it, and makes that another one for each parameter; indices are an operand.
    index = np.arange(start, start + size)
    if size == 1:
        # One number only, or equal ones, would become part of the kernel too.
        index = np.append(index, 0 if start else len(vector) - 1)
    return vector.at[index].get(mode="promise_in_bounds")[:size]


def precise_matmul(x, y):
    # On a GPU or a TPU, the default rounds what is multiplied to 10 or 8 bits.
    return jnp.matmul(x, y, precision="highest")


def entry(vector, index):
    return part(vector, index, 1)[0]


def take(x, indices):
    # Keras' own makes floats of them if `floatx` is "bfloat16".
    return jnp.asarray(x).at[indices].get(mode="promise_in_bounds")


def sum_min_max(x, low, high):
    # One reduction, where three take three times as long to compile.
    zero, infinity = np.float32(0), np.float32(np.inf)
    return jax.lax.reduce(
        (x, low, high),
        (zero, infinity, -infinity),
        lambda a, b: (
            a[0] + b[0],
            jnp.minimum(a[1], b[1]),
            jnp.maximum(a[2], b[2]),
        ),
        dimensions=(1,),
    )


def keep_layout_of(tensor, shape, parameters):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return tensor
    tensor = common.reshape(tensor, shape)
    # For each axis what the parameters say of it.
    found = [set() for _ in tensor.shape]
    for parameter in parameters:
        sharding = _sharding_of(parameter, distribution)
        rank = len(parameter.shape)
        # Trailing axes that aren't split may be left out.
        names = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
        # From the last axis on.
        for axis in range(1, min(rank, len(tensor.shape)) + 1):
            has_axis = tensor.shape[-axis] == parameter.shape[-axis]
            found[-axis].add(names[-axis] if has_axis else None)
    axes = [names.pop() if len(names) == 1 else None for names in found]
    layout = NamedSharding(sharding.mesh, PartitionSpec(*axes))
    return keras.distribution.distribute_tensor(tensor, layout)


def whole_layout(parameter):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    mesh = _sharding_of(parameter, distribution).mesh
    return NamedSharding(mesh, PartitionSpec())


def _sharding_of(variable, distribution):
    layout = distribution.get_variable_layout(variable)
    # `keras.Variable(layout=...)` may have been given one of JAX' own.
    return getattr(layout, "backend_layout", layout)


def keep_layout(tensor, variable):
    # Left to itself, the compiler may choose another layout for what a branch
    # of `cond` returns, and gather it behind the branch: on all steps, also on
    # those that don't measure.
    distribution = keras.distribution.distribution()
    if distribution is None:
        return tensor
    layout = distribution.get_variable_layout(variable)
    return keras.distribution.distribute_tensor(tensor, layout)
