"""Mixtures of experts: kernels with an axis of experts."""

import keras
from keras import ops

from keras_adafisher.aliases import Tensor
from keras_adafisher.wrappers.base import LayerWrapper
from keras_adafisher.wrappers.block import GradientBlock
from keras_adafisher.wrappers.matrix_view import MatrixView
from keras_adafisher.wrappers.registry import register_wrapper_by_name

EXPERTS = (
    "Gemma4MoEBlock",
    "GptOssExperts",
    "MixtralMoeExperts",
    "Qwen3MoeExperts",
    "Qwen3_5MoeExperts",
    "QwenMoeExperts",
)


class ExpertsBlock(GradientBlock):
    """`z[e] = W[e] h + b[e]` for each expert `e`.

    `H` has shape `(experts, inputs, 1)` and `S` shape `(experts, 1, outputs)`,
    estimated from the gradient. Each is normalized as one vector, so an expert
    that is rarely chosen, and has small gradients, takes longer steps. Ours.

    Args:
        weight: Variable of shape `(experts, inputs, outputs)`.
        bias: Variable of shape `(experts, outputs)`, or `None`.
    """

    def __init__(
        self, weight: keras.Variable, bias: keras.Variable | None = None
    ) -> None:
        experts, inputs, outputs = weight.shape
        super().__init__(
            weight,
            (experts, inputs, 1),
            (experts, 1, outputs),
            bias,
            MatrixView(weight.shape, inputs=(1,), outputs=(2,), maps=(0,)),
        )

    def operands_of_bias(
        self, bias_input: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        return bias_input, ops.squeeze(gradient, axis=1)


@register_wrapper_by_name("keras_hub", *EXPERTS)
class ExpertsWrapper(LayerWrapper):
    """Layers of keras_hub that run all experts at once.

    They have several kernels between which no tap fits, and whatever other
    weights, which keep AdamW's rule. `name_bias` is the bias of kernel `name`.
    """

    def make_blocks(self):
        weights = {weight.name: weight for weight in self.host.weights}
        return [
            ExpertsBlock(weight, weights.get(f"{name}_bias"))
            for name, weight in weights.items()
            if len(weight.shape) == 3
        ]
