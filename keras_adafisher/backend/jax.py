"""JAX' exceptions: `keras.distribution` spreads variables over devices."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from keras_adafisher.backend import common

__all__ = [
    "broadcast_layout",
    "constrain_layout",
    "entry",
    "evaluator",
    "half_precision",
    "has_accelerator",
    "is_traced",
    "part",
    "precise_matmul",
    "replicated_layout",
    "sum_min_max",
    "take",
    "unshare",
    "window_mean",
]


def evaluator(compute_loss, data, variables):
    # Without a compiler, a small network takes half a second.
    @jax.jit
    def stateless(values, data):
        mapping = zip(variables, values, strict=True)
        with keras.StatelessScope(mapping, collect_losses=True):
            return compute_loss(*data)

    return lambda: stateless([v.value for v in variables], data)


def is_traced(tensor):
    return isinstance(tensor, jax.core.Tracer)


def has_accelerator():
    return jax.default_backend() != "cpu"


def half_precision():
    # A TPU multiplies in no other dtype of two bytes.
    halves = {"cpu": None, "tpu": "bfloat16"}
    return halves.get(jax.default_backend(), "float16")


def window_mean(*args):
    # Accelerators multiply in less than single precision if they may.
    with jax.default_matmul_precision("highest"):
        # With one matrix for all, XLA brings the axes of the others into
        # another order and back: two kernels for each shape.
        return common.window_mean(*args, repeats_matrix=True)


def nearly_zeros(shape):
    """A constant that is as good as zeros.

    Of one whose entries are all equal, XLA makes a kernel that fills memory,
    one more to compile for each size. Others are in the program.

    Args:
        shape: Int or tuple of one int.
    """
    values = np.zeros(shape, "float32")
    values[:1] = np.finfo("float32").tiny
    return values


def part(vector, start, size):
    if has_accelerator():
        # Starting a kernel takes time there, and a slice needs none of its own.
        return jax.lax.slice_in_dim(vector, start, start + size)
    # XLA compiles equal kernels once. A slice is part of the kernel that reads
    # it, and makes that another one for each parameter; indices are an operand.
    index = np.arange(start, start + size)
    if size == 1:
        # One number only, or equal ones, would become part of the kernel too.
        index = np.append(index, 0 if start else len(vector) - 1)
    found = _gather(vector, index)
    return found[:1] if size == 1 else found


def _gather(vector, index):
    # What `vector[index]` comes down to. JAX' indexing takes some hundred
    # lines to find that out, hundreds of times in a large model.
    return jax.lax.gather(
        vector,
        index[:, None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,)
        ),
        slice_sizes=(1,),
        mode="promise_in_bounds",
    )


def precise_matmul(x, y):
    # On a GPU or a TPU, the default rounds what is multiplied to 10 or 8 bits.
    return jnp.matmul(x, y, precision="highest")


def entry(vector, index):
    return part(vector, index, 1)[0]


def take(x, indices):
    # Keras' own makes floats of them if `floatx` is "bfloat16".
    return jnp.asarray(x).at[indices].get(mode="promise_in_bounds")


def unshare(variable):
    # Assigning one variable to another leaves both with one array. A compiled
    # step overwrites its arguments, and can't take the same one twice. After an
    # error in a step, there may be no array any more.
    if is_traced(variable.value) or not variable.value.is_deleted():
        variable.assign(jnp.copy(variable.value))


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


def broadcast_layout(tensor, shape, parameters):
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


def replicated_layout(parameter):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    mesh = _sharding_of(parameter, distribution).mesh
    return NamedSharding(mesh, PartitionSpec())


def _sharding_of(variable, distribution):
    layout = distribution.get_variable_layout(variable)
    # `keras.Variable(layout=...)` may have been given one of JAX' own.
    return getattr(layout, "backend_layout", layout)


def constrain_layout(tensor, variable):
    # Left to itself, the compiler may choose another layout for what a branch
    # of `cond` returns, and gather it behind the branch: on all steps, also on
    # those that don't measure.
    distribution = keras.distribution.distribution()
    if distribution is None:
        return tensor
    layout = distribution.get_variable_layout(variable)
    return keras.distribution.distribute_tensor(tensor, layout)
