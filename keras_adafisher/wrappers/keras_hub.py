"""Layers of keras_hub, known by name: the package isn't imported."""

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_adafisher.aliases import Tensor
from keras_adafisher.wrappers.base import LayerWrapper
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.embedding import EmbeddingBlock
from keras_adafisher.wrappers.layer_scale import LayerScaleWrapper
from keras_adafisher.wrappers.registry import register_wrapper_by_name

LAYER_SCALES = ("DINOV2LayerScale", "DINOV3LayerScale", "LayerScale2d")

# They divide by a root mean square and scale. Some scale by `1 + weight`.
NORMALIZATIONS = (
    "EdRecRMSNormalization",
    "Gemma3nAudioCumulativeGroupNorm",
    "Gemma3nRMSNorm",
    "GptOssLayerNormalization",
    "LlamaLayerNorm",
    "MistralLayerNormalization",
    "MixtralLayerNormalization",
    "Phi3LayerNorm",
    "Qwen3LayerNorm",
    "Qwen3MoeLayerNorm",
    "Qwen3_5LayerNorm",
    "Qwen3_5RMSNormGated",
    "QwenLayerNorm",
    "QwenMoeLayerNorm",
    # Of `keras_hub.layers` and, each its own, of Gemma, Gemma3 and Gemma4.
    "RMSNormalization",
    "RmsNorm2d",
    "RoformerNorm",
    "T5LayerNorm",
)

register_wrapper_by_name("keras_hub", *LAYER_SCALES)(LayerScaleWrapper)


@register_wrapper_by_name("keras_hub", *NORMALIZATIONS)
class ScaleOnlyNormalizationWrapper(LayerScaleWrapper):
    """Normalizations with a scale per channel and without a shift.

    `h` is the layer's input, before it is normalized, and `s` the gradient at
    its output: arXiv 2405.16397, Proposition 3.1, as for Keras'
    `RMSNormalization`. A scale that is `1 + weight` has the weight's factors:
    the derivative by either is the same.
    """


@register_wrapper_by_name("keras_hub", "PositionEmbedding")
class PositionEmbeddingWrapper(LayerWrapper):
    """`PositionEmbedding`: an embedding whose ids are positions.

    `z[b, i, :] = E[p[b, i], :]`, where `p[b, i]` is `positions[b, i]` or, as
    a rule, `start_index + i`. So `H`, of shape `(sequence_length, 1)`, is the
    frequency of each position among all `(b, i)`, and `S` the mean of `s²`
    per column, over batch and positions: see `EmbeddingBlock`. Ours.

    All positions of a sequence of length `n` have the frequency `1 / n`, all
    others have 0. Min–Max normalization makes that 1 and 0. If no position
    is left over, because the sequences are as long as the layer allows, `H`
    carries no information and is 0.
    """

    def make_blocks(self) -> Sequence[Block]:
        embeddings = self.host.position_embeddings
        return [EmbeddingBlock(embeddings, *embeddings.shape)]

    def call(
        self,
        inputs: Tensor,
        start_index: Any = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        z = self.host_call(inputs, start_index, positions)
        if positions is None:
            positions = start_index + ops.arange(ops.shape(inputs)[-2])
        return self.tap(z, positions)


@register_wrapper_by_name("keras_hub", "AdjustablePositionEmbedding")
class AdjustablePositionEmbeddingWrapper(PositionEmbeddingWrapper):
    """`AdjustablePositionEmbedding`: the middle of a grid of embeddings.

    As `PositionEmbeddingWrapper`, where the positions are the grid's cells,
    row by row, and those in use are the `height` times `width` in its middle.
    The layer returns them once, for the whole batch, so `s` is a sum over the
    batch before it is squared.
    """

    def call(self, inputs, height=None, width=None):
        z = self.host_call(inputs, height, width)
        rows = _middle(self.host.height, height)
        columns = _middle(self.host.width, width)
        positions = rows[:, None] * self.host.width + columns
        return self.tap(z, positions)


def _middle(size, used):
    """The indices of the `used` entries (all, if `None`) in the middle."""
    used = used or size
    return (size - used) // 2 + ops.arange(used)
