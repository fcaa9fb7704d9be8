"""Conv1D, Conv2D, Conv3D: factors against explicit patches."""

import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from reference import patches

import keras_adafisher

LAYERS = {
    1: keras.layers.Conv1D,
    2: keras.layers.Conv2D,
    3: keras.layers.Conv3D,
}
SPATIAL = {1: (9,), 2: (6, 5), 3: (4, 5, 3)}

# Rank and arguments. Even and uneven sizes, kernels and strides.
CASES = {
    "1d_valid": (1, {"kernel_size": 3}),
    "1d_same": (1, {"kernel_size": 4, "padding": "same"}),
    "1d_same_strides": (
        1,
        {"kernel_size": 3, "padding": "same", "strides": 2},
    ),
    "1d_strides_larger_than_kernel": (
        1,
        {"kernel_size": 2, "padding": "same", "strides": 4},
    ),
    "1d_causal": (1, {"kernel_size": 3, "padding": "causal"}),
    "1d_causal_strides": (
        1,
        {"kernel_size": 3, "padding": "causal", "strides": 2},
    ),
    "1d_causal_dilation": (
        1,
        {"kernel_size": 3, "padding": "causal", "dilation_rate": 2},
    ),
    "1d_valid_dilation_groups": (
        1,
        {"kernel_size": 2, "dilation_rate": 3, "groups": 2},
    ),
    "1d_no_bias": (1, {"kernel_size": 3, "use_bias": False}),
    "2d_same_dilation": (
        2,
        {"kernel_size": (3, 2), "padding": "same", "dilation_rate": (2, 1)},
    ),
    "2d_groups_strides": (
        2,
        {"kernel_size": 3, "padding": "same", "strides": 2, "groups": 2},
    ),
    "3d_valid": (3, {"kernel_size": (2, 3, 1)}),
    "3d_same_strides": (
        3,
        {"kernel_size": (2, 3, 2), "padding": "same", "strides": 2},
    ),
    "3d_valid_dilation": (3, {"kernel_size": 2, "dilation_rate": (1, 2, 1)}),
    "3d_groups": (3, {"kernel_size": 2, "groups": 2}),
}
CHANNELS, FILTERS = 4, 6


def make_layer(case, **kwargs):
    rank, arguments = CASES[case]
    return LAYERS[rank](FILTERS, **arguments, **kwargs)


def make_input(case, rng, data_format="channels_last"):
    spatial = SPATIAL[CASES[case][0]]
    return layer_cases.conv_input(spatial, CHANNELS, rng, data_format)


def expected_fisher(layer, x, s):
    """`x` and `s` have their channels last."""
    h = patches(
        x,
        layer.kernel_size,
        layer.strides,
        layer.dilation_rate,
        layer.padding,
    )
    s = s.reshape(-1, s.shape[-1])
    weight, bias = layer_cases.linear_fisher(h, s, bias=layer.use_bias)
    # A filter sees the channels of its own group.
    size = CHANNELS // layer.groups
    filters = FILTERS // layer.groups
    weight = np.concatenate(
        [
            weight[..., g * size : (g + 1) * size, :][
                ..., g * filters : (g + 1) * filters
            ]
            for g in range(layer.groups)
        ],
        axis=-1,
    )
    return weight, bias


def check(case, rng, data_format):
    layer = make_layer(case, data_format=data_format)
    x = make_input(case, rng, data_format)
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    if data_format == "channels_first":
        x, s = np.moveaxis(x, 1, -1), np.moveaxis(s, 1, -1)
    weight, bias = expected_fisher(layer, x, s)
    layer_cases.assert_fisher(model, layer.kernel, weight)
    if layer.use_bias:
        layer_cases.assert_fisher(model, layer.bias, bias)


@pytest.mark.parametrize("case", CASES)
def test_fisher_diagonal_is_that_of_explicit_patches(case, rng):
    check(case, rng, "channels_last")


@pytest.mark.parametrize(
    "case",
    ["1d_same_strides", "1d_causal", "2d_same_dilation", "3d_groups"],
)
def test_channels_may_come_first(case, rng):
    x = make_input(case, rng, "channels_first")
    # TensorFlow has no such convolution of most kinds on the CPU.
    layer_cases.skip_if_plain_layer_fails(
        lambda: make_layer(case, data_format="channels_first"), x
    )
    check(case, rng, "channels_first")


@pytest.mark.parametrize("case", ["1d_causal_strides", "3d_same_strides"])
def test_wrapping_changes_neither_outputs_nor_gradients(case, rng):
    layer_cases.assert_wrapping_changes_nothing(
        lambda: make_layer(case, activation="tanh"), make_input(case, rng)
    )


@pytest.mark.parametrize("case", ["1d_valid_dilation_groups", "3d_valid"])
def test_statistics_are_float32_in_half_precision(case, rng):
    layer_cases.assert_trains_in_half_precision(
        lambda **kwargs: make_layer(case, **kwargs), make_input(case, rng)
    )


def test_two_calls_with_different_lengths_are_averaged(rng):
    layer = keras.layers.Conv1D(3, 2)
    inputs = keras.Input((6, 2))
    long, short = layer(inputs), layer(inputs[:, 1:5])
    model = keras.Model(inputs, keras.layers.Concatenate(axis=1)([long, short]))
    model.compile(
        optimizer=layer_cases.make_optimizer(), loss=layer_cases.product_loss
    )
    x = rng.normal(size=(3, 6, 2)).astype("float32")
    s = layer_cases.train_once(model, x, rng)

    def moments(x, s):
        h = patches(x, (2,), (1,), (1,), "valid")
        return np.mean(h**2, axis=0), np.mean(s.reshape(-1, 3) ** 2, axis=0)

    (h_1, s_1), (h_2, s_2) = moments(x, s[:, :5]), moments(x[:, 1:5], s[:, 5:])
    weight, bias = layer_cases.linear_fisher(
        # One row whose square is the mean of the two calls' means.
        np.sqrt((h_1 + h_2) / 2)[None],
        np.sqrt((s_1 + s_2) / 2)[None],
        bias=True,
    )
    layer_cases.assert_fisher(model, layer.kernel, weight)
    layer_cases.assert_fisher(model, layer.bias, bias)


def test_lora_leaves_factors_to_the_bias(rng):
    layer = keras.layers.Conv1D(3, 2, lora_rank=2)
    x = rng.normal(size=(2, 6, 2)).astype("float32")
    model = layer_cases.model_of(layer, x)
    layer_cases.train_once(model, x, rng)
    assert np.all(layer_cases.fisher_of(model, layer.bias) < 1)
    rows = keras_adafisher.coverage(model).rows
    assert {row.parameter.split("/")[-1] for row in rows if row.factors} == {
        "bias"
    }
    assert ops.is_tensor(layer.kernel)
