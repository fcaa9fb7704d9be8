"""GroupNormalization and RMSNormalization: a scale per channel."""

import keras
import layer_cases
import numpy as np
import pytest
from models import to_numpy
from reference import ScaleFactors

import keras_adafisher


def expected_fisher(x, s, axis):
    """Fisher diagonals of scale and shift, from rows over all other axes."""
    channels = np.prod([np.shape(x)[a] for a in axis])
    last = range(-len(axis), 0)
    rows = [
        np.moveaxis(np.asarray(v, "float64"), axis, last).reshape(-1, channels)
        for v in (x, s)
    ]
    factors = ScaleFactors(channels)
    factors.update(*rows, layer_cases.GAMMA_1, layer_cases.GAMMA_2)
    return factors.fisher(layer_cases.DAMPING)


CASES = {
    "group": ({"groups": 2}, (3, 5, 4), -1),
    "group_images": ({"groups": 2}, (2, 3, 3, 4), -1),
    "group_channels_first": ({"groups": 3, "axis": 1}, (2, 6, 5), 1),
    "group_instance": ({"groups": -1}, (3, 5, 4), -1),
    "group_scale_only": ({"groups": 2, "center": False}, (3, 5, 4), -1),
    "group_shift_only": ({"groups": 2, "scale": False}, (3, 5, 4), -1),
}


def make_group(case, **kwargs):
    return keras.layers.GroupNormalization(**CASES[case][0], **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_group_normalization_has_factors_per_channel(case, rng):
    _, shape, axis = CASES[case]
    x = rng.normal(size=shape).astype("float32")
    layer = make_group(case)
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    scale, shift = expected_fisher(x, s, (axis,))
    if layer.gamma is not None:
        layer_cases.assert_fisher(model, layer.gamma, scale)
    if layer.beta is not None:
        layer_cases.assert_fisher(model, layer.beta, shift)


def test_without_scale_and_shift_there_is_nothing_to_wrap():
    layer = keras.layers.GroupNormalization(2, center=False, scale=False)
    layer.build((None, 4))
    keras_adafisher.wrap(layer)
    assert layer.variables == []


@pytest.mark.parametrize("axis", [-1, 2, (1, 2), (-2, -1)])
def test_rms_normalization_has_factors_per_channel(axis, rng):
    x = rng.normal(size=(3, 5, 4)).astype("float32")
    layer = keras.layers.RMSNormalization(axis=axis)
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    axes = (axis,) if isinstance(axis, int) else axis
    scale, _ = expected_fisher(x, s, axes)
    layer_cases.assert_fisher(
        model, layer.scale, scale.reshape(layer.scale.shape)
    )


def test_two_calls_are_averaged(rng):
    x = rng.normal(size=(6, 4)).astype("float32")
    layer = keras.layers.RMSNormalization()
    inputs = keras.Input((4,))
    outputs = keras.layers.Concatenate()([layer(inputs), layer(3.0 * inputs)])
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=layer_cases.make_optimizer(), loss=layer_cases.product_loss
    )
    s = layer_cases.train_once(model, x, rng)
    scale, _ = expected_fisher(
        np.concatenate([x, 3.0 * x]),
        np.concatenate([s[:, :4], s[:, 4:]]),
        (-1,),
    )
    layer_cases.assert_fisher(model, layer.scale, scale)


@pytest.mark.parametrize(
    "make_layer",
    [
        lambda **kwargs: make_group("group", **kwargs),
        keras.layers.RMSNormalization,
    ],
    ids=["group", "rms"],
)
class TestBoth:
    def test_wrapping_changes_neither_outputs_nor_gradients(
        self, make_layer, rng
    ):
        x = rng.normal(size=(3, 5, 4)).astype("float32")
        layer_cases.assert_wrapping_changes_nothing(make_layer, x)

    def test_statistics_are_float32_in_half_precision(self, make_layer, rng):
        x = rng.normal(size=(3, 5, 4)).astype("float32")
        layer_cases.assert_trains_in_half_precision(make_layer, x)

    def test_large_half_precision_activations_do_not_overflow(
        self, make_layer, rng
    ):
        # 300² is too much for float16.
        x = (300 * rng.normal(size=(3, 5, 4))).astype("float32")
        layer = make_layer(dtype="mixed_float16")
        model = layer_cases.model_of(layer, x)
        model.train_on_batch(x, np.ones((3, 5, 4), "float32"))
        factors = model.optimizer.factors(layer.trainable_variables[0])
        h = np.mean(x.astype("float64") ** 2, axis=(0, 1))
        h = (h - h.min()) / (h.max() - h.min())
        np.testing.assert_allclose(
            to_numpy(factors.activation), layer_cases.running(h), rtol=1e-3
        )
