"""What is changed for TensorFlow only, on its `tf.GradientTape` mostly.

While a training step (`steps`) runs, a tape that is asked for the gradients of
parameters is also asked for those of the probes that measure for them
(`probe/probe.py`). These are kept on the probes, for the optimizer. The caller
gets what it has asked for. A tape that is told to watch parameters watches
their probes too, and doesn't mention them. So no list of variables or gradients
has a probe in it, and whoever counts, cuts or combines such lists sees those of
a plain model.

Nothing else knows of which parameters gradients are wanted: a tape calls the
gradient functions of all that it has recorded, also where it is asked for those
of a generator or of an input only.
"""

import contextlib
import functools
import warnings

import keras
import tensorflow as tf

from keras_adafisher.backend.common import own_tensor
from keras_adafisher.integration.custom_loops import adafishers
from keras_adafisher.probe.tensorflow import in_vectorized_map
from keras_adafisher.steps import current
from keras_adafisher.steps.passes import Passes


def install():
    """Change the classes."""
    keras.optimizers.LossScaleOptimizer.apply = _hooked_apply(
        keras.optimizers.LossScaleOptimizer.apply
    )
    tf.GradientTape.gradient = _hooked_gradient(tf.GradientTape.gradient)
    tf.GradientTape.watch = _hooked_watch(tf.GradientTape.watch)
    tf.GradientTape.watched_variables = _hooked_watched_variables(
        tf.GradientTape.watched_variables
    )


def _hooked_gradient(gradient):
    @functools.wraps(gradient)
    @tf.autograph.experimental.do_not_convert
    def gradient_and_answers(self, target, sources, *args, **kwargs):
        probes = [] if in_vectorized_map() else _probes_of(sources)
        if not probes:
            return gradient(self, target, sources, *args, **kwargs)
        if type(self).gradient is not tf.GradientTape.gradient:
            # Once: the filters of `warnings` know where it comes from.
            warnings.warn(
                f"{type(self).__name__} has a `gradient` of its own. If it "
                "averages gradients over processes, as Horovod does, each of "
                "them has Kronecker factors of its own batches, and weights "
                "that differ from those of the others: take "
                "`tf.distribute.MultiWorkerMirroredStrategy`. Otherwise all is "
                "well.",
                stacklevel=3,
            )
        # A tape makes zeros for variables of TensorFlow only, if it is told to.
        variables = [probe.variable.value for probe in probes]
        found, answers = gradient(
            self, target, [sources, variables], *args, **kwargs
        )
        step = current()
        step.passes = passes = step.passes or Passes()
        number = passes.add(tf.nest.flatten(found))
        for probe, answer in zip(probes, answers, strict=True):
            if answer is not None:
                probe.keep(answer, passes, number)
        return found

    return gradient_and_answers


def _hooked_watch(watch):
    @functools.wraps(watch)
    @tf.autograph.experimental.do_not_convert
    def watch_with_probes(self, tensor):
        watch(self, tensor)
        probes = _probes_of(tensor)
        if probes:
            watch(self, [probe.variable.value for probe in probes])

    return watch_with_probes


def _hooked_watched_variables(watched_variables):
    @functools.wraps(watched_variables)
    @tf.autograph.experimental.do_not_convert
    def variables_without_probes(self):
        found = watched_variables(self)
        step = current()
        if step is None:
            return found
        probes = {_key(probe.variable) for probe in step.probes()}
        return type(found)(v for v in found if _key(v) not in probes)

    return variables_without_probes


def _hooked_apply(apply):
    # The gradients that the optimizer inside gets are others: eagerly, and in
    # replicas, nothing would tell which passes they are from.
    @functools.wraps(apply)
    @tf.autograph.experimental.do_not_convert
    def select_and_apply(self, grads, trainable_variables=None):
        grads = list(grads)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        # Not public: what it takes if it is given none.
        variables = trainable_variables or self._trainable_variables
        gradients = dict(zip(map(id, variables), grads, strict=False))
        with contextlib.ExitStack() as stack:
            for optimizer in adafishers(self):
                for probe in optimizer.measuring_probes():
                    stack.enter_context(probe.selecting(gradients, optimizer))
            apply(self, grads, trainable_variables)

    return select_and_apply


def _probes_of(sources):
    """The probes that measure for some parameters in the step that runs.

    Args:
        sources: Nested structure of tensors and variables, Keras' or
            TensorFlow's.

    Returns:
        List of `Probe`s. None if there are probes among the variables:
        TensorFlow itself, which computes a part of the model once more in the
        backward pass, asks for the gradients of all variables of that part.
    """
    step = current()
    if step is None:
        return []
    known = set(map(_key, tf.nest.flatten(sources)))
    return [
        probe
        for probe in step.probes()
        if probe.trained_parameter is not None
        and _key(probe.trained_parameter) in known
        and _key(probe.variable) not in known
    ]


def _key(variable):
    """What a variable of Keras and the one of TensorFlow in it have alike."""
    is_of_keras = isinstance(variable, keras.Variable)
    return id(own_tensor(variable) if is_of_keras else variable)
