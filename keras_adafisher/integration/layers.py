"""The layers of a model."""

import keras


def layers_in(function, target, argument="target"):
    """A layer and all layers inside it.

    Args:
        function: String, the public function that `target` was given to.
        target: `keras.layers.Layer`.
        argument: String, what `target` is called there.

    Returns:
        List of layers, each before its sub-layers.

    Raises:
        TypeError: `target` is no layer.
    """
    if not isinstance(target, keras.layers.Layer):
        raise TypeError(
            f"Argument `{argument}` of `{function}` must be a `keras.Model` or "
            f"a `keras.layers.Layer`. Received: {argument}={target} "
            f"(of type {type(target)})"
        )
    # There is no public way to a layer's sub-layers.
    return target._flatten_layers()
