import warnings

import keras
import numpy as np
import pytest
import reference
from keras import ops
from models import assert_close
from models import PLAIN
from models import product_loss
from models import to_numpy

import keras_adafisher
from keras_adafisher.wrappers import DenseBlock
from keras_adafisher.wrappers import find_wrapper
from keras_adafisher.wrappers import registry
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


def test_so_has_one_that_overrides_what_a_convolution_computes():
    class Standardized(keras.layers.Conv2D):
        def convolution_op(self, inputs, kernel):
            kernel = kernel - ops.mean(kernel, axis=(0, 1, 2), keepdims=True)
            return super().convolution_op(inputs, kernel)

    wrapper, reason = find_wrapper(Standardized(3, 2))
    assert wrapper is None
    assert reason == "Standardized overrides Conv2D.convolution_op"


def test_wrapping_warns_of_an_override_once_for_its_class():
    class Doubled(keras.layers.Dense):
        def call(self, inputs):
            return super().call(2 * inputs)

    class Registered(Doubled):
        def call(self, inputs):
            return super().call(inputs)

    keras_adafisher.register_wrapper(Registered)(DenseWrapper)

    def model_of(*layers):
        return keras.Sequential([keras.Input((4,)), *layers])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Nothing that trains, nothing but a question, and a wrapper of its own.
        keras_adafisher.wrap(model_of(Doubled(3, trainable=False)))
        keras_adafisher.coverage(model_of(Doubled(3)))
        keras_adafisher.wrap(model_of(Registered(3)))
    with pytest.warns(UserWarning) as caught:
        keras_adafisher.wrap(model_of(Doubled(3), Doubled(3)))
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert "`Doubled` overrides `Dense.call`" in text
    assert "They take AdamW's rule" in text
    assert "`keras_adafisher.register_wrapper(Doubled)`" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_adafisher.wrap(model_of(Doubled(3)))


def test_no_layer_of_keras_overrides_what_its_parents_wrapper_relies_on():
    for cls in vars(keras.layers).values():
        if isinstance(cls, type) and issubclass(cls, keras.layers.Layer):
            registered = registry._registered_parent(cls)
            assert registered is None or not registry._override(cls, registered)


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


def test_a_wrapper_for_a_layer_of_ones_own(rng, monkeypatch):
    monkeypatch.setattr(registry, "_WRAPPERS", dict(registry._WRAPPERS))

    class TanhDense(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 2), name="kernel")

        def call(self, inputs):
            return keras.ops.tanh(keras.ops.matmul(inputs, self.kernel))

    @keras_adafisher.register_wrapper(TanhDense)
    class TanhDenseWrapper(keras_adafisher.LayerWrapper):
        def make_blocks(self):
            inputs, outputs = self.host.kernel.shape
            return [DenseBlock(self.host.kernel, None, inputs, outputs)]

        def call(self, inputs):
            z = keras.ops.matmul(inputs, self.host.kernel)
            return keras.ops.tanh(self.tap(z, inputs))

    layer = TanhDense()
    model = keras.Sequential([keras.Input((3,)), layer])
    assert keras_adafisher.coverage(model).factored_fraction == 1.0
    x = rng.normal(size=(4, 3)).astype("float32")
    r = rng.normal(size=(4, 2)).astype("float32")
    y = model.predict(x, verbose=0)
    optimizer = keras_adafisher.AdaFisher(
        damping=0.1, gamma_1=0.9, gamma_2=0.2, **PLAIN
    )
    model.compile(optimizer, loss=product_loss)
    model.train_on_batch(x, r)
    expected = reference.LinearFactors(3, 2, bias=False)
    expected.update(x, r / r.size * (1 - y**2), 0.9, 0.2)
    kernel, _ = expected.fisher(damping=0.1)
    actual = to_numpy(optimizer.preconditioner(layer.kernel))
    assert_close([actual], [kernel], 1e-5)


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


def test_statistics_may_be_in_half_precision():
    class Half(keras.layers.Dense):
        pass

    class HalfBlock(DenseBlock):
        def activation_statistic(self, h):
            return ops.mean(ops.square(h), axis=0)

        def gradient_statistic(self, s):
            return ops.mean(ops.square(s), axis=0)

    @keras_adafisher.register_wrapper(Half)
    class HalfWrapper(DenseWrapper):
        def make_blocks(self):
            layer = self.host
            return [HalfBlock(layer.kernel, layer.bias, *layer.kernel.shape)]

    layer = Half(3, dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((4,)), layer])
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
    model.compile(optimizer, loss="mse")
    model.fit(np.eye(4), np.eye(4)[:, :3], batch_size=1, verbose=0)
    activation, *_ = optimizer.factors(layer.kernel)
    assert to_numpy(activation).dtype == "float32"
    assert np.all(np.isfinite(to_numpy(activation)))
    assert np.any(to_numpy(activation) != 1)
