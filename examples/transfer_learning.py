"""Transfer learning: freeze a `keras.applications` model, then fine-tune it.

    KERAS_BACKEND=jax python examples/transfer_learning.py

The usual three steps, after Keras' guide "Transfer learning & fine-tuning":

1. Take a network that has learned a large task: here, the first blocks of a
   MobileNet. With `--weights imagenet` Keras downloads what it has learned.
   Without it nothing is downloaded (`weights=None`), and the script makes a
   larger task of its own: the handwritten digits 0 to 4 of scikit-learn.
2. Freeze it, put a new head on it, and train the head, on 100 images of the
   digits 5 to 9. Nothing of the frozen part is measured.
3. Thaw it and train all of it, with a smaller step. `trainable` has changed, so
   the model is compiled again, as with any optimizer: the new AdaFisher
   measures all layers.

Batch normalization stays in inference mode in the second and third step, as in
that guide. Prints the accuracy on other images after each step.
"""

import argparse

import keras
import numpy as np
import rich.console
import rich.table
import sklearn.datasets

import keras_adafisher

SIZE = 32


def load_digits(digits, training_images, seed=0):
    """Training and validation images in three channels, and labels from 0."""
    data = sklearn.datasets.load_digits()
    wanted = np.flatnonzero(np.isin(data.target, digits))
    wanted = np.random.default_rng(seed).permutation(wanted)
    # Each pixel becomes a square of 4x4, between -1 and 1 as MobileNet's are.
    images = np.kron(data.images[wanted], np.ones((1, SIZE // 8, SIZE // 8)))
    images = np.repeat(images[..., None], 3, axis=-1).astype("float32") / 8 - 1
    labels = data.target[wanted] - min(digits)
    cut = training_images
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def make_backbone(weights):
    """The first blocks of a MobileNet: the images are small."""
    mobilenet = keras.applications.MobileNet(
        input_shape=(SIZE, SIZE, 3),
        alpha=0.25,
        include_top=False,
        weights=weights,
    )
    features = mobilenet.get_layer("conv_pw_5_relu").output
    features = keras.layers.GlobalAveragePooling2D()(features)
    backbone = keras.Model(mobilenet.input, features, name="backbone")
    # Averages of the batches' statistics that a short training can fill.
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9
    return backbone


def with_head(backbone, training=None):
    """The backbone and a new head for five classes."""
    images = keras.Input((SIZE, SIZE, 3))
    features = backbone(images, training=training)
    return keras.Model(images, keras.layers.Dense(5)(features))


def train(model, learning_rate, data, epochs):
    """Compile and train.

    Returns:
        Accuracy on the validation data.
    """
    train_data, validation_data = data
    model.compile(
        # the one line that differs
        keras_adafisher.AdaFisher(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        *train_data,
        batch_size=25,
        epochs=epochs,
        validation_data=validation_data,
    )
    return history.history["val_accuracy"][-1]


def main():
    """All three steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", choices=["none", "imagenet"], default="none"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        nargs=3,
        default=[10, 20, 10],
        help="of the first task, of the head, of all of it",
    )
    parser.add_argument(
        "--quick", action="store_true", help="less than a minute"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs = [3, 5, 3]
    first, head, all_of_it = arguments.epochs
    keras.utils.set_random_seed(0)

    table = rich.table.Table(
        title=f"Transfer learning, {keras.backend.backend()}"
    )
    table.add_column("Step")
    table.add_column("Parameters that train", justify="right")
    table.add_column("With factors", justify="right")
    table.add_column("Validation accuracy", justify="right")

    accuracies = {}

    def add_row(step, model, accuracy):
        coverage = keras_adafisher.coverage(model)
        accuracies[step] = f"{100 * accuracy:.1f} %"
        table.add_row(
            step,
            f"{sum(row.count for row in coverage.rows):,}",
            f"{100 * coverage.factored_fraction:.0f} %",
            accuracies[step],
        )

    imagenet = arguments.weights == "imagenet"
    backbone = make_backbone("imagenet" if imagenet else None)
    if not imagenet:
        print("\nFirst task: digits 0 to 4")
        model = with_head(backbone)
        data = load_digits(range(5), training_images=700)
        add_row("first task", model, train(model, 3e-3, data, first))

    print("\nThe head: digits 5 to 9")
    backbone.trainable = False
    # `training=False`: also when it is thawed, its batch normalization keeps
    # the averages that it has.
    model = with_head(backbone, training=False)
    data = load_digits(range(5, 10), training_images=100)
    add_row("the head", model, train(model, 1e-2, data, head))

    print("\nFine-tuning")
    backbone.trainable = True
    add_row("fine-tuning", model, train(model, 1e-3, data, all_of_it))
    rich.console.Console().print(table)
    print(
        "Shown: only what trains is measured. The new digits are told apart "
        f"by {accuracies['the head']} with a new head, and by "
        f"{accuracies['fine-tuning']} after fine-tuning."
    )


if __name__ == "__main__":
    main()
