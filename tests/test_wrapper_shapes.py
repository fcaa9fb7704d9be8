"""Factors that don't fit their parameter are refused at wrapping."""

import keras
import pytest

import keras_adafisher
from keras_adafisher.wrappers import Block
from keras_adafisher.wrappers import register_wrapper


class Scaled(keras.layers.Layer):
    """`x * scale + shift` for inputs with three features."""

    shift_shape = (3,)

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(3,), name="scale")
        self.shift = self.add_weight(shape=self.shift_shape, name="shift")

    def call(self, inputs):
        return inputs * self.scale + self.shift


class ScaledBlock(Block):
    def __init__(self, weight, bias, activation_shape, gradient_shape):
        super().__init__(weight, bias)
        self.activation_shape = activation_shape
        self.gradient_shape = gradient_shape


@register_wrapper(Scaled)
class ScaledWrapper(keras_adafisher.LayerWrapper):
    def make_blocks(self):
        layer = self.host
        return [ScaledBlock(layer.scale, layer.shift, *layer.factor_shapes)]


def scaled(*factor_shapes, shift_shape=(3,)):
    layer = Scaled(name="my_scale")
    layer.factor_shapes = factor_shapes
    layer.shift_shape = shift_shape
    return layer


def wrap(*factor_shapes, **kwargs):
    layer = scaled(*factor_shapes, **kwargs)
    layer.build((None, 3))
    keras_adafisher.wrap(layer)


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((1,), (3,)), ((), (3,))])
def test_factors_may_broadcast(shapes):
    wrap(*shapes)


def test_factors_that_would_enlarge_the_parameter_are_refused():
    with pytest.raises(ValueError, match=r"Layer 'my_scale', .*'scale'") as e:
        wrap((3, 1), (3,))
    assert "shape (3,)" in str(e.value)
    assert "ScaledBlock has factors of shapes (3, 1) and (3,)" in str(e.value)
    assert "Fisher diagonal of shape (3, 3)" in str(e.value)


def test_factors_that_do_not_multiply_are_refused():
    with pytest.raises(ValueError, match=r"Layer 'my_scale', .*'scale'") as e:
        wrap((2,), (3,))
    assert "factors of shapes (2,) and (3,)" in str(e.value)


def test_a_bias_is_checked_too():
    with pytest.raises(ValueError, match="parameter 'shift' of shape"):
        wrap((3,), (3,), shift_shape=())


@pytest.mark.parametrize("is_built", [True, False])
def test_a_model_with_one_such_layer_stays_as_it_was(is_built):
    layers = [
        keras.layers.Dense(3),
        keras.layers.Dense(3),
        scaled((2,), (3,)),
        keras.layers.Dense(3),
    ]
    model = keras.Sequential(layers)
    if is_built:
        model.build((None, 3))
    attributes = [set(vars(layer)) for layer in (model, *layers)]
    with pytest.raises(ValueError, match=r"Layer '.*my_scale', .*'scale'"):
        model.compile(keras_adafisher.AdaFisher(), loss="mse")
        model.build((None, 3))
    if is_built:
        assert [set(vars(layer)) for layer in (model, *layers)] == attributes
        assert not model.compiled
        assert model.trainable_variables == model.weights
