"""What the author of a wrapper wants to know of it."""

from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from keras_adafisher.integration.coverage_report import Coverage
from keras_adafisher.integration.coverage_report import coverage
from keras_adafisher.integration.layers import layers_in
from keras_adafisher.integration.wrapping import wrap
from keras_adafisher.optimizer import AdaFisher
from keras_adafisher.wrappers import wrapper_of


def check_wrapper(
    layer: keras.layers.Layer, x: ArrayLike, **call_arguments: Any
) -> Coverage:
    """Check that the wrapper of a layer does what a wrapper has to.

    It must not change what the layer computes, and all of its blocks must
    report in a training step. Both are tried on a copy of the layer, which
    stays as it is.

    ```python
    keras_adafisher.check_wrapper(Gated(4), np.random.normal(size=(16, 6)))
    ```

    Args:
        layer: `keras.layers.Layer` with a registered wrapper. It needn't be
            built.
        x: Array, a batch of inputs.
        **call_arguments: Further arguments of the layer's `call`.

    Returns:
        The `Coverage` of the copy after one step of training, in which each
        row tells of one parameter.

    Raises:
        TypeError: `layer` isn't a layer.
        ValueError: The layer has no wrapper, its outputs aren't the same with
            it, or a parameter's factors weren't measured. (Those that a block
            estimates from the gradient don't count.)
    """
    if not isinstance(layer, keras.layers.Layer):
        raise TypeError(
            "Argument `layer` of `check_wrapper` must be a layer. "
            f"Received: layer={layer} (of type {type(layer)})"
        )
    x = np.asarray(x)
    copy = layer.__class__.from_config(layer.get_config())
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    model = keras.Model(inputs, copy(inputs, **call_arguments))
    if layer.built:
        copy.set_weights(layer.get_weights())

    before = ops.convert_to_numpy(model(x))
    wrap(model)
    wrappers = list(filter(None, map(wrapper_of, layers_in("", model))))
    if not wrappers:
        raise ValueError(
            f"Layer '{layer.name}' has no wrapper. Register one with "
            "`keras_adafisher.register_wrapper`."
        )
    after = _outputs_of_wrappers(model, wrappers, x)
    if not np.array_equal(before, after, equal_nan=True):
        raise ValueError(
            f"With its wrapper, layer '{layer.name}' computes something else: "
            "the outputs differ by up to "
            f"{np.max(np.abs(before - after)):.3g}. The wrapper's `call` must "
            "compute exactly what the layer's `call` does."
        )

    model.compile(AdaFisher(0.0), loss="mse")
    target = np.random.default_rng(0).normal(size=after.shape)
    model.train_on_batch(x, target)
    report = coverage(model)
    sources = {row.parameter: row.source for row in report.rows}
    silent = [
        parameter.path
        for wrapper in wrappers
        for block in wrapper.blocks
        for parameter in block.parameters
        if not block.is_estimated and sources[parameter.path] != "measured"
    ]
    if silent:
        raise ValueError(
            f"The wrapper of layer '{layer.name}' has measured nothing for "
            f"{', '.join(silent)}. In its `call`, the output of each block's "
            "map must pass through `self.tap(z, h, block)`, and what that "
            "returns must be used."
        )
    return report


def _outputs_of_wrappers(model, wrappers, x):
    """A model's outputs if wrappers run, although nothing is measured."""
    calls = [wrapper.host.call for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.host.call = wrapper.call
        return ops.convert_to_numpy(model(x))
    finally:
        for wrapper, call in zip(wrappers, calls, strict=True):
            wrapper.host.call = call
