"""TensorFlow's exceptions: `tf.distribute` makes its replicas visible."""

import contextlib

import tensorflow as tf
from keras import ops

from keras_adafisher.backend import common

__all__ = [
    "check_same_strategy",
    "creation_scope",
    "entries",
    "half_precision",
    "has_accelerator",
    "is_traced",
    "mark_negatives",
    "mean_square",
    "pointwise_conv",
    "read_parts",
    "step_number",
]


def is_traced(tensor):
    return not tf.executing_eagerly()


def has_accelerator():
    return any(map(tf.config.list_logical_devices, ("GPU", "TPU")))


def half_precision():
    if tf.config.list_logical_devices("TPU"):
        # It multiplies in no other dtype of two bytes.
        return "bfloat16"
    return "float16" if has_accelerator() else None


def step_number(iterations):
    # `ops.convert_to_tensor` returns a variable as it is here, and it would be
    # read where the number is used, after the counter has moved on.
    return tf.convert_to_tensor(iterations.value)


def mark_negatives(x):
    # `tf.debugging.enable_check_numerics()` stops at a constant that isn't
    # finite, wherever it is used.
    return x / tf.cast(x >= 0, x.dtype)


# Without XLA, operations run one by one: one that cuts a vector into all of its
# parts takes less than one for each.
def entries(vector):
    return tf.unstack(vector)


def read_parts(variable, sizes):
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        # Each replica reads its own copy.
        return None
    return tf.split(tf.convert_to_tensor(variable.value), sizes)


def in_replica():
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync > 1


def check_same_strategy(variables, state):
    own = _strategy_of(state)
    for variable in variables:
        if _strategy_of(variable) is not own:
            raise _wrong_scope(variable, f"optimizer with strategy={own}")


def creation_scope(variable):
    # What is made outside the scope of a model's strategy isn't mirrored.
    strategy = _strategy_of(variable)
    current = tf.distribute.get_strategy()
    # In a model that is built while it is traced, variables come later.
    exists = isinstance(variable.value, tf.Variable)
    if exists and strategy is None and current.num_replicas_in_sync > 1:
        raise _wrong_scope(variable, f"scope of strategy={current}")
    if strategy is None or strategy is current:
        return contextlib.nullcontext()
    return strategy.scope()


def _strategy_of(variable):
    value = variable if isinstance(variable, tf.Variable) else variable.value
    return getattr(value, "distribute_strategy", None)


def _wrong_scope(variable, other):
    return ValueError(
        "A model and its optimizer must be created in the scope of the same "
        "`tf.distribute` strategy. Create both, and call `compile` or "
        "`keras_adafisher.wrap`, inside `with strategy.scope():`. "
        f"Received: variable '{getattr(variable, 'path', variable.name)}' with "
        f"strategy={_strategy_of(variable)}, {other}"
    )


def mean_square(x, axis):
    if not x.shape.rank or len(axis) < x.shape.rank:
        # A Euclidean norm would need no tensor of squares, but XLA has none.
        return common.mean_square(x, axis)
    # Without a tensor of squares.
    size = tf.cast(tf.size(x), "float32")
    return tf.nn.l2_loss(tf.cast(x, "float32")) * (2 / size)


def pointwise_conv(x, kernel, data_format, dilation_rate):
    # TensorFlow's convolutions take no channels-first tensors on the CPU, but
    # Keras' `separable_conv` does.
    if data_format == "channels_last" or tf.config.list_logical_devices("GPU"):
        return ops.conv(x, kernel, data_format=data_format)
    x = ops.moveaxis(x, 1, -1)
    x = ops.conv(x, kernel, data_format="channels_last")
    return ops.moveaxis(x, -1, 1)
