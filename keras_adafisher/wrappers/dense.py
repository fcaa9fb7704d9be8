"""Dense layers."""

import keras

from keras_adafisher.blocks import DenseBlock
from keras_adafisher.wrappers.base import LayerWrapper
from keras_adafisher.wrappers.base import variable_or_none
from keras_adafisher.wrappers.registry import register_wrapper


@register_wrapper(keras.layers.Dense)
class DenseWrapper(LayerWrapper):
    """`Dense`, on inputs of any rank."""

    def make_blocks(self):
        kernel = self.host.kernel
        return [
            DenseBlock(
                variable_or_none(kernel),
                self.host.bias,
                inputs=kernel.shape[0],
                outputs=kernel.shape[1],
            )
        ]

    def call(self, inputs, *args, **kwargs):
        z = self.host_call_without_activation(inputs, *args, **kwargs)
        return self.activate(self.tap(z, inputs))
