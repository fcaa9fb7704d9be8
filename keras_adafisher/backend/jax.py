"""JAX' exceptions: `keras.distribution` spreads variables over devices."""

import keras
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


def layout_like(parameter, shape):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return None
    layout = distribution.get_variable_layout(parameter)
    # `keras.Variable(layout=...)` may have been given one of JAX' own.
    sharding = getattr(layout, "backend_layout", layout)
    axes = [None] * len(shape)
    # From the last axis on. JAX leaves trailing axes out that aren't split.
    rank = len(parameter.shape)
    names = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
    for axis in range(1, min(rank, len(shape)) + 1):
        if shape[-axis] == parameter.shape[-axis]:
            axes[-axis] = names[-axis]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def keep_layout(tensor, variable):
    # Left to itself, the compiler may choose another layout for what a branch
    # of `cond` returns, and gather it behind the branch: on all steps, also on
    # those that don't measure.
    distribution = keras.distribution.distribution()
    if distribution is None:
        return tensor
    layout = distribution.get_variable_layout(variable)
    return keras.distribution.distribute_tensor(tensor, layout)
