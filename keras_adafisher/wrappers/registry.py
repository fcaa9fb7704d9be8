"""Which wrapper measures which layer class."""

import warnings
import weakref
from collections.abc import Callable
from typing import TypeVar

import keras

from keras_adafisher.wrappers.base import LayerWrapper

_WrapperClass = TypeVar("_WrapperClass", bound=type[LayerWrapper])

_WRAPPERS = {}
# For classes of packages that aren't imported here, and for classes that
# aren't public: from the package's and the class' name.
_WRAPPERS_BY_NAME = {}

# What decides over the map from a layer's inputs and weights to its output.
# `convolution_op` is what Keras' convolutions have instead for subclasses.
_COMPUTATION = ("call", "convolution_op")

# The classes that `warn_of_override` has warned of.
_warned = weakref.WeakSet()


def register_wrapper(
    layer_class: type[keras.layers.Layer],
) -> Callable[[_WrapperClass], _WrapperClass]:
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


def register_wrapper_by_name(package, *class_names):
    """Class decorator that registers a `LayerWrapper` for names of classes.

    As `register_wrapper`, but for layer classes that can't be imported here.
    A class that is registered itself comes first.

    Args:
        package: String, the top-level package that defines the classes.
        *class_names: Strings. Where several modules of the package have a
            class of that name, the wrapper has to fit all of them.

    Returns:
        The decorator. It returns the wrapper class unchanged.

    Raises:
        ValueError: One of them has a wrapper already.
    """

    def register(wrapper_class):
        for class_name in class_names:
            key = package, class_name
            if key in _WRAPPERS_BY_NAME:
                raise ValueError(
                    f"Layer class `{class_name}` of `{package}` already has "
                    f"the wrapper `{_WRAPPERS_BY_NAME[key].__name__}`. "
                    f"Received: {wrapper_class.__name__}"
                )
            _WRAPPERS_BY_NAME[key] = wrapper_class
        return wrapper_class

    return register


def find_wrapper(
    layer: keras.layers.Layer,
) -> tuple[type[LayerWrapper] | None, str]:
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
    # The weights of a layer in float8 train on. Its `quantized_call` passes by
    # the taps: the factors are estimated from gradients.
    if layer.quantization_mode not in (None, "float8"):
        return None, f"quantized to {layer.quantization_mode}"
    return _registered_for(registered), ""


def warn_of_override(layer: keras.layers.Layer) -> None:
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
    parents = (c for c in cls.__mro__ if _registered_for(c) is not None)
    return next(parents, None)


def _override(cls, registered):
    """Which method a class doesn't share with its parent. `None` if none."""
    for name in _COMPUTATION:
        if getattr(cls, name, None) is not getattr(registered, name, None):
            return f"{registered.__name__}.{name}"
    return None


def _registered_for(cls):
    """The wrapper class of this class, not of its parents, or `None`."""
    package = cls.__module__.partition(".")[0]
    by_name = _WRAPPERS_BY_NAME.get((package, cls.__name__))
    return _WRAPPERS.get(cls, by_name)


def _is_subclass(cls, parent):
    return isinstance(cls, type) and issubclass(cls, parent)
