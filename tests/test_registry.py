import keras
import pytest

import keras_adafisher
from keras_adafisher.wrappers import DenseBlock
from keras_adafisher.wrappers import find_wrapper
from keras_adafisher.wrappers.dense import DenseWrapper


class KeepsCall(keras.layers.Dense):
    pass


class OverridesCall(keras.layers.Dense):
    def call(self, inputs):
        return super().call(2 * inputs)


def test_a_subclass_that_keeps_call_uses_its_parents_wrapper():
    assert find_wrapper(KeepsCall(3)) == (DenseWrapper, "")


def test_a_subclass_that_overrides_call_has_none():
    wrapper, reason = find_wrapper(OverridesCall(3))
    assert wrapper is None
    assert reason == "OverridesCall overrides Dense.call"


def test_a_class_that_nobody_registered_has_none():
    wrapper, reason = find_wrapper(keras.layers.Dropout(0.5))
    assert wrapper is None
    assert reason == "no wrapper for Dropout"


def test_a_quantized_layer_has_none():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    layer.quantize("int8")
    wrapper, reason = find_wrapper(layer)
    assert wrapper is None
    assert reason == "quantized to int8"


def test_a_wrapper_for_a_layer_of_ones_own(rng):
    class Tanh(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 2), name="kernel")

        def call(self, inputs):
            return keras.ops.tanh(keras.ops.matmul(inputs, self.kernel))

    @keras_adafisher.register_wrapper(Tanh)
    class TanhWrapper(keras_adafisher.LayerWrapper):
        def make_blocks(self):
            return [DenseBlock(self.host.kernel, None, *self.host.kernel.shape)]

        def call(self, inputs):
            z = keras.ops.matmul(inputs, self.host.kernel)
            return keras.ops.tanh(self.tap(z, inputs))

    model = keras.Sequential([keras.Input((3,)), Tanh()])
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    model.train_on_batch(rng.normal(size=(4, 3)), rng.normal(size=(4, 2)))
    assert keras_adafisher.coverage(model).factored_fraction == 1.0


def test_what_is_no_layer_class_is_refused():
    for wrong in (int, keras.layers.Dense(3), "Dense"):
        with pytest.raises(TypeError, match="Argument `layer_class` must be"):
            keras_adafisher.register_wrapper(wrong)


def test_what_is_no_wrapper_class_is_refused():
    with pytest.raises(TypeError, match="decorates subclasses of"):
        keras_adafisher.register_wrapper(keras.layers.Dropout)(int)


def test_registering_twice_is_refused():
    class Another(DenseWrapper):
        pass

    with pytest.raises(
        ValueError, match="`Dense` already has the wrapper `DenseWrapper`"
    ):
        keras_adafisher.register_wrapper(keras.layers.Dense)(Another)
    assert find_wrapper(keras.layers.Dense(3)) == (DenseWrapper, "")


def test_a_wrapper_has_to_answer_its_questions():
    class Empty(keras_adafisher.LayerWrapper):
        pass

    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    with pytest.raises(NotImplementedError, match="override `make_blocks"):
        Empty(layer)
