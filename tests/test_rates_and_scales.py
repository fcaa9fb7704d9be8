"""What else may scale a step: a subclass, the loss, the precision of floats."""

import keras
import numpy as np
import pytest
from models import assert_same
from models import cross_entropy
from models import data
from models import mlp
from models import to_numpy
from models import weights

import keras_adafisher


class BiasesOnly(keras_adafisher.AdaFisher):
    """A learning rate for each variable: none for kernels."""

    def update_step(self, gradient, variable, learning_rate):
        is_matrix = len(variable.shape) == 2
        super().update_step(
            gradient, variable, learning_rate * (0.0 if is_matrix else 1.0)
        )


@pytest.mark.parametrize("rms_decay", [0.99, None])
def test_a_subclass_may_scale_the_learning_rate_of_each_variable(rms_decay):
    model = mlp()
    optimizer = BiasesOnly(1e-2, rms_decay=rms_decay)
    model.compile(optimizer, loss=cross_entropy())
    before = weights(model)
    model.train_on_batch(*data())
    for old, new in zip(before, weights(model), strict=True):
        assert np.any(new != old) == (new.ndim == 1)


@pytest.mark.parametrize("scale", [2.0**15, 2.0**-6])
def test_the_scale_of_a_loss_scale_optimizer_leaves_epsilon_alone(scale):
    """As published, `epsilon` is added to a mean square of the plain loss."""

    def fishers(wrap):
        keras.utils.set_random_seed(0)
        model = mlp()
        optimizer = keras_adafisher.AdaFisher(
            factor_update_steps=1,
            epsilon=1e-4,
            normalization="min_max",
            rms_decay=None,
        )
        model.compile(wrap(optimizer), loss=cross_entropy())
        for _ in range(3):
            model.train_on_batch(*data())
        return [to_numpy(optimizer.preconditioner(v)) for v in model.weights]

    plain = fishers(lambda optimizer: optimizer)
    scaled = fishers(
        lambda optimizer: keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=scale
        )
    )
    for actual, expected in zip(scaled, plain, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_state_of_one_normalization_loads_under_another():
    """The factors have one order, whatever they are normalized by."""
    fishers, optimizers = [], []
    for normalization in ("mean", "min_max"):
        keras.utils.set_random_seed(0)
        model = mlp()
        optimizer = keras_adafisher.AdaFisher(normalization=normalization)
        model.compile(optimizer, loss=cross_entropy())
        model.train_on_batch(*data())
        if optimizers:
            values = [to_numpy(v) for v in optimizers[0].variables]
            optimizer.set_weights(values)
        optimizers.append(optimizer)
        fishers.append(
            [to_numpy(optimizer.preconditioner(v)) for v in model.weights]
        )
    assert_same(*fishers)


def test_training_in_bfloat16_throughout():
    before = keras.config.floatx()
    keras.config.set_floatx("bfloat16")
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = mlp()
        optimizer = keras_adafisher.AdaFisher()
        model.compile(optimizer, loss="mse")
        x, y = data()
        model.fit(x, np.eye(3)[y], verbose=0)
        fisher = to_numpy(optimizer.preconditioner(model.layers[0].kernel))
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy("float32")
    assert fisher.max() > 1.2 * fisher.min()
    assert np.all(np.isfinite(fisher.astype("float32")))
