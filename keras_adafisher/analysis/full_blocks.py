"""Blocks that measure whole Kronecker factors, one for each kind of map."""

import math
import sys

import numpy as np
from keras import ops

from keras_adafisher.integration.wrapping import make_wrapper
from keras_adafisher.wrappers import Block
from keras_adafisher.wrappers import ConvBlock
from keras_adafisher.wrappers import ConvTransposeBlock
from keras_adafisher.wrappers import DenseBlock
from keras_adafisher.wrappers import EinsumBlock
from keras_adafisher.wrappers import EmbeddingBlock
from keras_adafisher.wrappers import ReverseEmbeddingBlock


class NoFullFactors(Exception):
    """Says why a block or a layer has none."""


class _FullBlock(Block):
    """A block whose statistics are whole matrices.

    Args:
        block: The `Block` of which they have the diagonals.
        examples_of_activation: Callable that makes `(examples, inputs)` of `h`.
        examples_of_gradient: Callable that makes `(examples, outputs)` of `s`.
    """

    def __init__(self, block, examples_of_activation, examples_of_gradient):
        super().__init__(block.weight, block.bias)
        self.examples_of_activation = examples_of_activation
        self.examples_of_gradient = examples_of_gradient
        # A bias with an `S` of its own isn't the weight of a further input.
        self.has_one = block.bias is not None and (
            block.bias_gradient_shape is None
        )
        inputs = math.prod(block.activation_shape)
        outputs = math.prod(block.gradient_shape)
        self.activation_shape = (inputs + self.has_one,) * 2
        self.gradient_shape = (outputs,) * 2

    def activation_statistic(self, h):
        examples = ops.cast(self.examples_of_activation(h), "float32")
        if self.has_one:
            examples = ops.pad(examples, [(0, 0), (0, 1)], constant_values=1)
        return _second_moment(examples)

    def gradient_statistic(self, s):
        return _second_moment(ops.cast(self.examples_of_gradient(s), "float32"))


class _FullEmbeddingBlock(_FullBlock):
    """One-hot rows, whose second moment is the diagonal of frequencies."""

    def __init__(self, block):
        super().__init__(block, None, _last_axis)
        self.frequencies = block.activation_statistic

    def activation_statistic(self, h):
        return ops.diag(ops.reshape(self.frequencies(h), (-1,)))


def _second_moment(examples):
    return ops.matmul(ops.transpose(examples), examples) / ops.cast(
        ops.shape(examples)[0], "float32"
    )


def _last_axis(x):
    """Rows of all axes but the last."""
    return ops.reshape(x, (-1, x.shape[-1]))


def _full_patches(block, patches):
    """The `_FullBlock` of a convolution of either direction.

    Args:
        block: The `Block`.
        patches: Callable that makes the patches of float32 images whose
            channels are last: not every device convolves others.
    """

    def channels_last(x):
        return ops.moveaxis(x, 1, -1) if block.channels_first else x

    def examples_of_activation(h):
        return _last_axis(patches(channels_last(ops.cast(h, "float32"))))

    def examples_of_gradient(s):
        return _last_axis(channels_last(s))

    return _FullBlock(block, examples_of_activation, examples_of_gradient)


def _full_dense(block, layer):
    return _FullBlock(block, _last_axis, _last_axis)


def _full_conv(block, layer):
    if block.groups > 1:
        raise NoFullFactors("it has groups, each with factors of its own")
    size = math.prod(block.activation_shape)
    # A convolution with the unit vectors for filters returns the patches.
    kernel = np.eye(size, dtype="float32")
    kernel = kernel.reshape((*block.activation_shape[:-1], size))

    def patches(h):
        padding = block.padding
        if padding == "causal":
            reach = (block.kernel_size[0] - 1) * block.dilation_rate[0]
            h, padding = ops.pad(h, [(0, 0), (reach, 0), (0, 0)]), "valid"
        return ops.conv(
            h,
            kernel,
            strides=block.strides,
            padding=padding,
            data_format="channels_last",
            dilation_rate=block.dilation_rate,
        )

    return _full_patches(block, patches)


def _full_conv_transpose(block, layer):
    size = math.prod(block.activation_shape)
    *taps, _, channels = block.activation_shape
    # What each kernel tap reads, in the same way: filter `(i, c)` takes
    # channel `c` through tap `i`.
    kernel = np.eye(size, dtype="float32")
    kernel = kernel.reshape((*taps, channels, size)).swapaxes(-1, -2)

    def patches(h):
        return ops.conv_transpose(
            h,
            kernel,
            strides=block.strides,
            padding=layer.padding,
            output_padding=layer.output_padding,
            data_format="channels_last",
            dilation_rate=block.dilation_rate,
        )

    return _full_patches(block, patches)


def _full_einsum(block, layer):
    shared = set(block.kernel_h_labels) & set(block.kernel_s_labels)
    if shared:
        raise NoFullFactors(
            f"the axis '{shared.pop()}' of its kernel is one of input and "
            "output, with a linear map for each position"
        )

    def examples(x, labels, kept):
        """Rows with the labels of the kernel, in its order."""
        rank = len(x.shape)
        first = rank - len(labels) if block.is_left_elided else 0
        last = [first + labels.index(label) for label in kept]
        size = math.prod(x.shape[axis] for axis in last)
        others = [axis for axis in range(rank) if axis not in last]
        return ops.reshape(ops.transpose(x, [*others, *last]), (-1, size))

    def examples_of_activation(h):
        if block.reduction is not None:
            h = ops.einsum(block.reduction, ops.cast(h, "float32"))
        return examples(h, block.input_labels, block.kernel_h_labels)

    def examples_of_gradient(s):
        return examples(s, block.output_labels, block.kernel_s_labels)

    return _FullBlock(block, examples_of_activation, examples_of_gradient)


def _full_embedding(block, layer):
    return _FullEmbeddingBlock(block)


_FULL = {
    DenseBlock: _full_dense,
    ReverseEmbeddingBlock: _full_dense,
    ConvBlock: _full_conv,
    ConvTransposeBlock: _full_conv_transpose,
    EinsumBlock: _full_einsum,
    EmbeddingBlock: _full_embedding,
}


def _full_block(block, layer):
    """The `_FullBlock` of a block. Raises `NoFullFactors`."""
    if block.is_estimated:
        raise NoFullFactors(
            "its activations can't be seen, and AdaFisher estimates its "
            "factors from gradients"
        )
    # Not of subclasses, which may compute something else.
    make = _FULL.get(type(block))
    if make is None:
        raise NoFullFactors(
            f"the Fisher information of a {type(block).__name__} is no "
            "Kronecker product of two matrices"
        )
    full = make(block, layer)
    size = max(*full.activation_shape, *full.gradient_shape)
    # Where users set it, which this module can't import from: it is imported
    # from there.
    largest = sys.modules[__package__].LARGEST_FACTOR
    if size > largest:
        raise NoFullFactors(
            f"one of them would have {size:,} rows, more than "
            f"`analysis.LARGEST_FACTOR` = {largest:,}"
        )
    return full


def full_wrapper(layer):
    """A wrapper that measures full factors. Raises `NoFullFactors`."""
    if not layer.built:
        raise NoFullFactors("it isn't built")
    wrapper, reason = make_wrapper(layer)
    if wrapper is None:
        raise NoFullFactors(reason)
    blocks, reasons = [], []
    for block in wrapper.blocks:
        try:
            blocks.append(_full_block(block, layer))
        except NoFullFactors as error:
            reasons.append(str(error))
            # Without parameters, it isn't measured.
            blocks.append(Block(None))
    if len(reasons) == len(blocks):
        raise NoFullFactors(reasons[0])
    wrapper.measure(blocks)
    return wrapper
