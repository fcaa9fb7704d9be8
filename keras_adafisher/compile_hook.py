"""`model.compile(optimizer=AdaFisher())` wraps the model.

Importing this module changes two attributes of Keras classes, and only for
models that an AdaFisher trains do they behave differently:

- `compile` wraps the model if its optimizer is an AdaFisher, and unwraps it
  if an earlier `compile` wrapped it and the optimizer is another one.
- `Model.trainable_weights` of a wrapped model includes the probes. Keras
  documents it as equal to `trainable_variables`, and the trainers of
  TensorFlow and PyTorch read the one where JAX' reads the other.
"""

import functools

import keras

from keras_adafisher.optimizer import AdaFisher
from keras_adafisher.probe import probe_of
from keras_adafisher.wrap import unwrap
from keras_adafisher.wrap import wrap

_WRAPPED = "_wrapped_by_adafisher_compile"


def install():
    """Change `compile` and `trainable_weights`. Once is enough."""
    # The class that defines `compile`, not `keras.Model`: for Keras, a model
    # with a `compile` other than that one has an override of its user's, and
    # `load_model` then doesn't compile it.
    owner = next(c for c in keras.Model.__mro__ if "compile" in vars(c))
    if hasattr(owner.compile, "without_adafisher"):
        return
    owner.compile = _hooked_compile(owner.compile)
    keras.Model.trainable_weights = _hooked_trainable_weights(
        keras.Model.trainable_weights
    )


def _hooked_compile(compile):
    @functools.wraps(compile)
    def compile_and_wrap(self, optimizer="rmsprop", *args, **kwargs):
        # Before the model is compiled: Keras then notes the state of all of
        # its layers.
        optimizer = keras.optimizers.get(optimizer)
        if _has_adafisher(optimizer):
            wrap(self)
            setattr(self, _WRAPPED, True)
        elif getattr(self, _WRAPPED, False):
            unwrap(self)
            setattr(self, _WRAPPED, False)
        return compile(self, optimizer, *args, **kwargs)

    compile_and_wrap.without_adafisher = compile
    return compile_and_wrap


def _hooked_trainable_weights(trainable_weights):
    @functools.wraps(trainable_weights.fget)
    def weights_and_probes(self):
        variables = self.trainable_variables
        if any(probe_of(variable) is not None for variable in variables):
            return variables
        return trainable_weights.fget(self)

    return property(weights_and_probes)


def _has_adafisher(optimizer):
    # Of `LossScaleOptimizer` and of `MultiOptimizer`.
    inner = getattr(optimizer, "inner_optimizer", None)
    several = getattr(optimizer, "optimizers", None) or []
    return isinstance(optimizer, AdaFisher) or any(
        _has_adafisher(other)
        for other in (inner, *several)
        if other is not None
    )
