"""Kronecker-factored blocks: one for each linear map inside a layer.

A block answers what has to be known about a map `z = W h + b` to factor its
Fisher information: the shapes of the two factors, how they are measured from
`h` and from `s = dL/dz`, how a measurement is normalized, and how the factors
make up the Fisher diagonal of the weight and of the bias.
"""

import math

from keras import ops

from keras_adafisher import factors
from keras_adafisher.statistics import mean_square
from keras_adafisher.statistics import window_mean


class Block:
    """One map `z = W h + b` with Kronecker factors `H` and `S`.

    Subclasses set `activation_shape` and `gradient_shape` and override
    `activation_statistic` and `gradient_statistic`.

    Args:
        weight: `keras.Variable`, `W`. `None` if the map has none.
        bias: `keras.Variable`, `b`. `None` if the map has none.

    Attributes:
        activation_shape: Shape of `H`.
        gradient_shape: Shape of `S`.

    """

    activation_shape = ()
    gradient_shape = ()

    def __init__(self, weight, bias=None):
        self.weight = weight
        self.bias = bias

    @property
    def parameters(self):
        """The variables that this block factors."""
        return [v for v in (self.weight, self.bias) if v is not None]

    def activation_statistic(self, h):
        """Mean of `h²` over batch and positions, per input coordinate.

        Args:
            h: The activations that enter the map.

        Returns:
            Float32 tensor of shape `activation_shape`.

        """
        raise NotImplementedError(
            f"{self.__class__.__name__} must override `activation_statistic()`."
        )

    def gradient_statistic(self, s):
        """Mean of `s²` over batch and positions, per output coordinate.

        Args:
            s: The gradient of the loss at the map's output.

        Returns:
            Float32 tensor of shape `gradient_shape`.

        """
        raise NotImplementedError(
            f"{self.__class__.__name__} must override `gradient_statistic()`."
        )

    def normalize_activation(self, statistic, epsilon):
        """Normalize a measured `H` and the entry 1 that belongs to the bias.

        Args:
            statistic: Tensor of shape `activation_shape`.
            epsilon: Float, see `factors.min_max`.

        Returns:
            A tensor like `statistic` and a scalar tensor.

        """
        if self.bias is None:
            return factors.min_max(statistic, epsilon), ops.ones(())
        return factors.min_max_with_one(statistic, epsilon)

    def fisher_of_weight(self, activation, gradient):
        """The Fisher diagonal of the weight, undamped.

        Args:
            activation: Tensor of shape `activation_shape`, the running `H`.
            gradient: Tensor of shape `gradient_shape`, the running `S`.

        Returns:
            Tensor that broadcasts to the weight's shape.

        """
        return activation * gradient

    def fisher_of_bias(self, one, gradient):
        """The Fisher diagonal of the bias, undamped.

        Args:
            one: Scalar tensor, the running factor of the input that is 1.
            gradient: Tensor of shape `gradient_shape`, the running `S`.

        Returns:
            Tensor that broadcasts to the bias' shape.

        """
        return one * gradient


class DenseBlock(Block):
    """`z[..., o] = sum_i h[..., i] W[i, o] + b[o]`.

    `H[i]` is the mean of `h²` and `S[o]` the mean of `s²` over all axes but
    the last: arXiv 2405.16397, Section 3.1.

    Args:
        weight: Variable of shape `(inputs, outputs)`. `None` if it doesn't
            train: then only the bias is factored.
        bias: Variable of shape `(outputs,)`, or `None`.
        inputs: Int, number of input coordinates.
        outputs: Int, number of output coordinates.

    """

    def __init__(self, weight, bias, inputs, outputs):
        super().__init__(weight, bias)
        self.activation_shape = (inputs, 1)
        self.gradient_shape = (outputs,)

    def activation_statistic(self, h):
        h = mean_square(h, axis=tuple(range(len(h.shape) - 1)))
        return ops.reshape(h, self.activation_shape)

    def gradient_statistic(self, s):
        return mean_square(s, axis=tuple(range(len(s.shape) - 1)))


class ConvBlock(Block):
    """A convolution of any rank, as a dense map of its patches.

    `H` has an entry for each kernel tap and input channel: the mean of the
    square of what that tap reads, over batch and output positions, zeros of
    the padding included. `S` has an entry for each filter. With groups, a
    filter sees only the input channels of its own group, so `H` has a last
    axis for the group. arXiv 2405.16397, Section 3.1 and Appendix A; groups
    are ours.

    Args:
        weight: Variable of shape `(*kernel_size, channels / groups, filters)`.
            `None` if it doesn't train.
        bias: Variable of shape `(filters,)`, or `None`.
        channels: Int, number of input channels.
        filters: Int, number of output channels.
        kernel_size, strides, dilation_rate: Tuples of ints, one entry per
            spatial axis.
        padding: `"valid"`, `"same"` or `"causal"`.
        data_format: `"channels_last"` or `"channels_first"`.
        groups: Int.

    """

    def __init__(
        self,
        weight,
        bias,
        channels,
        filters,
        kernel_size,
        strides,
        dilation_rate,
        padding,
        data_format,
        groups=1,
    ):
        super().__init__(weight, bias)
        self.filters = filters
        self.kernel_size = tuple(kernel_size)
        self.strides = tuple(strides)
        self.dilation_rate = tuple(dilation_rate)
        self.padding = padding
        self.channels_first = data_format == "channels_first"
        self.groups = groups
        self.activation_shape = (*kernel_size, channels // groups, groups)
        self.gradient_shape = (filters,)

    def activation_statistic(self, h):
        # The batch first: everything after it works on one small map.
        h = mean_square(h, axis=0)
        if self.channels_first:
            h = ops.moveaxis(h, 0, -1)
        windows = zip(
            self.kernel_size, self.strides, self.dilation_rate, strict=True
        )
        for axis, (size, stride, dilation) in enumerate(windows):
            h = window_mean(h, axis, size, stride, dilation, self.padding)
        # Channels are ordered by group.
        group_size, groups = self.activation_shape[-2:]
        h = ops.reshape(h, (*self.kernel_size, groups, group_size))
        return ops.swapaxes(h, -1, -2)

    def gradient_statistic(self, s):
        axes = list(range(len(s.shape)))
        axes.pop(1 if self.channels_first else -1)
        return mean_square(s, axis=tuple(axes))

    def normalize_activation(self, statistic, epsilon):
        # The authors' code divides a convolution's `H`, the 1 of the bias
        # included, by the number of inputs to a filter. That only changes
        # what `epsilon` amounts to.
        inputs = math.prod(self.activation_shape[:-1])
        return super().normalize_activation(statistic, epsilon * inputs)

    def fisher_of_weight(self, activation, gradient):
        if self.groups > 1:
            filters_per_group = self.filters // self.groups
            activation = ops.repeat(activation, filters_per_group, axis=-1)
        return activation * gradient


class ScaleBlock(Block):
    """`z = h * W + b`, elementwise: the scale and shift of a normalization.

    `H` and `S` have the parameters' shape: the means of `h²` and `s²` over
    all other axes. `H` of the shift is 1. arXiv 2405.16397, Proposition 3.1.

    Args:
        weight: Variable, or `None`.
        bias: Variable of the same shape, or `None`.
        axis: Tuple of ints, the axes of `h` that the parameters have.
        shape: Tuple of ints, the parameters' shape.

    """

    def __init__(self, weight, bias, axis, shape):
        super().__init__(weight, bias)
        self.axis = tuple(axis)
        self.activation_shape = tuple(shape)
        self.gradient_shape = tuple(shape)

    def activation_statistic(self, h):
        rank = len(h.shape)
        kept = {axis % rank for axis in self.axis}
        others = tuple(axis for axis in range(rank) if axis not in kept)
        return ops.reshape(mean_square(h, axis=others), self.activation_shape)

    def gradient_statistic(self, s):
        return self.activation_statistic(s)

    def normalize_activation(self, statistic, epsilon):
        # Scale and shift are factored apart, so 1 isn't part of the vector.
        return factors.min_max(statistic, epsilon), ops.ones(())
