"""What is changed on Keras' classes once a model is wrapped, and why.

- `Model.make_train_function` makes a training step (`steps`) of the model's
  `train_step` if it trains with an AdaFisher, builds the optimizer before the
  step is traced, and has it traced anew if somebody has changed a setting.
- `LossScaleOptimizer.build` and `MultiOptimizer.build` hand the probes on to
  the AdaFishers inside, and tell these by what the loss is scaled.

`jax_hooks.py` and `tensorflow_hooks.py` have what is for one backend only.

Whoever trains without an AdaFisher notices none of it. Until a model is
wrapped, `compile` is all that differs from Keras: see `compile_hook.py`.

A wrapped model isn't given a subclass of its class in place of this: programs
look at what `type(model)` is, and Keras saves and pickles a model by it.
"""

import contextlib
import functools
import weakref

import keras

from keras_adafisher.integration.custom_loops import adafishers
from keras_adafisher.integration.custom_loops import choice_of
from keras_adafisher.integration.custom_loops import run_step
from keras_adafisher.integration.layers import layers_in
from keras_adafisher.optimizer.arguments import RULES
from keras_adafisher.probe import probe_of
from keras_adafisher.probe import with_probes
from keras_adafisher.wrappers import wrapper_of

_is_installed = False

# The settings with which models' steps were traced.
_traced_settings = weakref.WeakKeyDictionary()


def install():
    """Change Keras' classes. Once is enough."""
    global _is_installed
    if _is_installed:
        return
    _is_installed = True
    keras.Model.make_train_function = _hooked_make_train_function(
        keras.Model.make_train_function
    )
    for optimizer_class in (
        keras.optimizers.LossScaleOptimizer,
        keras.optimizers.MultiOptimizer,
    ):
        optimizer_class.build = _hooked_build(optimizer_class.build)
    if keras.backend.backend() == "jax":
        from keras_adafisher.integration import jax_hooks

        jax_hooks.install()
    elif keras.backend.backend() == "tensorflow":
        from keras_adafisher.integration import tensorflow_hooks

        tensorflow_hooks.install()


def _hooked_make_train_function(make_train_function):
    @functools.wraps(make_train_function)
    def make_of_training_step(self, force=False):
        _build_optimizer(self)
        optimizers = _optimizers_of(self)
        inner = list(adafishers(*optimizers))
        if not inner and not any(map(choice_of, optimizers)):
            return make_train_function(self, force)
        for adafisher in inner:
            adafisher.check_that_layers_are_wrapped()
        if keras.backend.backend() == "torch":
            return make_train_function(self, force)
        # A step that is traced has the numbers of when it was.
        settings = [
            {name: getattr(adafisher, name, None) for name in RULES}
            for adafisher in inner
        ]
        if _traced_settings.get(self, settings) != settings:
            force = True
        _traced_settings[self] = settings
        train_step = self.train_step

        @functools.wraps(train_step)
        def step(*args):
            # The values of variables are in the state, which comes first on
            # JAX. Data may have the same shapes.
            *state, data = args

            @functools.wraps(train_step)
            def on_state(*state):
                return train_step(*state, data)

            return run_step(on_state, optimizers, state)

        # Keras' trainers read the method once, here.
        replaced = vars(self).get("train_step")
        vars(self)["train_step"] = step
        try:
            return make_train_function(self, force)
        finally:
            if replaced is None:
                del vars(self)["train_step"]
            else:
                vars(self)["train_step"] = replaced

    return make_of_training_step


def _build_optimizer(model):
    """Build a model's optimizer if it can be known that it is an AdaFisher.

    TensorFlow's trainer builds it while it traces the step, and a `tf.function`
    that has made variables is traced once more. A `MultiOptimizer` may choose
    its optimizers only as it is built.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or optimizer.built:
        return
    choose = choice_of(optimizer)
    if not choose and not any(adafishers(optimizer)):
        return
    # A `train_step` of the user's may train other variables too.
    of_keras = getattr(model.train_step, "__func__", None)
    if of_keras is not keras.Model.train_step:
        return
    layers = layers_in("make_train_function", model)
    if not all(layer.built for layer in layers):
        return
    # Without wrappers, it chooses others, and Keras builds them.
    if not choose or any(map(wrapper_of, layers)):
        optimizer.build(model.trainable_variables)


def _optimizers_of(model):
    """The optimizers that a model's `train_step` may apply.

    A model with several, a GAN for instance, has them as attributes, or in
    lists or dicts. On JAX, where state is passed along, there is one whose
    state Keras' trainer passes.
    """
    optimizer = getattr(model, "optimizer", None)
    if keras.backend.backend() == "jax":
        return [] if optimizer is None else [optimizer]
    values = [optimizer]
    for value in vars(model).values():
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
        else:
            values.append(value)
    found = {
        id(value): value
        for value in values
        if isinstance(value, keras.optimizers.Optimizer)
    }
    return list(found.values())


def _hooked_build(build):
    @functools.wraps(build)
    def build_with_probes(self, var_list):
        # A `MultiOptimizer` may choose its optimizers as it is built.
        if choice_of(self) or any(adafishers(self)):
            var_list = with_probes(var_list)
        with _probes_beside_parameters(self):
            build(self, var_list)
        if hasattr(self, "dynamic_scale"):
            for adafisher in adafishers(self):
                adafisher.set_loss_scale(self.dynamic_scale)

    return build_with_probes


@contextlib.contextmanager
def _probes_beside_parameters(optimizer):
    """Context in which a `MultiOptimizer` gives AdaFishers their probes.

    It chooses by a variable's path, and one may be for kernels only.
    """
    # Not public, see `choice_of`. Here it may be an `OptimizerMap` too.
    choose = getattr(optimizer, "_optimizer_map", None)
    if choose is None:
        yield
        return
    # It may return a new optimizer each time that it is asked.
    chosen = {}

    def choose_for(variable):
        probe = probe_of(variable)
        parameters = [] if probe is None else probe.block.parameters
        found = [chosen[id(p)] for p in parameters if id(p) in chosen]
        if not found:
            chosen[id(variable)] = choose(variable)
            return chosen[id(variable)]
        # Another AdaFisher knows better than to take a probe for a weight.
        return next(adafishers(*found, *chosen.values()), found[0])

    # Past Keras' tracking, as the map itself was already.
    vars(optimizer)["_optimizer_map"] = choose_for
    try:
        yield
    finally:
        vars(optimizer)["_optimizer_map"] = choose
