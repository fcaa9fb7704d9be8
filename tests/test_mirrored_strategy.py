"""`tf.distribute.MirroredStrategy`: collected for TensorFlow only."""

import functools

import keras
import numpy as np
import tensorflow as tf
from models import assert_close
from models import cnn
from models import cross_entropy
from models import data
from models import image_data
from models import mlp
from models import to_numpy
from models import weights

import keras_adafisher

STEPS = 12


def train(strategy, make_model, batches):
    """Weights and Fisher diagonals after one step per batch."""
    with strategy.scope():
        model = make_model()
        optimizer = keras_adafisher.AdaFisher(factor_update_steps=4)
        model.compile(optimizer, loss=cross_entropy())
    rng = np.random.default_rng(3)
    model.set_weights([rng.uniform(size=w.shape) for w in model.get_weights()])
    for x, y in batches:
        model.train_on_batch(x, y)
    diagonals = [
        to_numpy(optimizer.fisher_diagonal(v))
        for v in model.weights
        if v.trainable
    ]
    return weights(model), diagonals


# TensorFlow's collectives of two strategies on the same devices get into each
# other's way.
@functools.cache
def mirrored():
    devices = [d.name for d in tf.config.list_logical_devices("CPU")]
    assert len(devices) == 2
    return tf.distribute.MirroredStrategy(devices)


def test_two_replicas_give_the_weights_of_one_device():
    x, y = data(examples=16 * STEPS)
    batches = list(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))
    one, factors_of_one = train(tf.distribute.get_strategy(), mlp, batches)
    two, factors_of_two = train(mirrored(), mlp, batches)
    assert_close(two, one, 1e-6)
    assert_close(factors_of_two, factors_of_one, 1e-6)


def test_convolutions_and_normalization_layers():
    """Without batch statistics, which differ between replicas in Keras."""

    def model():
        model = cnn()
        model.layers[1].trainable = False
        return model

    x, y = image_data(examples=16 * STEPS)
    batches = list(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))
    one, _ = train(tf.distribute.get_strategy(), model, batches)
    two, _ = train(mirrored(), model, batches)
    assert_close(two, one, 1e-6)


def test_fit_under_the_strategy():
    x, y = data()
    with mirrored().scope():
        model = mlp()
        model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]


def test_wrapping_outside_of_the_scope():
    """The probes join the strategy of the weights, not the current one."""
    with mirrored().scope():
        model = mlp()
    keras_adafisher.wrap(model)
    for variable in model.trainable_variables:
        assert variable.value.distribute_strategy.num_replicas_in_sync == 2


def test_a_layer_that_is_built_late():
    x, y = data()
    with mirrored().scope():
        model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3)])
        model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    model.fit(x, y, batch_size=16, verbose=0)
    assert len(model.optimizer.variables) > 0
    to_numpy(model.optimizer.fisher_diagonal(model.layers[0].kernel))


def test_factors_that_are_estimated_from_gradients():
    """From the gradient of the whole batch, not of a replica's part."""

    def model():
        return keras.Sequential(
            [
                keras.Input((4, 3)),
                keras.layers.GRU(3),
                keras.layers.Dense(3),
            ]
        )

    rng = np.random.default_rng(0)
    x = rng.normal(size=(16 * STEPS, 4, 3)).astype("float32")
    y = rng.integers(0, 3, size=16 * STEPS)
    batches = list(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))
    one, factors_of_one = train(tf.distribute.get_strategy(), model, batches)
    two, factors_of_two = train(mirrored(), model, batches)
    assert_close(two, one, 1e-6)
    assert_close(factors_of_two, factors_of_one, 1e-6)
