"""What a layer's backward pass is asked for: mean squares.

Pure functions of tensors. Each returns a float32 tensor, whatever the compute
dtype is, and reads the activations once.
"""

from keras import ops

from keras_adafisher import backend


def mean_square(x, axis):
    """Mean of the squared entries of `x` over some axes.

    Args:
        x: Tensor of any shape and dtype.
        axis: Tuple of ints, the axes to average over.

    Returns:
        Float32 tensor: `x`'s shape without these axes.
    """
    return backend.mean_square(x, axis)


def channel_mean_square(x, channels_first=False):
    """Mean of the squared entries of `x` over all axes but its channels.

    Args:
        x: Tensor of shape `(batch, *positions, channels)`, or
            `(batch, channels, *positions)`.
        channels_first: Bool.

    Returns:
        Float32 tensor of shape `(channels,)`.
    """
    axes = list(range(len(x.shape)))
    axes.pop(1 if channels_first else -1)
    return mean_square(x, axis=tuple(axes))


def rank_one_factors(x, first_shape, second_shape):
    """Two factors whose product has the means of `x²` along its axes.

    If `x²` is a product of two tensors of these shapes, it is the product of
    the factors, up to a constant. The fit is that of Adafactor (Shazeer and
    Stern, 2018, arXiv 1804.04235, Section 3).

    Args:
        x: Tensor.
        first_shape: Tuple of ints that broadcasts to `x.shape`.
        second_shape: Tuple of ints that broadcasts to `x.shape`. Axes that
            both shapes have hold one fit for each of their positions.

    Returns:
        Two float32 tensors, of shapes `first_shape` and `second_shape`.
    """
    x = ops.cast(x, "float32")
    # Scaled, since the square of a small number underflows.
    square = ops.square(x / _one_if_zero(ops.max(ops.abs(x))))
    rank = len(x.shape)
    # As in broadcasting, axes of size 1 are missing on the left.
    first, second = (
        (1,) * (rank - len(shape)) + tuple(shape)
        for shape in (first_shape, second_shape)
    )
    shared = tuple(min(sizes) for sizes in zip(first, second, strict=True))
    root = ops.sqrt(_one_if_zero(_mean_to_shape(square, shared)))
    return (
        ops.reshape(_mean_to_shape(square, first) / root, first_shape),
        ops.reshape(_mean_to_shape(square, second) / root, second_shape),
    )


def patch_mean_square(
    x, kernel_size, strides, dilation_rate, padding, channels_first=False
):
    """Mean square of what each kernel tap of a convolution sees.

    Args:
        x: Tensor, the input of a convolution of any rank.
        kernel_size, strides, dilation_rate: Tuples of ints, one entry per
            spatial axis.
        padding: `"valid"`, `"same"` or `"causal"`.
        channels_first: Bool.

    Returns:
        Float32 tensor of shape `(*kernel_size, channels)`: means over batch
        and output positions, zeros of the padding included.
    """
    if set(kernel_size) == set(strides) == {1}:
        means = channel_mean_square(x, channels_first)
        return backend.reshape(means, (*kernel_size, -1))
    # The batch first: everything after it works on one small map.
    x = mean_square(x, axis=(0,))
    if channels_first:
        x = ops.moveaxis(x, 0, -1)
    windows = zip(kernel_size, strides, dilation_rate, strict=True)
    for axis, (size, stride, dilation) in enumerate(windows):
        x = window_mean(x, axis, size, stride, dilation, padding)
    return x


def window_mean(x, axis, kernel_size, stride, dilation, padding):
    """Mean of what each kernel tap of a convolution sees along one axis.

    Along one spatial axis, tap `i` of a convolution's kernel reads the
    positions `i * dilation + stride * [0, 1, ..., outputs - 1]` of the padded
    input. The mean over a rectangle is a mean of means, so a convolution of
    any rank takes one call of this function per spatial axis. No patch of the
    input is ever built.

    Args:
        x: Float tensor of any shape.
        axis: Int, the spatial axis.
        kernel_size: Int, number of taps.
        stride: Int.
        dilation: Int.
        padding: `"valid"`, `"same"` or `"causal"`, as in Keras' convolutions.
            Positions in the padding count as zeros.

    Returns:
        `x` with `kernel_size` entries along `axis` instead of the positions.
    """
    size = ops.shape(x)[axis]
    reach = (kernel_size - 1) * dilation
    if padding == "valid":
        outputs = (size - reach - 1) // stride + 1
        before = 0
    else:
        outputs = (size + stride - 1) // stride
        needed = (outputs - 1) * stride + reach + 1 - size
        causal = padding == "causal"
        before = reach if causal else _at_least_zero(needed) // 2

    return backend.window_mean(
        x, axis, kernel_size, stride, dilation, before, outputs
    )


def transposed_window_mean(x, axis, kernel_size, stride, dilation, extent):
    """Mean of what each tap of a transposed convolution reads along one axis.

    A transposed convolution moves tap `i` of its kernel from each input
    position `q` to the output position `q * stride + i * dilation - crop`, if
    there is such an output. Seen from an output, the tap reads one input or
    none, which counts as zero.

    Args:
        x: Float tensor of any shape.
        axis: Int, the spatial axis.
        kernel_size: Int, number of taps.
        stride: Int.
        dilation: Int.
        extent: Int, the number of outputs that an input of size 1 has. An
            input of size `n` has `(n - 1) * stride + extent`.

    Returns:
        `x` with `kernel_size` entries along `axis` instead of the positions:
        means over the outputs.
    """
    outputs = (ops.shape(x)[axis] - 1) * stride + extent
    # The taps of one input reach further than its outputs: what exceeds them
    # is cut off, half of it (rounded down) in front.
    reach = (kernel_size - 1) * dilation + 1
    crop = max(reach - extent, 0) // 2

    index = [slice(None)] * len(x.shape)
    taps = []
    for tap in range(kernel_size):
        offset = tap * dilation - crop
        # The inputs whose outputs `offset` would move past an end.
        before = max(-(offset // stride), 0)
        after = max(-((extent - 1 - offset) // stride), 0)
        index[axis] = slice(before, -after or None)
        taps.append(ops.sum(x[tuple(index)], axis=axis))
    return ops.stack(taps, axis=axis) / ops.cast(outputs, x.dtype)


def _mean_to_shape(x, shape):
    """Mean of `x` over the axes that have size 1 in a shape of its rank."""
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    # For PyTorch, no axes are all axes.
    return ops.mean(x, axis=axes, keepdims=True) if axes else x


def _one_if_zero(x):
    return ops.where(x > 0, x, ops.ones_like(x))


def _at_least_zero(size):
    """The larger of a size, which may be a tensor, and 0."""
    return max(size, 0) if isinstance(size, int) else ops.maximum(size, 0)
