"""Is the curvature of a network diagonal? A look at its Kronecker factors.

    KERAS_BACKEND=jax python examples/analysis.py

AdaFisher divides the momentum by the diagonal of a Kronecker-factored Fisher
information: of the two matrices of a layer, `H` (its inputs) and `S` (the
gradients at its outputs), it keeps the diagonals only. This script trains a
small convolutional network on the 1,797 digits of scikit-learn, with AdaFisher
and with Adam, and then looks at what was left out: a table says for each layer
how much of the two matrices is on the diagonal, and pictures in the directory
`analysis` show them, together with what both optimizers divided by and the
ways they took.
"""

import argparse
import pathlib

import keras
import rich.console
import sklearn.datasets
from keras import ops

import keras_adafisher
from keras_adafisher import analysis
from keras_adafisher import plotting
from keras_adafisher.callbacks import SecondMomentHistory

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def load_digits():
    """Images and labels."""
    digits = sklearn.datasets.load_digits()
    return digits.images[..., None].astype("float32") / 16, digits.target


def make_model():
    """The network. Nothing in it knows that somebody will look inside."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="tanh"),
            keras.layers.Dense(10),
        ],
        name="cnn",
    )


def make_optimizers():
    """What is compared."""
    return {
        "AdaFisher": keras_adafisher.AdaFisher(),
        "Adam": keras.optimizers.Adam(learning_rate=0.002),
    }


def train(optimizer, history, epochs):
    """Train the network from scratch, always from the same weights.

    Returns:
        The model, and its weights at the beginning and after each epoch.
    """
    # For the same names, too.
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = make_model()
    model.compile(optimizer, loss=LOSS, metrics=["accuracy"])
    snapshots = [model.get_weights()]
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: snapshots.append(model.get_weights())
    )
    model.fit(
        *load_digits(),
        batch_size=64,
        epochs=epochs,
        callbacks=[history, keep],
    )
    return model, snapshots


def surface(x, y):
    """A bent valley, fifty times as steep across as along."""
    return x**2 / 50 + (y - ops.sin(x)) ** 2 + 0.01


def main():
    """Train, print the table and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--plots", type=pathlib.Path, default="analysis")
    parser.add_argument(
        "--quick", action="store_true", help="less than a minute"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs = 2

    # While they train, callbacks record what the momentum is divided by.
    histories = {
        "AdaFisher": keras_adafisher.FisherHistory(every=10),
        "Adam": SecondMomentHistory(every=10),
    }
    models, trajectories = {}, {}
    for name, optimizer in make_optimizers().items():
        print(f"\n{name}")
        models[name], trajectories[name] = train(
            optimizer, histories[name], arguments.epochs
        )
    model = models["AdaFisher"]

    # The whole factors, of 256 examples.
    x, y = (array[:256] for array in load_digits())
    factors = analysis.kronecker_factors(model, x, y)
    print()
    rich.console.Console().print(analysis.diagonal_energy_table(factors))

    second_conv = factors[1]
    figures = {
        "factors": plotting.plot_factors(second_conv),
        # The rows of the gradient factor are the layer's filters.
        "gershgorin": plotting.plot_gershgorin(
            second_conv.gradient, f"{second_conv.layer}, S"
        ),
        "spectrum": plotting.plot_spectrum(
            second_conv.activation, 0.01, title=f"{second_conv.layer}, H"
        ),
        "histograms": plotting.plot_histograms(
            *histories.values(), parameter=second_conv.parameters[0]
        ),
        "surface": plotting.loss_surface_trajectories(
            surface,
            {
                "SGD": keras.optimizers.SGD(0.1, momentum=0.9),
                "Adam": keras.optimizers.Adam(0.1),
                "AdaFisher": keras_adafisher.AdaFisher(
                    0.1, factor_update_steps=1
                ),
            },
            start=(-5.0, 2.5),
            steps=20 + 4 * arguments.epochs,
        ),
        "weights": plotting.weight_trajectories(model, x, y, trajectories),
    }
    arguments.plots.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(arguments.plots / f"{name}.png")
    print(f"Pictures: {', '.join(figures)} in {arguments.plots}")
    shares = [
        100 * analysis.diagonal_energy(matrix)
        for matrix in (second_conv.activation, second_conv.gradient)
    ]
    print(
        f"Shown: in {second_conv.layer}, {shares[0]:.0f} % of the squared norm "
        f"of H and {shares[1]:.0f} % of that of S are on the diagonals, which "
        "is what AdaFisher keeps."
    )


if __name__ == "__main__":
    main()
