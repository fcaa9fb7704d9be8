"""A vision transformer, trained by AdaFisherW and by Adam.

    KERAS_BACKEND=jax python examples/vision_transformer.py

A small ViT reads the 1,797 handwritten digits of scikit-learn as 16 patches of
2x2 pixels. All of it has Kronecker factors: the convolution that embeds the
patches, the embedding of their positions, the four projections of each
attention layer, the normalizations. `MultiHeadAttention` needs no line of code
for that, and neither does `AddPositions`, a layer of this script: what it is
made of is found.

Both optimizers have the learning rates and the momentum that were best for a
ViT in docs/quality.md, and warm-up and decay. Prints a table and saves the loss
curves to `vision_transformer.png`.
"""

import argparse
import time

import keras
import matplotlib.pyplot as plt
import rich.console
import rich.table
import sklearn.datasets
import sklearn.model_selection
from keras import layers

import keras_adafisher

PATCHES = 16
BATCH = 64


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


class AddPositions(layers.Layer):
    """Adds to each patch a vector that is learned for its position."""

    def __init__(self, positions, width, **kwargs):
        super().__init__(**kwargs)
        self.positions = positions
        self.embedding = layers.Embedding(positions, width)

    def build(self, input_shape):
        self.embedding.build((self.positions,))

    def call(self, patches):
        return patches + self.embedding(keras.ops.arange(self.positions))


def make_model(depth, width=48, heads=4):
    """The network. Nothing in it knows which optimizer it will meet."""
    images = keras.Input((8, 8, 1))
    x = layers.Conv2D(width, 2, strides=2)(images)
    x = layers.Reshape((PATCHES, width))(x)
    x = AddPositions(PATCHES, width)(x)
    for _ in range(depth):
        h = layers.LayerNormalization()(x)
        x += layers.MultiHeadAttention(heads, width // heads)(h, h)
        h = layers.LayerNormalization()(x)
        h = layers.Dense(2 * width, activation="gelu")(h)
        x += layers.Dense(width)(h)
    x = layers.LayerNormalization()(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(images, layers.Dense(10)(x))


def schedule(peak, steps):
    """A learning rate that warms up over 5 % of the steps, then falls to 0."""
    warmup = max(1, steps // 20)
    return keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=peak, warmup_steps=warmup
    )


def train(optimizer, depth, epochs):
    """Train the network from scratch.

    Returns:
        The trained model, its history and the seconds that it took.
    """
    x_train, x_val, y_train, y_val = load_digits()
    keras.utils.set_random_seed(0)
    model = make_model(depth)
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    start = time.perf_counter()
    history = model.fit(
        x_train,
        y_train,
        batch_size=BATCH,
        epochs=epochs,
        validation_data=(x_val, y_val),
    )
    return model, history.history, time.perf_counter() - start


def main():
    """Train with both optimizers and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--depth", type=int, default=3, help="blocks")
    parser.add_argument("--plot", default="vision_transformer.png")
    parser.add_argument(
        "--quick", action="store_true", help="less than a minute"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs, arguments.depth = 4, 1

    steps = arguments.epochs * -(-len(load_digits()[0]) // BATCH)
    optimizers = {
        "Adam": keras.optimizers.Adam(
            schedule(1e-2, steps), beta_1=0.8, global_clipnorm=1.0
        ),
        # the one line that differs
        "AdaFisherW": keras_adafisher.AdaFisherW(
            schedule(1e-2, steps), global_clipnorm=1.0
        ),
    }
    losses = {}
    table = rich.table.Table(
        title=f"Vision transformer, {arguments.epochs} epochs, "
        f"{keras.backend.backend()}"
    )
    table.add_column("Optimizer")
    table.add_column("Validation accuracy", justify="right")
    table.add_column("Validation loss", justify="right")
    table.add_column("Seconds", justify="right")
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    epochs = range(1, arguments.epochs + 1)
    for (name, optimizer), color in zip(
        optimizers.items(), ("#0072B2", "#D55E00"), strict=True
    ):
        print(f"\n{name}")
        model, history, seconds = train(
            optimizer, arguments.depth, arguments.epochs
        )
        table.add_row(
            name,
            f"{100 * history['val_accuracy'][-1]:.2f} %",
            f"{history['val_loss'][-1]:.4f}",
            f"{seconds:.1f}",
        )
        losses[name] = history["val_loss"][-1]
        for key, style, what in (
            ("loss", "--", "training"),
            ("val_loss", "-", "validation"),
        ):
            axes.plot(
                epochs,
                history[key],
                style,
                color=color,
                label=f"{name}, {what}",
            )

    print(f"\n{keras_adafisher.coverage(model)}")
    rich.console.Console().print(table)
    axes.set(xlabel="Epoch", ylabel="Loss (log scale)", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(arguments.plot, dpi=150)
    print(f"Loss curves: {arguments.plot}")
    print(
        "Shown: a whole transformer has factors, and the validation loss ends "
        f"at {losses['AdaFisherW']:.4f}, with Adam at {losses['Adam']:.4f}."
    )


if __name__ == "__main__":
    main()
