"""Layers whose weights other code reads, past their `call`."""

import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from layer_cases import DAMPING
from layer_cases import running
from models import product_loss
from reference import min_max

import keras_adafisher


class Reader(keras.layers.Layer):
    """Uses another layer's kernel, and never calls the layer."""

    def __init__(self, inner, read, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner
        self.read = read

    def build(self, shape):
        self.inner.build(shape)

    def call(self, inputs):
        return self.read(self.inner, inputs)


def dense(inner, x):
    return ops.matmul(x, inner.kernel) + inner.bias


def grouped_conv(inner, x):
    return ops.conv(x, inner.kernel, padding="same")


def moment(x, axis):
    return min_max(np.mean(np.square(x.astype("float64")), axis=axis))


def make_reader(inner, read, x):
    layer = Reader(inner, read)
    (gradient, *_) = layer_cases.parameter_gradients(layer, x)
    model = layer_cases.model_of(layer, x)
    return model, layer_cases.ramp(model, x), gradient


def test_factors_are_estimated_from_the_gradient(rng):
    x = rng.normal(size=(5, 3)).astype("float32")
    layer = keras.layers.Dense(4)
    model, y, g = make_reader(layer, dense, x)
    rows = keras_adafisher.coverage(model).rows
    assert [row.factors for row in rows] == [
        "H (3, 1) x S (4,)",
        "H of 1 x S (4,)",
    ]
    model.train_on_batch(x, y)
    s = running(moment(g, 0))
    kernel = np.outer(running(moment(g, 1)), s) + DAMPING
    layer_cases.assert_fisher(model, layer.kernel, kernel, rtol=1e-3)
    bias = running(1.0) * s + DAMPING
    layer_cases.assert_fisher(model, layer.bias, bias, rtol=1e-3)
    # Once it has trained, the user sees it.
    assert [row.factors for row in keras_adafisher.coverage(model).rows] == [
        "H (3, 1) x S (4,), estimated from the gradient",
        "H of 1 x S (4,), estimated from the gradient",
    ]


def test_the_filters_of_a_group_share_their_inputs(rng):
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    conv = keras.layers.Conv1D(6, 3, padding="same", groups=2, use_bias=False)
    model, y, g = make_reader(conv, grouped_conv, x)
    model.train_on_batch(x, y)
    h, s = np.zeros((3, 2, 2)), np.zeros(6)
    for group in range(2):
        filters = slice(3 * group, 3 * group + 3)
        square = g[..., filters].astype("float64") ** 2
        root = np.sqrt(square.mean())
        h[..., group] = square.mean(axis=2) / root
        s[filters] = square.mean(axis=(0, 1)) / root
    h, s = running(min_max(h)), running(min_max(s))
    expected = np.repeat(h, 3, axis=-1) * s + DAMPING
    layer_cases.assert_fisher(model, conv.kernel, expected, rtol=1e-3)


def test_a_scale_is_estimated_elementwise(rng):
    """`H` and `S` have the weight's shape: their product is `g²`."""
    x = rng.normal(size=(4, 3)).astype("float32")
    norm = keras.layers.RMSNormalization()
    model, y, g = make_reader(norm, lambda norm, x: x * norm.scale, x)
    model.train_on_batch(x, y)
    factor = running(min_max(np.abs(g.astype("float64"))))
    layer_cases.assert_fisher(model, norm.scale, factor**2 + DAMPING, rtol=1e-3)


def test_only_steps_that_measure_estimate(rng):
    x = rng.normal(size=(5, 3)).astype("float32")
    layer = keras.layers.Dense(4)
    model, y, _ = make_reader(layer, dense, x)
    model.compile(
        keras_adafisher.AdaFisher(factor_update_steps=2), loss=product_loss
    )
    seen = []
    for _ in range(4):
        model.train_on_batch(rng.permutation(x), y)
        seen.append(layer_cases.fisher_of(model, layer.kernel))
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[2], seen[3])
    assert not np.array_equal(seen[1], seen[2])


@pytest.mark.parametrize("value", [0.0, np.nan], ids=["zero", "NaN"])
def test_gradients_that_say_nothing_leave_the_factors_alone(value, rng):
    x = rng.normal(size=(5, 3)).astype("float32")
    layer = keras.layers.Dense(4)
    model, y, _ = make_reader(layer, dense, x)
    model.train_on_batch(x, y)
    before = layer_cases.fisher_of(model, layer.kernel)
    model.train_on_batch(x, value * y)
    after = layer_cases.fisher_of(model, layer.kernel)
    np.testing.assert_array_equal(after, before)


def test_accumulated_steps_are_estimated_together(rng):
    """From the mean gradient, as one batch of all the micro-batches."""
    x = rng.normal(size=(6, 3)).astype("float32")
    y = rng.normal(size=(6, 4)).astype("float32")
    fishers = []
    for steps in (None, 3):
        keras.utils.set_random_seed(0)
        layer = keras.layers.Dense(4)
        model = layer_cases.model_of(Reader(layer, dense), x)
        optimizer = keras_adafisher.AdaFisher(gradient_accumulation_steps=steps)
        model.compile(optimizer, loss=product_loss)
        model.fit(x, y, batch_size=6 // (steps or 1), shuffle=False, verbose=0)
        fishers.append(layer_cases.fisher_of(model, layer.kernel))
    np.testing.assert_allclose(*fishers, rtol=1e-5)


def test_tiny_gradients_are_estimated(rng):
    """Their squares would be 0 in float32."""
    x = rng.normal(size=(5, 3)).astype("float32")
    layer = keras.layers.Dense(4)
    model, y, g = make_reader(layer, dense, x)
    model.train_on_batch(x, 1e-25 * y)
    s = running(moment(g, 0))
    kernel = np.outer(running(moment(g, 1)), s) + DAMPING
    layer_cases.assert_fisher(model, layer.kernel, kernel, rtol=1e-3)
