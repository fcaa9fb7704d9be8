"""Layers around wrapped ones, and weights that stay on AdamW's rule."""

import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from models import own_variable
from models import product_loss

import keras_adafisher


def attention_model(attention):
    inputs = keras.Input((4, 3))
    hidden = keras.layers.Dense(3)(inputs)
    model = keras.Model(inputs, attention([hidden, hidden]))
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    return model


@pytest.mark.parametrize(
    "make_attention",
    [
        lambda: keras.layers.Attention(use_scale=True, score_mode="concat"),
        keras.layers.AdditiveAttention,
    ],
    ids=["Attention", "AdditiveAttention"],
)
def test_scales_of_scores_have_no_factors(make_attention, rng):
    """They lead to one output: its `S`, one number, would normalize to 0."""
    attention = make_attention()
    model = attention_model(attention)
    before = attention.get_weights()
    x = rng.normal(size=(2, 4, 3)).astype("float32")
    model.train_on_batch(x, x)
    for old, new in zip(before, attention.get_weights(), strict=True):
        # AdamW's first step: the learning rate, in the gradient's direction.
        np.testing.assert_allclose(np.abs(new - old), 1e-3, rtol=0.2)
    reasons = {
        row.parameter.split("/")[0]: row.reason
        for row in keras_adafisher.coverage(model).rows
        if not row.factors
    }
    name = type(attention).__name__
    assert list(reasons.values()) == [f"no wrapper for {name}"]


@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.EinsumDense("ab,bc->ac", 3, bias_axes="c"),
        lambda: keras.layers.Embedding(5, 3),
    ],
    ids=["EinsumDense", "Embedding"],
)
def test_a_quantized_layer_has_no_factors(layer, rng):
    layer = layer()
    dtype = "int32" if isinstance(layer, keras.layers.Embedding) else "float32"
    inputs = keras.Input((4,), dtype=dtype)
    model = keras.Model(inputs, keras.layers.Dense(2)(layer(inputs)))
    layer.quantize("int8")
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    x = rng.integers(0, 5, size=(3, 4)).astype(dtype)
    layer_cases.train_once(model, x, rng)
    rows = keras_adafisher.coverage(model).rows
    assert all(
        row.reason == "quantized to int8" for row in rows if not row.factors
    )
    assert {row.layer for row in rows if row.factors} == {"dense"}


def test_the_layer_inside_spectral_normalization_is_factored(rng):
    x = rng.normal(size=(6, 3)).astype("float32")
    layer = keras.layers.SpectralNormalization(keras.layers.Dense(2))
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    kernel, bias = layer_cases.linear_fisher(x, s, bias=True)
    layer_cases.assert_fisher(model, layer.layer.kernel, kernel)
    layer_cases.assert_fisher(model, layer.layer.bias, bias)


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="Keras has no sparse tensors with PyTorch",
)
def test_sparse_activations_count_with_their_zeros(rng):
    ids = np.array([0, 2, 2, 1, 2], "int32")
    layer = keras.layers.Dense(3)
    inputs = keras.Input((), dtype="int32")
    outputs = layer(ops.one_hot(inputs, 4, sparse=True))
    model = keras.Model(inputs, outputs)
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    s = layer_cases.train_once(model, ids, rng)
    kernel, bias = layer_cases.linear_fisher(np.eye(4)[ids], s, bias=True)
    layer_cases.assert_fisher(model, layer.kernel, kernel)
    layer_cases.assert_fisher(model, layer.bias, bias)


def test_a_frozen_layer_is_not_measured_until_it_trains(rng):
    x = rng.normal(size=(4, 3)).astype("float32")
    layer = keras.layers.EinsumDense("ab,bc->ac", 3, bias_axes="c")
    layer.trainable = False
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2)(layer(inputs)))
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    before = layer.get_weights()
    y = np.ones((4, 2), "float32")
    model.train_on_batch(x, y)
    # How often it was measured, and how often not: of one layer.
    assert own_variable(model.optimizer, "records").shape == (2,)
    np.testing.assert_array_equal(layer.get_weights()[0], before[0])

    layer.trainable = True
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    model.train_on_batch(x, y)
    assert np.all(layer_cases.fisher_of(model, layer.kernel) < 0.5)
    assert not np.array_equal(layer.get_weights()[0], before[0])
