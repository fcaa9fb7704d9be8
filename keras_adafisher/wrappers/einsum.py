"""EinsumDense layers, and so the projections of attention layers."""

from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_adafisher import backend
from keras_adafisher.aliases import Tensor
from keras_adafisher.statistics import mean_square
from keras_adafisher.wrappers.base import ActivationWrapper
from keras_adafisher.wrappers.base import variable_or_none
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.matrix_view import MatrixView
from keras_adafisher.wrappers.registry import register_wrapper


class EinsumBlock(Block):
    """`z = einsum(equation, h, W) + b`.

    In `abc,cde->abde`, a label of the kernel `W` is

    - a coordinate of `H` if it is a label of the input `h`,
    - a coordinate of `S` if it is a label of the output `z`,
    - a coordinate of both if it is in all three: an axis of experts, say. Each
      of its values has a linear map of its own, but `H` and `S` are each
      normalized as one vector.

    `H` and `S` are the means of `h²` and `s²` over all labels that the kernel
    lacks, the ellipsis included: these are the examples. A label of the input
    alone (`b` in `abc,cd->ad`) makes no examples: `z` is linear in the sum over
    it, so `h` is summed over it before it is squared. Both factors have the
    axes of the kernel, with size 1 for the labels that they lack.

    A bias with other labels than `S` (some of them, or some that the kernel
    lacks) has an `S` of its own: the mean of `s²` over all labels that the
    bias lacks.

    For `...i,io->...o`, a dense layer, this is arXiv 2405.16397, Section 3.1.
    The rest is ours.

    Args:
        weight: Variable of shape `kernel_shape`. `None` if it doesn't train:
            then only the bias is factored.
        bias: Variable, or `None`. As in `keras.layers.EinsumDense`, it has
            the output's axes from the first of its labels on, with size 1 for
            the labels that it lacks.
        equation: String, as in `keras.layers.EinsumDense`.
        kernel_shape: Tuple of ints, one for each label of the kernel.
        bias_axes: String, the labels of the bias, or `None`.
    """

    def __init__(
        self,
        weight: keras.Variable | None,
        bias: keras.Variable | None,
        equation: str,
        kernel_shape: Iterable[int],
        bias_axes: str | None = None,
    ) -> None:
        super().__init__(weight, bias)
        input_spec, rest = equation.split(",")
        kernel, output_spec = rest.split("->")
        self.is_left_elided = input_spec.startswith("...")
        inputs, outputs = input_spec.strip("."), output_spec.strip(".")
        bias_spec: Any = "" if bias is None else bias_axes

        # Labels in the order of the input, of the output and of the kernel.
        self.input_labels = _common(inputs, kernel + outputs)
        self.output_labels = outputs
        self.h_labels = _common(inputs, kernel)
        self.s_labels = _common(outputs, kernel)
        self.kernel_h_labels = _common(kernel, inputs)
        self.kernel_s_labels = _common(kernel, outputs)
        self.bias_labels = _common(outputs, bias_spec)
        self.measured_labels = _common(outputs, kernel + bias_spec)
        self.reduction = None
        if inputs != self.input_labels:
            # A sum, or a diagonal where a label repeats.
            reduced_spec = input_spec.replace(inputs, self.input_labels)
            self.reduction = f"{input_spec}->{reduced_spec}"

        sizes = dict(zip(kernel, kernel_shape, strict=True))
        self.activation_shape = _shape(kernel, inputs, sizes)
        self.gradient_shape = _shape(kernel, outputs, sizes)
        if bias is not None:
            self.bias_shape = tuple(bias.shape)
            first = outputs.index(self.bias_labels[0])
            labels = outputs[first:]
            for label, size in zip(labels, self.bias_shape, strict=False):
                sizes.setdefault(label, size)
            if self.bias_labels != self.s_labels:
                self.bias_gradient_shape = self.bias_shape
        self.s_sizes = _sizes(self.kernel_s_labels, sizes)
        self._kernel_labels = kernel
        self._kernel_shape = tuple(kernel_shape)

    def matrix_view(self) -> MatrixView | None:
        kernel = self._kernel_labels
        both = _common(self.kernel_h_labels, self.kernel_s_labels)
        groups = [
            [kernel.index(label) for label in labels if label not in both]
            for labels in (self.kernel_h_labels, self.kernel_s_labels)
        ]
        inputs, outputs = groups
        maps = [kernel.index(label) for label in both]
        # A label of the kernel alone is summed over, and one that repeats
        # takes a diagonal.
        is_matrix = len(inputs + outputs + maps) == len(kernel)
        if not (inputs and outputs and is_matrix):
            return None
        return MatrixView(self._kernel_shape, inputs, outputs, maps)

    def activation_statistic(self, h: Tensor) -> Tensor:
        if self.reduction is not None:
            h = ops.einsum(self.reduction, ops.cast(h, "float32"))
        h = self._mean_square(h, self.input_labels, self.h_labels)
        return _permute(h, self.h_labels, self.kernel_h_labels)

    def gradient_statistic(self, s: Tensor) -> Tensor:
        return self._mean_square(s, self.output_labels, self.measured_labels)

    def split_gradient(self, statistic: Tensor) -> tuple[Tensor, Tensor | None]:
        gradient = _mean(statistic, self.measured_labels, self.s_labels)
        gradient = _permute(gradient, self.s_labels, self.kernel_s_labels)
        if self.bias_gradient_shape is None:
            return gradient, None
        return gradient, _mean(
            statistic, self.measured_labels, self.bias_labels
        )

    def operands_of_bias(
        self, bias_input: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.bias_gradient_shape is None:
            gradient = backend.reshape(gradient, self.s_sizes)
            gradient = _permute(gradient, self.kernel_s_labels, self.s_labels)
            gradient = backend.reshape(gradient, self.bias_shape)
        return bias_input, gradient

    def _mean_square(self, x, labels, kept):
        """Mean of `x²` over the ellipsis and all labels that aren't `kept`."""
        rank = len(x.shape)
        first = rank - len(labels) if self.is_left_elided else 0
        kept = {first + labels.index(label) for label in kept}
        return mean_square(x, axis=tuple(set(range(rank)) - kept))


@register_wrapper(keras.layers.EinsumDense)
class EinsumDenseWrapper(ActivationWrapper):
    """`EinsumDense`."""

    def make_blocks(self):
        layer = self.host
        return [
            EinsumBlock(
                variable_or_none(layer.kernel),
                layer.bias,
                equation=layer.equation,
                kernel_shape=layer.kernel.shape,
                bias_axes=layer.bias_axes,
            )
        ]


def _common(labels, others):
    """The labels that are among others, in their order and once each."""
    return "".join(dict.fromkeys(la for la in labels if la in others))


def _sizes(labels, sizes):
    return tuple(sizes[label] for label in labels)


def _shape(kernel, labels, sizes):
    """The kernel's shape, with ones for all but some labels."""
    return tuple(
        sizes[label] if label in labels and label not in kernel[:axis] else 1
        for axis, label in enumerate(kernel)
    )


def _permute(x, labels, order):
    """Bring the axes of `x` into another order."""
    if labels == order:
        return x
    return ops.transpose(x, [labels.index(label) for label in order])


def _mean(x, labels, kept):
    """Mean of `x` over all labels that aren't `kept`."""
    axis = tuple(i for i, label in enumerate(labels) if label not in kept)
    return ops.mean(x, axis=axis) if axis else x
