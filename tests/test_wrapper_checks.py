"""`check_wrapper`, on wrappers that are right and wrong."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_adafisher
from keras_adafisher.wrappers import DenseBlock
from keras_adafisher.wrappers import GradientBlock


class Product(keras.layers.Layer):
    """`x W`, by hand."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 3), name="kernel")

    def call(self, inputs):
        return ops.matmul(inputs, self.kernel)


def product(make_blocks, call):
    """A new class of layers whose wrapper has these methods."""
    layer_class = type("Mine", (Product,), {"call": Product.call})
    methods = {"make_blocks": make_blocks}
    if call is not None:
        methods["call"] = call
    keras_adafisher.register_wrapper(layer_class)(
        type("Wrapper", (keras_adafisher.LayerWrapper,), methods)
    )
    return layer_class()


def dense(self):
    return [DenseBlock(self.host.kernel, None, 4, 3)]


def estimated(self):
    return [GradientBlock(self.host.kernel, (4, 1), (3,))]


def right(self, inputs):
    return self.tap(ops.matmul(inputs, self.host.kernel), inputs)


def other_outputs(self, inputs):
    return 1.5 * self.tap(ops.matmul(inputs, self.host.kernel), inputs)


def no_tap(self, inputs):
    return ops.matmul(inputs, self.host.kernel)


def unused_tap(self, inputs):
    z = ops.matmul(inputs, self.host.kernel)
    self.tap(z, inputs)
    return z


X = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")


def test_a_wrapper_that_is_right():
    layer = product(dense, right)
    layer(X)
    before = layer.get_weights()
    report = keras_adafisher.check_wrapper(layer, X)
    assert [row.source for row in report.rows] == ["measured"]
    # The layer itself stays as it is.
    assert keras_adafisher.coverage(layer).rows[0].source == "not yet"
    np.testing.assert_array_equal(layer.get_weights()[0], before[0])


def test_a_layer_of_keras_that_is_not_built():
    report = keras_adafisher.check_wrapper(keras.layers.Dense(3), X)
    assert [row.source for row in report.rows] == ["measured"] * 2


class TwoMaps(keras.layers.Layer):
    """Outputs of different shapes, of which one is frozen."""

    def build(self, input_shape):
        self.wide = keras.layers.Dense(4, name="wide")
        self.narrow = keras.layers.Dense(2, trainable=False)
        self.wide.build(input_shape)
        self.narrow.build(input_shape)

    def call(self, inputs):
        return {"wide": self.wide(inputs), "narrow": [self.narrow(inputs)]}


def test_outputs_of_several_shapes_and_frozen_weights():
    report = keras_adafisher.check_wrapper(TwoMaps(), X)
    assert {row.parameter: row.source for row in report.rows} == {
        f"two_maps/wide/{name}": "measured" for name in ("kernel", "bias")
    }


def test_what_is_estimated_needs_no_tap():
    report = keras_adafisher.check_wrapper(product(estimated, None), X)
    assert [row.source for row in report.rows] == ["estimated"]


@pytest.mark.parametrize(
    "call, message",
    [
        (other_outputs, "computes something else: the outputs differ by up"),
        (no_tap, "has measured nothing for .*kernel"),
        (unused_tap, "has measured nothing for .*kernel"),
    ],
)
@pytest.mark.filterwarnings("ignore:AdaFisher is at a step at which it")
def test_a_wrapper_that_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        keras_adafisher.check_wrapper(product(dense, call), X)


def test_a_layer_without_a_wrapper():
    with pytest.raises(ValueError, match=r"'\w+' has no wrapper. Register one"):
        keras_adafisher.check_wrapper(Product(), X)


def test_what_is_no_layer():
    with pytest.raises(TypeError, match="`layer` of `check_wrapper` must be"):
        keras_adafisher.check_wrapper("dense", X)
