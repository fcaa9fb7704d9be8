"""Depthwise and separable convolutions."""

from collections.abc import Iterable

import keras
from keras import ops

from keras_adafisher import backend
from keras_adafisher.aliases import Tensor
from keras_adafisher.statistics import channel_mean_square
from keras_adafisher.statistics import patch_mean_square
from keras_adafisher.wrappers.base import ActivationWrapper
from keras_adafisher.wrappers.base import LayerWrapper
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.conv import ConvBlock
from keras_adafisher.wrappers.registry import register_wrapper


class DepthwiseConvBlock(Block):
    """A depthwise convolution of any rank.

    Each input channel has filters of its own:
    `z[.., c, m] = sum_tap h[.. + tap, c] W[tap, c, m] + b[c, m]`. The channel
    is a coordinate of both factors. `H` has an entry for each kernel tap and
    channel, the mean of the square of what that tap reads in that channel,
    over batch and output positions, zeros of the padding included. `S` has an
    entry for each output. Each factor is normalized as one vector over all
    channels. As for a convolution (arXiv 2405.16397, Section 3.1 and
    Appendix A) with as many groups as channels, which is ours.

    Args:
        weight: Variable of shape `(*kernel_size, channels, multiplier)`.
        bias: Variable of shape `(channels * multiplier,)`, or `None`.
        strides, dilation_rate: Tuples of ints, one entry per spatial axis.
        padding: `"valid"` or `"same"`.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    def __init__(
        self,
        weight: keras.Variable,
        bias: keras.Variable | None,
        strides: Iterable[int],
        dilation_rate: Iterable[int],
        padding: str,
        data_format: str,
    ) -> None:
        super().__init__(weight, bias)
        *kernel_size, channels, multiplier = weight.shape
        self.kernel_size = tuple(kernel_size)
        self.strides = tuple(strides)
        self.dilation_rate = tuple(dilation_rate)
        self.padding = padding
        self.channels_first = data_format == "channels_first"
        self.activation_shape = (*kernel_size, channels, 1)
        self.gradient_shape = (channels, multiplier)

    def activation_statistic(self, h: Tensor) -> Tensor:
        h = patch_mean_square(
            h,
            self.kernel_size,
            self.strides,
            self.dilation_rate,
            self.padding,
            self.channels_first,
        )
        return ops.expand_dims(h, -1)

    def gradient_statistic(self, s: Tensor) -> Tensor:
        s = channel_mean_square(s, self.channels_first)
        return backend.reshape(s, self.gradient_shape)

    def operands_of_bias(
        self, bias_input: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        return bias_input, backend.reshape(gradient, (-1,))


@register_wrapper(keras.layers.DepthwiseConv1D)
@register_wrapper(keras.layers.DepthwiseConv2D)
class DepthwiseConvWrapper(ActivationWrapper):
    """`DepthwiseConv1D` and `DepthwiseConv2D`."""

    def make_blocks(self):
        layer = self.host
        return [
            DepthwiseConvBlock(
                layer.kernel,
                layer.bias,
                strides=layer.strides,
                dilation_rate=layer.dilation_rate,
                padding=layer.padding,
                data_format=layer.data_format,
            )
        ]


@register_wrapper(keras.layers.SeparableConv1D)
@register_wrapper(keras.layers.SeparableConv2D)
class SeparableConvWrapper(LayerWrapper):
    """`SeparableConv1D` and `SeparableConv2D`: one block for each kernel.

    The layer is a depthwise convolution without a bias, and a convolution of
    its output with kernels of size 1.
    """

    def make_blocks(self):
        layer = self.host
        ones = (1,) * layer.rank
        *_, channels, filters = layer.pointwise_kernel.shape
        return [
            DepthwiseConvBlock(
                layer.depthwise_kernel,
                None,
                strides=layer.strides,
                dilation_rate=layer.dilation_rate,
                padding=layer.padding,
                data_format=layer.data_format,
            ),
            ConvBlock(
                layer.pointwise_kernel,
                layer.bias,
                channels=channels,
                filters=filters,
                kernel_size=ones,
                strides=ones,
                dilation_rate=ones,
                padding="valid",
                data_format=layer.data_format,
            ),
        ]

    def call(self, inputs):
        # The layer makes one operation of the two, past the place of the
        # first tap.
        layer = self.host
        depthwise = ops.depthwise_conv(
            inputs,
            layer.depthwise_kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
        depthwise = self.tap(depthwise, inputs, 0)
        z = backend.pointwise_conv(
            depthwise,
            layer.pointwise_kernel,
            layer.data_format,
            layer.dilation_rate,
        )
        if layer.use_bias:
            shape = [1] * len(z.shape)
            shape[1 if layer.data_format == "channels_first" else -1] = -1
            z = ops.add(z, ops.reshape(layer.bias, shape))
        return self.activate(self.tap(z, depthwise, 1))
