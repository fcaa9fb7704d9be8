"""Transposed convolutions."""

from collections.abc import Iterable

import keras
from keras import ops

from keras_adafisher import backend
from keras_adafisher.aliases import Tensor
from keras_adafisher.statistics import channel_mean_square
from keras_adafisher.statistics import mean_square
from keras_adafisher.statistics import transposed_window_mean
from keras_adafisher.wrappers.base import ActivationWrapper
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.matrix_view import MatrixView
from keras_adafisher.wrappers.registry import register_wrapper


class ConvTransposeBlock(Block):
    """A transposed convolution of any rank, as a dense map of its patches.

    Along each axis, kernel tap `i` carries input position `q` to output
    position `p = q * stride + i * dilation - crop`:

        z[p, o] = sum_{i, c} patch[p, i, c] W[i, o, c] + b[o]

    where `patch[p, i, c]` is `h[q, c]` if there is such a `q`, else 0. So the
    examples are the output positions, as in a convolution, and the layer is a
    convolution of its input with zeros between the entries.

    `H` has an entry for each kernel tap and input channel: the mean of
    `patch²` over batch and output positions, zeros included. `S` has an entry
    for each filter: the mean of `s²` over batch and output positions. The
    bias is the weight of an input 1 to every example, so zeros belong to the
    mean: without them, `H` and the bias' 1 would count different examples.

    Ours, after the convolutions of arXiv 2405.16397, Section 3.1 and
    Appendix A.

    Args:
        weight: Variable of shape `(*kernel_size, filters, channels)`.
        bias: Variable of shape `(filters,)`, or `None`.
        strides, dilation_rate: Tuples of ints, one entry per spatial axis.
        extents: Tuple of ints: along each spatial axis, the number of outputs
            that an input of size 1 has. `padding` and `output_padding` are in
            this number.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    def __init__(
        self,
        weight: keras.Variable,
        bias: keras.Variable | None,
        strides: Iterable[int],
        dilation_rate: Iterable[int],
        extents: Iterable[int],
        data_format: str,
    ) -> None:
        super().__init__(weight, bias)
        *kernel_size, filters, channels = weight.shape
        self.kernel_size = tuple(kernel_size)
        self.strides = tuple(strides)
        self.dilation_rate = tuple(dilation_rate)
        self.extents = tuple(extents)
        self.channels_first = data_format == "channels_first"
        self.activation_shape = (*kernel_size, 1, channels)
        self.gradient_shape = (filters, 1)

    def matrix_view(self) -> MatrixView:
        *kernel_size, _, channels = self.activation_shape
        taps = len(kernel_size)
        return MatrixView(
            (*kernel_size, self.gradient_shape[0], channels),
            inputs=(*range(taps), taps + 1),
            outputs=(taps,),
        )

    def activation_statistic(self, h: Tensor) -> Tensor:
        h = mean_square(h, axis=(0,))
        if self.channels_first:
            h = ops.moveaxis(h, 0, -1)
        windows = zip(
            self.kernel_size,
            self.strides,
            self.dilation_rate,
            self.extents,
            strict=True,
        )
        for axis, window in enumerate(windows):
            h = transposed_window_mean(h, axis, *window)
        return ops.expand_dims(h, -2)

    def gradient_statistic(self, s: Tensor) -> Tensor:
        s = channel_mean_square(s, self.channels_first)
        return backend.reshape(s, self.gradient_shape)

    def operands_of_bias(
        self, bias_input: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        return bias_input, backend.reshape(gradient, (-1,))


@register_wrapper(keras.layers.Conv1DTranspose)
@register_wrapper(keras.layers.Conv2DTranspose)
@register_wrapper(keras.layers.Conv3DTranspose)
class ConvTransposeWrapper(ActivationWrapper):
    """`Conv1DTranspose`, `Conv2DTranspose` and `Conv3DTranspose`."""

    def make_blocks(self):
        layer = self.host
        channels_first = layer.data_format == "channels_first"
        channels, ones = layer.kernel.shape[-1], (1,) * layer.rank
        if channels_first:
            shape = layer.compute_output_shape((1, channels, *ones))[2:]
        else:
            shape = layer.compute_output_shape((1, *ones, channels))[1:-1]
        return [
            ConvTransposeBlock(
                layer.kernel,
                layer.bias,
                strides=layer.strides,
                dilation_rate=layer.dilation_rate,
                extents=shape,
                data_format=layer.data_format,
            )
        ]
