"""Which update suits the kernels of a recurrent layer?

An LSTM reads scikit-learn's digits row by row. It is trained with each of four
updates of its kernels and several learning rates; then a training step of each
is timed. `--gamma` sets both `gamma_1` and `gamma_2`: with 0.1 the factors
fill the range from 0 to 1, and more than the damping shows.

    KERAS_BACKEND=jax python benchmarks/recurrent.py
    KERAS_BACKEND=jax python benchmarks/recurrent.py --gamma 0.1 --damping 0.1

Updates:

- `Adam`: Adam for the whole model.
- `AdamW's rule`: AdaFisher, but the LSTM has no factors.
- `estimated`: AdaFisher, and the LSTM's factors come from its kernels'
  gradients. This is what the package does.
- `measured`: AdaFisher with taps in the cell, which therefore has to run step
  by step.
"""

import argparse
import statistics
import time

import keras
import numpy as np
import rich
from keras import ops
from rich.table import Table
from sklearn.datasets import load_digits

import keras_adafisher
from keras_adafisher.wrappers import DenseBlock

UNITS, BATCH = 64, 32


class PlainCell(keras.layers.LSTMCell):
    """A cell without factors, since it overrides `call`."""

    def call(self, inputs, states, training=False):
        return super().call(inputs, states, training=training)


class MeasuredCell(PlainCell):
    """The same, with a wrapper of its own."""


@keras_adafisher.register_wrapper(MeasuredCell)
class MeasuredCellWrapper(keras_adafisher.LayerWrapper):
    def make_blocks(self):
        kernel, recurrent = self.host.kernel, self.host.recurrent_kernel
        return [
            DenseBlock(kernel, self.host.bias, *kernel.shape),
            DenseBlock(recurrent, None, *recurrent.shape),
        ]

    def call(self, inputs, states, training=False):
        cell = self.host
        h, c = states
        z = self.tap(ops.matmul(inputs, cell.kernel) + cell.bias, inputs, 0)
        z = z + self.tap(ops.matmul(h, cell.recurrent_kernel), h, 1)
        i, f, g, o = ops.split(z, 4, axis=-1)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
        return h, [h, c]


LAYERS = {
    "Adam": lambda: keras.layers.LSTM(UNITS),
    "AdamW's rule": lambda: keras.layers.RNN(PlainCell(UNITS)),
    "estimated": lambda: keras.layers.LSTM(UNITS),
    "measured": lambda: keras.layers.RNN(MeasuredCell(UNITS)),
}


def make_model(update, rate, arguments):
    if update == "Adam":
        optimizer = keras.optimizers.Adam(rate)
    else:
        # As published but for what the command line says.
        optimizer = keras_adafisher.AdaFisher.as_published(
            learning_rate=rate,
            damping=arguments.damping,
            factor_update_steps=arguments.factor_update_steps,
            epsilon=0.0,
        )
        if arguments.gamma is not None:
            optimizer.gamma_1 = optimizer.gamma_2 = arguments.gamma
    inputs = keras.Input((8, 8))
    outputs = keras.layers.Dense(10)(LAYERS[update]()(inputs))
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(data, arguments):
    x, y = data
    train, test = slice(0, 44 * BATCH), slice(44 * BATCH, None)
    table = Table(title=f"LSTM on digits, {keras.backend.backend()}")
    for column in ("Update", "Learning rate", "Training loss", "Accuracy"):
        table.add_column(column)
    for update in LAYERS:
        for rate in arguments.rates:
            losses, accuracies = [], []
            for seed in range(arguments.seeds):
                keras.utils.set_random_seed(seed)
                model = make_model(update, rate, arguments)
                history = model.fit(
                    x[train],
                    y[train],
                    batch_size=BATCH,
                    epochs=arguments.epochs,
                    verbose=0,
                )
                losses.append(history.history["loss"][-1])
                _, accuracy = model.evaluate(x[test], y[test], verbose=0)
                accuracies.append(accuracy)
            table.add_row(
                update, f"{rate:g}", spread(losses), spread(accuracies)
            )
    rich.print(table)


def time_steps(data, arguments):
    x, y = data
    batch = x[:BATCH], y[:BATCH]
    models = {name: make_model(name, 1e-3, arguments) for name in LAYERS}
    seconds = {name: [] for name in LAYERS}
    for step in range(arguments.steps + 10):
        for name, model in models.items():
            start = time.perf_counter()
            model.train_on_batch(*batch)
            if step >= 10:
                seconds[name].append(time.perf_counter() - start)
    table = Table(title="A training step, relative to Adam's next to it")
    table.add_column("Update")
    table.add_column("Ratio")
    for name in LAYERS:
        ratios = np.divide(seconds[name], seconds["Adam"])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        table.add_row(name, f"{middle:.2f} (quartiles {low:.2f}, {high:.2f})")
    rich.print(table)


def spread(values):
    middle = statistics.median(values)
    return f"{middle:.4f} ({min(values):.4f} to {max(values):.4f})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    rates = [3e-4, 1e-3, 3e-3, 1e-2]
    parser.add_argument("--rates", nargs="+", type=float, default=rates)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--gamma", type=float)
    parser.add_argument("--factor-update-steps", type=int, default=10)
    arguments = parser.parse_args()
    x, y = load_digits(return_X_y=True)
    data = (x.reshape(-1, 8, 8) / 16).astype("float32"), y
    time_steps(data, arguments)
    train(data, arguments)


if __name__ == "__main__":
    main()
