"""JAX' exceptions: `keras.distribution` spreads variables over devices."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from keras_adafisher.backend import common


def differentiate(compute_loss, data, probes, variables):
    inputs = [[v.value for v in probe.inputs] for probe in probes]
    ids = {id(v) for probe in probes for v in probe.inputs}
    variables = [v for v in variables if id(v) not in ids]

    # All as arguments: XLA would compute with constants while it compiles.
    def loss_of(inputs, values, data):
        values = [
            *zip(variables, values, strict=True),
            *(
                pair
                for probe, group in zip(probes, inputs, strict=True)
                for pair in zip(probe.inputs, group, strict=True)
            ),
        ]
        with keras.StatelessScope(values, collect_losses=True):
            return compute_loss(*data)

    values = [v.value for v in variables]
    # Compiling all at once takes less than half as long as one by one.
    return jax.jit(jax.grad(loss_of))(inputs, values, data)


def evaluator(compute_loss, data, variables):
    # Without a compiler, a small network takes half a second.
    @jax.jit
    def stateless(values, data):
        mapping = zip(variables, values, strict=True)
        with keras.StatelessScope(mapping, collect_losses=True):
            return compute_loss(*data)

    return lambda: stateless([v.value for v in variables], data)


def write_requests(probes, mask, wanted, bit, assign):
    values = [probe.request.value for probe in probes]
    if not any(isinstance(v, jax.core.Tracer) for v in (wanted, *values)):
        # Outside of a trace, each operation would be compiled by itself.
        values, wanted = jax.device_get((values, wanted))
    # One by one: XLA compiles equal operations once. Those that take a vector
    # of all apart differ.
    for probe, value in zip(probes, values, strict=True):
        request = value.astype("int32") & mask | wanted * bit
        assign(probe.request, request.astype("float32"))


def silence(inputs):
    # They are zeros. Made anew, those of each shape would be compiled.
    return inputs


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


def layout_like(parameters, shape):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    # For each axis what the parameters say of it.
    found = [set() for _ in shape]
    for parameter in parameters:
        sharding = _sharding_of(parameter, distribution)
        rank = len(parameter.shape)
        # Trailing axes that aren't split may be left out.
        names = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
        # From the last axis on.
        for axis in range(1, min(rank, len(shape)) + 1):
            has_axis = shape[-axis] == parameter.shape[-axis]
            found[-axis].add(names[-axis] if has_axis else None)
    axes = [names.pop() if len(names) == 1 else None for names in found]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


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
