"""Train one layer for one step, and what has to hold for every wrapper."""

import copy

import keras
import numpy as np
import pytest
from keras import ops
from models import factored
from models import own_variable
from models import PLAIN
from models import probes_in
from models import product_loss
from models import running_factors
from models import to_numpy
from reference import min_max

import keras_adafisher
from keras_adafisher.wrappers.base import wrapper_of

GAMMA_1, GAMMA_2, DAMPING = 0.9, 0.05, 1e-3
# For models of batched matrix products or of several layers: without XLA,
# TensorFlow's training steps on the CPU now and then read a weight after its
# update, with any optimizer (Keras 3.15, TensorFlow 2.21).
JIT_COMPILE = keras.backend.backend() != "torch"


def make_optimizer():
    return keras_adafisher.AdaFisher(
        learning_rate=1e-3,
        damping=DAMPING,
        gamma_1=GAMMA_1,
        gamma_2=GAMMA_2,
        factor_update_steps=1,
        **PLAIN,
    )


def running(measurement):
    """A running factor after its first measurement: it starts at 1."""
    return (1 - GAMMA_1) + GAMMA_2 * measurement


def linear_fisher(h_rows, s_rows, bias=False, bias_s_rows=None):
    """Fisher diagonals of `z = W h + b` from its rows, after one step.

    Args:
        h_rows: `(rows, *inputs)`.
        s_rows: `(rows, *outputs)`.
        bias: Bool.
        bias_s_rows: `(rows, *bias_shape)`, where the bias' `S` isn't the
            weight's.

    Returns:
        Arrays of shapes `(*inputs, *outputs)` and `outputs` (of the bias, or
        `None`).
    """
    h = np.mean(np.square(np.asarray(h_rows, "float64")), axis=0)
    s = np.mean(np.square(np.asarray(s_rows, "float64")), axis=0)
    entries = np.append(h.ravel(), 1.0) if bias else h.ravel()
    entries = running(min_max(entries))
    one = entries[-1]
    h = entries[: h.size].reshape(h.shape)
    s = running(min_max(s))
    weight_fisher = np.multiply.outer(h, s) + DAMPING
    if not bias:
        return weight_fisher, None
    if bias_s_rows is not None:
        rows = np.asarray(bias_s_rows, "float64")
        s = running(min_max(np.mean(np.square(rows), axis=0)))
    return weight_fisher, one * s + DAMPING


def model_of(layer, x, jit_compile="auto", **call_arguments):
    """A compiled functional model of one layer, for `product_loss`."""
    inputs = keras.Input(np.shape(x)[1:], dtype=np.asarray(x).dtype.name)
    model = keras.Model(inputs, layer(inputs, **call_arguments))
    model.compile(
        optimizer=make_optimizer(), loss=product_loss, jit_compile=jit_compile
    )
    return model


def train_once(model, x, rng, y_shape=None):
    """One step with a known gradient.

    Returns:
        `s = dL/dz` for a layer without activation, as float64.
    """
    shape = y_shape or tuple(ops.shape(model(x)))
    y = rng.normal(size=shape).astype("float32")
    model.train_on_batch(x, y)
    return y.astype("float64") / y.size


def fisher_of(model, variable):
    return to_numpy(model.optimizer.preconditioner(variable))


def assert_fisher(model, variable, expected, rtol=2e-5):
    """The optimizer's Fisher diagonal of a variable is as expected."""
    actual = fisher_of(model, variable)
    assert actual.shape == tuple(variable.shape)
    assert expected.shape == tuple(variable.shape)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-7)


def let_wrappers_run(layer):
    """Also where nothing is measured, and the plain layers would run."""
    for inner in layer._flatten_layers():
        wrapper = wrapper_of(inner)
        if wrapper is not None:
            inner.call = wrapper.call


def assert_wrapping_changes_nothing(make_layer, x, **call_arguments):
    """Outputs are equal bit by bit, and so are gradients up to rounding."""
    plain = make_layer()
    outputs, gradients = [], []
    plain(x, **call_arguments)
    for wrapped in (False, True):
        layer = make_layer()
        layer(x, **call_arguments)
        weights = [w * 1.5 + 0.1 for w in plain.get_weights()]
        layer.set_weights(weights)
        if wrapped:
            keras_adafisher.wrap(layer)
            assert probes_in(layer)
            let_wrappers_run(layer)
        outputs.append(to_numpy(layer(x, **call_arguments)))
        gradients.append(parameter_gradients(layer, x, **call_arguments))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    for plain_gradient, wrapped_gradient in zip(*gradients, strict=True):
        np.testing.assert_allclose(
            wrapped_gradient, plain_gradient, rtol=1e-5, atol=1e-7
        )


def ramp(model, x):
    """Labels for which `product_loss` has the gradients from -1 to 1."""
    output = to_numpy(model(x))
    y = np.linspace(-1, 1, output.size, dtype="float32").reshape(output.shape)
    return y * output.size


def parameter_gradients(layer, x, jit_compile="auto", **call_arguments):
    """Gradients for the labels `ramp(model, x)`, by one step of SGD."""
    inputs = keras.Input(np.shape(x)[1:], dtype=np.asarray(x).dtype.name)
    model = keras.Model(inputs, layer(inputs, **call_arguments))
    before = copy.deepcopy(layer.get_weights())
    model.compile(
        optimizer=keras.optimizers.SGD(1.0),
        loss=product_loss,
        jit_compile=jit_compile,
    )
    # `compile` doesn't unwrap: it didn't wrap.
    model.train_on_batch(x, ramp(model, x))
    after = layer.get_weights()
    gradients = [b - a for a, b in zip(after, before, strict=True)]
    layer.set_weights(before)
    return gradients


def assert_trains_in_half_precision(make_layer, x, **call_arguments):
    """With `mixed_float16`, factors are float32 and nearly the same."""
    factors = []
    for dtype in ("float32", "mixed_float16"):
        keras.utils.set_random_seed(0)
        layer = make_layer(dtype=dtype)
        model = model_of(layer, x, **call_arguments)
        optimizer = make_optimizer()
        model.compile(
            optimizer=keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=64.0
            ),
            loss=product_loss,
        )
        size = int(np.prod(ops.shape(model(x))))
        y = np.linspace(-1, 2, size, dtype="float32")
        model.train_on_batch(x, y.reshape(ops.shape(model(x))))
        assert own_variable(optimizer, "factors").dtype == "float32"
        factors.append(running_factors(optimizer, factored(model)))
    for full, half in zip(*factors, strict=True):
        # Not the 1 of the beginning.
        assert full.max() <= running(1.0) + 1e-6
        np.testing.assert_allclose(half, full, atol=0.02 * GAMMA_2)


def conv_input(spatial, channels, rng, data_format):
    """Two examples for a convolution."""
    x = rng.normal(size=(2, *spatial, channels)).astype("float32")
    return np.moveaxis(x, -1, 1) if data_format == "channels_first" else x


def skip_if_plain_layer_fails(make_layer, x):
    """Not every device has every convolution."""
    try:
        make_layer()(x)
    except Exception as error:
        pytest.skip(
            f"{keras.backend.backend()} can't compute the plain layer either: "
            f"{type(error).__name__}"
        )
