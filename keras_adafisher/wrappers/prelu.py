"""PReLU: a slope for negative inputs."""

import keras
from keras import ops

from keras_adafisher.aliases import Tensor
from keras_adafisher.wrappers.base import OutputWrapper
from keras_adafisher.wrappers.normalization import ScaleBlock
from keras_adafisher.wrappers.registry import register_wrapper


class SlopeBlock(ScaleBlock):
    """`z = max(x, 0) + alpha * min(x, 0)`, elementwise.

    `alpha` is the scale of `h = min(x, 0)`. `H` and `S` have its shape: the
    means of `h²` and `s²` over the batch and the shared axes, the positions
    with positive `x` (where `h` is 0) included. Ours.
    """

    def activation_statistic(self, h: Tensor) -> Tensor:
        return super().activation_statistic(ops.minimum(h, 0))


@register_wrapper(keras.layers.PReLU)
class PReLUWrapper(OutputWrapper):
    """`PReLU`, with and without `shared_axes`."""

    def make_blocks(self):
        alpha = self.host.alpha
        shared = self.host.shared_axes or ()
        axes = range(1, len(alpha.shape) + 1)
        axis = [axis for axis in axes if axis not in shared]
        return [SlopeBlock(alpha, None, axis, alpha.shape)]
