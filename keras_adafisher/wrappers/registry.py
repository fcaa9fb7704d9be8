"""Which wrapper measures which layer class."""

import keras

from keras_adafisher.wrappers.base import LayerWrapper

_WRAPPERS = {}
# For classes of packages that aren't imported here, and for classes that
# aren't public: from the package's and the class' name.
_WRAPPERS_BY_NAME = {}


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
        wrapper_class = _registered_for(registered)
        if wrapper_class is None:
            continue
        if cls.call is not registered.call:
            return None, (
                f"{cls.__name__} overrides {registered.__name__}.call"
            )
        if layer.quantization_mode is not None:
            return None, f"quantized to {layer.quantization_mode}"
        return wrapper_class, ""
    return None, f"no wrapper for {cls.__name__}"


def _registered_for(cls):
    """The wrapper class of this class, not of its parents, or `None`."""
    package = cls.__module__.partition(".")[0]
    by_name = _WRAPPERS_BY_NAME.get((package, cls.__name__))
    return _WRAPPERS.get(cls, by_name)


def _is_subclass(cls, parent):
    return isinstance(cls, type) and issubclass(cls, parent)
