"""Cells of recurrent layers."""

from collections.abc import Sequence

import keras

from keras_adafisher.wrappers.base import LayerWrapper
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.block import GradientBlock
from keras_adafisher.wrappers.matrix_view import MatrixView
from keras_adafisher.wrappers.registry import register_wrapper
from keras_adafisher.wrappers.registry import register_wrapper_by_name


@register_wrapper(keras.layers.SimpleRNNCell)
@register_wrapper(keras.layers.LSTMCell)
@register_wrapper(keras.layers.GRUCell)
# The cell of ConvLSTM1D, 2D and 3D isn't public.
@register_wrapper_by_name("keras", "ConvLSTMCell")
class RecurrentCellWrapper(LayerWrapper):
    """Cells whose pre-activation is `x W + h U + b`, step by step.

    The kernel `W` and the recurrent kernel `U` have factors of their own: `H`
    has one entry for each input of theirs (and kernel tap, in a convolution),
    `S` one for each output, gates side by side.

    The fused kernels, which are what makes these layers fast (on PyTorch
    always, elsewhere on GPUs, and JAX' GRU), never call the cell and show
    neither `h` nor `s`. A tap in the cell would force them off. So both
    factors are estimated from the kernels' gradients, see `GradientBlock`,
    which is the same on all paths. Ours: the paper has no recurrent layers.
    """

    def make_blocks(self) -> Sequence[Block]:
        cell = self.host
        return [
            _block(cell.kernel, cell.bias),
            _block(cell.recurrent_kernel),
        ]


def _block(kernel, bias=None):
    *inputs, outputs = kernel.shape
    rank = len(inputs)
    view = MatrixView(kernel.shape, inputs=range(rank), outputs=(rank,))
    return GradientBlock(kernel, (*inputs, 1), (outputs,), bias, view)
