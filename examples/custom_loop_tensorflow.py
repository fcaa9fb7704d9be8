"""AdaFisher in a training loop of one's own, with TensorFlow.

    python examples/custom_loop_tensorflow.py

As in Keras' guide "Writing a training loop from scratch in TensorFlow". The
lines that AdaFisher needs are marked.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf
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
    batches = tf.data.Dataset.from_tensor_slices((x_train, y_train))
    batches = batches.shuffle(len(x_train)).batch(64)
    model = make_model()
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    keras_adafisher.wrap(model)  # AdaFisher
    optimizer = keras_adafisher.AdaFisher()  # AdaFisher
    optimizer.build(model.trainable_variables)

    @tf.function
    @keras_adafisher.training_step(optimizer)  # AdaFisher
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    for epoch in range(epochs):
        print(f"Epoch {epoch + 1}/{epochs}")
        bar = keras.utils.Progbar(len(batches))
        for step, (x, y) in enumerate(batches):
            loss = train_step(x, y)
            bar.update(step + 1, values=[("loss", float(loss))])

    predicted = np.argmax(model(x_val, training=False), axis=-1)
    accuracy = np.mean(predicted == y_val)
    print(f"Validation accuracy: {100 * accuracy:.2f} %")


if __name__ == "__main__":
    main()
