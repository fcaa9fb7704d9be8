"""What a backend does that needs no exception."""

import contextlib
import math

import numpy as np
from keras import ops

# What to do if no layer has reported anything.
HOW_TO_MEASURE = (
    "In a custom training loop, decorate the step with "
    "`keras_adafisher.training_step(optimizer)`, and differentiate all of "
    "`model.trainable_variables` in it."
)


# What answers are multiplied by on their way: see `probe.py`. 9e-13: a mean
# square of 1e4 adds nothing to a gradient's norm of 1 in float32, and one of
# 1e-25 doesn't vanish yet.
ANSWER_SCALE = 2.0**-40


class AppliedAgain(Exception):
    """An optimizer is applied twice in a step whose condition knows of once."""


class Updater:
    """What `AdaFisher` overrides of `keras.optimizers.Optimizer`."""

    # Not public, but what comes before it, `apply`, has gradients that aren't
    # clipped yet, and what comes after, `update_step`, one of them.
    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._prepare_updates(grads, trainable_variables)
        super()._backend_update_step(grads, trainable_variables, learning_rate)


def make_probe_tensor(size, parameter):
    """Make the tensor in the place of a probe's variable.

    Args:
        size: Int, its length.
        parameter: `keras.Variable` that the probe measures for.

    Returns:
        Tensor, or `None` where a probe is a variable.
    """
    return None


def answer_of(probe, gradients):
    """The gradient of a probe.

    Args:
        probe: `Probe`.
        gradients: Dict from the id of a probe's variable to its gradient.

    Returns:
        Tensor, or `None` if there is none. On PyTorch a list of tensors, the
        parts of the vector.
    """
    answer = gradients.get(id(probe.variable))
    return None if answer is None else ops.convert_to_tensor(answer)


def join_answers(answers):
    """Join answers, one behind the other.

    Args:
        answers: List of what `answer_of` returned, or of vectors.

    Returns:
        Vector.
    """
    return answers[0] if len(answers) == 1 else ops.concatenate(answers)


def request_outside_of_steps(probe):
    """Whether a tap measures where no training step is known to run.

    Args:
        probe: `Probe`.
    """
    return False


def run_step(make_step, inner, optimizers, function, args, kwargs, once):
    """Run a function as a training step.

    Args:
        make_step: Callable that takes the arguments of `Step` behind
            `optimizers`, and makes one.
        inner: List of the AdaFishers that train something, none perhaps.
        optimizers: List of Keras optimizers that are or contain them.
        function: Callable.
        args: Tuple, its arguments.
        kwargs: Dict, its keyword arguments.
        once: Bool. Whether it is decided once whether the step measures.

    Returns:
        What the function returns.
    """
    with make_step():
        return function(*args, **kwargs)


def is_traced(tensor):
    """Whether a tensor has no value yet: a program is made of the step."""
    return False


def has_accelerator():
    """Whether training steps run on something else than a CPU."""
    return False


def differentiate(compute_loss, data, probes, variables):
    """Differentiate a loss with respect to probes, eagerly.

    Args:
        compute_loss: Callable that takes `*data` and returns a scalar tensor.
        data: Tuple of nested tensors.
        probes: List of `Probe`s.
        variables: List of all variables that `compute_loss` reads.

    Returns:
        List with the gradient of each probe, a tensor or `None`. Nothing else
        keeps a gradient.
    """
    raise NotImplementedError("Keras has no operation for this.")


def evaluator(compute_loss, data, variables):
    """A function that computes a loss many times.

    Args:
        compute_loss: See `differentiate`.
        data: See `differentiate`.
        variables: See `differentiate`.

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


def clear_answer(probe):
    """Drop what a backward pass left on a probe."""
    # AutoGraph, which converts what a `tf.function` calls, warns of a function
    # that consists of a docstring.
    return


def step_number(iterations):
    """The optimizer's iteration counter, to compute with."""
    return ops.convert_to_tensor(iterations)


def in_replica():
    """Whether other threads run this code too, each on its own device."""
    return False


def sum_over_replicas(probes, answers, wanted):
    """Sum up the answers of all replicas of a data-parallel step.

    Args:
        probes: List of `Probe`s.
        answers: List with the answer of each of them, a tensor.
        wanted: Bool or boolean tensor. If false, the sums aren't read, and
            nothing needs to be sent.

    Returns:
        A list like `answers`, as if one device had seen the whole batch.
    """
    return answers


def check_same_strategy(variables, state):
    """Raise a `ValueError` if not all variables are on the same devices.

    Args:
        variables: List of the model's variables.
        state: A variable of the optimizer.
    """


def creation_scope(variable):
    """Context in which variables are made that belong to `variable`."""
    return contextlib.nullcontext()


def whole_layout(parameter):
    """Layout of what is whole on each device that has part of a parameter.

    Args:
        parameter: Variable.

    Returns:
        What `keras.Variable` takes as `layout`. `None` if nothing is
        distributed.
    """
    return None


def keep_layout(tensor, variable):
    """`tensor`, laid out over devices like the variable it is meant for."""
    return tensor


def keep_layout_of(tensor, shape, parameters):
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


def one(x):
    """A 1 in a vector of its own, on the device of a tensor `x`."""
    return np.ones(1, "float32")


def tap(z, h, probe, request):
    """An identity in whose backward pass a probe answers.

    Args:
        z, h, probe: See `probe.tap`.
        request: Bool or boolean tensor, whether an answer is wanted.

    Returns:
        `z`.
    """
    raise NotImplementedError("Each backend has its own.")


def view(variable, make, views, name):
    """What a function makes of a variable's value, which it only looks at.

    Args:
        variable: `keras.Variable`.
        make: Callable that takes a tensor and returns a view of it.
        views: Dict, the caller's, in which to keep what stays valid.
        name: String, a key of `views`.
    """
    return make(ops.convert_to_tensor(variable))


def cond(pred, true_fn, false_fn):
    """`keras.ops.cond`. On PyTorch, `pred` is a bool."""
    return ops.cond(pred, true_fn, false_fn)


def mean_square(x, axis):
    """`statistics.mean_square`."""
    # In this form XLA knows it for a sum of squares: on a CPU, one with a
    # factor inside takes up to ten times as long.
    x = ops.square(ops.cast(x, "float32"))
    return ops.mean(x, axis=axis) if axis else x


def mean_squares_of_quotients(gradients, fishers, damping):
    """Means of the squared entries of `gradient / (fisher + damping)`.

    Args:
        gradients: List of float tensors.
        fishers: List of the `FisherDiagonal`s of their parameters.
        damping: Float.

    Returns:
        List of float32 scalars.
    """
    # With the exceptions of the backend that runs.
    from keras_adafisher import backend

    quotients = [
        ops.divide(ops.convert_to_tensor(gradient), fisher() + damping)
        for gradient, fisher in zip(gradients, fishers, strict=True)
    ]
    return [
        backend.mean_square(q, tuple(range(len(q.shape)))) for q in quotients
    ]


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


def precise_matmul(x, y):
    """A product of float32 matrices that isn't rounded to fewer digits."""
    return ops.matmul(x, y)


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


def window_mean(x, axis, kernel_size, stride, dilation, before, outputs):
    """`statistics.window_mean`.

    Args:
        x, axis, kernel_size, stride, dilation: See there.
        before: Int, the padding in front of `x`.
        outputs: Int, the number of output positions.
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
    x = ops.reshape(x, (math.prod(shape[:axis]), size, -1))
    x = ops.matmul(matrix, x)
    return ops.reshape(x, (*shape[:axis], kernel_size, *shape[axis + 1 :]))


def at_least_zero(size):
    """The larger of a size, which may be a tensor, and 0."""
    return max(size, 0) if isinstance(size, int) else ops.maximum(size, 0)
