"""Trajectories of the authors' own PyTorch code: weights after every step.

`golden/official.npz` was recorded with the official implementation (commit
eb858c6) on PyTorch 2.14, float32. `epsilon=1e-6` is hard-coded there.
"""

import pathlib

import keras
import numpy as np
import pytest
from models import cross_entropy
from models import to_numpy

import keras_adafisher

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "official.npz")
TOLERANCE = 2e-6


def dense_model(inputs, units, use_bias=True):
    *hidden, last = units
    layers = [
        keras.layers.Dense(n, activation="tanh", use_bias=use_bias)
        for n in hidden
    ]
    layers.append(keras.layers.Dense(last, use_bias=use_bias))
    return keras.Sequential([keras.Input((inputs,)), *layers])


def conv_model(use_bias):
    first, second, third = use_bias
    return keras.Sequential(
        [
            keras.Input((11, 13, 2)),
            keras.layers.Conv2D(5, 3, activation="tanh", use_bias=first),
            keras.layers.Conv2D(
                6, (3, 2), strides=2, activation="tanh", use_bias=second
            ),
            keras.layers.Conv2D(4, 1, activation="tanh", use_bias=third),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


CASES = {
    "mlp_default": (
        lambda: dense_model(7, (9, 6, 4)),
        keras_adafisher.AdaFisher,
        {},
    ),
    "mlp_t3": (
        lambda: dense_model(5, (12, 3)),
        keras_adafisher.AdaFisher,
        {
            "learning_rate": 5e-4,
            "beta": 0.8,
            "damping": 5e-3,
            "gamma_1": 0.91,
            "gamma_2": 0.009,
            "factor_update_steps": 3,
        },
    ),
    "mlp_nobias_t1": (
        lambda: dense_model(5, (8, 3), use_bias=False),
        keras_adafisher.AdaFisher,
        {"learning_rate": 1e-4, "damping": 1e-4, "factor_update_steps": 1},
    ),
    "mlpW_t2": (
        lambda: dense_model(6, (8, 3)),
        keras_adafisher.AdaFisherW,
        {"weight_decay": 0.02, "factor_update_steps": 2},
    ),
    "cnn_t4": (
        lambda: conv_model((True, True, True)),
        keras_adafisher.AdaFisher,
        {"learning_rate": 3e-4, "factor_update_steps": 4},
    ),
    "cnnW_nobias_t1": (
        lambda: conv_model((False, False, True)),
        keras_adafisher.AdaFisherW,
        {
            "learning_rate": 3e-4,
            "weight_decay": 0.1,
            "factor_update_steps": 1,
            "gamma_1": 0.93,
            "gamma_2": 0.007,
            "damping": 2e-3,
        },
    ),
}


@pytest.mark.parametrize("tag", CASES)
def test_weights_and_factors_follow_the_official_code(tag, record_property):
    make_model, optimizer_class, arguments = CASES[tag]
    model = make_model()
    count = len(model.get_weights())
    model.set_weights([GOLDEN[f"{tag}/w0/{i}"] for i in range(count)])
    optimizer = optimizer_class.as_published(**arguments)
    model.compile(optimizer=optimizer, loss=cross_entropy())

    worst_weight = worst_factor = 0.0
    recorded = []
    steps = zip(GOLDEN[f"{tag}/x"], GOLDEN[f"{tag}/y"], strict=True)
    for step, (x, y) in enumerate(steps, start=1):
        model.reset_metrics()
        loss = model.train_on_batch(x, y)
        golden_loss = GOLDEN[f"{tag}/loss"][step - 1]
        np.testing.assert_allclose(loss, golden_loss, rtol=1e-5)
        if f"{tag}/w{step}/0" not in GOLDEN:
            continue
        recorded.append(step)
        for index, weight in enumerate(model.get_weights()):
            golden = GOLDEN[f"{tag}/w{step}/{index}"]
            worst_weight = max(worst_weight, relative_error(weight, golden))
        for parameter, golden in golden_fishers(model, tag, step):
            fisher = to_numpy(optimizer.preconditioner(parameter))
            error = relative_error(fisher, golden + optimizer.damping)
            worst_factor = max(worst_factor, error)
    record_property(
        "figure",
        f"{tag}: largest relative error to the official code "
        f"{worst_weight:.1e} (weights), {worst_factor:.1e} (Fisher diagonal)",
    )
    assert recorded == [1, 2, 5, 10, 20, 30]
    assert worst_weight <= TOLERANCE
    assert worst_factor <= TOLERANCE


def relative_error(actual, golden):
    return np.abs(actual - golden).max() / np.abs(golden).max()


def golden_fishers(model, tag, step):
    """Pairs of a parameter and its undamped official Fisher diagonal."""
    layers = [layer for layer in model.layers if layer.weights]
    for index, layer in enumerate(layers):
        h = GOLDEN[f"{tag}/H{step}/{index}"]
        s = GOLDEN[f"{tag}/S{step}/{index}"]
        kernel, *biases = layer.weights
        if biases:
            yield biases[0], h[-1] * s
            h = h[:-1]
        if isinstance(layer, keras.layers.Conv2D):
            # From (in, kh, kw) to (kh, kw, in).
            height, width, channels, _ = kernel.shape
            h = h.reshape(channels, height, width).transpose(1, 2, 0)
        yield kernel, h[..., None] * s
