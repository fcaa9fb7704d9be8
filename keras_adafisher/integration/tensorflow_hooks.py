"""What is changed on TensorFlow's `tf.GradientTape`, and why.

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

import functools

import keras
import tensorflow as tf

from keras_adafisher.steps import current


def install():
    """Change `tf.GradientTape`."""
    tf.GradientTape.gradient = _hooked_gradient(tf.GradientTape.gradient)
    tf.GradientTape.watch = _hooked_watch(tf.GradientTape.watch)
    tf.GradientTape.watched_variables = _hooked_watched_variables(
        tf.GradientTape.watched_variables
    )


def _hooked_gradient(gradient):
    @functools.wraps(gradient)
    @tf.autograph.experimental.do_not_convert
    def gradient_and_answers(self, target, sources, *args, **kwargs):
        probes = _probes_of(sources)
        if not probes:
            return gradient(self, target, sources, *args, **kwargs)
        # A tape makes zeros for variables of TensorFlow only, if it is told to.
        variables = [probe.variable.value for probe in probes]
        parameters = [probe.trained_parameter for probe in probes]
        found, answers = gradient(
            self, target, [sources, variables], *args, **kwargs
        )
        gradients = dict(
            zip(
                map(_key, tf.nest.flatten(sources)),
                tf.nest.flatten(found),
                strict=True,
            )
        )
        for probe, parameter, answer in zip(
            probes, parameters, answers, strict=True
        ):
            if answer is not None:
                probe.keep(answer, gradients[_key(parameter)])
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
    return id(variable.value if is_of_keras else variable)
