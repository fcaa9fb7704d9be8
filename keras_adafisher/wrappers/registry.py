"""Which wrapper measures which layer class."""

import warnings
import weakref

import keras

from keras_adafisher.wrappers.base import LayerWrapper

_WRAPPERS = {}

# What decides over the map from a layer's inputs and weights to its output.
# `convolution_op` is what Keras' convolutions have instead for subclasses.
_COMPUTATION = ("call", "convolution_op")

# The classes that `warn_of_override` has warned of.
_warned = weakref.WeakSet()


def register_wrapper(layer_class):
    """Class decorator that registers a `LayerWrapper` for a layer class.

    A subclass of `layer_class` uses the same wrapper as long as it keeps
    `call` (and a convolution's `convolution_op`). One that overrides it takes
    AdamW's rule, and wrapping a model that has one warns, once for the class:
    no code can tell whether what a method does, on its way to
    `super().call()` and back, leaves the measured `h` and `s` those of the
    weight. If it does, register the parent's wrapper for the subclass; if
    not, one of its own. All other methods may be overridden.

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
    registered = _registered_parent(cls)
    if registered is None:
        return None, f"no wrapper for {cls.__name__}"
    override = _override(cls, registered)
    if override is not None:
        return None, f"{cls.__name__} overrides {override}"
    if layer.quantization_mode is not None:
        return None, f"quantized to {layer.quantization_mode}"
    return _WRAPPERS[registered], ""


def warn_of_override(layer):
    """Warn if a layer trains without the factors that its parent has.

    Args:
        layer: `keras.layers.Layer`.
    """
    cls = type(layer)
    registered = _registered_parent(cls)
    if registered is None or cls in _warned or not layer.trainable_variables:
        return
    override = _override(cls, registered)
    if override is None:
        return
    warnings.warn(
        f"`{cls.__name__}` overrides `{override}`, so AdaFisher can't know "
        f"what its weights see. They take AdamW's rule. Decorate a "
        "`keras_adafisher.LayerWrapper` with "
        f"`keras_adafisher.register_wrapper({cls.__name__})` to give them "
        "Kronecker factors.",
        # The caller of `wrap`.
        stacklevel=3,
    )
    _warned.add(cls)


def _registered_parent(cls):
    return next((c for c in cls.__mro__ if c in _WRAPPERS), None)


def _override(cls, registered):
    """Which method a class doesn't share with its parent. `None` if none."""
    for name in _COMPUTATION:
        if getattr(cls, name, None) is not getattr(registered, name, None):
            return f"{registered.__name__}.{name}"
    return None


def _is_subclass(cls, parent):
    return isinstance(cls, type) and issubclass(cls, parent)
