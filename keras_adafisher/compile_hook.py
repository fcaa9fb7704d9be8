"""`model.compile(optimizer=AdaFisher())` wraps the model.

`install` changes some attributes of Keras classes, and only for models that an
AdaFisher trains do they behave differently:

- `compile` wraps the model if its optimizer is an AdaFisher, and unwraps it
  if an earlier `compile` wrapped it and the optimizer is another one. Layers
  that it shares with another model that an AdaFisher trains stay wrapped.
- `Model.trainable_variables` of a wrapped model has the probes at its end. So
  `zip` pairs the weights of a wrapped model with those of a plain one.
- `Model.trainable_weights` of a wrapped model includes the probes. Keras
  documents it as equal to `trainable_variables`, and TensorFlow's trainer reads
  the one where JAX' reads the other. (On PyTorch a model has no probes.)
- `Model.summary`, `Model.export` and `Model.get_state_tree` see the model
  without wrappers.
- `Model.make_train_function` builds the optimizer if the model is built.
- `Model.set_state_tree` lets an AdaFisher ask for a measurement, as loading
  weights does.
"""

import functools
import weakref

import keras

from keras_adafisher.optimizer import AdaFisher
from keras_adafisher.probe import probe_of
from keras_adafisher.wrap import plain_layers
from keras_adafisher.wrap import unwrap_all_but
from keras_adafisher.wrap import without_wrappers
from keras_adafisher.wrap import wrap

# The models that `compile` has wrapped.
_wrapped = weakref.WeakSet()


def install():
    """Change Keras' classes. Once is enough."""
    # The class that defines `compile`, not `keras.Model`: for Keras, a model
    # with a `compile` other than that one has an override of its user's, and
    # `load_model` then doesn't compile it.
    owner = next(c for c in keras.Model.__mro__ if "compile" in vars(c))
    if hasattr(owner.compile, "without_adafisher"):
        return
    owner.compile = _hooked_compile(owner.compile)
    keras.Model.make_train_function = _hooked_make_train_function(
        keras.Model.make_train_function
    )
    keras.Model.trainable_variables = _hooked_trainable_variables(
        keras.Model.trainable_variables
    )
    keras.Model.trainable_weights = _hooked_trainable_weights(
        keras.Model.trainable_weights
    )
    keras.Model.summary = _plainly(keras.Model.summary)
    keras.Model.export = _plainly(keras.Model.export)
    keras.Model.get_state_tree = _plainly(keras.Model.get_state_tree)
    keras.Model.set_state_tree = _hooked_set_state_tree(
        keras.Model.set_state_tree
    )


def _hooked_compile(compile):
    @functools.wraps(compile)
    def compile_and_wrap(self, optimizer="rmsprop", *args, **kwargs):
        # Before the model is compiled: Keras then notes the state of all of
        # its layers.
        optimizer = keras.optimizers.get(optimizer)
        previous = getattr(self, "optimizer", None)
        if previous is not optimizer:
            for adafisher in adafishers(previous):
                adafisher.ask(False)
        if any(adafishers(optimizer)):
            wrap(self)
            _wrapped.add(self)
        elif self in _wrapped:
            _wrapped.remove(self)
            shared = [
                layer
                for model in _wrapped
                for layer in plain_layers("unwrap", model)
            ]
            unwrap_all_but(shared, self)
        return compile(self, optimizer, *args, **kwargs)

    compile_and_wrap.without_adafisher = compile
    return compile_and_wrap


def _hooked_make_train_function(make_train_function):
    @functools.wraps(make_train_function)
    def build_and_make_train_function(self, *args, **kwargs):
        # TensorFlow's trainer builds the optimizer while it traces the step,
        # and a `tf.function` that has made variables is traced once more.
        optimizer = getattr(self, "optimizer", None)
        if any(adafishers(optimizer)) and not optimizer.built:
            layers = plain_layers("make_train_function", self)
            if all(layer.built for layer in layers):
                optimizer.build(self.trainable_variables)
        return make_train_function(self, *args, **kwargs)

    return build_and_make_train_function


def _hooked_trainable_variables(trainable_variables):
    @functools.wraps(trainable_variables.fget)
    def weights_then_probes(self):
        variables = trainable_variables.fget(self)
        return sorted(variables, key=lambda v: probe_of(v) is not None)

    return property(weights_then_probes)


def _hooked_trainable_weights(trainable_weights):
    @functools.wraps(trainable_weights.fget)
    def weights_and_probes(self):
        variables = self.trainable_variables
        if any(probe_of(variable) is not None for variable in variables):
            return variables
        return trainable_weights.fget(self)

    return property(weights_and_probes)


def _hooked_set_state_tree(set_state_tree):
    @functools.wraps(set_state_tree)
    def set_and_ask(self, *args, **kwargs):
        set_state_tree(self, *args, **kwargs)
        for adafisher in adafishers(getattr(self, "optimizer", None)):
            adafisher.ask()

    return set_and_ask


def _plainly(method):
    @functools.wraps(method)
    def call_without_wrappers(self, *args, **kwargs):
        with without_wrappers(self):
            return method(self, *args, **kwargs)

    return call_without_wrappers


def adafishers(optimizer):
    """The AdaFishers that an optimizer is or contains, one after another.

    Args:
        optimizer: `keras.optimizers.Optimizer` or `None`.
    """
    if isinstance(optimizer, AdaFisher):
        yield optimizer
    # Of `LossScaleOptimizer` and of `MultiOptimizer`.
    inner = getattr(optimizer, "inner_optimizer", None)
    several = getattr(optimizer, "optimizers", None) or []
    for other in (inner, *several):
        if other is not None:
            yield from adafishers(other)
