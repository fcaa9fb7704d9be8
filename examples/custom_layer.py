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

Trains a network of such layers on scikit-learn's digits, three times without
the wrapper and three times with it, and prints what each parameter's update is
and a table of both. The optimizer is the one that docs/quality.md recommends
for little data and many epochs.
"""

import argparse

import keras
import numpy as np
import rich.console
import rich.table
import sklearn.datasets
import sklearn.model_selection
from keras import ops

import keras_adafisher
from keras_adafisher.wrappers import DenseBlock

BATCH = 32


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


def schedule(peak, steps):
    """A learning rate that warms up over 5 % of the steps, then falls to 0."""
    warmup = max(1, steps // 20)
    return keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=peak, warmup_steps=warmup
    )


def train(seed, epochs):
    """Train the network from scratch.

    Returns:
        The trained model and the last entry of each line of its history.
    """
    x_train, x_val, y_train, y_val = load_digits()
    keras.utils.set_random_seed(seed)
    steps = epochs * -(-len(x_train) // BATCH)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            GatedDense(64),
            GatedDense(64),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        keras_adafisher.AdaFisherW(schedule(1e-2, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        x_train,
        y_train,
        batch_size=BATCH,
        epochs=epochs,
        validation_data=(x_val, y_val),
        verbose=2,
    )
    return model, {key: line[-1] for key, line in history.history.items()}


def main():
    """Train without the wrapper and with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="less than a minute"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs, arguments.seeds = 5, 1

    table = rich.table.Table(
        title=f"GatedDense, {arguments.epochs} epochs, runs: "
        f"{arguments.seeds}, {keras.backend.backend()}"
    )
    table.add_column("Wrapper")
    table.add_column("With factors", justify="right")
    table.add_column("Training loss", justify="right")
    table.add_column("Validation accuracy", justify="right")
    shares, losses = [], []
    for has_wrapper in (False, True):
        if has_wrapper:
            register = keras_adafisher.register_wrapper(GatedDense)
            register(GatedDenseWrapper)
        name = "GatedDenseWrapper" if has_wrapper else "none"
        print(f"\nWrapper: {name}")
        ends = []
        for seed in range(arguments.seeds):
            model, end = train(seed, arguments.epochs)
            ends.append(end)
        coverage = keras_adafisher.coverage(model)
        print(f"\n{coverage}")
        shares.append(f"{100 * coverage.factored_fraction:.1f} %")
        losses.append(f"{np.mean([end['loss'] for end in ends]):.4f}")
        accuracy = np.mean([end["val_accuracy"] for end in ends])
        table.add_row(name, shares[-1], losses[-1], f"{100 * accuracy:.2f} %")
    rich.console.Console().print(table)
    print(
        f"Shown: the wrapper gives {shares[1]} of the parameters factors, in "
        f"place of {shares[0]}. The training loss ends at {losses[1]} with it "
        f"and at {losses[0]} without."
    )


if __name__ == "__main__":
    main()
