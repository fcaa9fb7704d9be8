"""Convolutions."""

import keras

from keras_adafisher.blocks import ConvBlock
from keras_adafisher.wrappers.base import LayerWrapper
from keras_adafisher.wrappers.base import variable_or_none
from keras_adafisher.wrappers.registry import register_wrapper


@register_wrapper(keras.layers.Conv2D)
class ConvWrapper(LayerWrapper):
    """`Conv2D`."""

    def make_blocks(self):
        layer = self.host
        kernel = layer.kernel
        return [
            ConvBlock(
                variable_or_none(kernel),
                layer.bias,
                channels=kernel.shape[-2] * layer.groups,
                filters=layer.filters,
                kernel_size=layer.kernel_size,
                strides=layer.strides,
                dilation_rate=layer.dilation_rate,
                padding=layer.padding,
                data_format=layer.data_format,
                groups=layer.groups,
            )
        ]

    def call(self, inputs, *args, **kwargs):
        z = self.host_call_without_activation(inputs, *args, **kwargs)
        return self.activate(self.tap(z, inputs))
