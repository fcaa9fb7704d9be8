"""PReLU: the slope is the scale of the negative part."""

import keras
import layer_cases
import numpy as np
import pytest
from layer_cases import DAMPING
from layer_cases import running
from reference import min_max

SHARED = [None, [1], [1, 2], 3]


def make_layer(shared_axes=None, **kwargs):
    return keras.layers.PReLU(
        alpha_initializer="ones", shared_axes=shared_axes, **kwargs
    )


@pytest.mark.parametrize("shared_axes", SHARED, ids=str)
def test_fisher_diagonal_of_the_slope(shared_axes, rng):
    x = rng.normal(size=(4, 3, 2, 5)).astype("float32")
    layer = make_layer(shared_axes)
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    shared = shared_axes if isinstance(shared_axes, list) else [shared_axes]
    over = tuple([0, *(axis for axis in shared if axis)])
    h = np.where(x < 0, x.astype("float64"), 0.0)
    h = np.mean(h**2, axis=over, keepdims=True)[0]
    s = np.mean(s**2, axis=over, keepdims=True)[0]
    fisher = running(min_max(h)) * running(min_max(s)) + DAMPING
    layer_cases.assert_fisher(model, layer.alpha, fisher)


def test_wrapping_changes_neither_outputs_nor_gradients(rng):
    x = rng.normal(size=(4, 3, 5)).astype("float32")
    layer_cases.assert_wrapping_changes_nothing(lambda: make_layer([1]), x)


def test_statistics_are_float32_in_half_precision(rng):
    x = rng.normal(size=(4, 3, 5)).astype("float32")
    layer_cases.assert_trains_in_half_precision(make_layer, x)


def test_two_calls_are_averaged(rng):
    x = rng.normal(size=(6, 4)).astype("float32")
    layer = make_layer()
    inputs = keras.Input((4,))
    outputs = keras.layers.Concatenate()([layer(inputs), layer(-inputs)])
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=layer_cases.make_optimizer(), loss=layer_cases.product_loss
    )
    s = layer_cases.train_once(model, x, rng)
    h = np.concatenate([np.minimum(x, 0), np.minimum(-x, 0)]).astype("float64")
    s = np.concatenate([s[:, :4], s[:, 4:]])
    fisher = running(min_max(np.mean(h**2, axis=0)))
    fisher = fisher * running(min_max(np.mean(s**2, axis=0))) + DAMPING
    layer_cases.assert_fisher(model, layer.alpha, fisher)
