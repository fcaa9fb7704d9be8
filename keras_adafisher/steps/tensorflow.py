"""Training steps on TensorFlow, perhaps in several replicas."""

import tensorflow as tf

from keras_adafisher.backend.tensorflow import in_replica
from keras_adafisher.steps.step import AppliedAgain


def run(make_step, inner, optimizers, function, args, kwargs, once):
    def run_in(mode, is_branch=False):
        with make_step(mode) as step:
            step.raises_if_applied_again = is_branch
            try:
                return function(*args, **kwargs)
            finally:
                # Of a step that wasn't applied, for instance.
                for probe in step.probes():
                    probe.forget_answers(step.passes)

    if not inner:
        return run_in("plain")
    # Of one replica among several, TensorFlow takes no condition whose branches
    # communicate. An optimizer that isn't built yet makes its variables in the
    # step, which no branch may do.
    is_built = all(optimizer.built for optimizer in optimizers)
    if not once or not is_built or in_replica() or tf.executing_eagerly():
        return run_in("conditional")
    measures = [optimizer.measures_anything() for optimizer in inner]
    if any(answer is True for answer in measures):
        return run_in("measure")
    try:
        return tf.cond(
            tf.reduce_any(tf.stack(measures)),
            lambda: run_in("measure", is_branch=True),
            lambda: run_in("plain", is_branch=True),
        )
    except AppliedAgain:
        # One decision doesn't do: a GAN's critic is trained several times.
        return run_in("conditional")
