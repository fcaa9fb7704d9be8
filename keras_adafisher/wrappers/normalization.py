"""Normalization layers: their scale and shift."""

from collections.abc import Iterable

import keras

from keras_adafisher import backend
from keras_adafisher.aliases import Tensor
from keras_adafisher.statistics import mean_square
from keras_adafisher.wrappers.base import OutputWrapper
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.registry import register_wrapper


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

    # Scale and shift are factored apart.
    normalizes_bias_input = False

    def __init__(
        self,
        weight: keras.Variable | None,
        bias: keras.Variable | None,
        axis: Iterable[int],
        shape: Iterable[int],
    ) -> None:
        super().__init__(weight, bias)
        self.axis = tuple(axis)
        self.activation_shape = tuple(shape)
        self.gradient_shape = tuple(shape)

    def activation_statistic(self, h: Tensor) -> Tensor:
        return self._mean_square(h)

    def gradient_statistic(self, s: Tensor) -> Tensor:
        return self._mean_square(s)

    def _mean_square(self, x):
        rank = len(x.shape)
        kept = {axis % rank for axis in self.axis}
        others = tuple(axis for axis in range(rank) if axis not in kept)
        x = mean_square(x, axis=others)
        return backend.reshape(x, self.activation_shape)


class NormalizationWrapper(OutputWrapper):
    """Layers that normalize and then compute `gamma * x + beta`.

    `h` is the layer's input, before it is normalized, and `s` the gradient at
    the layer's output: arXiv 2405.16397, Proposition 3.1. (The paper has
    batch and layer normalization; group normalization is ours.)
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


register_wrapper(keras.layers.BatchNormalization)(NormalizationWrapper)
register_wrapper(keras.layers.LayerNormalization)(NormalizationWrapper)
register_wrapper(keras.layers.GroupNormalization)(NormalizationWrapper)


@register_wrapper(keras.layers.RMSNormalization)
class RMSNormalizationWrapper(OutputWrapper):
    """`RMSNormalization`: a scale without a shift.

    Ours, after arXiv 2405.16397, Proposition 3.1: `h` is the layer's input,
    before it is normalized, and `s` the gradient at its output.
    """

    def make_blocks(self):
        scale = self.host.scale
        # Whatever `axis` says, the layer multiplies by `scale` as it is, so
        # it belongs to the last axes.
        axis = range(-len(scale.shape), 0)
        return [ScaleBlock(scale, None, axis, scale.shape)]
