"""A model's loss as a function, which leaves no trace in the model."""

import contextlib
import inspect

import keras
import numpy as np
from keras import ops

from keras_adafisher import backend


def loss_evaluator(model, x, y, loss):
    """A function without arguments that computes the loss in training mode.

    Args:
        model, x, y, loss: See `kronecker_factors`.
    """
    return backend.evaluator(
        loss_function(model, loss), tensors_of(x, y), all_variables(model)
    )


def loss_function(model, loss):
    """The loss in training mode, as a function of a batch.

    Args:
        model: `keras.Model`.
        loss: See `kronecker_factors`.

    Returns:
        Callable `(x, y)`.
    """
    if loss is not None:
        loss = keras.losses.get(loss)
    elif not getattr(model, "compiled", False):
        raise ValueError(
            "Argument `loss` must be given for a model that isn't compiled. "
            f"Received: loss=None, and a model '{model.name}' without "
            "`compile()`"
        )
    # As in `fit`: not every `call` takes `training`.
    parameters = inspect.signature(model.call).parameters
    arguments = {"training": True} if "training" in parameters else {}

    def compute_loss(x, y):
        y_pred = model(x, **arguments)
        if loss is None:
            return model.compute_loss(x=x, y=y, y_pred=y_pred)
        return ops.mean(loss(y, y_pred))

    return compute_loss


def tensors_of(*data):
    """Nested arrays as nested tensors."""
    return keras.tree.map_structure(ops.convert_to_tensor, data)


def all_variables(model):
    """The variables that computing the loss reads or changes."""
    return [*model.variables, *getattr(model, "metrics_variables", [])]


@contextlib.contextmanager
def as_it_was(model):
    """Context after which all that a forward pass changes is set back."""
    variables = [
        *model.non_trainable_variables,
        *getattr(model, "metrics_variables", []),
    ]
    values = [np.array(ops.convert_to_numpy(v)) for v in variables]
    try:
        with backend.keep_random_state():
            yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
