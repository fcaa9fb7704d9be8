"""Tiny models and data that several test files use."""

import keras
import numpy as np
from keras import ops

import keras_adafisher
from keras_adafisher.probe import probes_of

# The rule alone, whatever the settings: `theta -= learning_rate * m / F`.
PLAIN = {
    name: keras_adafisher.AdaFisher.PUBLISHED[name]
    for name in ("normalization", "nesterov", "rms_decay")
}


def product_loss(y_true, y_pred):
    """A loss whose gradient is known: `dL/dy_pred = y_true / y_true.size`."""
    return y_true * y_pred


def data(inputs=6, classes=3, examples=48, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, inputs)).astype("float32")
    y = rng.integers(0, classes, size=examples)
    return x, y


def mlp(inputs=6, classes=3, **kwargs):
    model = keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(5, activation="tanh", **kwargs),
            keras.layers.Dense(classes, **kwargs),
        ]
    )
    return model


def cnn(classes=3):
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(classes),
        ]
    )


def image_data(examples=48, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, 6, 6, 2)).astype("float32")
    y = rng.integers(0, classes, size=examples)
    return x, y


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def probes_in(layer):
    """The probes of what trains in a layer and in all layers inside it."""
    return probes_of(layer.trainable_variables)


def factored(model):
    """The trainable variables of a model that have factors."""
    rows = keras_adafisher.coverage(model).rows
    paths = {row.parameter for row in rows if row.factors}
    return [v for v in model.trainable_variables if v.path in paths]


def pairs_of(optimizer, variable):
    """Arrays `H` and `S` of a variable, for each way that it is used in."""
    h, s, _ = optimizer.factors(variable)
    if not isinstance(h, tuple):
        h, s = (h,), (s,)
    return [tuple(map(to_numpy, pair)) for pair in zip(h, s, strict=True)]


def running_factors(optimizer, variables):
    """List of all `H` and `S` of some variables, as arrays."""
    return [
        factor
        for variable in variables
        for pair in pairs_of(optimizer, variable)
        for factor in pair
    ]


def own_variable(optimizer, name):
    """An optimizer's variable of some name: "factors", for instance."""
    (variable,) = (v for v in optimizer.variables if v.name == name)
    return variable


def to_numpy(tensor):
    # A copy: what PyTorch gives follows the variable.
    return np.array(ops.convert_to_numpy(tensor))


def weights(model):
    return [np.array(w) for w in model.get_weights()]


def state(model):
    """Weights and optimizer variables."""
    return weights(model) + [to_numpy(v) for v in model.optimizer.variables]


def trained(optimizer, steps=3):
    """An `mlp` with always the same weights, after steps on small batches."""
    keras.utils.set_random_seed(1)
    model = mlp()
    model.compile(optimizer, loss=cross_entropy())
    train(model, range(steps))
    return model


def train(model, seeds):
    """Train an `mlp` on one small batch for each seed."""
    for seed in seeds:
        model.train_on_batch(*data(seed=seed, examples=8))


def assert_same(actual, expected):
    """Lists of arrays are equal bit for bit."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(actual, expected, tolerance):
    """Largest difference relative to the largest entry, array by array."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        scale = max(np.abs(b).max(), 1e-30)
        assert np.abs(a - b).max() / scale <= tolerance
