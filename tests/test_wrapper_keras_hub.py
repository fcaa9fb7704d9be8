"""The layers of keras_hub that have wrappers of their own.

The package knows them by name only. If a release of keras_hub renames one,
the test that fails has its name.
"""

import sys

import keras
import layer_cases
import numpy as np
import pytest
from models import product_loss
from models import to_numpy
from test_wrapper_layer_scale import expected_fisher

import keras_adafisher
from keras_adafisher.wrappers import PositionEmbeddingWrapper
from keras_adafisher.wrappers.experts import EXPERTS
from keras_adafisher.wrappers.keras_hub import LAYER_SCALES
from keras_adafisher.wrappers.keras_hub import NORMALIZATIONS
from keras_adafisher.wrappers.registry import find_wrapper

keras_hub = pytest.importorskip("keras_hub", reason="it isn't installed")

POSITIONS, SIZE = 5, 3
CHANNELS = 4
# What the constructors need that don't read the channels from the input.
ARGUMENTS = {
    "keras_hub.src.layers.modeling.rms_normalization.RMSNormalization": {
        "input_dim": CHANNELS
    },
    "DINOV2LayerScale": {"hidden_dim": CHANNELS},
    "DINOV3LayerScale": {"hidden_dim": CHANNELS},
    "Gemma3nAudioCumulativeGroupNorm": {
        "num_channels": CHANNELS,
        "feature_dims": (3,),
    },
    "Gemma3nRMSNorm": {"dim": CHANNELS},
    "LayerScale2d": {"dim": CHANNELS},
    "RmsNorm2d": {"dim": CHANNELS},
}


def classes_named(name):
    """The layer classes of keras_hub with this name, one per module."""
    modules = [
        module
        for path, module in sorted(sys.modules.items())
        if path.startswith("keras_hub.src.")
    ]
    return [
        vars(module)[name]
        for module in modules
        if getattr(vars(module).get(name), "__module__", "") == module.__name__
    ]


def make_layers():
    """One layer of each class that scales its channels."""
    layers = []
    for name in (*LAYER_SCALES, *NORMALIZATIONS):
        for layer_class in classes_named(name):
            path = f"{layer_class.__module__}.{name}"
            arguments = ARGUMENTS.get(path, ARGUMENTS.get(name, {}))
            layers.append(layer_class(**arguments))
    return layers


@pytest.mark.parametrize(
    "name",
    [
        *EXPERTS,
        *LAYER_SCALES,
        *NORMALIZATIONS,
        "PositionEmbedding",
        "AdjustablePositionEmbedding",
    ],
)
def test_the_class_exists(name):
    assert classes_named(name)
    assert all(issubclass(c, keras.layers.Layer) for c in classes_named(name))


def test_every_scale_has_factors_per_channel(rng):
    x = rng.normal(1.0, 2.0, size=(2, 3, 3, CHANNELS)).astype("float32")
    layers = make_layers()
    inputs = keras.Input(x.shape[1:])
    outputs = keras.layers.Concatenate()([layer(inputs) for layer in layers])
    model = keras.Model(inputs, outputs)
    plain_outputs = to_numpy(model(x))
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    np.testing.assert_array_equal(to_numpy(model(x)), plain_outputs)
    assert keras_adafisher.coverage(model).factored_fraction == 1.0
    s = layer_cases.train_once(model, x, rng)
    for layer, s_of_layer in zip(
        layers, np.split(s, len(layers), axis=-1), strict=True
    ):
        (weight,) = layer.weights
        np.testing.assert_allclose(
            layer_cases.fisher_of(model, weight),
            expected_fisher(x, s_of_layer),
            rtol=2e-5,
            err_msg=weight.path,
        )


@pytest.mark.parametrize("name", ["LayerScale2d", "RmsNorm2d"])
def test_channels_first(name, rng):
    (layer_class,) = classes_named(name)
    x = rng.normal(size=(2, CHANNELS, 3, 3)).astype("float32")
    layer = layer_class(dim=CHANNELS, data_format="channels_first")
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    layer_cases.assert_fisher(
        model,
        layer.gamma,
        expected_fisher(np.moveaxis(x, 1, -1), np.moveaxis(s, 1, -1)),
    )


def test_a_normalization_without_a_scale_has_nothing_to_wrap():
    (layer_class,) = classes_named("Gemma3nRMSNorm")
    layer = layer_class(dim=CHANNELS, with_scale=False)
    layer.build((None, CHANNELS))
    keras_adafisher.wrap(layer)
    assert layer.variables == []


@pytest.mark.parametrize("name", ["LlamaLayerNorm", "T5LayerNorm"])
def test_a_normalization_in_half_precision(name, rng):
    (layer_class,) = classes_named(name)
    x = rng.normal(size=(3, 5, CHANNELS)).astype("float32")
    layer_cases.assert_wrapping_changes_nothing(layer_class, x)
    layer_cases.assert_trains_in_half_precision(layer_class, x)


# PositionEmbedding


def make_positions(**kwargs):
    return keras_hub.layers.PositionEmbedding(POSITIONS, **kwargs)


def one_hot(positions, count=POSITIONS):
    return np.eye(count)[np.ravel(positions)]


@pytest.mark.parametrize(
    "length, call_arguments, positions",
    [
        (5, {}, [0, 1, 2, 3, 4]),
        (3, {}, [0, 1, 2]),
        (3, {"start_index": 1}, [1, 2, 3]),
        (3, {"positions": np.array([4, 0, 4])}, [4, 0, 4]),
        (
            3,
            {"positions": np.array([[4, 0, 0], [2, 1, 0]])},
            [[4, 0, 0], [2, 1, 0]],
        ),
    ],
    ids=["all", "some", "later", "given", "given_per_example"],
)
def test_fisher_diagonal_is_that_of_one_hot_positions(
    length, call_arguments, positions, rng
):
    x = np.zeros((2, length, SIZE), "float32")
    layer = make_positions()
    model = layer_cases.model_of(layer, x, **call_arguments)
    s = layer_cases.train_once(model, x, rng)
    h = one_hot(np.broadcast_to(positions, (2, length)))
    expected, _ = layer_cases.linear_fisher(h, s.reshape(-1, SIZE))
    layer_cases.assert_fisher(model, layer.position_embeddings, expected)


def test_unused_positions_get_0_and_so_do_all_if_all_are_used(rng):
    for length, normalized in ((3, [1, 1, 1, 0, 0]), (5, [0, 0, 0, 0, 0])):
        x = np.zeros((2, length, SIZE), "float32")
        layer = make_positions()
        model = layer_cases.model_of(layer, x)
        layer_cases.train_once(model, x, rng)
        factors = model.optimizer.factors(layer.position_embeddings)
        np.testing.assert_allclose(
            to_numpy(factors.activation)[:, 0],
            layer_cases.running(np.array(normalized)),
            rtol=1e-6,
        )


def test_a_length_that_is_not_known_before(rng):
    layer = make_positions()
    inputs = keras.Input((None, SIZE))
    model = keras.Model(inputs, layer(inputs))
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    x = np.zeros((2, 3, SIZE), "float32")
    s = layer_cases.train_once(model, x, rng)
    expected, _ = layer_cases.linear_fisher(
        one_hot([[0, 1, 2]] * 2), s.reshape(-1, SIZE)
    )
    layer_cases.assert_fisher(model, layer.position_embeddings, expected)


def test_wrapping_position_embeddings_changes_nothing():
    x = np.zeros((2, 3, SIZE), "float32")
    layer_cases.assert_wrapping_changes_nothing(make_positions, x)
    layer_cases.assert_wrapping_changes_nothing(
        make_positions, x, start_index=2
    )


def test_position_embeddings_in_half_precision():
    x = np.zeros((2, 3, SIZE), "float32")
    layer_cases.assert_trains_in_half_precision(make_positions, x)


# AdjustablePositionEmbedding


@pytest.mark.parametrize(
    "used, positions",
    [
        ({}, range(4 * 3)),
        # The grid's cells:   0  1  2
        #                     3  4  5
        #                     6  7  8
        #                     9 10 11
        ({"height": 2, "width": 1}, [4, 7]),
        ({"height": 3, "width": 2}, [0, 1, 3, 4, 6, 7]),
    ],
    ids=["all", "middle", "odd_rest"],
)
def test_fisher_diagonal_of_the_middle_of_a_grid(used, positions, rng):
    (layer_class,) = classes_named("AdjustablePositionEmbedding")
    x = rng.normal(size=(2, len(positions), SIZE)).astype("float32")
    layer = layer_class(height=4, width=3)
    inputs = keras.Input(x.shape[1:])
    outputs = keras.layers.Add()([inputs, layer(inputs, **used)])
    model = keras.Model(inputs, outputs)
    plain_outputs = to_numpy(model(x))
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    np.testing.assert_array_equal(to_numpy(model(x)), plain_outputs)
    # The layer's output is used by all examples.
    s = layer_cases.train_once(model, x, rng).sum(axis=0)
    expected, _ = layer_cases.linear_fisher(one_hot(positions, 4 * 3), s)
    layer_cases.assert_fisher(model, layer.position_embeddings, expected)


def test_another_subclass_needs_a_wrapper_of_its_own():
    class Doubled(keras_hub.layers.PositionEmbedding):
        def call(self, inputs):
            return 2 * super().call(inputs)

    class Renamed(keras_hub.layers.PositionEmbedding):
        pass

    assert find_wrapper(Renamed(3)) == (PositionEmbeddingWrapper, "")
    assert find_wrapper(Doubled(3)) == (
        None,
        "Doubled overrides PositionEmbedding.call",
    )
