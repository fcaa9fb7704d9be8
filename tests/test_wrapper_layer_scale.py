"""A scale per channel that follows no normalization."""

import layer_cases
import numpy as np
import pytest
from keras.src.applications.convnext import LayerScale
from reference import ScaleFactors


def make_layer(**kwargs):
    return LayerScale(0.5, 4, **kwargs)


def expected_fisher(x, s):
    """The Fisher diagonal of a scale of the last axis."""
    factors = ScaleFactors(np.shape(x)[-1])
    rows = (np.reshape(v, (-1, np.shape(x)[-1])) for v in (x, s))
    factors.update(*rows, layer_cases.GAMMA_1, layer_cases.GAMMA_2)
    return factors.fisher(layer_cases.DAMPING)[0]


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 3, 4)])
def test_factors_are_per_channel(shape, rng):
    x = rng.normal(size=shape).astype("float32")
    layer = make_layer()
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    layer_cases.assert_fisher(model, layer.gamma, expected_fisher(x, s))


def test_wrapping_changes_neither_outputs_nor_gradients(rng):
    x = rng.normal(size=(3, 5, 4)).astype("float32")
    layer_cases.assert_wrapping_changes_nothing(make_layer, x)


def test_statistics_are_float32_in_half_precision(rng):
    x = rng.normal(size=(3, 5, 4)).astype("float32")
    layer_cases.assert_trains_in_half_precision(make_layer, x)
