"""What a backend does that needs no exception.

Numerics, conditions, and how variables are laid out over devices. The list
below is all that code for every backend uses of `backend`. A file beside this
one has a list of what its backend does differently, and perhaps functions for
other code of that backend.
"""

import contextlib
import itertools
import math

import numpy as np
from keras import ops

# Not public, but there is no other way to tell: in a stateless call, another
# tensor stands for a variable's.
from keras.src.backend.common.stateless_scope import in_stateless_scope

__all__ = [
    "at_least",
    "broadcast_layout",
    "check_same_strategy",
    "cond",
    "constant",
    "constrain_layout",
    "count_ids",
    "creation_scope",
    "entries",
    "entry",
    "evaluator",
    "filled",
    "half_matmul",
    "half_precision",
    "has_accelerator",
    "initializer",
    "is_traced",
    "keep_random_state",
    "lerp",
    "lerp_each",
    "mark_negatives",
    "mean_square",
    "own_tensor",
    "part",
    "pointwise_conv",
    "precise_matmul",
    "quadratic",
    "read_parts",
    "replicated_layout",
    "reshape",
    "split",
    "stack",
    "step_number",
    "sum_min_max",
    "take",
    "unshare",
    "view",
    "window_mean",
]


def own_tensor(variable):
    """The tensor of a variable, or the one of a stateless call.

    While a layer runs, `variable.value` is a copy in the dtype that the layer
    computes in. And reading it asks for several settings of Keras, which takes
    Python time.
    """
    return variable.value if in_stateless_scope() else variable._value


def is_traced(tensor):
    """Whether a tensor has no value yet: a program is made of the step."""
    return False


def has_accelerator():
    """Whether training steps run on something else than a CPU."""
    return False


def half_precision():
    """The dtype of two bytes for products of matrices, if one is worth it.

    Returns:
        String, the one with the most digits among those that are many times as
        fast as single precision. `None` if there is none.
    """
    return None


def evaluator(compute_loss, data, variables):
    """A function that computes a loss many times.

    Args:
        compute_loss: Callable that takes `*data` and returns a scalar tensor.
        data: Tuple of nested tensors.
        variables: List of all variables that `compute_loss` reads.

    Returns:
        Callable without arguments that returns the loss for the present values
        of the variables.
    """
    return lambda: compute_loss(*data)


def keep_random_state():
    """Context after which random numbers go on as if nothing was drawn.

    As far as the backend has a state of its own: layers keep theirs in
    variables.
    """
    return contextlib.nullcontext()


def step_number(iterations):
    """The optimizer's iteration counter, to compute with."""
    return ops.convert_to_tensor(iterations)


def initializer(number):
    """What makes the first value of a variable that all entries share.

    On JAX, Keras' own compile a program for each shape, and so does an array of
    NumPy's that is made a tensor without a dtype, as `keras.Variable` does it.

    Args:
        number: Float, the value of all entries.

    Returns:
        Callable that takes a shape and a dtype.
    """

    def initialize(shape, dtype="float32"):
        return ops.convert_to_tensor(np.full(shape, number, dtype), dtype)

    return initialize


def check_same_strategy(variables, state):
    """Raise a `ValueError` if not all variables are on the same devices.

    Args:
        variables: List of the model's variables.
        state: A variable of the optimizer.
    """


def creation_scope(variable):
    """Context in which variables are made that belong to `variable`."""
    return contextlib.nullcontext()


def replicated_layout(parameter):
    """Layout of what is whole on each device that has part of a parameter.

    Args:
        parameter: Variable.

    Returns:
        What `keras.Variable` takes as `layout`. `None` if nothing is
        distributed.
    """
    return None


def constrain_layout(tensor, variable):
    """`tensor`, laid out over devices like the variable it is meant for."""
    return tensor


def broadcast_layout(tensor, shape, parameters):
    """`tensor`, laid out over devices like parameters that it belongs to.

    Args:
        tensor: Tensor.
        shape: Tuple, the shape with which it broadcasts to the parameters. It
            isn't brought into it where nothing is distributed.
        parameters: List of variables. An axis of the tensor is split as those
            axes of theirs are that it meets in broadcasting, if they have its
            size and agree.
    """
    return tensor


def constant(values, dtype):
    """What a traced function takes as a constant.

    Args:
        values: Nested list of numbers.
        dtype: String.
    """
    return np.array(values, dtype)


def view(variable, make, views, name):
    """What a function makes of a variable's value, which it only looks at.

    Args:
        variable: `keras.Variable`.
        make: Callable that takes a tensor and returns a view of it, or a tuple
            of views.
        views: Dict, the caller's, in which to keep what stays valid.
        name: String, a key of `views`.
    """
    return make(ops.convert_to_tensor(variable))


def split(x, lengths):
    """Cut a tensor along its first axis.

    Args:
        x: Tensor.
        lengths: List of ints that add up to that axis' length.

    Returns:
        Sequence of tensors.
    """
    ends = itertools.accumulate(lengths)
    return [
        x[end - length : end] for end, length in zip(ends, lengths, strict=True)
    ]


def unshare(variable):
    """Make sure that no other variable has the same array as its value.

    A no-op where assigning copies.
    """


def cond(pred, true_fn, false_fn):
    """`keras.ops.cond`. On PyTorch, `pred` is a bool."""
    return ops.cond(pred, true_fn, false_fn)


def mean_square(x, axis):
    """`statistics.mean_square`."""
    # In this form XLA knows it for a sum of squares: on a CPU, one with a
    # factor inside takes up to ten times as long.
    x = ops.square(ops.cast(x, "float32"))
    return ops.mean(x, axis=axis) if axis else x


def sum_min_max(x, low, high):
    """Sums of rows of `x`, minima of those of `low`, maxima of those of `high`.

    Args:
        x, low, high: Matrices of one shape.
    """
    return ops.sum(x, axis=1), ops.min(low, axis=1), ops.max(high, axis=1)


def pointwise_conv(x, kernel, data_format, dilation_rate):
    """The second half of `keras.ops.separable_conv`.

    Args:
        x: Tensor of shape `(batch, *positions, channels)` or, with
            `data_format="channels_first"`, `(batch, channels, *positions)`.
        kernel: Tensor of shape `(1, ..., 1, channels, filters)`.
        data_format: String.
        dilation_rate: Tuple of ints, that of the whole operation. It means
            nothing for kernels of size 1, but Keras passes it on, and PyTorch
            chooses an algorithm by it, which shows in the last bit.

    Returns:
        A tensor like `x` with `filters` channels.
    """
    return ops.conv(
        x, kernel, data_format=data_format, dilation_rate=dilation_rate
    )


# `keras.ops` takes numbers too. But on PyTorch it makes tensors of them, and a
# GPU that gets one is waited for.
def at_least(x, number):
    """The larger of each entry of a tensor and a number."""
    return ops.maximum(x, number)


def filled(x, condition, number):
    """A tensor, with a number in its place where a condition holds."""
    return ops.where(condition, number, x)


def mark_negatives(x):
    """A tensor in which what is negative isn't finite."""
    return filled(x, x < 0, np.float32(np.nan))


def lerp(x, y, weight):
    """`x + (y - x) * weight`, of two tensors and a number."""
    return x + (y - x) * weight


def lerp_each(xs, ys, weight):
    """`lerp` of the tensors of two lists. On PyTorch, at once."""
    return [lerp(x, y, weight) for x, y in zip(xs, ys, strict=True)]


def precise_matmul(x, y):
    """A product of float32 matrices that isn't rounded to fewer digits."""
    return ops.matmul(x, y)


def half_matmul(x, y):
    """A product of matrices in half precision."""
    return ops.matmul(x, y)


def quadratic(x, coefficients, matmul):
    """A polynomial of matrices, `a I + b X + c X²`.

    Args:
        x: Float tensor of shape `(count, m, m)`.
        coefficients: Tuple of three floats, `a`, `b` and `c`.
        matmul: `precise_matmul` or `half_matmul`.

    Returns:
        A tensor like it.
    """
    a, b, c = coefficients
    identity = ops.eye(x.shape[-1], dtype=x.dtype)
    return a * identity + b * x + c * matmul(x, x)


def reshape(x, shape):
    """`keras.ops.reshape`, of what isn't symbolic."""
    return x if tuple(x.shape) == tuple(shape) else ops.reshape(x, shape)


def stack(scalars):
    """`keras.ops.stack`, of scalar tensors."""
    return ops.stack(scalars)


def part(vector, start, size):
    """Neighbouring entries of a vector.

    Args:
        vector: Tensor of one axis.
        start: Int.
        size: Int.
    """
    return vector[start : start + size]


def entry(vector, index):
    """One entry of a vector, a scalar."""
    return vector[index]


def entries(vector):
    """What `entry` reads the entries of a vector from, if all are read."""
    return vector


def read_parts(variable, sizes):
    """The value of a variable, read once and cut, if that takes less.

    Args:
        variable: `keras.Variable` of one axis.
        sizes: List of ints, the sizes of its parts.

    Returns:
        List of tensors. `None` if reading each part by itself takes less.
    """
    return None


def take(x, indices):
    """`keras.ops.take`, along the first axis, of indices that are in range."""
    return ops.take(x, indices, axis=0)


def count_ids(ids, size):
    """How often each id from 0 to `size - 1` occurs. Others don't count.

    Args:
        ids: Tensor of integers, of one axis.
        size: Int.

    Returns:
        Float32 tensor of shape `(size,)`.
    """
    # Backends differ in what they do with an id that is out of range.
    is_valid = ops.logical_and(ids >= 0, ids < size)
    return ops.segment_sum(
        ops.cast(is_valid, "float32"),
        ops.where(is_valid, ids, ops.zeros_like(ids)),
        num_segments=size,
    )


def window_mean(
    x,
    axis,
    kernel_size,
    stride,
    dilation,
    before,
    outputs,
    repeats_matrix=False,
):
    """`statistics.window_mean`.

    Args:
        x, axis, kernel_size, stride, dilation: See there.
        before: Int, the padding in front of `x`.
        outputs: Int, the number of output positions.
        repeats_matrix: Bool. Whether two stacks of matrices are multiplied,
            one of them of copies, and not a matrix and a stack. Defaults to
            `False`.
    """
    # Which position each tap reads at each output, as a matrix: a product is
    # one operation, slices and sums are two for each tap.
    shape = ops.shape(x)
    size = shape[axis]
    positions = np.arange(size) if isinstance(size, int) else ops.arange(size)
    taps = dilation * np.arange(kernel_size)[:, None]
    starts = positions + before - taps
    is_read = (starts % stride == 0) & (starts >= 0)
    is_read = is_read & (starts < outputs * stride)
    matrix = ops.cast(is_read, x.dtype) / ops.cast(outputs, x.dtype)
    count = math.prod(shape[:axis])
    x = ops.reshape(x, (count, size, -1))
    if repeats_matrix:
        matrix = ops.broadcast_to(matrix, (count, *matrix.shape))
    x = ops.matmul(matrix, x)
    return ops.reshape(x, (*shape[:axis], kernel_size, *shape[axis + 1 :]))
