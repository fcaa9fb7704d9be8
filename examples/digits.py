"""AdaFisher next to Adam on handwritten digits.

    KERAS_BACKEND=jax python examples/digits.py

Trains one small convolutional network twice, from the same initial weights
and on the same batches: once with Keras' Adam, once with AdaFisher. The 1,797
images of 8x8 pixels come with scikit-learn. Prints a table and saves the loss
curves to `digits.png`.
"""

import argparse
import time

import keras
import matplotlib.pyplot as plt
import rich.console
import rich.table
import sklearn.datasets
import sklearn.model_selection

import keras_adafisher


def load_digits():
    """Training and validation images and labels."""
    digits = sklearn.datasets.load_digits()
    images = digits.images[..., None].astype("float32") / 16
    return sklearn.model_selection.train_test_split(
        images,
        digits.target,
        test_size=0.25,
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


def train(optimizer, epochs):
    """Train the network from scratch.

    Returns:
        The trained model, its history and the seconds that it took.
    """
    x_train, x_val, y_train, y_val = load_digits()
    keras.utils.set_random_seed(0)
    model = make_model()
    # The one line that differs from a script that uses Adam.
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    start = time.perf_counter()
    history = model.fit(
        x_train,
        y_train,
        batch_size=64,
        epochs=epochs,
        validation_data=(x_val, y_val),
    )
    return model, history.history, time.perf_counter() - start


def main():
    """Train with both optimizers and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--plot", default="digits.png")
    parser.add_argument(
        "--quick", action="store_true", help="less than a minute"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs = 2

    table = rich.table.Table(
        title=f"Digits, {arguments.epochs} epochs, {keras.backend.backend()}"
    )
    table.add_column("Optimizer")
    table.add_column("Validation accuracy", justify="right")
    table.add_column("Validation loss", justify="right")
    table.add_column("Seconds", justify="right")
    losses = {}
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")

    optimizers = {
        "Adam": keras.optimizers.Adam(),
        "AdaFisher": keras_adafisher.AdaFisher(),
    }
    for (name, optimizer), color in zip(
        optimizers.items(), ("#0072B2", "#D55E00"), strict=True
    ):
        print(f"\n{name}")
        model, history, seconds = train(optimizer, arguments.epochs)
        table.add_row(
            name,
            f"{100 * history['val_accuracy'][-1]:.2f} %",
            f"{history['val_loss'][-1]:.4f}",
            f"{seconds:.1f}",
        )
        losses[name] = history["val_loss"][-1]
        epochs = range(1, arguments.epochs + 1)
        axes.plot(
            epochs,
            history["loss"],
            "--",
            color=color,
            label=f"{name}, training",
        )
        axes.plot(
            epochs,
            history["val_loss"],
            color=color,
            label=f"{name}, validation",
        )

    # Which parameters AdaFisher has Kronecker factors for.
    print(f"\n{keras_adafisher.coverage(model)}")
    rich.console.Console().print(table)

    axes.set(xlabel="Epoch", ylabel="Loss (log scale)", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(arguments.plot, dpi=150)
    print(f"Loss curves: {arguments.plot}")
    print(
        "Shown: one line changes, and the validation loss ends at "
        f"{losses['AdaFisher']:.4f}, with Adam at {losses['Adam']:.4f}."
    )


if __name__ == "__main__":
    main()
