import keras
import layer_cases
import numpy as np
import pytest
import reference
from keras import ops
from models import assert_same
from models import PLAIN
from models import product_loss
from models import to_numpy

import keras_adafisher
from keras_adafisher.wrappers import ConvBlock

CASES = {
    "valid": {},
    "same": {"padding": "same"},
    "strided": {"strides": (2, 3)},
    "strided same": {"strides": 2, "padding": "same"},
    "dilated": {"dilation_rate": (1, 2)},
    "dilated same": {"dilation_rate": 2, "padding": "same"},
    "no bias": {"use_bias": False},
    "1x1": {"kernel_size": 1},
    "groups": {"groups": 2},
    "groups same": {"groups": 4, "padding": "same", "use_bias": False},
}


def expected_fisher(layer, x, s, epsilon=0.0):
    """Fisher diagonals of kernel and bias from explicit patches."""
    patches = reference.patches(
        x, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding
    )
    groups = layer.groups
    per_group = x.shape[-1] // groups
    h = np.mean(patches**2, axis=0)
    # Group by group: what a filter of that group sees.
    h = np.stack(np.split(h, groups, axis=-1), axis=-1)
    assert h.shape == (*layer.kernel_size, per_group, groups)
    vector = h.reshape(-1)
    if layer.use_bias:
        vector = np.append(vector, 1.0)
    # The official code divides by the number of inputs of a filter.
    scale = np.prod(h.shape[:-1])
    vector = 0.1 * 1.0 + 0.1 * reference.min_max(vector / scale, epsilon)
    h = vector[: h.size].reshape(h.shape)
    s = 0.1 + 0.1 * reference.min_max(reference.second_moment(s), epsilon)
    filters_per_group = layer.filters // groups
    kernel = np.empty(layer.kernel.shape)
    for f in range(layer.filters):
        kernel[..., f] = h[..., f // filters_per_group] * s[f]
    return kernel + 0.01, vector[-1] * s + 0.01


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_fisher_diagonal_from_explicit_patches(case, epsilon, rng):
    arguments = {"filters": 4, "kernel_size": (2, 3), **CASES[case]}
    layer = keras.layers.Conv2D(**arguments)
    model = keras.Sequential([keras.Input((5, 7, 4)), layer])
    x = rng.normal(size=(3, 5, 7, 4)).astype("float32")
    r = rng.normal(size=(3, *model.output_shape[1:])).astype("float32")
    optimizer = keras_adafisher.AdaFisher(
        damping=0.01, gamma_1=0.9, gamma_2=0.1, epsilon=epsilon, **PLAIN
    )
    model.compile(optimizer, loss=product_loss)
    model.train_on_batch(x, r)

    kernel, bias = expected_fisher(layer, x, r / r.size, epsilon)
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.kernel)), kernel, rtol=1e-4
    )
    if layer.use_bias:
        np.testing.assert_allclose(
            to_numpy(optimizer.preconditioner(layer.bias)), bias, rtol=1e-4
        )


def test_channels_first_is_channels_last_moved(rng):
    """Without a convolution: not every device has one for this layout."""
    arguments = {
        "weight": None,
        "bias": None,
        "channels": 3,
        "filters": 2,
        "kernel_size": (2, 3),
        "strides": (1, 2),
        "dilation_rate": (1, 1),
        "padding": "same",
    }
    last = ConvBlock(**arguments, data_format="channels_last")
    first = ConvBlock(**arguments, data_format="channels_first")
    h = ops.convert_to_tensor(rng.normal(size=(2, 5, 7, 3)).astype("float32"))
    s = ops.convert_to_tensor(rng.normal(size=(2, 5, 4, 2)).astype("float32"))
    for statistic, x in (("activation", h), ("gradient", s)):
        name = f"{statistic}_statistic"
        np.testing.assert_allclose(
            to_numpy(getattr(first, name)(ops.moveaxis(x, -1, 1))),
            to_numpy(getattr(last, name)(x)),
            rtol=1e-6,
        )


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="PyTorch uses its own operations, which `test_cost` counts",
)
def test_no_patch_of_the_input_is_built(rng, monkeypatch):
    """The largest tensor of a statistic is the input itself."""
    block = ConvBlock(
        None, None, 3, 2, (7, 7), (1, 1), (1, 1), "same", "channels_last"
    )
    h = ops.convert_to_tensor(rng.normal(size=(8, 16, 16, 3)).astype("float32"))
    sizes = []
    for name in ("mean", "square", "matmul", "reshape"):
        original = getattr(ops, name)

        def counted(x, *args, original=original, **kwargs):
            y = original(x, *args, **kwargs)
            sizes.append(np.prod(y.shape))
            return y

        monkeypatch.setattr(ops, name, counted)
    block.activation_statistic(h)
    # A product and two changes of shape for each axis.
    assert len(sizes) >= 2 + 2 * 3
    assert max(sizes) == 8 * 16 * 16 * 3
    # All but the square work on one map.
    assert sorted(sizes)[-2] <= 16 * 16 * 3


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_outputs_are_those_of_the_plain_layer(activation, rng):
    model = keras.Sequential(
        [
            keras.Input((5, 7, 2)),
            keras.layers.Conv2D(3, 2, activation=activation),
        ]
    )
    x = rng.normal(size=(3, 5, 7, 2)).astype("float32")
    plain = model.predict(x, verbose=0)
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    layer_cases.let_wrappers_run(model)
    assert_same([model.predict(x, verbose=0)], [plain])


def test_an_image_size_that_is_known_only_at_run_time(rng):
    layer = keras.layers.Conv2D(3, 3, strides=2, padding="same")
    model = keras.Sequential(
        [
            keras.Input((None, None, 2)),
            layer,
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    optimizer = keras_adafisher.AdaFisher(
        damping=0.01, gamma_1=0.9, gamma_2=0.1, **PLAIN
    )
    model.compile(optimizer, loss=product_loss)
    x = rng.normal(size=(3, 6, 9, 2)).astype("float32")
    r = rng.normal(size=(3, 3)).astype("float32")
    model.train_on_batch(x, r)
    s = np.broadcast_to((r / r.size / 15)[:, None, None, :], (3, 3, 5, 3))
    kernel, _ = expected_fisher(layer, x, s)
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.kernel)), kernel, rtol=1e-4
    )
