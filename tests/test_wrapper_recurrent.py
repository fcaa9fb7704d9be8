"""Recurrent layers: factors that are estimated from gradients."""

import keras
import layer_cases
import numpy as np
import pytest
from layer_cases import DAMPING
from layer_cases import running
from models import product_loss
from reference import min_max

import keras_adafisher

LAYERS = {
    "SimpleRNN": lambda **kw: keras.layers.SimpleRNN(4, **kw),
    "LSTM": lambda **kw: keras.layers.LSTM(4, return_sequences=True, **kw),
    "GRU": lambda **kw: keras.layers.GRU(4, **kw),
    "GRU with one bias": lambda **kw: keras.layers.GRU(
        4, reset_after=False, **kw
    ),
    "Bidirectional": lambda **kw: keras.layers.Bidirectional(
        keras.layers.LSTM(4, use_bias=False, **kw)
    ),
    "StackedRNNCells": lambda **kw: keras.layers.RNN(
        [keras.layers.LSTMCell(4, **kw), keras.layers.GRUCell(3, **kw)]
    ),
    "ConvLSTM1D": lambda **kw: keras.layers.ConvLSTM1D(2, 3, **kw),
}


def sequences(name, rng, examples=4, steps=3):
    shape = (4, 3) if name == "ConvLSTM1D" else (3,)
    return rng.normal(size=(examples, steps, *shape)).astype("float32")


def estimate(gradient):
    """`H ⊗ S + damping` of a kernel from its gradient, and `S`."""
    rows = gradient.reshape(-1, gradient.shape[-1]).astype("float64")
    h = running(min_max(np.mean(rows**2, axis=1)))
    s = running(min_max(np.mean(rows**2, axis=0)))
    return np.outer(h, s).reshape(gradient.shape) + DAMPING, s


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_are_estimated_from_their_gradients(name, rng):
    x = sequences(name, rng)
    layer = LAYERS[name]()
    gradients = layer_cases.parameter_gradients(layer, x)
    model = layer_cases.model_of(layer, x)
    model.train_on_batch(x, layer_cases.ramp(model, x))

    assert keras_adafisher.coverage(model).factored_fraction == 1.0
    s_of_cell = {}
    for variable, gradient in zip(layer.weights, gradients, strict=True):
        cell, _, name = variable.path.rpartition("/")
        if name == "bias":
            # After the cell's kernels.
            expected = running(1.0) * s_of_cell[cell] + DAMPING
            expected = np.broadcast_to(expected, gradient.shape)
        else:
            expected, s = estimate(gradient)
        if name == "kernel":
            s_of_cell[cell] = s
        layer_cases.assert_fisher(model, variable, expected, rtol=2e-3)


def test_the_estimate_of_one_row_is_exact(rng):
    x = sequences("SimpleRNN", rng, examples=1, steps=1)
    layer = keras.layers.SimpleRNN(4)
    # The bias is added to the pre-activation, so its gradient is `s`.
    *_, s = layer_cases.parameter_gradients(layer, x)
    model = layer_cases.model_of(layer, x)
    model.train_on_batch(x, layer_cases.ramp(model, x))
    h = running(min_max(x.ravel().astype("float64") ** 2))
    s = running(min_max(s.astype("float64") ** 2))
    expected = np.outer(h, s) + DAMPING
    kernel, recurrent_kernel, _ = layer.weights
    layer_cases.assert_fisher(model, kernel, expected, rtol=1e-3)
    # The state before the first step is zero, and so is this gradient: no
    # estimate, the factors are still 1.
    layer_cases.assert_fisher(
        model, recurrent_kernel, np.full((4, 4), 1 + DAMPING)
    )


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_wrapping_keeps_the_fused_kernels(name, rng, monkeypatch):
    """The cell runs as often as in a plain layer: on PyTorch never."""
    calls = []
    cell_class = type(LAYERS[name]().cell)
    plain_call = cell_class.call

    def call(self, *args, **kwargs):
        calls.append(self)
        return plain_call(self, *args, **kwargs)

    monkeypatch.setattr(cell_class, "call", call)
    x = sequences(name, rng)
    counts = []
    for optimizer in ("adam", "adafisher"):
        calls.clear()
        model = layer_cases.model_of(LAYERS[name](), x)
        model.compile(optimizer=optimizer, loss=product_loss)
        # TensorFlow would trace Adam's first step twice.
        model.optimizer.build(model.trainable_variables)
        model.fit(x, np.ones_like(model.predict(x, verbose=0)), verbose=0)
        counts.append(len(calls))
    assert counts[0] == counts[1]
    if keras.backend.backend() == "torch":
        assert counts == [0, 0]


def test_wrapping_changes_nothing(rng):
    layer_cases.assert_wrapping_changes_nothing(
        LAYERS["LSTM"], sequences("LSTM", rng)
    )


def test_half_precision(rng):
    layer_cases.assert_trains_in_half_precision(
        LAYERS["GRU"], sequences("GRU", rng)
    )
