import keras
import pytest
from models import cnn
from models import probes_in

import keras_adafisher


class Slope(keras.layers.Layer):
    """A layer that nobody has registered a wrapper for."""

    def build(self, shape):
        self.alpha = self.add_weight(shape=(shape[-1],), name="alpha")

    def call(self, x):
        return keras.ops.maximum(x, self.alpha * x)


def small():
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, name="hidden"),
            Slope(name="slope"),
            keras.layers.Dense(2, use_bias=False, name="out"),
        ],
        name="small",
    )


def test_one_row_for_each_trainable_parameter():
    rows = keras_adafisher.coverage(small()).rows
    assert [
        (r.layer, r.parameter, r.shape, r.count, r.factors, r.reason)
        for r in rows
    ] == [
        (
            "small/hidden",
            "small/hidden/kernel",
            (4, 3),
            12,
            "H (4, 1) x S (3,)",
            "",
        ),
        ("small/hidden", "small/hidden/bias", (3,), 3, "H of 1 x S (3,)", ""),
        (
            "small/slope",
            "small/slope/alpha",
            (3,),
            3,
            "",
            "no wrapper for Slope",
        ),
        (
            "small/out",
            "small/out/kernel",
            (3, 2),
            6,
            "H (3, 1) x S (2,)",
            "",
        ),
    ]


def test_factored_fraction_counts_scalars():
    coverage = keras_adafisher.coverage(small())
    assert coverage.factored_fraction == pytest.approx(21 / 24)
    assert keras_adafisher.coverage(cnn()).factored_fraction == 1.0


def test_it_is_the_same_before_and_after_wrapping():
    model = small()
    before = keras_adafisher.coverage(model).rows
    assert probes_in(model) == []
    keras_adafisher.wrap(model)
    assert keras_adafisher.coverage(model).rows == before


def test_frozen_parameters_are_not_listed():
    model = small()
    model.layers[0].trainable = False
    assert len(keras_adafisher.coverage(model).rows) == 2
    for layer in model.layers:
        layer.trainable = False
    coverage = keras_adafisher.coverage(model)
    assert coverage.rows == []
    assert coverage.factored_fraction == 0.0
    assert "0.00% of 0 trainable parameters" in str(coverage)


def test_the_table():
    text = str(keras_adafisher.coverage(small()))
    assert 'Coverage of model "small"' in text
    assert "AdamW: no wrapper for Slope" in text
    assert "Kronecker factors for 87.50% of 24 trainable parameters" in text


def test_a_model_that_is_not_built():
    model = keras.Sequential([keras.layers.Dense(3)], name="late")
    with pytest.raises(ValueError, match="'late' has not yet been built"):
        keras_adafisher.coverage(model)
