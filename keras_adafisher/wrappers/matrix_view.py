"""How a weight of any rank is one matrix, or several: inputs by outputs."""

import math
from collections.abc import Iterable

from keras import ops

from keras_adafisher import backend
from keras_adafisher.aliases import Tensor


class MatrixView:
    """The linear maps of a weight, as matrices.

    The kernel of a convolution, for instance, is one matrix whose rows are its
    taps and input channels and whose columns are its filters, or one for each
    group. Those of a layer of experts are one for each expert.

    Args:
        shape: Tuple of ints, the weight's shape, or another of as many entries
            that separates what shares an axis, groups and filters for instance.
        inputs: Tuple of the axes of `shape` that `H` is over.
        outputs: Tuple of the axes that `S` is over.
        maps: Tuple of the axes that tell one map from another. Defaults to
            none: there is one map.

    Attributes:
        size: Tuple of the numbers of maps, of inputs and of outputs.
    """

    def __init__(
        self,
        shape: Iterable[int],
        inputs: Iterable[int],
        outputs: Iterable[int],
        maps: Iterable[int] = (),
    ) -> None:
        self.shape = tuple(shape)
        self._axes = tuple(tuple(axes) for axes in (maps, inputs, outputs))
        self._order = sum(self._axes, start=())
        self.size = tuple(
            math.prod(self.shape[axis] for axis in axes) for axes in self._axes
        )

    def split(self, weight: Tensor) -> Tensor:
        """Get the matrices of a tensor of the weight's shape.

        Args:
            weight: Tensor.

        Returns:
            Tensor of shape `(maps, inputs, outputs)`.
        """
        weight = backend.reshape(weight, self.shape)
        if self._order != tuple(range(len(self.shape))):
            weight = ops.transpose(weight, self._order)
        return backend.reshape(weight, self.size)

    def join(self, matrices: Tensor, shape: Iterable[int]) -> Tensor:
        """Undo `split`.

        Args:
            matrices: Tensor of shape `(maps, inputs, outputs)`.
            shape: The weight's shape.

        Returns:
            Tensor of shape `shape`.
        """
        rank = len(self.shape)
        split = [self.shape[axis] for axis in self._order]
        weight = backend.reshape(matrices, split)
        if self._order != tuple(range(rank)):
            back = sorted(range(rank), key=self._order.__getitem__)
            weight = ops.transpose(weight, back)
        return backend.reshape(weight, shape)

    def split_factors(
        self, activation: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Get the Kronecker factors of each map.

        Args:
            activation: Tensor, `H`, with an entry for each input of each map.
            gradient: Tensor, `S`, with an entry for each output of each map.

        Returns:
            Tensors of shapes `(maps, inputs)` and `(maps, outputs)`.
        """
        _, inputs, outputs = self._axes
        return (
            self._split_factor(activation, outputs),
            self._split_factor(gradient, inputs),
        )

    def _split_factor(self, factor, missing):
        shape = [
            1 if axis in missing else length
            for axis, length in enumerate(self.shape)
        ]
        factor = ops.transpose(backend.reshape(factor, shape), self._order)
        return backend.reshape(factor, (self.size[0], -1))
