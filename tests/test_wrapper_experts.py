"""Kernels with an axis of experts, as keras_hub's mixtures have them."""

import keras
import layer_cases
import numpy as np
from keras import ops
from layer_cases import DAMPING
from layer_cases import JIT_COMPILE
from layer_cases import running
from reference import min_max
from test_wrapper_keras_hub import classes_named

import keras_adafisher


def estimate(gradient):
    """`H` and `S` of each expert, normalized over all of them."""
    square = gradient.astype("float64") ** 2
    root = np.sqrt(square.mean(axis=(1, 2), keepdims=True))
    h = square.mean(axis=2, keepdims=True) / root
    s = square.mean(axis=1, keepdims=True) / root
    return running(min_max(h)), running(min_max(s))


class Mixture(keras.layers.Layer):
    """The experts' outputs, examples first."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def build(self, shape):
        self.experts.build(shape)

    def call(self, inputs):
        return ops.swapaxes(self.experts(inputs), 0, 1)


def test_each_expert_has_its_own_factors(rng):
    (experts_class,) = classes_named("GptOssExperts")
    experts = experts_class(num_experts=2, hidden_dim=3, intermediate_dim=4)
    layer = Mixture(experts)
    x = rng.normal(size=(5, 3)).astype("float32")
    gradients = layer_cases.parameter_gradients(
        layer, x, jit_compile=JIT_COMPILE
    )
    model = layer_cases.model_of(layer, x, jit_compile=JIT_COMPILE)
    model.train_on_batch(x, layer_cases.ramp(model, x))

    assert keras_adafisher.coverage(model).factored_fraction == 1.0
    kernels, biases = experts.weights[::2], experts.weights[1::2]
    for kernel, bias, gradient in zip(
        kernels, biases, gradients[::2], strict=True
    ):
        h, s = estimate(gradient)
        layer_cases.assert_fisher(model, kernel, h * s + DAMPING, rtol=2e-3)
        expected = running(1.0) * s[:, 0] + DAMPING
        layer_cases.assert_fisher(model, bias, expected, rtol=2e-3)
