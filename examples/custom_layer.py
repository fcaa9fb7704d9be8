"""A layer of one's own, with Kronecker factors of its own.

    KERAS_BACKEND=jax python examples/custom_layer.py

`GatedDense` is a gated linear unit: two dense maps of the same input, one of
which opens and closes the other,

    y = (x A) * sigmoid(x B + b)

AdaFisher doesn't know it, so its weights take AdamW's rule, and
`keras_adafisher.coverage` says so. `GatedDenseWrapper` tells what there is to
know: two linear maps (two blocks), and where their outputs are (two taps). A
tap returns its first argument unchanged. So the wrapper's `call` computes
exactly what the layer's does.

Trains a network of such layers on scikit-learn's digits, first without the
wrapper and then with it, prints what each parameter's update is and a table of
both runs.
"""

import argparse

import keras
import rich.console
import rich.table
import sklearn.datasets
import sklearn.model_selection
from keras import ops

import keras_adafisher
from keras_adafisher.wrappers import DenseBlock


class GatedDense(keras.layers.Layer):
    """Computes `(x A) * sigmoid(x B + b)`."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        shape = (input_shape[-1], self.units)
        self.a = self.add_weight(shape=shape, name="a")
        self.b = self.add_weight(shape=shape, name="b")
        self.bias = self.add_weight(
            shape=(self.units,), initializer="zeros", name="bias"
        )

    def call(self, inputs):
        gate = ops.matmul(inputs, self.b) + self.bias
        return ops.matmul(inputs, self.a) * ops.sigmoid(gate)


# Below, this class is given to `register_wrapper`. In a script that needs no
# comparison, the decorator `@register_wrapper(GatedDense)` does it here.
class GatedDenseWrapper(keras_adafisher.LayerWrapper):
    """Measures both maps of a `GatedDense`."""

    def make_blocks(self):
        inputs, outputs = self.host.a.shape
        return [
            DenseBlock(self.host.a, None, inputs, outputs),
            # A bias has the factor S of the map that it belongs to.
            DenseBlock(self.host.b, self.host.bias, inputs, outputs),
        ]

    def call(self, inputs):
        value = ops.matmul(inputs, self.host.a)
        gate = ops.matmul(inputs, self.host.b) + self.host.bias
        # Each map's output passes through its tap, together with its input.
        value = self.tap(value, inputs, block=0)
        gate = self.tap(gate, inputs, block=1)
        return value * ops.sigmoid(gate)


def load_digits():
    """Training and validation vectors and labels."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    return sklearn.model_selection.train_test_split(
        x.astype("float32") / 16,
        y,
        test_size=0.25,
        random_state=0,
        stratify=y,
    )


def train(epochs):
    """Train the network from scratch.

    Returns:
        The trained model and its history.
    """
    x_train, x_val, y_train, y_val = load_digits()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            GatedDense(64),
            GatedDense(64),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        # the one line that differs
        keras_adafisher.AdaFisher(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        x_train,
        y_train,
        batch_size=32,
        epochs=epochs,
        validation_data=(x_val, y_val),
    )
    return model, history.history


def main():
    """Train without the wrapper and with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()

    table = rich.table.Table(
        title=f"GatedDense, {arguments.epochs} epochs, "
        f"{keras.backend.backend()}"
    )
    table.add_column("Wrapper")
    table.add_column("With factors", justify="right")
    table.add_column("Training loss", justify="right")
    table.add_column("Validation accuracy", justify="right")
    for has_wrapper in (False, True):
        if has_wrapper:
            register = keras_adafisher.register_wrapper(GatedDense)
            register(GatedDenseWrapper)
        name = "GatedDenseWrapper" if has_wrapper else "none"
        print(f"\nWrapper: {name}")
        model, history = train(arguments.epochs)
        coverage = keras_adafisher.coverage(model)
        print(f"\n{coverage}")
        table.add_row(
            name,
            f"{100 * coverage.factored_fraction:.1f} %",
            f"{history['loss'][-1]:.4f}",
            f"{100 * history['val_accuracy'][-1]:.2f} %",
        )
    rich.console.Console().print(table)


if __name__ == "__main__":
    main()
