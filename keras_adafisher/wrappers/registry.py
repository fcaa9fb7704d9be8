"""Which wrapper measures which layer class."""

import keras

from keras_adafisher.wrappers.base import LayerWrapper

_WRAPPERS = {}


def register_wrapper(layer_class):
    """Class decorator that registers a `LayerWrapper` for a layer class.

    Subclasses of `layer_class` use the same wrapper as long as they keep its
    `call`. One that overrides `call` needs a wrapper of its own.

    Args:
        layer_class: Subclass of `keras.layers.Layer`.

    Returns:
        The decorator. It returns the wrapper class unchanged.

    Raises:
        TypeError: `layer_class` is not a layer class, or what is decorated is
            not a subclass of `LayerWrapper`.
        ValueError: `layer_class` has a wrapper already.
    """
    if not _is_subclass(layer_class, keras.layers.Layer):
        raise TypeError(
            "Argument `layer_class` must be a subclass of "
            f"`keras.layers.Layer`. Received: layer_class={layer_class}"
        )

    def register(wrapper_class):
        if not _is_subclass(wrapper_class, LayerWrapper):
            raise TypeError(
                "`register_wrapper` decorates subclasses of "
                "`keras_adafisher.LayerWrapper`. "
                f"Received: {wrapper_class}"
            )
        if layer_class in _WRAPPERS:
            raise ValueError(
                f"Layer class `{layer_class.__name__}` already has the "
                f"wrapper `{_WRAPPERS[layer_class].__name__}`. "
                f"Received: {wrapper_class.__name__}"
            )
        _WRAPPERS[layer_class] = wrapper_class
        return wrapper_class

    return register


def find_wrapper(layer):
    """The wrapper class for a layer, or the reason why there is none.

    Args:
        layer: `keras.layers.Layer`.

    Returns:
        Tuple of a subclass of `LayerWrapper` or `None`, and a string that is
        empty if there is one.
    """
    cls = type(layer)
    for registered in cls.__mro__:
        if registered not in _WRAPPERS:
            continue
        if cls.call is not registered.call:
            return None, (
                f"{cls.__name__} overrides {registered.__name__}.call"
            )
        if layer.quantization_mode is not None:
            return None, f"quantized to {layer.quantization_mode}"
        return _WRAPPERS[registered], ""
    return None, f"no wrapper for {cls.__name__}"


def _is_subclass(cls, parent):
    return isinstance(cls, type) and issubclass(cls, parent)
