"""What is changed on Keras' classes for JAX only, and why.

There, gradients are those of a function of values, and state is passed along.
So in a training step, the probes (`probe/probe.py`) are variables and values
among others:

- `Layer.trainable_variables` and `Layer.trainable_weights` end with the probes.
  Keras' trainer, and `train_step`s of one's own, take what they differentiate
  from there. Lists of parts are plain: see `Step.shows`.
- `Layer.stateless_call` takes lists with a step's probes behind them for models
  that have none: all lists with the shapes of the weights have them. It takes
  plain lists, of averages for instance, for models that have some.
- `MultiOptimizer.apply` takes lists without probes: it counts its variables.
"""

import functools

import keras

from keras_adafisher.probe import probe_of
from keras_adafisher.probe import with_probes
from keras_adafisher.steps import current


def install():
    """Change Keras' classes."""
    for name in ("trainable_variables", "trainable_weights"):
        hooked = _hooked_list(getattr(keras.layers.Layer, name))
        setattr(keras.layers.Layer, name, hooked)
    keras.layers.Layer.stateless_call = _hooked_stateless_call(
        keras.layers.Layer.stateless_call
    )
    keras.optimizers.MultiOptimizer.apply = _hooked_apply(
        keras.optimizers.MultiOptimizer.apply
    )


def _hooked_list(variables):
    @functools.wraps(variables.fget)
    def and_probes(self):
        found = variables.fget(self)
        step = current()
        if step is None:
            return found
        probes = with_probes(found)[len(found) :]
        return [*found, *(p for p in probes if step.shows(probe_of(p), found))]

    return property(and_probes)


def _hooked_stateless_call(stateless_call):
    @functools.wraps(stateless_call)
    def call_without_probes(
        self, trainable_variables, non_trainable_variables, *args, **kwargs
    ):
        step = current()
        if step is None:
            return stateless_call(
                self,
                trainable_variables,
                non_trainable_variables,
                *args,
                **kwargs,
            )
        # Of a copy of the trained model that isn't trained, for instance, and
        # of the trained model with averages of its weights.
        known = self.trainable_variables
        missing = known[len(trainable_variables) :]
        if all(probe_of(variable) is not None for variable in missing):
            zeros = [keras.ops.zeros(probe.shape) for probe in missing]
            trainable_variables = [*trainable_variables, *zeros]
        count = len(self.non_trainable_variables)
        # A part of what is trained, without its probes, measures nothing.
        weights = [v for v in known if probe_of(v) is None]
        hidden = set(map(id, with_probes(weights))) - set(map(id, known))
        with step.without(hidden):
            return stateless_call(
                self,
                trainable_variables[: len(known)],
                non_trainable_variables[:count],
                *args,
                **kwargs,
            )

    return call_without_probes


def _hooked_apply(apply):
    @functools.wraps(apply)
    def apply_with_probes(self, grads, trainable_variables=None):
        if trainable_variables is not None:
            if not self.built:
                self.build(trainable_variables)
            given = set(map(id, trainable_variables))
            missing = [
                variable
                for variable in self._trainable_variables
                if probe_of(variable) is not None and id(variable) not in given
            ]
            grads = [*grads, *[None for _ in missing]]
            trainable_variables = [*trainable_variables, *missing]
        apply(self, grads, trainable_variables)

    return apply_with_probes
