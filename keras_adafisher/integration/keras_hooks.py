"""All that is changed on classes of Keras, and why.

- `compile` wraps the model if its optimizer is an AdaFisher, and unwraps it
  if an earlier `compile` wrapped it and the optimizer is another one. Layers
  that it shares with another model that an AdaFisher trains stay wrapped.
- `Model.make_train_function` makes a training step (`steps.py`) of the model's
  `train_step` if it trains with an AdaFisher, builds the optimizer before the
  step is traced, and has it traced anew if somebody has changed a setting.
- `Layer.trainable_variables` and `Layer.trainable_weights` end with the probes
  while a training step runs. Keras' trainers, and `train_step`s of one's own,
  take what they differentiate from there.
- `Layer.stateless_call` takes lists with a step's probes behind them for models
  that have none: on JAX, all lists with the shapes of the weights have them.
- `MultiOptimizer.apply` takes lists without probes: it counts its variables.
- `LossScaleOptimizer.build` and `MultiOptimizer.build` hand the probes on to
  the AdaFishers inside, and tell these by what the loss is scaled.

Whoever has no AdaFisher notices none of it.
"""

import contextlib
import functools
import weakref

import keras

from keras_adafisher.integration.custom_loops import adafishers
from keras_adafisher.integration.custom_loops import run_step
from keras_adafisher.integration.wrapping import layers_in
from keras_adafisher.integration.wrapping import unwrap_all_but
from keras_adafisher.integration.wrapping import wrap
from keras_adafisher.optimizer.arguments import RULES
from keras_adafisher.probe import probe_of
from keras_adafisher.probe import probes_of
from keras_adafisher.probe import with_probes
from keras_adafisher.steps import current

# The models that `compile` has wrapped.
_wrapped = weakref.WeakSet()
# The settings of their AdaFishers with which steps were traced.
_traced_settings = weakref.WeakKeyDictionary()


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
    for name in ("trainable_variables", "trainable_weights"):
        hooked = _hooked_list(getattr(keras.layers.Layer, name))
        setattr(keras.layers.Layer, name, hooked)
    keras.layers.Layer.stateless_call = _hooked_stateless_call(
        keras.layers.Layer.stateless_call
    )
    for optimizer_class in (
        keras.optimizers.LossScaleOptimizer,
        keras.optimizers.MultiOptimizer,
    ):
        optimizer_class.build = _hooked_build(optimizer_class.build)
    keras.optimizers.MultiOptimizer.apply = _hooked_apply(
        keras.optimizers.MultiOptimizer.apply
    )


def _hooked_compile(compile):
    @functools.wraps(compile)
    def compile_and_wrap(self, optimizer="rmsprop", *args, **kwargs):
        optimizer = keras.optimizers.get(optimizer)
        previous = getattr(self, "optimizer", None)
        if previous is not optimizer:
            for adafisher in adafishers(previous):
                adafisher.leave(probes_of(self.trainable_variables))
        if any(adafishers(optimizer)):
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


def _check_mode():
    if keras.config.is_nnx_enabled():
        raise ValueError(
            "AdaFisher doesn't train in Keras' NNX mode, where `train_step` "
            "takes no state. Call `keras.config.set_nnx_enabled(False)`, or "
            "unset `KERAS_NNX_ENABLED`, and build the model after it."
        )


def _hooked_make_train_function(make_train_function):
    @functools.wraps(make_train_function)
    def make_of_training_step(self, force=False):
        optimizers = _optimizers_of(self)
        inner = list(adafishers(*optimizers))
        if not inner:
            return make_train_function(self, force)
        for adafisher in inner:
            adafisher.check_that_layers_are_wrapped()
        # TensorFlow's trainer builds the optimizer while it traces the step,
        # and a `tf.function` that has made variables is traced once more. (A
        # `train_step` of the user's may train other variables too.)
        optimizer = getattr(self, "optimizer", None)
        of_keras = getattr(self.train_step, "__func__", None)
        if (
            of_keras is keras.Model.train_step
            and any(adafishers(optimizer))
            and not optimizer.built
        ):
            layers = layers_in("make_train_function", self)
            if all(layer.built for layer in layers):
                optimizer.build(self.trainable_variables)
        if keras.backend.backend() == "torch":
            return make_train_function(self, force)
        # A step that is traced has the numbers of when it was.
        settings = [
            {name: getattr(adafisher, name) for name in RULES}
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


def _hooked_list(variables):
    @functools.wraps(variables.fget)
    def and_probes(self):
        found = variables.fget(self)
        step = current()
        # Without taps, a tape has no gradients for probes: `None` in a list in
        # which other code expects tensors. (On JAX they are zeros, and what is
        # passed along has the same length on all steps.)
        is_plain = step is not None and step.mode == "plain"
        if step is None or (is_plain and keras.backend.backend() != "jax"):
            return found
        return with_probes(found)

    return property(and_probes)


def _hooked_stateless_call(stateless_call):
    @functools.wraps(stateless_call)
    def call_without_probes(
        self, trainable_variables, non_trainable_variables, *args, **kwargs
    ):
        if current() is not None:
            # A copy of the trained model that isn't trained, for instance.
            count = len(self.trainable_variables)
            trainable_variables = trainable_variables[:count]
            count = len(self.non_trainable_variables)
            non_trainable_variables = non_trainable_variables[:count]
        return stateless_call(
            self, trainable_variables, non_trainable_variables, *args, **kwargs
        )

    return call_without_probes


def _hooked_build(build):
    @functools.wraps(build)
    def build_with_probes(self, var_list):
        # A `MultiOptimizer` may choose its optimizers as it is built.
        chooses = hasattr(self, "optimizers") and not self.optimizers
        if chooses or any(adafishers(self)):
            var_list = with_probes(var_list)
        with _probes_beside_parameters(self):
            build(self, var_list)
        if hasattr(self, "dynamic_scale"):
            for adafisher in adafishers(self):
                adafisher.set_loss_scale(self.dynamic_scale)

    return build_with_probes


def _hooked_apply(apply):
    @functools.wraps(apply)
    def apply_with_probes(self, grads, trainable_variables=None):
        if trainable_variables is not None and self.built:
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


@contextlib.contextmanager
def _probes_beside_parameters(optimizer):
    """Context in which a `MultiOptimizer` gives AdaFishers their probes.

    It chooses by a variable's path, and one may be for kernels only.
    """
    # Not public: what a `MultiOptimizer` asks for each variable's optimizer.
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
