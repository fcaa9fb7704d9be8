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

    def run(mode):
        with make_step(mode, wanted, values):
            args, kwargs = state.with_probes()
            return state.laid_out(
                state.without_probes(function(*args, **kwargs))
            )

    if not isinstance(measures, jax.core.Tracer):
        return run("measure" if measures else "plain")
    if not once:
        return run("ask")
    try:
        return jax.lax.cond(
            measures, lambda: run("measure"), lambda: run("plain")
        )
    except TypeError as error:
        if "cond" not in str(error):
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
        self._arguments = args, kwargs
        self._lists = []
        self._variables = []
        self.mapping = []
        for optimizer in optimizers:
            if not optimizer.built:
                raise ValueError(
                    f"Optimizer '{optimizer.name}' must be built before "
                    f"`{_name(function)}` is called: "
                    "`optimizer.build(model.trainable_variables)`"
                )
            # Keras has no public name for the variables that an optimizer is
            # built with. The probes are behind the others.
            trained = optimizer._trainable_variables
            weights = [v for v in trained if not _is_probe(v)]
            probes = [v for v in trained if _is_probe(v)]
            values = self._find(optimizer.variables)
            if values is None:
                raise _not_found(
                    function, "optimizer.variables", optimizer, args, kwargs
                )
            self.mapping += zip(optimizer.variables, values, strict=True)
            self._variables += [optimizer.variables, weights]
            if not probes:
                continue
            if self._find(weights) is None:
                raise _not_found(
                    function,
                    "model.trainable_variables",
                    optimizer,
                    args,
                    kwargs,
                )
            self._lists.append((_shapes(weights), _shapes(probes)))

    def _find(self, variables):
        """The first list or tuple of values of some variables, or `None`."""
        shapes = _shapes(variables)
        nodes = jax.tree.leaves(
            self._arguments, is_leaf=lambda node: _fits(node, shapes)
        )
        return next((node for node in nodes if _fits(node, shapes)), None)

    def with_probes(self):
        """The arguments, with the probes' zeros behind weights' values."""
        arguments = self._arguments
        for weights, probes in self._lists:
            zeros = [_nearly_zeros(shape) for shape in probes]
            arguments = _replace(
                arguments,
                weights,
                lambda node, zeros=zeros: type(node)([*node, *zeros]),
            )
        return arguments

    def without_probes(self, results):
        """What the step returned, without probes behind weights' values."""
        for weights, probes in self._lists:
            count = len(weights)
            results = _replace(
                results,
                weights + probes,
                lambda node, count=count: node[:count],
            )
        return results

    def laid_out(self, results):
        """What the step returned, with values laid out like variables.

        In a branch, the compiler may choose another layout, and send the
        values to where they belong behind it.
        """
        if keras.distribution.distribution() is None:
            return results
        for variables in self._variables:
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
        isinstance(node, list | tuple)
        and len(node) == len(shapes)
        and all(hasattr(value, "shape") for value in node)
        and [tuple(value.shape) for value in node] == shapes
    )


def _replace(tree, shapes, change):
    def is_leaf(node):
        return _fits(node, shapes)

    return jax.tree.map(
        lambda node: change(node) if is_leaf(node) else node,
        tree,
        is_leaf=is_leaf,
    )


def _name(function):
    return getattr(function, "__name__", str(function))


def _not_found(function, what, optimizer, args, kwargs):
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
        f"arguments. Received: none for optimizer '{optimizer.name}', and "
        f"lists of {lengths} arrays"
    )


def _is_flat(node):
    return isinstance(node, list | tuple) and all(
        hasattr(value, "shape") for value in node
    )


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
