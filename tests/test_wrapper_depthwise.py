"""Depthwise and separable convolutions, against explicit patches."""

import keras
import layer_cases
import numpy as np
import pytest
from layer_cases import DAMPING
from layer_cases import running
from models import to_numpy
from reference import min_max
from reference import patches

SPATIAL = {1: (9,), 2: (6, 7)}
DEPTHWISE = {1: keras.layers.DepthwiseConv1D, 2: keras.layers.DepthwiseConv2D}
SEPARABLE = {1: keras.layers.SeparableConv1D, 2: keras.layers.SeparableConv2D}

# Rank and arguments.
CASES = {
    "1d_valid": (1, {"kernel_size": 3}),
    "1d_same_strides": (
        1,
        {"kernel_size": 4, "padding": "same", "strides": 2},
    ),
    "1d_dilation": (1, {"kernel_size": 2, "dilation_rate": 3}),
    "2d_same_multiplier": (
        2,
        {"kernel_size": (3, 2), "padding": "same", "depth_multiplier": 2},
    ),
    "2d_valid_strides_multiplier": (
        2,
        {"kernel_size": 2, "strides": 2, "depth_multiplier": 3},
    ),
    "2d_same_dilation": (
        2,
        {"kernel_size": 3, "padding": "same", "dilation_rate": 2},
    ),
    "2d_no_bias": (2, {"kernel_size": 2, "use_bias": False}),
}
CHANNELS, FILTERS = 3, 5


def make_depthwise(case, **kwargs):
    rank, arguments = CASES[case]
    return DEPTHWISE[rank](**arguments, **kwargs)


def make_separable(case, **kwargs):
    rank, arguments = CASES[case]
    return SEPARABLE[rank](FILTERS, **arguments, **kwargs)


def make_input(case, rng, data_format="channels_last"):
    spatial = SPATIAL[CASES[case][0]]
    return layer_cases.conv_input(spatial, CHANNELS, rng, data_format)


def patches_of(layer, x):
    return patches(
        x,
        layer.kernel_size,
        layer.strides,
        layer.dilation_rate,
        layer.padding,
    )


def depthwise_fisher(h_patches, s, bias):
    """Fisher diagonals of kernel and bias, channel by channel.

    Args:
        h_patches: `(rows, *kernel_size, channels)`.
        s: `(..., channels * multiplier)`.
        bias: Bool.
    """
    channels = h_patches.shape[-1]
    multiplier = s.shape[-1] // channels
    h = np.mean(h_patches**2, axis=0)
    s = np.mean(s.reshape(-1, channels, multiplier) ** 2, axis=0)
    entries = np.append(h, 1.0) if bias else h.ravel()
    entries = running(min_max(entries))
    h = entries[: h.size].reshape(h.shape)
    s = running(min_max(s))
    kernel = np.zeros((*h.shape, multiplier))
    for channel in range(channels):
        for m in range(multiplier):
            kernel[..., channel, m] = h[..., channel] * s[channel, m]
    return kernel + DAMPING, entries[-1] * s.ravel() + DAMPING


@pytest.mark.parametrize("case", CASES)
def test_depthwise_fisher_is_that_of_patches_per_channel(case, rng):
    layer = make_depthwise(case)
    x = make_input(case, rng)
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    kernel, bias = depthwise_fisher(patches_of(layer, x), s, layer.use_bias)
    layer_cases.assert_fisher(model, layer.kernel, kernel)
    if layer.use_bias:
        layer_cases.assert_fisher(model, layer.bias, bias)


def test_depthwise_with_channels_first(rng):
    case, data_format = "2d_same_multiplier", "channels_first"
    x = make_input(case, rng, data_format)
    layer_cases.skip_if_plain_layer_fails(
        lambda: make_depthwise(case, data_format=data_format), x
    )
    layer = make_depthwise(case, data_format=data_format)
    model = layer_cases.model_of(layer, x)
    s = np.moveaxis(layer_cases.train_once(model, x, rng), 1, -1)
    kernel, bias = depthwise_fisher(
        patches_of(layer, np.moveaxis(x, 1, -1)), s, True
    )
    layer_cases.assert_fisher(model, layer.kernel, kernel)
    layer_cases.assert_fisher(model, layer.bias, bias)


def test_depthwise_is_a_convolution_with_a_group_per_channel(rng):
    x = make_input("2d_no_bias", rng)
    fishers = []
    y = rng.normal(size=(2, 5, 6, CHANNELS)).astype("float32")
    for layer in (
        keras.layers.DepthwiseConv2D(2),
        keras.layers.Conv2D(CHANNELS, 2, groups=CHANNELS),
    ):
        model = layer_cases.model_of(layer, x)
        model.train_on_batch(x, y)
        fisher = layer_cases.fisher_of(model, layer.kernel)
        fishers.append(
            (fisher.squeeze(), layer_cases.fisher_of(model, layer.bias))
        )
    for depthwise, grouped in zip(*fishers, strict=True):
        np.testing.assert_allclose(depthwise, grouped, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_separable_fisher_is_that_of_its_two_convolutions(case, rng):
    layer = make_separable(case)
    x = make_input(case, rng)
    model = layer_cases.model_of(layer, x)
    pointwise = to_numpy(layer.pointwise_kernel).astype("float64")
    depthwise_kernel = to_numpy(layer.depthwise_kernel).astype("float64")
    s = layer_cases.train_once(model, x, rng)

    # The output of the first and the gradient at it, by hand.
    h = patches_of(layer, x)
    channels, multiplier = depthwise_kernel.shape[-2:]
    depthwise = np.einsum(
        "rtc,tcm->rcm",
        h.reshape(len(h), -1, channels),
        depthwise_kernel.reshape(-1, channels, multiplier),
    ).reshape(len(h), -1)
    s = s.reshape(-1, FILTERS)
    s_depthwise = s @ pointwise.reshape(-1, FILTERS).T

    kernel, _ = depthwise_fisher(h, s_depthwise, bias=False)
    layer_cases.assert_fisher(model, layer.depthwise_kernel, kernel)
    kernel, bias = layer_cases.linear_fisher(depthwise, s, layer.use_bias)
    layer_cases.assert_fisher(
        model, layer.pointwise_kernel, kernel.reshape(pointwise.shape)
    )
    if layer.use_bias:
        layer_cases.assert_fisher(model, layer.bias, bias)


@pytest.mark.parametrize(
    "case", ["1d_same_strides", "1d_dilation", "2d_valid_strides_multiplier"]
)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_wrapping_a_separable_convolution_changes_nothing(
    case, data_format, rng
):
    x = make_input(case, rng, data_format)

    def make_layer():
        return make_separable(case, data_format=data_format, activation="tanh")

    layer_cases.skip_if_plain_layer_fails(make_layer, x)
    layer_cases.assert_wrapping_changes_nothing(make_layer, x)


@pytest.mark.parametrize("case", ["1d_same_strides", "2d_same_multiplier"])
def test_wrapping_a_depthwise_convolution_changes_nothing(case, rng):
    layer_cases.assert_wrapping_changes_nothing(
        lambda: make_depthwise(case, activation="tanh"), make_input(case, rng)
    )


@pytest.mark.parametrize("make_layer", [make_depthwise, make_separable])
def test_statistics_are_float32_in_half_precision(make_layer, rng):
    case = "2d_same_multiplier"
    layer_cases.assert_trains_in_half_precision(
        lambda **kwargs: make_layer(case, **kwargs), make_input(case, rng)
    )


def test_two_calls_are_averaged(rng):
    layer = keras.layers.DepthwiseConv1D(3)
    inputs = keras.Input((9, CHANNELS))
    outputs = keras.layers.Concatenate()([layer(inputs), layer(2.0 * inputs)])
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=layer_cases.make_optimizer(), loss=layer_cases.product_loss
    )
    x = make_input("1d_valid", rng)
    s = layer_cases.train_once(model, x, rng)
    h = patches_of(layer, x)
    kernel, bias = depthwise_fisher(
        np.concatenate([h, 2.0 * h]),
        np.concatenate([s[..., :CHANNELS], s[..., CHANNELS:]]),
        bias=True,
    )
    layer_cases.assert_fisher(model, layer.kernel, kernel)
    layer_cases.assert_fisher(model, layer.bias, bias)
