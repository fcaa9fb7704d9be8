"""Convolutions."""

import math
from collections.abc import Iterable

import keras
from keras import ops

from keras_adafisher import backend
from keras_adafisher.aliases import Tensor
from keras_adafisher.statistics import channel_mean_square
from keras_adafisher.statistics import patch_mean_square
from keras_adafisher.statistics import rank_one_factors
from keras_adafisher.wrappers.base import ActivationWrapper
from keras_adafisher.wrappers.base import variable_or_none
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.matrix_view import MatrixView
from keras_adafisher.wrappers.registry import register_wrapper


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

    # Those of the first kernel axis. Groups are on the last two.
    takes_slices = True

    def __init__(
        self,
        weight: keras.Variable | None,
        bias: keras.Variable | None,
        channels: int,
        filters: int,
        kernel_size: Iterable[int],
        strides: Iterable[int],
        dilation_rate: Iterable[int],
        padding: str,
        data_format: str,
        groups: int = 1,
    ) -> None:
        super().__init__(weight, bias)
        self.filters = filters
        self.kernel_size = tuple(kernel_size)
        self.strides = tuple(strides)
        self.dilation_rate = tuple(dilation_rate)
        self.padding = padding
        self.channels_first = data_format == "channels_first"
        self.groups = groups
        self.activation_shape = (*kernel_size, channels // groups, groups)
        # The authors' code divides `H`, the 1 of the bias included, by the
        # number of inputs to a filter. That only changes what `epsilon`
        # amounts to.
        self.epsilon_scale = math.prod(self.activation_shape[:-1])
        self.gradient_shape = (filters,)

    def matrix_view(self) -> MatrixView:
        # Filters are ordered by group.
        *inputs, groups = self.activation_shape
        rank = len(inputs)
        return MatrixView(
            (*inputs, groups, self.filters // groups),
            inputs=range(rank),
            outputs=(rank + 1,),
            maps=(rank,),
        )

    def activation_statistic(self, h: Tensor) -> Tensor:
        h = patch_mean_square(
            h,
            self.kernel_size,
            self.strides,
            self.dilation_rate,
            self.padding,
            self.channels_first,
        )
        group_size, groups = self.activation_shape[-2:]
        if groups == 1:
            return h
        # Channels are ordered by group.
        h = backend.reshape(h, (*self.kernel_size, groups, group_size))
        return ops.swapaxes(h, -1, -2)

    def gradient_statistic(self, s: Tensor) -> Tensor:
        return channel_mean_square(s, self.channels_first)

    def estimate_from_gradient(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        # Filters are ordered by group as well.
        groups = self.groups
        activation, gradient = rank_one_factors(
            backend.reshape(gradient, (*self.activation_shape, -1)),
            (*self.activation_shape, 1),
            (groups, self.filters // groups),
        )
        return (
            backend.reshape(activation, self.activation_shape),
            backend.reshape(gradient, self.gradient_shape),
        )

    def operands_of_weight(
        self, activation: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.groups > 1:
            filters_per_group = self.filters // self.groups
            activation = ops.repeat(activation, filters_per_group, axis=-1)
        return activation, gradient


@register_wrapper(keras.layers.Conv1D)
@register_wrapper(keras.layers.Conv2D)
@register_wrapper(keras.layers.Conv3D)
class ConvWrapper(ActivationWrapper):
    """`Conv1D`, `Conv2D` and `Conv3D`."""

    def make_blocks(self):
        layer = self.host
        kernel = layer.kernel
        return [
            ConvBlock(
                variable_or_none(kernel),
                layer.bias,
                channels=kernel.shape[-2] * layer.groups,
                filters=layer.filters,
                kernel_size=layer.kernel_size,
                strides=layer.strides,
                dilation_rate=layer.dilation_rate,
                padding=layer.padding,
                data_format=layer.data_format,
                groups=layer.groups,
            )
        ]
