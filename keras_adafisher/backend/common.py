"""What a backend does that needs no exception."""

import contextlib
import math

import numpy as np
from keras import ops


class Updater:
    """What `AdaFisher` overrides of `keras.optimizers.Optimizer`."""

    # Not public, but what comes before it, `apply`, has gradients that aren't
    # clipped yet, and what comes after, `update_step`, one of them.
    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._prepare_updates(grads, trainable_variables)
        super()._backend_update_step(grads, trainable_variables, learning_rate)


def make_inputs(parameter, add_variable, shapes):
    """Make what a tap takes besides the layer's tensors.

    Args:
        parameter: `keras.Variable`, one of the layer's.
        add_variable: Callable `(name, shape)`, which makes a variable of the
            layer's wrapper.
        shapes: Dict from name to shape.

    Returns:
        List of these inputs, and of those that are variables.
    """
    variables = [add_variable(name, shape) for name, shape in shapes.items()]
    return variables, variables


def gradients_of(probe, gradients):
    """The gradients of a probe's inputs, each a tensor or `None`.

    Args:
        probe: `Probe`.
        gradients: Dict from the id of a variable to its gradient.
    """
    return [gradients.get(id(variable)) for variable in probe.variables]


def differentiate(compute_loss, data, probes, variables):
    """Differentiate a loss with respect to the inputs of probes, eagerly.

    Args:
        compute_loss: Callable that takes `*data` and returns a scalar tensor.
        data: Tuple of nested tensors.
        probes: List of `Probe`s.
        variables: List of all variables that `compute_loss` reads.

    Returns:
        List with the gradients of each probe's `inputs`, each a tensor or
        `None`. Nothing else keeps a gradient.
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


def has_answers(probes):
    """Whether any of the probes got gradients at all, as far as one can see."""
    return True


def drop_stale_answer(probe):
    """Called in a backward pass, before a probe answers."""


def open_tap(probe):
    """Get a probe ready for a forward pass.

    Returns:
        Bool. Whether its tap has to be part of that. A traced step is compiled
        once, for measuring and other steps alike.
    """
    return True


def close_tap(probe):
    """Drop what `open_tap` or a backward pass left on a probe."""
    # AutoGraph, which converts what a `tf.function` calls, warns of a function
    # that consists of a docstring.
    return


def is_requested(request):
    """Whether a probe's answer is wanted, as `ops.cond` takes it."""
    return request > 0


def silence(inputs):
    """What a probe answers if its answer isn't wanted.

    Args:
        inputs: List of those of a probe's inputs whose gradients the answer is.

    Returns:
        List of zeros of their shapes.
    """
    return [ops.zeros(tensor.shape, "float32") for tensor in inputs]


def measures_activations_early():
    """Whether a tap measures `h` in the forward pass, not in the backward pass.

    Then the backward pass doesn't keep `h` alive for it: a compiler may have
    it there in another form only.
    """
    return True


def write_requests(probes, mask, wanted, bit, assign):
    """Write some bits of requests, and leave the others.

    Args:
        probes: List of `Probe`s.
        mask: Int, the bits to leave.
        wanted: What a comparison with `step_number()` gives.
        bit: Int, the bit to set if `wanted`.
        assign: Callable `(variable, value)`.
    """
    requests = ops.stack([probe.request.value for probe in probes])
    requests = ops.bitwise_and(ops.cast(requests, "int32"), mask)
    requests = ops.cast(requests + ops.cast(wanted, "int32") * bit, "float32")
    for probe, request in zip(probes, ops.unstack(requests), strict=True):
        assign(probe.request, request)


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
        answers: List with the gradients of each probe's `inputs`.
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


def layout_like(parameters, shape):
    """Layout over devices of what is used together with parameters.

    Args:
        parameters: List of variables.
        shape: Tuple of ints.

    Returns:
        What `keras.Variable` takes as `layout`: an axis is split as those
        axes of the parameters are that it meets in broadcasting, if they have
        its size and agree. `None` if nothing is distributed.
    """
    return None


def whole_layout(parameter):
    """Layout of what is whole on each device that has part of a parameter.

    Args:
        parameter: Variable.

    Returns:
        See `layout_like`.
    """
    return None


def keep_layout(tensor, variable):
    """`tensor`, laid out over devices like the variable it is meant for."""
    return tensor


def constant(values, dtype):
    """What a traced function takes as a constant.

    Args:
        values: Nested list of numbers.
        dtype: String.
    """
    return np.array(values, dtype)


def tap(z, h, probe, default):
    """`probe.tap`, once the probe is ready.

    Args:
        z, h, probe: See there.
        default: Callable that takes these, the tap by operations of Keras.
    """
    return default(z, h, probe)


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
    """`keras.ops.cond`. `pred` is a bool where `is_requested` returns one."""
    return ops.cond(pred, true_fn, false_fn)


def mean_square(x, axis):
    """`statistics.mean_square`."""
    # In this form XLA knows it for a sum of squares: on a CPU, one with a
    # factor inside takes up to ten times as long.
    x = ops.square(ops.cast(x, "float32"))
    return ops.mean(x, axis=axis) if axis else x


def mean_square_of_quotient(gradient, fisher, damping):
    """Mean of the squared entries of `gradient / (fisher + damping)`.

    Args:
        gradient: Float tensor.
        fisher: `FisherDiagonal` of the parameter.
        damping: Float.

    Returns:
        Float32 scalar.
    """
    # With the exceptions of the backend that runs.
    from keras_adafisher import backend

    quotient = ops.divide(gradient, fisher() + damping)
    return backend.mean_square(quotient, tuple(range(len(quotient.shape))))


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


def reshape(x, shape):
    """`keras.ops.reshape`, of what isn't symbolic."""
    return x if tuple(x.shape) == tuple(shape) else ops.reshape(x, shape)


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
