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

    before = _to_numpy(model(x))
    wrap(model)
    wrappers = list(filter(None, map(wrapper_of, layers_in("", model))))
    if not wrappers:
        raise ValueError(
            f"Layer '{layer.name}' has no wrapper. Register one with "
            "`keras_adafisher.register_wrapper`."
        )
    after = _outputs_of_wrappers(model, wrappers, x)
    _check_equal(layer.name, before, after)

    model.compile(AdaFisher(0.0), loss="mse")
    rng = np.random.default_rng(0)
    targets = keras.tree.map_structure(
        lambda output: rng.normal(size=output.shape), after
    )
    model.train_on_batch(x, targets)
    report = coverage(model)
    sources = {row.parameter: row.source for row in report.rows}
    silent = [
        parameter.path
        for wrapper in wrappers
        for block in wrapper.blocks
        for parameter in block.parameters
        if parameter.trainable
        and not block.is_estimated
        and sources[parameter.path] != "measured"
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
        return _to_numpy(model(x))
    finally:
        for wrapper, call in zip(wrappers, calls, strict=True):
            wrapper.host.call = call


def _to_numpy(outputs):
    return keras.tree.map_structure(ops.convert_to_numpy, outputs)


def _check_equal(name, before, after):
    """Raise an error if outputs differ, with a wrapper and without one.

    Args:
        name: String, the layer's.
        before, after: Arrays, or nested structures of them.
    """
    pairs = zip(
        keras.tree.flatten(before), keras.tree.flatten(after), strict=True
    )
    errors = [
        np.max(np.abs(old - new))
        for old, new in pairs
        if not np.array_equal(old, new, equal_nan=True)
    ]
    if errors:
        raise ValueError(
            f"With its wrapper, layer '{name}' computes something else: the "
            f"outputs differ by up to {max(errors):.3g}. The wrapper's `call` "
            "must compute exactly what the layer's `call` does."
        )
