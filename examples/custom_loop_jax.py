"""AdaFisher in a training loop of one's own, with JAX.

    python examples/custom_loop_jax.py

As in Keras' guide "Writing a training loop from scratch in JAX": model and
optimizer are called without state, and the state is passed along. The lines
that AdaFisher needs are marked.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from digits import load_digits
from digits import make_model

import keras_adafisher


def main():
    """Train and validate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs

    x_train, x_val, y_train, y_val = load_digits()
    keras.utils.set_random_seed(0)
    model = make_model()
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    keras_adafisher.wrap(model)  # AdaFisher
    optimizer = keras_adafisher.AdaFisher()  # AdaFisher
    optimizer.build(model.trainable_variables)

    def loss_and_updates(trainable, non_trainable, x, y):
        logits, non_trainable = model.stateless_call(
            trainable, non_trainable, x, training=True
        )
        return loss_fn(y, logits), non_trainable

    gradient_fn = jax.value_and_grad(loss_and_updates, has_aux=True)

    @jax.jit
    @keras_adafisher.training_step(optimizer)  # AdaFisher
    def train_step(state, x, y):
        trainable, non_trainable, optimizer_variables = state
        (loss, non_trainable), gradients = gradient_fn(
            trainable, non_trainable, x, y
        )
        trainable, optimizer_variables = optimizer.stateless_apply(
            optimizer_variables, gradients, trainable
        )
        return loss, (trainable, non_trainable, optimizer_variables)

    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
    state = jax.tree.map(lambda variable: variable.value, variables)
    rng = np.random.default_rng(0)
    for epoch in range(epochs):
        print(f"Epoch {epoch + 1}/{epochs}")
        order = rng.permutation(len(x_train))
        batches = np.array_split(order, len(order) // 64)
        bar = keras.utils.Progbar(len(batches))
        for step, batch in enumerate(batches):
            loss, state = train_step(state, x_train[batch], y_train[batch])
            bar.update(step + 1, values=[("loss", float(loss))])

    # Back into the model and the optimizer, to predict and to save.
    for each, values in zip(variables, state, strict=True):
        for variable, value in zip(each, values, strict=True):
            variable.assign(value)
    predicted = np.argmax(model.predict(x_val, verbose=0), axis=-1)
    accuracy = np.mean(predicted == y_val)
    print(f"Validation accuracy: {100 * accuracy:.2f} %")


if __name__ == "__main__":
    main()
