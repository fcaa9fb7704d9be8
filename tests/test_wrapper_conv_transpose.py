"""Transposed convolutions, against what each kernel entry multiplies."""

import keras
import layer_cases
import numpy as np
import pytest
from models import to_numpy

LAYERS = {
    1: keras.layers.Conv1DTranspose,
    2: keras.layers.Conv2DTranspose,
    3: keras.layers.Conv3DTranspose,
}
SPATIAL = {1: (4,), 2: (3, 4), 3: (2, 3, 2)}

# Rank and arguments. Kernels smaller, equal to and larger than strides.
CASES = {
    "1d_valid": (1, {"kernel_size": 3}),
    "1d_valid_strides": (1, {"kernel_size": 3, "strides": 2}),
    "1d_valid_gaps": (1, {"kernel_size": 2, "strides": 3}),
    "1d_same": (1, {"kernel_size": 4, "padding": "same"}),
    "1d_same_strides": (1, {"kernel_size": 3, "padding": "same", "strides": 2}),
    "1d_same_gaps": (1, {"kernel_size": 1, "padding": "same", "strides": 3}),
    "1d_same_wide": (1, {"kernel_size": 7, "padding": "same", "strides": 2}),
    "1d_same_output_padding": (
        1,
        {
            "kernel_size": 4,
            "padding": "same",
            "strides": 3,
            "output_padding": 1,
        },
    ),
    "1d_valid_output_padding": (
        1,
        {"kernel_size": 3, "strides": 2, "output_padding": 1},
    ),
    "1d_valid_dilation": (1, {"kernel_size": 3, "dilation_rate": 2}),
    "1d_same_dilation": (
        1,
        {"kernel_size": 3, "padding": "same", "dilation_rate": 2},
    ),
    "2d_same_strides": (
        2,
        {"kernel_size": (3, 2), "padding": "same", "strides": (2, 3)},
    ),
    "2d_no_bias": (2, {"kernel_size": 2, "strides": 2, "use_bias": False}),
    "3d_same_strides": (
        3,
        {"kernel_size": (3, 2, 1), "padding": "same", "strides": 2},
    ),
    "3d_valid": (3, {"kernel_size": 2}),
}
CHANNELS, FILTERS = 3, 2


def make_layer(case, **kwargs):
    rank, arguments = CASES[case]
    return LAYERS[rank](FILTERS, **arguments, **kwargs)


def make_input(case, rng, data_format="channels_last"):
    spatial = SPATIAL[CASES[case][0]]
    return layer_cases.conv_input(spatial, CHANNELS, rng, data_format)


def response_patches(layer, x):
    """What each kernel entry multiplies, found by asking the layer itself.

    For each tap, a kernel that is 1 there (from one input channel to one
    filter) returns exactly the entries of the input that the tap reads.

    Returns:
        Array of shape `(batch * positions, *kernel_size, channels)`.
    """
    layer = type(layer).from_config(layer.get_config())
    layer.build(x.shape)
    taps = {}
    for tap in np.ndindex(*layer.kernel_size):
        for channel in range(CHANNELS):
            kernel = np.zeros(layer.kernel.shape, "float32")
            kernel[(*tap, 0, channel)] = 1.0
            biases = [np.zeros(FILTERS)] * layer.use_bias
            layer.set_weights([kernel, *biases])
            seen = to_numpy(layer(x)).astype("float64")
            axis = 1 if layer.data_format == "channels_first" else -1
            taps[(*tap, channel)] = np.take(seen, 0, axis=axis).ravel()
    result = np.zeros((taps[(*tap, 0)].size, *layer.kernel_size, CHANNELS))
    for index, column in taps.items():
        result[(slice(None), *index)] = column
    return result


def check(case, rng, data_format):
    layer = make_layer(case, data_format=data_format)
    x = make_input(case, rng, data_format)
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    if data_format == "channels_first":
        s = np.moveaxis(s, 1, -1)
    kernel, bias = layer_cases.linear_fisher(
        response_patches(layer, x), s.reshape(-1, FILTERS), layer.use_bias
    )
    # From (*kernel_size, channels, filters) to Keras' order.
    layer_cases.assert_fisher(model, layer.kernel, np.swapaxes(kernel, -1, -2))
    if layer.use_bias:
        layer_cases.assert_fisher(model, layer.bias, bias)


@pytest.mark.parametrize("case", CASES)
def test_fisher_diagonal_is_that_of_what_each_entry_multiplies(case, rng):
    layer_cases.skip_if_plain_layer_fails(
        lambda: make_layer(case), make_input(case, rng)
    )
    check(case, rng, "channels_last")


@pytest.mark.parametrize("case", ["1d_same_strides", "2d_same_strides"])
def test_channels_may_come_first(case, rng):
    x = make_input(case, rng, "channels_first")
    layer_cases.skip_if_plain_layer_fails(
        lambda: make_layer(case, data_format="channels_first"), x
    )
    check(case, rng, "channels_first")


def test_patches_by_hand(rng):
    """Stride 2, three taps, "same": p = 2 q + i, without the first or last."""
    x = make_input("1d_same_strides", rng)
    measured = response_patches(make_layer("1d_same_strides"), x)
    expected = np.zeros((2, 8, 3, CHANNELS))
    for example in range(2):
        for q in range(4):
            for tap in range(3):
                p = 2 * q + tap
                if p < 8:
                    expected[example, p, tap] = x[example, q]
    np.testing.assert_array_equal(measured, expected.reshape(16, 3, CHANNELS))


@pytest.mark.parametrize("case", ["1d_same_output_padding", "3d_same_strides"])
def test_wrapping_changes_neither_outputs_nor_gradients(case, rng):
    layer_cases.assert_wrapping_changes_nothing(
        lambda: make_layer(case, activation="tanh"), make_input(case, rng)
    )


def test_statistics_are_float32_in_half_precision(rng):
    case = "1d_same_strides"
    layer_cases.assert_trains_in_half_precision(
        lambda **kwargs: make_layer(case, **kwargs), make_input(case, rng)
    )


def test_two_calls_are_averaged(rng):
    layer = make_layer("1d_valid_strides")
    inputs = keras.Input((4, CHANNELS))
    outputs = keras.layers.Concatenate()([layer(inputs), layer(2.0 * inputs)])
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=layer_cases.make_optimizer(), loss=layer_cases.product_loss
    )
    x = make_input("1d_valid_strides", rng)
    s = layer_cases.train_once(model, x, rng)
    h = response_patches(layer, x)
    kernel, bias = layer_cases.linear_fisher(
        np.concatenate([h, 2.0 * h]),
        np.concatenate([s[..., :2].reshape(-1, 2), s[..., 2:].reshape(-1, 2)]),
        bias=True,
    )
    layer_cases.assert_fisher(model, layer.kernel, np.swapaxes(kernel, -1, -2))
    layer_cases.assert_fisher(model, layer.bias, bias)


def test_an_unknown_length_is_no_obstacle(rng):
    layer = make_layer("1d_same_strides")
    inputs = keras.Input((None, CHANNELS))
    model = keras.Model(inputs, layer(inputs))
    model.compile(
        optimizer=layer_cases.make_optimizer(), loss=layer_cases.product_loss
    )
    x = make_input("1d_same_strides", rng)
    s = layer_cases.train_once(model, x, rng)
    kernel, _ = layer_cases.linear_fisher(
        response_patches(layer, x), s.reshape(-1, FILTERS), bias=True
    )
    layer_cases.assert_fisher(model, layer.kernel, np.swapaxes(kernel, -1, -2))
