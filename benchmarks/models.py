"""The models of the benchmarks, each a function of its size.

Each function returns a `Task`: a model that isn't compiled yet, and one batch
of random data. The sizes are chosen for a CPU: a training step of the default
ones takes some tens of milliseconds on two cores.
"""

import dataclasses

import keras
import numpy as np
from keras import layers
from keras import ops

CLASSES = 10


@dataclasses.dataclass
class Task:
    """A model and one batch for it.

    Attributes:
        model: `keras.Model`, not compiled.
        x, y: NumPy arrays.
    """

    model: keras.Model
    x: np.ndarray
    y: np.ndarray

    def compile(self, optimizer):
        self.model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )

    def step(self):
        """One training step, and wait until it has happened."""
        loss = self.model.train_on_batch(self.x, self.y)
        if keras.backend.backend() == "jax":
            # The loss may be there before the weights are.
            self.model.trainable_weights[-1].value.block_until_ready()
        return loss


def mlp(size=1024, batch=128, depth=3):
    """Dense layers that are all equally wide."""
    inputs = x = keras.Input((size,))
    for _ in range(depth):
        x = layers.Dense(size, activation="relu")(x)
    return _classifier(inputs, x, batch)


def resnet(size=16, batch=32, image=32, blocks=1):
    """A residual CNN with batch normalization in three stages."""
    inputs = keras.Input((image, image, 3))
    x = layers.Conv2D(size, 3, padding="same", use_bias=False)(inputs)
    for stage, filters in enumerate((size, 2 * size, 4 * size)):
        for block in range(blocks):
            strides = 2 if stage and not block else 1
            shortcut = x
            if strides == 2:
                shortcut = layers.Conv2D(filters, 1, strides=2)(x)
            for stride in (strides, 1):
                x = layers.BatchNormalization()(x)
                x = layers.ReLU()(x)
                x = layers.Conv2D(
                    filters, 3, stride, padding="same", use_bias=False
                )(x)
            x = layers.add([x, shortcut])
    x = layers.ReLU()(layers.BatchNormalization()(x))
    return _classifier(inputs, layers.GlobalAveragePooling2D()(x), batch)


def gpt(size=128, batch=8, sequence=64, depth=2, vocabulary=1000, heads=4):
    """A decoder-only transformer."""
    inputs = keras.Input((sequence,), dtype="int32")
    x = layers.Embedding(vocabulary, size)(inputs)
    x = Positions(sequence)(x)
    x = transformer(x, size, depth, causal=True, heads=heads)
    model = keras.Model(inputs, _head(vocabulary)(x))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocabulary, (batch, sequence + 1)).astype("int32")
    return Task(model, ids[:, :-1], ids[:, 1:])


def vit(
    size=128,
    batch=8,
    image=32,
    depth=2,
    patch=4,
    heads=4,
    classes=CLASSES,
):
    """A vision transformer."""
    inputs = keras.Input((image, image, 3))
    x = layers.Conv2D(size, patch, strides=patch)(inputs)
    x = layers.Reshape((-1, size))(x)
    x = Positions((image // patch) ** 2)(x)
    x = transformer(x, size, depth, causal=False, heads=heads)
    x = layers.GlobalAveragePooling1D()(x)
    return _classifier(inputs, x, batch, classes)


def mobilenet(size=16, batch=32, image=32, depth=4):
    """Depthwise and pointwise convolutions with batch normalization."""
    inputs = keras.Input((image, image, 3))
    x = layers.Conv2D(size, 3, 2, padding="same", use_bias=False)(inputs)
    x = layers.ReLU(6)(layers.BatchNormalization()(x))
    for index in range(depth):
        # Twice the filters at half the resolution, at every other block.
        halves = index % 2
        x = layers.DepthwiseConv2D(
            3, 1 + halves, padding="same", use_bias=False
        )(x)
        x = layers.ReLU(6)(layers.BatchNormalization()(x))
        size *= 1 + halves
        x = layers.Conv2D(size, 1, use_bias=False)(x)
        x = layers.ReLU(6)(layers.BatchNormalization()(x))
    return _classifier(inputs, layers.GlobalAveragePooling2D()(x), batch)


def convolutions(size=16, batch=32, image=32, kernel=3, depth=3):
    """Plain convolutions that keep the size of the image."""
    inputs = x = keras.Input((image, image, size))
    for _ in range(depth):
        x = layers.Conv2D(size, kernel, padding="same", activation="relu")(x)
    return _classifier(inputs, layers.GlobalAveragePooling2D()(x), batch)


# The five that stand for what people train.
MODELS = {
    "wide MLP": mlp,
    "ResNet": resnet,
    "GPT": gpt,
    "ViT": vit,
    "MobileNet": mobilenet,
}

# The tests take two of them, as small as they can be.
TINY = {
    "wide MLP": {"size": 8, "batch": 4, "depth": 1},
    "MobileNet": {"size": 2, "batch": 2, "image": 8, "depth": 1},
}


def names(level):
    """The names of the models that a benchmark runs."""
    return list(TINY if level == "tiny" else MODELS)


def make_task(name, tiny=False, sizes=None):
    """One of `MODELS`, always with the same weights and data."""
    keras.utils.set_random_seed(0)
    return MODELS[name](**(TINY[name] if tiny else {}), **(sizes or {}))


class Positions(layers.Layer):
    """Add a learned vector to each position."""

    def __init__(self, length, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    def build(self, shape):
        self.embedding = layers.Embedding(self.length, shape[-1])
        self.embedding.build((self.length,))

    def call(self, x):
        return x + self.embedding(ops.arange(self.length))


def transformer(x, size, depth, causal, heads=4):
    for _ in range(depth):
        h = layers.LayerNormalization()(x)
        h = layers.MultiHeadAttention(heads, size // heads)(
            h, h, use_causal_mask=causal
        )
        x = layers.add([x, h])
        h = layers.LayerNormalization()(x)
        h = layers.Dense(4 * size, activation="gelu")(h)
        x = layers.add([x, layers.Dense(size)(h)])
    return layers.LayerNormalization()(x)


def _head(classes):
    # In mixed precision, the loss needs more than bfloat16's eight bits.
    return layers.Dense(classes, dtype="float32")


def _classifier(inputs, features, batch, classes=CLASSES):
    return with_images(keras.Model(inputs, _head(classes)(features)), batch)


def with_images(model, batch):
    """A classifier, with random inputs and labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *model.input_shape[1:])).astype("float32")
    y = rng.integers(0, model.output_shape[-1], batch).astype("int32")
    return Task(model, x, y)
