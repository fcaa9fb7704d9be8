"""Embeddings: dense maps of one-hot vectors that nobody builds."""

import keras
from keras import ops

# Not public, but there is no other way to the mask that a layer's `call` has
# attached to its output: `ReversibleEmbedding` does so.
from keras.src.backend.common.masking import get_keras_mask
from keras.src.backend.common.masking import set_keras_mask

from keras_adafisher import backend
from keras_adafisher.aliases import Tensor
from keras_adafisher.statistics import mean_square
from keras_adafisher.wrappers.base import LayerWrapper
from keras_adafisher.wrappers.base import OutputWrapper
from keras_adafisher.wrappers.base import variable_or_none
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.dense import DenseBlock
from keras_adafisher.wrappers.registry import register_wrapper

_INTEGERS = ("int32", "int64")


class EmbeddingBlock(Block):
    """`z[..., :] = E[id[...], :]`, a dense map of one-hot rows.

    The square of a one-hot vector is itself, so `H`, its mean over all ids of
    the batch, is the frequency of each id: its count divided by the number of
    ids, masked ones included. `S` is the mean of `s²` over all axes but the
    last. Ours: the paper has no embeddings.

    Min–Max normalization maps the most frequent id of the batch to 1, and
    ids that don't occur in it to 0 (unless all occur). So the running `H` of
    a rare id is near 0, and its row takes the longest steps that the damping
    allows, when it occurs at all. If all ids are equally frequent, `H`
    carries no information and is 0.

    Args:
        weight: Variable of shape `(inputs, outputs)`, or `None`.
        inputs: Int, number of ids.
        outputs: Int, size of an embedding.
    """

    def __init__(
        self, weight: keras.Variable | None, inputs: int, outputs: int
    ) -> None:
        super().__init__(weight)
        self.activation_shape = (inputs, 1)
        self.gradient_shape = (outputs,)

    def activation_statistic(self, h: Tensor) -> Tensor:
        inputs = self.activation_shape[0]
        ids = backend.reshape(h, (-1,))
        # What `Embedding.call` and `ops.take` make of them: negative ids
        # count from the end.
        if keras.backend.standardize_dtype(ids.dtype) not in _INTEGERS:
            ids = ops.cast(ids, "int32")
        ids = ops.where(ids < 0, ids + inputs, ids)
        counts = backend.count_ids(ids, inputs)
        size = ops.shape(ids)[0]
        if not isinstance(size, int):
            size = ops.cast(size, "float32")
        frequencies = counts / size
        return backend.reshape(frequencies, self.activation_shape)

    def gradient_statistic(self, s: Tensor) -> Tensor:
        return mean_square(s, axis=tuple(range(len(s.shape) - 1)))


class ReverseEmbeddingBlock(Block):
    """`z[..., v] = sum_d h[..., d] E[v, d]`, an embedding used backwards.

    A dense map whose kernel is the transpose of `E`: `H` has shape
    `(1, inputs)` and `S` shape `(outputs, 1)`. Where the same `E` embeds as
    well, its Fisher information is the sum of this block's Kronecker product
    and that of an `EmbeddingBlock`. Ours.

    Args:
        weight: Variable of shape `(outputs, inputs)`, or `None`.
        inputs: Int, size of an embedding.
        outputs: Int, number of ids.
    """

    def __init__(
        self, weight: keras.Variable | None, inputs: int, outputs: int
    ) -> None:
        super().__init__(weight)
        self.activation_shape = (1, inputs)
        self.gradient_shape = (outputs, 1)

    def activation_statistic(self, h: Tensor) -> Tensor:
        h = mean_square(h, axis=tuple(range(len(h.shape) - 1)))
        return backend.reshape(h, self.activation_shape)

    def gradient_statistic(self, s: Tensor) -> Tensor:
        s = mean_square(s, axis=tuple(range(len(s.shape) - 1)))
        return backend.reshape(s, self.gradient_shape)


@register_wrapper(keras.layers.Embedding)
class EmbeddingWrapper(OutputWrapper):
    """`Embedding`."""

    def make_blocks(self):
        layer = self.host
        return [
            EmbeddingBlock(
                variable_or_none(layer.embeddings),
                inputs=layer.input_dim,
                outputs=layer.output_dim,
            )
        ]


@register_wrapper(keras.layers.ReversibleEmbedding)
class ReversibleEmbeddingWrapper(LayerWrapper):
    """`ReversibleEmbedding`, tied or not: one block for each direction."""

    def make_blocks(self):
        layer = self.host
        embeddings = variable_or_none(layer.embeddings)
        sizes = layer.input_dim, layer.output_dim
        if layer.tie_weights:
            reverse = ReverseEmbeddingBlock(embeddings, *reversed(sizes))
        else:
            reverse = DenseBlock(
                layer.reverse_embeddings, None, *reversed(sizes)
            )
        return [EmbeddingBlock(embeddings, *sizes), reverse]

    def call(self, inputs, reverse=False):
        if not reverse:
            z = self.host_call(inputs)
            tapped = self.tap(z, inputs)
            set_keras_mask(tapped, get_keras_mask(z))
            return tapped
        soft_cap = self.host.logit_soft_cap
        if soft_cap is None:
            return self.tap(self.host_call(inputs, reverse=True), inputs, 1)
        # The cap is a nonlinearity: the tap belongs in front of it.
        z = self.host_call_without("logit_soft_cap", inputs, reverse=True)
        z = self.tap(z, inputs, 1)
        return ops.multiply(ops.tanh(ops.divide(z, soft_cap)), soft_cap)
