"""Dense layers."""

import keras

from keras_adafisher.aliases import Tensor
from keras_adafisher.statistics import mean_square
from keras_adafisher.wrappers.base import ActivationWrapper
from keras_adafisher.wrappers.base import variable_or_none
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.matrix_view import MatrixView
from keras_adafisher.wrappers.registry import register_wrapper


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

    def __init__(
        self,
        weight: keras.Variable | None,
        bias: keras.Variable | None,
        inputs: int,
        outputs: int,
    ) -> None:
        super().__init__(weight, bias)
        self.activation_shape = (inputs, 1)
        self.gradient_shape = (outputs,)

    def matrix_view(self) -> MatrixView:
        shape = (self.activation_shape[0], *self.gradient_shape)
        return MatrixView(shape, inputs=(0,), outputs=(1,))

    def activation_statistic(self, h: Tensor) -> Tensor:
        return mean_square(h, axis=tuple(range(len(h.shape) - 1)))

    def gradient_statistic(self, s: Tensor) -> Tensor:
        return mean_square(s, axis=tuple(range(len(s.shape) - 1)))


@register_wrapper(keras.layers.Dense)
class DenseWrapper(ActivationWrapper):
    """`Dense`, on inputs of any rank."""

    def make_blocks(self):
        kernel = self.host.kernel
        return [
            DenseBlock(
                variable_or_none(kernel),
                self.host.bias,
                inputs=kernel.shape[0],
                outputs=kernel.shape[1],
            )
        ]
