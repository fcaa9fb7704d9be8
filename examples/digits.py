"""AdaFisher and AdaFisherMuon next to Adam on handwritten digits.

    KERAS_BACKEND=jax python examples/digits.py

Trains one small convolutional network with each of them: with Adam at 1e-3,
its default, and at three times that, with AdaFisher at 1e-3 and AdaFisherMuon
at 0.04. One run may be lucky, so there are three seeds of each, the same for
all. All learning rates warm up and fall along the same cosine. The 1,797 images
of 8x8 pixels come with scikit-learn. Prints a table and saves the validation
losses to `digits.png`: the mean of the seeds, in a band from the lowest to the
highest.
"""

import argparse
import statistics
import time

import keras
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table
import sklearn.datasets
import sklearn.model_selection

import keras_adafisher

BATCH = 64
# The rest is a whole number of batches: another size would be compiled too.
VALIDATION = 453
OPTIMIZERS = {
    "Adam, 1e-3": lambda rate: keras.optimizers.Adam(rate(1e-3)),
    "Adam, 3e-3": lambda rate: keras.optimizers.Adam(rate(3e-3)),
    # The one line that differs from a script that uses Adam.
    "AdaFisher": lambda rate: keras_adafisher.AdaFisher(rate(1e-3)),
    "AdaFisherMuon": lambda rate: keras_adafisher.AdaFisherMuon(rate(0.04)),
}
STYLES = {
    "Adam, 1e-3": {"color": "#000000", "linestyle": "--"},
    "Adam, 3e-3": {"color": "#009E73", "linestyle": "-."},
    "AdaFisher": {"color": "#0072B2"},
    "AdaFisherMuon": {"color": "#D55E00", "linewidth": 2.5},
}


def load_digits():
    """Training and validation images and labels."""
    digits = sklearn.datasets.load_digits()
    images = digits.images[..., None].astype("float32") / 16
    return sklearn.model_selection.train_test_split(
        images,
        digits.target,
        test_size=VALIDATION,
        random_state=0,
        stratify=digits.target,
    )


def make_model():
    """The network. Nothing in it knows which optimizer it will meet."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Activation("relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def schedule(peak, steps):
    """A learning rate that warms up over 5 % of the steps, then falls to 0."""
    warmup = max(1, steps // 20)
    return keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=peak, warmup_steps=warmup
    )


class Clock(keras.callbacks.Callback):
    """What the first step takes, with all that is compiled, and all others.

    Attributes:
        first: Float, the seconds from `fit` to the end of the first step.
        others: List of floats, the seconds of each step after it.
    """

    def __init__(self):
        super().__init__()
        self.first, self.others = None, []
        self._start = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        if self.first is not None:
            self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        seconds = time.perf_counter() - self._start
        if self.first is None:
            self.first = seconds
        else:
            self.others.append(seconds)


def train(make_optimizer, seed, epochs):
    """Train the network from scratch.

    Returns:
        The trained model, its history and a `Clock`.
    """
    x_train, x_val, y_train, y_val = load_digits()
    steps = epochs * (len(x_train) // BATCH)
    keras.utils.set_random_seed(seed)
    model = make_model()
    model.compile(
        optimizer=make_optimizer(lambda peak: schedule(peak, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    clock = Clock()
    history = model.fit(
        x_train,
        y_train,
        batch_size=BATCH,
        epochs=epochs,
        verbose=0,
        callbacks=[clock],
        validation_data=(x_val, y_val),
        validation_batch_size=VALIDATION,
    )
    return model, history.history, clock


def main():
    """Train with all optimizers and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", default="digits.png")
    parser.add_argument(
        "--quick", action="store_true", help="less than a minute"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs, arguments.seeds = 2, 1

    table = rich.table.Table(
        title=f"Digits, {arguments.epochs} epochs, seeds: {arguments.seeds}, "
        f"{keras.backend.backend()}"
    )
    table.add_column("Optimizer")
    table.add_column("Validation accuracy", justify="right")
    table.add_column("Validation loss (from, to)", justify="right")
    table.add_column("First step", justify="right")
    table.add_column("Per step", justify="right")
    ends = {}
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    epochs = range(1, arguments.epochs + 1)
    for name, make_optimizer in OPTIMIZERS.items():
        losses, accuracies, first, others = [], [], [], []
        for seed in range(arguments.seeds):
            model, history, clock = train(
                make_optimizer, seed, arguments.epochs
            )
            losses.append(history["val_loss"])
            accuracies.append(history["val_accuracy"][-1])
            first.append(clock.first)
            others += clock.others
            print(
                f"{name}, seed {seed}: validation loss {losses[-1][-1]:.4f}",
                flush=True,
            )
        last = [curve[-1] for curve in losses]
        ends[name] = statistics.mean(last)
        table.add_row(
            name,
            f"{100 * statistics.mean(accuracies):.2f} %",
            f"{ends[name]:.4f} ({min(last):.4f}, {max(last):.4f})",
            f"{statistics.mean(first):.1f} s",
            # One step in ten measures: a median wouldn't see what that takes.
            f"{1e3 * statistics.mean(others):.1f} ms",
        )
        axes.plot(epochs, np.mean(losses, axis=0), label=name, **STYLES[name])
        axes.fill_between(
            epochs,
            np.min(losses, axis=0),
            np.max(losses, axis=0),
            color=STYLES[name]["color"],
            alpha=0.15,
            linewidth=0,
        )

    # Which parameters AdaFisher has Kronecker factors for.
    print(f"\n{keras_adafisher.coverage(model)}")
    rich.console.Console().print(table)

    axes.set(xlabel="Epoch", ylabel="Validation loss (log scale)", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(arguments.plot, dpi=150)
    print(f"Loss curves: {arguments.plot}")
    better = min("Adam, 1e-3", "Adam, 3e-3", key=ends.get)
    print(
        "Shown: one line changes, and the validation loss ends at "
        f"{ends['AdaFisherMuon']:.4f} with AdaFisherMuon and at "
        f"{ends['AdaFisher']:.4f} with AdaFisher, where the better Adam is at "
        f"{ends[better]:.4f}."
    )


if __name__ == "__main__":
    main()
