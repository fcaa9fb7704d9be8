"""Normalization layers: their scale and shift."""

import keras

from keras_adafisher.blocks import ScaleBlock
from keras_adafisher.wrappers.base import LayerWrapper
from keras_adafisher.wrappers.registry import register_wrapper


class NormalizationWrapper(LayerWrapper):
    """Layers that normalize and then compute `gamma * x + beta`.

    `h` is the layer's input, before it is normalized, and `s` the gradient at
    the layer's output: arXiv 2405.16397, Proposition 3.1.
    """

    def make_blocks(self):
        gamma, beta = self.host.gamma, self.host.beta
        if gamma is None and beta is None:
            return []
        shape = (beta if gamma is None else gamma).shape
        return [ScaleBlock(gamma, beta, self.axis(), shape)]

    def axis(self):
        """Tuple of ints, the axes that the parameters have."""
        axis = self.host.axis
        return (axis,) if isinstance(axis, int) else tuple(axis)

    def call(self, inputs, *args, **kwargs):
        return self.tap(self.host_call(inputs, *args, **kwargs), inputs)


register_wrapper(keras.layers.BatchNormalization)(NormalizationWrapper)
register_wrapper(keras.layers.LayerNormalization)(NormalizationWrapper)
