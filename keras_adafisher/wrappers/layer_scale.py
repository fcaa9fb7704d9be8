"""Layers that scale their channels."""

from collections.abc import Sequence

from keras_adafisher.wrappers.base import OutputWrapper
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.normalization import ScaleBlock
from keras_adafisher.wrappers.registry import register_wrapper_by_name


# Of ConvNeXt, in `keras.applications`. It isn't public.
@register_wrapper_by_name("keras", "LayerScale")
class LayerScaleWrapper(OutputWrapper):
    """`z = gamma * h`, elementwise, with one weight per channel.

    `H` is the mean of `h²` and `S` the mean of `s²` over all axes but the
    channels, where `h` is the layer's input and `s` the gradient at its
    output. Both have shape `(channels,)`. Ours: it is what arXiv 2405.16397,
    Proposition 3.1, has for the scale of a normalization.

    The host has this one weight or none, under whatever name. Its channels
    are the last axis, unless its `data_format` says that they are the first.
    """

    def make_blocks(self) -> Sequence[Block]:
        data_format = getattr(self.host, "data_format", None)
        axis = 1 if data_format == "channels_first" else -1
        return [
            ScaleBlock(weight, None, (axis,), weight.shape)
            for weight in self.host.weights
        ]
