"""Wrap a model's layers in place, and undo it."""

import contextlib
import functools
from collections.abc import Sequence

import keras

from keras_adafisher.integration import keras_hooks
from keras_adafisher.integration.layers import layers_in
from keras_adafisher.optimizer.arguments import check
from keras_adafisher.optimizer.arguments import matches
from keras_adafisher.wrappers import find_wrapper
from keras_adafisher.wrappers import warn_of_override
from keras_adafisher.wrappers import wrapper_of

# The attribute of layers that are left out.
_EXCLUDED = "adafisher_excluded"


def wrap(
    target: keras.Model | keras.layers.Layer,
    exclude_layers: Sequence[str] | None = None,
) -> None:
    """Make a model's layers measure their Kronecker factors in training.

    `model.compile(optimizer=AdaFisher())` calls this function. Call it
    yourself before a custom training loop:

    ```python
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher()
    optimizer.build(model.trainable_variables)
    ```

    and decorate its step function with `keras_adafisher.training_step`.

    The model stays the same object, with the same variables, config, outputs
    and saved files. Layers that aren't built yet are wrapped when they are.
    Wrapping what is wrapped already changes nothing.

    A layer whose class overrides the `call` of one that has a wrapper isn't
    wrapped, and a warning says so, once for each such class.

    Args:
        target: `keras.Model` or `keras.layers.Layer`.
        exclude_layers: List of strings, regular expressions that are searched
            for in the paths of layers. Those with one of them aren't wrapped,
            neither now nor by a later `compile`, and their parameters take
            AdamW's rule. A list takes the place of that of an earlier call.
            Defaults to `None`, which leaves that one in force.

    Raises:
        TypeError: `target` is neither.
        ValueError: The factors of a layer don't broadcast to its parameters, or
            `exclude_layers` is something else. No layer is wrapped then.
    """
    layers = layers_in("wrap", target)
    if exclude_layers is not None:
        check("exclude_layers", exclude_layers)
        for layer in layers:
            path = layer.path or layer.name
            layer.__dict__[_EXCLUDED] = matches(exclude_layers, path)
    built = [layer for layer in layers if layer.built]
    # All before the first is attached: if one can't be made, the model stays
    # as it is.
    wrappers = [make_wrapper(layer)[0] for layer in built]
    for layer, wrapper in zip(built, wrappers, strict=True):
        if wrapper is None and not layer.__dict__.get(_EXCLUDED):
            warn_of_override(layer)
    keras_hooks.install()
    for layer, wrapper in zip(built, wrappers, strict=True):
        current = wrapper_of(layer)
        if current is not None and current.has_the_blocks_of(wrapper):
            continue
        # LoRA and `quantize` change which parameters a layer trains.
        _detach(layer)
        if wrapper is not None:
            wrapper.attach()
    for layer in layers:
        if not layer.built:
            _wrap_when_built(layer)


def unwrap(target: keras.Model | keras.layers.Layer) -> None:
    """Undo `wrap`.

    Args:
        target: `keras.Model` or `keras.layers.Layer`.

    Raises:
        TypeError: `target` is neither.
    """
    unwrap_all_but((), target)


def unwrap_all_but(kept, target):
    """Undo `wrap`, except for some layers.

    Args:
        kept: Collection of layers, compared by identity.
        target: `keras.Model` or `keras.layers.Layer`.
    """
    layers = layers_in("unwrap", target)
    kept = {id(layer) for layer in kept}
    for layer in layers:
        if id(layer) in kept:
            continue
        build = layer.__dict__.get("build")
        if hasattr(build, "without_adafisher"):
            layer.build = build.without_adafisher
        _detach(layer)


@contextlib.contextmanager
def without_wrappers(target):
    """Context in which no layer is wrapped. Afterwards all are as before.

    Args:
        target: `keras.layers.Layer`.
    """
    layers = layers_in("without_wrappers", target)
    wrappers = [w for w in map(wrapper_of, layers) if w is not None]
    for wrapper in wrappers:
        wrapper.detach()
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper.attach()


def make_wrapper(layer):
    """A new wrapper for a built layer, or why it can't have one.

    Args:
        layer: `keras.layers.Layer`.

    Returns:
        Tuple of a `LayerWrapper` that isn't attached or `None`, and a string
        that is empty if there is one.
    """
    if "call" in layer.__dict__ and wrapper_of(layer) is None:
        return None, f"the `call` of {layer.name} was replaced"
    if layer.__dict__.get(_EXCLUDED):
        return None, f"{layer.name} is left out by `exclude_layers`"
    wrapper_class, reason = find_wrapper(layer)
    if wrapper_class is None:
        return None, reason
    wrapper = wrapper_class(layer)
    if not wrapper.blocks:
        return None, f"{layer.name} has no parameters to factor"
    return wrapper, ""


def _wrap_when_built(layer):
    build = layer.build
    if hasattr(build, "without_adafisher"):
        return

    @functools.wraps(build)
    def build_and_wrap(*args, **kwargs):
        build(*args, **kwargs)
        layer.build = build
        # Sub-layers too: `build` may have made some.
        wrap(layer)

    build_and_wrap.without_adafisher = build
    layer.build = build_and_wrap


def _detach(layer):
    """Take a layer's wrapper off, if it has one."""
    wrapper = wrapper_of(layer)
    if wrapper is not None:
        wrapper.detach()
