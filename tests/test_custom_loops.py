"""Training loops of one's own, as in Keras' three guides.

Each ends with the weights that `fit` gives.
"""

import keras
import numpy as np
from models import assert_close
from models import cnn
from models import cross_entropy
from models import image_data
from models import weights

import keras_adafisher

BATCH = 16


def make():
    keras.utils.set_random_seed(5)
    return cnn(), keras_adafisher.AdaFisher(factor_update_steps=2)


def batches():
    x, y = image_data()
    for start in range(0, len(x), BATCH):
        yield x[start : start + BATCH], y[start : start + BATCH]


def with_gradient_tape(model, optimizer, loss_fn):
    import tensorflow as tf

    @tf.function
    @keras_adafisher.training_step(optimizer)
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_weights)
        optimizer.apply(gradients, model.trainable_weights)

    for x, y in batches():
        step(tf.constant(x), tf.constant(y))


def with_stateless_calls(model, optimizer, loss_fn):
    import jax

    def loss_and_updates(trainable, non_trainable, x, y):
        z, non_trainable = model.stateless_call(
            trainable, non_trainable, x, training=True
        )
        return loss_fn(y, z), non_trainable

    gradient_fn = jax.value_and_grad(loss_and_updates, has_aux=True)

    @jax.jit
    @keras_adafisher.training_step(optimizer)
    def step(state, x, y):
        trainable, non_trainable, optimizer_variables = state
        (_, non_trainable), gradients = gradient_fn(
            trainable, non_trainable, x, y
        )
        trainable, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        return trainable, non_trainable, optimizer_variables

    optimizer.build(model.trainable_variables)
    lists = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
    state = [[v.value for v in variables] for variables in lists]
    for x, y in batches():
        state = step(state, x, y)
    for variables, values in zip(lists, state, strict=True):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def with_backward(model, optimizer, loss_fn):
    import torch

    for x, y in batches():
        z = model(torch.from_numpy(x), training=True)
        loss = loss_fn(torch.from_numpy(y), z)
        model.zero_grad()
        loss.backward()
        variables = list(model.trainable_weights)
        gradients = [v.value.grad for v in variables]
        with torch.no_grad():
            optimizer.apply(gradients, variables)


LOOP = {
    "tensorflow": with_gradient_tape,
    "jax": with_stateless_calls,
    "torch": with_backward,
}[keras.backend.backend()]


def test_a_custom_loop_gives_the_weights_of_fit():
    model, optimizer = make()
    start = weights(model)
    keras_adafisher.wrap(model)
    LOOP(model, optimizer, cross_entropy())

    fitted, optimizer = make()
    fitted.compile(optimizer, loss=cross_entropy())
    x, y = image_data()
    fitted.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    assert_close(weights(model), weights(fitted), 1e-6)
    assert not np.allclose(weights(model)[0], start[0])


def test_other_optimizers_train_a_wrapped_model_as_a_plain_one():
    """Probes are marked as no parameters, and Keras optimizers heed it."""

    def run(is_wrapped):
        keras.utils.set_random_seed(5)
        model = cnn()
        if is_wrapped:
            keras_adafisher.wrap(model)
        LOOP(model, keras.optimizers.Adam(), cross_entropy())
        return weights(model)

    assert_close(run(True), run(False), 1e-6)
