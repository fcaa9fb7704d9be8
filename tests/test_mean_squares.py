"""The running mean squares, against numbers that are written out."""

import types

import keras
import numpy as np
import pytest
from keras import ops
from models import mlp
from models import own_variable
from models import to_numpy

import keras_adafisher
from keras_adafisher.optimizer.update_rms import are_measured
from keras_adafisher.optimizer.update_rms import UpdateRMS
from keras_adafisher.wrappers import DenseBlock
from keras_adafisher.wrappers.dense import DenseWrapper


def make(indices=(3,), decay=0.5, interval=2):
    def add_variable(shape, initializer, name):
        return keras.Variable(np.zeros(shape, "float32"), name=name)

    settings = types.SimpleNamespace(
        rms_decay=decay, factor_update_steps=interval
    )
    return UpdateRMS(list(indices), settings, add_variable)


def take_in(mean_squares, squares, update):
    indices, squares = zip(*squares, strict=True)
    squares = ops.convert_to_tensor(squares, "float32")
    average = mean_squares.averaged(squares, list(indices), update)
    mean_squares.variable.assign(average)


# PyTorch counts in Python's numbers, the others in tensors.
@pytest.mark.parametrize("number", [int, ops.convert_to_tensor])
def test_a_measurement_counts_until_the_next(number):
    """In the end, 4, 8, 16, 16, 32, 32, each twice as heavy as the last."""
    mean_squares = make()
    squares = {0: 4.0, 1: 8.0, 2: 16.0, 4: 32.0}
    roots = []
    for update in range(5):
        is_measured = bool(are_measured(number(update), 2))
        assert is_measured == (update in squares)
        if is_measured:
            take_in(mean_squares, [(3, squares[update])], number(update))
        root = mean_squares.of(mean_squares.roots(number(update), 0.0), 3)
        roots.append(float(to_numpy(root)))
    expected = [4, 20 / 3, 26.5 / 1.875, 26.5 / 1.875, 54.625 / 1.96875]
    np.testing.assert_allclose(np.square(roots), expected, rtol=1e-6)


def test_epsilon_is_added_before_the_correction():
    mean_squares = make()
    take_in(mean_squares, [(3, 16.0)], 0)
    # (sqrt(0.5 * 16) + 1) / sqrt(0.5)
    (root,) = to_numpy(mean_squares.roots(0, 1.0))
    assert root == pytest.approx(4 + 2**0.5)


def test_what_is_not_finite_or_missing_changes_nothing():
    mean_squares = make(indices=(0, 2, 5))
    take_in(mean_squares, [(0, 2.0), (2, 4.0), (5, 6.0)], 0)
    take_in(mean_squares, [(0, np.inf), (2, np.nan)], 1)
    np.testing.assert_array_equal(to_numpy(mean_squares.variable), [1, 2, 3])


@pytest.mark.parametrize("number", [int, ops.convert_to_tensor])
def test_a_counter_that_ran_over_corrects_nothing(number):
    mean_squares = make()
    mean_squares.variable.assign([9.0])
    roots = mean_squares.roots(number(-(2**31) + 1), 0.0)
    np.testing.assert_allclose(to_numpy(roots), [3.0], rtol=1e-6)


def test_a_parameter_without_a_gradient_keeps_its_mean_square():
    model = mlp()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=1)
    optimizer.build(model.trainable_variables)
    weights = model.weights
    optimizer.apply([ops.ones(w.shape) for w in weights], weights)
    variable = own_variable(optimizer, "mean_squares")
    before = to_numpy(variable)
    assert np.all(before > 0)
    optimizer.apply([3 * ops.ones(w.shape) for w in weights[:2]], weights[:2])
    after = to_numpy(variable)
    assert np.all(after[:2] > before[:2])
    np.testing.assert_array_equal(after[2:], before[2:])


class Doubled(keras.layers.Dense):
    """A layer that its author factors."""


class DoubledBlock(DenseBlock):
    def operands_of_weight(self, activation, gradient):
        return 2 * activation, gradient


@keras_adafisher.register_wrapper(Doubled)
class DoubledWrapper(DenseWrapper):
    def make_blocks(self):
        layer = self.host
        return [DoubledBlock(layer.kernel, layer.bias, *layer.kernel.shape)]


def layers():
    inputs = keras.Input((6, 6, 4))
    x = keras.layers.Conv2D(6, 3, padding="same")(inputs)
    x = keras.layers.Conv2D(6, 2, groups=2, activation="tanh")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.DepthwiseConv2D(2)(x)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.EinsumDense(
        "bijc,cde->bijde", (4, 4, 3, 5), bias_axes="de"
    )(x)
    x = keras.layers.Flatten()(x)
    # A kernel with more than 1,024 entries, and some with fewer.
    x = keras.layers.Dense(7, "tanh")(x)
    x = Doubled(6)(x)
    return keras.Model(inputs, keras.layers.Dense(5)(x))


def tied_embedding():
    """Its Fisher diagonal is the sum of two."""
    inputs = keras.Input((4,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(11, 6)
    x = keras.layers.Dense(6, "tanh")(embedding(inputs))
    return keras.Model(inputs, embedding(x, reverse=True))


@pytest.mark.parametrize("make_model", [layers, tied_embedding])
def test_the_first_step(make_model, rng):
    """It is `g / F`, divided by its root mean square and bounded by 1."""
    plain = make_model()
    model = make_model()
    before = plain.get_weights()
    model.set_weights(before)
    if make_model is layers:
        x = rng.normal(size=(8, 6, 6, 4)).astype("float32")
    else:
        x = rng.integers(11, size=(8, 4)).astype("int32")
    # So large that `epsilon` doesn't count.
    y = 100 * rng.normal(size=(8, *plain.output_shape[1:])).astype("float32")
    plain.compile(keras.optimizers.SGD(1.0), loss="mse")
    plain.train_on_batch(x, y)
    optimizer = keras_adafisher.AdaFisher(1e-3)
    model.compile(optimizer, loss="mse")
    model.train_on_batch(x, y)
    trainable = {id(v) for v in plain.trainable_variables}
    for variable, other, old in zip(
        model.weights, plain.weights, before, strict=True
    ):
        if id(other) not in trainable:
            continue
        gradient = old - to_numpy(other)
        quotient = gradient / to_numpy(optimizer.preconditioner(variable))
        wanted = quotient / np.sqrt(np.mean(np.square(quotient)))
        np.testing.assert_allclose(
            (old - to_numpy(variable)) / 1e-3,
            np.clip(wanted, -1, 1),
            rtol=2e-3,
            atol=1e-3,
            err_msg=variable.path,
        )
