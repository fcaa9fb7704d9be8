import keras
import numpy as np
import pytest
import reference
from models import assert_same
from models import PLAIN
from models import product_loss
from models import to_numpy

import keras_adafisher


def train_once(layer, x, r, epsilon=0.0):
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    optimizer = keras_adafisher.AdaFisher(
        damping=0.01, gamma_1=0.9, gamma_2=0.1, epsilon=epsilon, **PLAIN
    )
    model.compile(optimizer, loss=product_loss)
    model.train_on_batch(x, r)
    return optimizer


def expected_fisher(h_rows, s_rows, epsilon=0.0):
    factors = reference.ScaleFactors(h_rows.shape[-1])
    factors.update(h_rows, s_rows, 0.9, 0.1, epsilon)
    return factors.fisher(damping=0.01)


def check(optimizer, layer, scale, shift):
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.gamma)), scale, rtol=1e-5
    )
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.beta)), shift, rtol=1e-5
    )


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize(
    "make_layer",
    [keras.layers.BatchNormalization, keras.layers.LayerNormalization],
)
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_fisher_diagonal_of_the_last_axis(make_layer, shape, epsilon, rng):
    layer = make_layer()
    x = rng.normal(2.0, 3.0, size=(5, *shape)).astype("float32")
    r = rng.normal(size=x.shape).astype("float32")
    optimizer = train_once(layer, x, r, epsilon)
    check(
        optimizer,
        layer,
        *expected_fisher(
            reference.rows(x), reference.rows(r / r.size), epsilon
        ),
    )


def test_batch_normalization_of_another_axis(rng):
    layer = keras.layers.BatchNormalization(axis=1)
    x = rng.normal(size=(5, 4, 3)).astype("float32")
    r = rng.normal(size=x.shape).astype("float32")
    optimizer = train_once(layer, x, r)
    rows = [reference.rows(np.moveaxis(a, 1, -1)) for a in (x, r / r.size)]
    check(optimizer, layer, *expected_fisher(*rows))


@pytest.mark.parametrize("axis", [(1, 2), (-1, -2), (2,)])
def test_layer_normalization_of_several_axes(axis, rng):
    layer = keras.layers.LayerNormalization(axis=axis)
    x = rng.normal(size=(5, 3, 4)).astype("float32")
    r = rng.normal(size=x.shape).astype("float32")
    optimizer = train_once(layer, x, r)
    if len(axis) == 2:
        rows = [a.reshape(5, 12) for a in (x, r / r.size)]
    else:
        rows = [reference.rows(a) for a in (x, r / r.size)]
    expected = expected_fisher(*rows)
    check(optimizer, layer, *(f.reshape(layer.gamma.shape) for f in expected))


def test_scale_only_and_shift_only(rng):
    x = rng.normal(size=(5, 4)).astype("float32")
    r = rng.normal(size=x.shape).astype("float32")
    scale, shift = expected_fisher(x, r / r.size)
    layer = keras.layers.BatchNormalization(center=False)
    optimizer = train_once(layer, x, r)
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.gamma)), scale, rtol=1e-5
    )
    layer = keras.layers.BatchNormalization(scale=False)
    optimizer = train_once(layer, x, r)
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.beta)), shift, rtol=1e-5
    )


def test_a_layer_without_parameters_is_left_alone(rng):
    layer = keras.layers.BatchNormalization(center=False, scale=False)
    layer.build((None, 4))
    keras_adafisher.wrap(layer)
    assert layer.trainable_variables == []


@pytest.mark.parametrize(
    "make_layer",
    [keras.layers.BatchNormalization, keras.layers.LayerNormalization],
)
def test_outputs_and_moving_averages_are_those_of_the_plain_layer(
    make_layer, rng
):
    x = rng.normal(2.0, 3.0, size=(8, 4)).astype("float32")

    def run(optimizer):
        layer = make_layer()
        model = keras.Sequential([keras.Input((4,)), layer])
        layer.trainable = False
        model.compile(optimizer, loss="mse")
        outputs = [
            to_numpy(model(x, training=training)) for training in (True, False)
        ]
        return outputs + layer.get_weights()

    assert_same(run(keras_adafisher.AdaFisher()), run("sgd"))
