"""The whole Kronecker factors of a model's layers, for one batch."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_adafisher.analysis.full_blocks import full_wrapper
from keras_adafisher.analysis.full_blocks import NoFullFactors
from keras_adafisher.analysis.losses import all_variables
from keras_adafisher.analysis.losses import as_it_was
from keras_adafisher.analysis.losses import loss_function
from keras_adafisher.analysis.losses import tensors_of
from keras_adafisher.integration.layers import layers_in
from keras_adafisher.integration.wrapping import without_wrappers
from keras_adafisher.probe import BackendProbe
from keras_adafisher.steps import Step


@dataclasses.dataclass(frozen=True)
class KroneckerFactors:
    """The Kronecker factors of one linear map, for one batch.

    Attributes:
        layer: String, the layer's path.
        parameters: Tuple of strings, the paths of the map's weight and bias,
            as far as it has them.
        activation: Float32 array of shape `(inputs, inputs)`, `H`: the mean of
            `h hᵀ` over the positions of all examples. The
            input coordinates are in the order of the weight's axes. If the
            map has a bias, `h` has one more entry at its end, the 1.
        gradient: Float32 array of shape `(outputs, outputs)`, `S`: the mean of
            `s sᵀ` over them, where `s` is the gradient of the loss at the
            map's output.
        bias_index: Int, the index of the 1 in `activation`, or `None`.
    """

    layer: str
    parameters: tuple[str, ...]
    activation: np.ndarray
    gradient: np.ndarray
    bias_index: int | None


def kronecker_factors(
    model: keras.Model, x: Any, y: Any, layers: Any = None, loss: Any = None
) -> list[KroneckerFactors]:
    """Compute the full Kronecker factors of some layers for one batch.

    ```python
    for factors in analysis.kronecker_factors(model, x[:256], y[:256]):
        print(factors.layer, factors.activation.shape, factors.gradient.shape)
    ```

    The model runs once forward and backward, in training mode. Its diagonals
    are therefore what AdaFisher measures at a training step on this batch. A
    layer that is called several times gets the mean over its calls. Dense and
    einsum layers (so also the projections of attention layers), convolutions
    without groups and their transposes, and embeddings have full factors. The
    model needn't be compiled with AdaFisher, nor be wrapped, and is left as it
    was: batch normalizations' moving averages, metrics and the state of
    dropout are set back. Only layers that draw from Keras' global random seed
    leave a trace.

    Under mixed precision, note that the loss isn't scaled here: in float16
    small gradients may vanish.

    Args:
        model: `keras.Model`, built.
        x: The batch, as the model takes it: an array or tensor, or a list or
            dict of them.
        y: The labels, as the loss takes them: the same.
        layers: `keras.layers.Layer` of the model, or a layer's path or name,
            or a list of those. A layer stands for all layers inside it.
            Defaults to all layers that have full factors.
        loss: Loss function that takes `y` and the model's output, a
            `keras.losses.Loss` or the name of one. Its mean is differentiated.
            Defaults to what the model was compiled with, `add_loss` and
            regularizers included.

    Returns:
        List of `KroneckerFactors`, in the order of the model's layers.

    Raises:
        TypeError: `model` is no model.
        ValueError: The model isn't built; there is neither a `loss` nor one
            that the model was compiled with; `layers` names a layer that the
            model doesn't have, that has no full factors, or that isn't called
            for this `x`.
    """
    everything = layers_in("kronecker_factors", model, "model")
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' has not yet been built. Build it first "
            "by calling `build()` or by calling the model on a batch of data."
        )
    compute_loss = loss_function(model, loss)
    chosen = _chosen_layers(everything, layers)
    with as_it_was(model), without_wrappers(model):
        wrappers = _full_wrappers(chosen)
        attached = []
        try:
            for wrapper in wrappers:
                wrapper.attach()
                attached.append(wrapper)
            probes = _in_order(model, wrappers)
            # All that is attached here measures.
            with Step([], "measure"):
                answers = BackendProbe.differentiate(
                    compute_loss,
                    tensors_of(x, y),
                    probes,
                    all_variables(model),
                )
        finally:
            for wrapper in attached:
                wrapper.detach()

    paths = {
        id(probe): wrapper.host.path or wrapper.host.name
        for wrapper in wrappers
        for probe in wrapper.probes
    }
    results = []
    for probe, answer in zip(probes, answers, strict=True):
        path = paths[id(probe)]
        calls = 0
        if answer is not None:
            answer = ops.convert_to_numpy(answer) / BackendProbe.ANSWER_SCALE
            calls, *sums = probe.split(answer)
        if calls:
            results.append(_result(path, probe.block, sums, calls))
        elif layers is not None:
            raise ValueError(
                f"Layer '{path}' isn't called by the model for this batch, or "
                "its output doesn't change the loss. Leave it out. "
                f"Received: layers={layers}"
            )
    return results


def _full_wrappers(chosen):
    """The wrappers for what was chosen.

    Args:
        chosen: List of pairs of a list of layers, and of the layer that they
            are in and that has to have factors, or `None`.
    """
    wrappers = {}
    for inside, required in chosen:
        reasons = []
        for layer in inside:
            if id(layer) in wrappers:
                continue
            try:
                wrappers[id(layer)] = full_wrapper(layer)
            except NoFullFactors as error:
                reasons.append(str(error))
        if required is not None and len(reasons) == len(inside):
            raise ValueError(
                f"Layer '{required.path or required.name}' has no full "
                f"Kronecker factors: {reasons[0]}. Leave it out of `layers`. "
                "With `layers=None`, all layers that have them are taken."
            )
    return list(wrappers.values())


def _chosen_layers(everything, layers):
    """What `_full_wrappers` takes, for the argument `layers`."""
    if layers is None:
        return [(everything, None)]
    is_one = isinstance(layers, (str, keras.layers.Layer))
    if is_one or not np.iterable(layers):
        layers = [layers]
    chosen = []
    for choice in layers:
        if isinstance(choice, str):
            found = [
                layer
                for layer in everything
                if choice in (layer.path, layer.name)
            ]
        else:
            found = [layer for layer in everything if layer is choice]
        if not found:
            names = ", ".join(f"'{la.path or la.name}'" for la in everything)
            raise ValueError(
                "Argument `layers` must hold layers of the model, their paths "
                f"or names. Received: layers={layers}. The model has {names}"
            )
        chosen += [
            (layers_in("kronecker_factors", layer), layer) for layer in found
        ]
    return chosen


def _in_order(model, wrappers):
    """The probes of wrappers, in the order of the model's weights."""
    order = {id(v): index for index, v in enumerate(model.weights)}
    return sorted(
        (probe for wrapper in wrappers for probe in wrapper.probes),
        key=lambda probe: order[id(probe.block.parameters[0])],
    )


def _result(path, block, sums, calls):
    activation, gradient = (total / np.float32(calls) for total in sums)
    return KroneckerFactors(
        layer=path,
        parameters=tuple(v.path for v in block.parameters),
        activation=activation,
        gradient=gradient,
        bias_index=len(activation) - 1 if block.has_one else None,
    )


def check_kronecker_factors(argument, value):
    """Raise a `TypeError` if an argument is no `KroneckerFactors`."""
    if not isinstance(value, KroneckerFactors):
        raise TypeError(
            f"Argument `{argument}` must be what `kronecker_factors` returned, "
            f"`KroneckerFactors`. Received: {value} (of type {type(value)})"
        )
