"""`compile` wraps models: all that importing the package changes in Keras.

If its optimizer is an AdaFisher, `compile` wraps the model. It unwraps the
model if an earlier `compile` wrapped it and the optimizer is another one.
Layers that it shares with another model that an AdaFisher trains stay wrapped.

What else is changed, `keras_hooks.py` changes, when the first model is wrapped.
"""

import functools
import weakref

import keras

from keras_adafisher.integration.custom_loops import adafishers
from keras_adafisher.integration.custom_loops import choice_of
from keras_adafisher.integration.layers import layers_in
from keras_adafisher.integration.wrapping import unwrap_all_but
from keras_adafisher.integration.wrapping import wrap
from keras_adafisher.probe import probes_of

# The models that `compile` has wrapped.
_wrapped = weakref.WeakSet()


def install():
    """Change `compile`. Once is enough."""
    # The class that defines `compile`, not `keras.Model`: for Keras, a model
    # with a `compile` other than that one has an override of its user's, and
    # `load_model` then doesn't compile it.
    owner = next(c for c in keras.Model.__mro__ if "compile" in vars(c))
    if not hasattr(owner.compile, "without_adafisher"):
        owner.compile = _hooked_compile(owner.compile)


def _hooked_compile(compile):
    @functools.wraps(compile)
    def compile_and_wrap(self, optimizer="rmsprop", *args, **kwargs):
        optimizer = keras.optimizers.get(optimizer)
        previous = getattr(self, "optimizer", None)
        # Keras may put one that stays into a new `LossScaleOptimizer`.
        staying = list(adafishers(optimizer))
        for adafisher in adafishers(previous):
            if not any(adafisher is other for other in staying):
                adafisher.leave(probes_of(self.trainable_variables))
        if staying or _chooses_adafisher(optimizer, self):
            _check_mode()
            wrap(self)
            _wrapped.add(self)
        elif self in _wrapped:
            _wrapped.remove(self)
            shared = [
                layer
                for model in _wrapped
                for layer in layers_in("unwrap", model)
            ]
            unwrap_all_but(shared, self)
        return compile(self, optimizer, *args, **kwargs)

    compile_and_wrap.without_adafisher = compile
    return compile_and_wrap


def _chooses_adafisher(optimizer, model):
    """Whether a `MultiOptimizer` will choose an AdaFisher for some variable.

    Of a model that isn't built yet, there is no variable to try it with.
    """
    choose = choice_of(optimizer)
    if choose is None or not model.built:
        return False
    return any(any(adafishers(choose(v))) for v in model.trainable_variables)


def _check_mode():
    if keras.config.is_nnx_enabled():
        raise ValueError(
            "AdaFisher doesn't train in Keras' NNX mode, where `train_step` "
            "takes no state. Call `keras.config.set_nnx_enabled(False)`, or "
            "unset `KERAS_NNX_ENABLED`, and build the model after it."
        )
