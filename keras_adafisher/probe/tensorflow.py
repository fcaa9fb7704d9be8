"""TensorFlow's probes: variables that tapes know, and no list has.

`integration/tensorflow_hooks.py` asks tapes for their gradients, and keeps
these here until the optimizer is applied.
"""

import dataclasses
import re

import tensorflow as tf
from keras import ops

from keras_adafisher.backend.tensorflow import in_replica
from keras_adafisher.probe.probe import Probe

_MIRRORED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
)


@dataclasses.dataclass
class _Answers:
    """What tapes have returned to one replica.

    Attributes:
        found: List of pairs of an answer and its parameter's gradient.
        are_read: Bool, whether an optimizer has taken them in.
    """

    found: list = dataclasses.field(default_factory=list)
    are_read: bool = False


class TensorFlowProbe(Probe):
    """Where one block reports what it measures, on TensorFlow."""

    HOW_TO_MEASURE = (
        "In a custom training loop, decorate the step with "
        "`keras_adafisher.training_step(optimizer)`. Compute gradients in it "
        "by `tf.GradientTape.gradient`, where they are applied too, not in a "
        "`tf.function` or a loop of TensorFlow's inside of it."
    )

    def __init__(self, block, host, name="probe"):
        super().__init__(block, host, name)
        # By the number of the replica.
        self._answers = {}

    @property
    def trained_parameter(self):
        """The block's weight or, if it is frozen, what else is trained."""
        return next((p for p in self.block.parameters if p.trainable), None)

    def keep(self, answer, gradient):
        """Keep an answer until the optimizer is applied.

        Args:
            answer: Tensor, the gradient of the probe.
            gradient: The gradient of `trained_parameter` that the same tape
                returned with it.
        """
        answers = self._answers.setdefault(_replica(), _Answers())
        if answers.are_read:
            # An optimizer was applied since. Others that share the layer may
            # have been too.
            answers.found = []
            answers.are_read = False
        answers.found.append((answer, gradient))

    def answer_in(self, gradients):
        kept = self._answers.get(_replica(), _Answers()).found
        kept = [pair for pair in kept if _is_known_here(pair[0])]
        if not kept:
            return None
        # If the weight's gradient is one that a tape has returned, the answer
        # is the one beside it. Otherwise it is made of those there are: the
        # sum over several batches, or a multiple of it.
        given = gradients.get(id(self.trained_parameter))
        same = [answer for answer, gradient in kept if gradient is given]
        return tf.add_n(same[:1] or [answer for answer, _ in kept])

    def clear_answer(self):
        if _replica() in self._answers:
            self._answers[_replica()].are_read = True

    def forget_answers(self):
        """Drop what the tapes of a step have returned."""
        self._answers.pop(_replica(), None)

    def identity(self, z, h, request):
        # `tf.vectorized_map` converts what a function consists of, and drops
        # the gradient of a tap. (It traces the function in a name scope of this
        # name.) Without a tap, the optimizer knows that it has to estimate the
        # factors.
        scopes = tf.get_current_name_scope().split("/")
        if any(re.fullmatch(r"loop_body(_\d+)?", scope) for scope in scopes):
            return z

        # If a branch of `tf.cond` captures a tensor twice, here and where
        # weights are used, TensorFlow leaves one of the two without a value.
        is_graph = not tf.executing_eagerly()
        graph = getattr(h, "graph", None)
        if is_graph and graph is not tf.compat.v1.get_default_graph():
            h = tf.identity(h)

        # In the backward pass: a graph is run as it is, layers keep their
        # inputs for it, and another condition takes time to trace and to run.
        def answer(s):
            # A sparse tensor becomes a dense one only where it is measured.
            dense = ops.convert_to_tensor(h, sparse=False)
            return tf.concat(
                [self.measure_activations(dense), self.measure_gradients(s)], 0
            )

        @tf.custom_gradient
        def identity(z, vector):
            def grad(s):
                if request is True:
                    return s, answer(s)
                # The probe itself is zero.
                return s, tf.cond(request, lambda: answer(s), lambda: vector)

            return tf.identity(z), grad

        return identity(z, tf.convert_to_tensor(self.variable.value))

    @staticmethod
    def sum_over_replicas(probes, answers, wanted):
        # A replica's gradients are those of its own part of the batch. One call
        # for the whole list, so that the strategy sends them in one piece.
        def all_reduce(answers):
            replica = tf.distribute.get_replica_context()
            return replica.all_reduce(tf.distribute.ReduceOp.SUM, answers)

        def all_reduce_if_wanted(strategy, answers, wanted):
            # The same on each replica.
            wanted = strategy.experimental_local_results(wanted)[0]
            return tf.cond(
                wanted,
                lambda: strategy.extended.call_for_each_replica(
                    all_reduce, args=(answers,)
                ),
                lambda: answers,
            )

        if not in_replica():
            return answers
        replica = tf.distribute.get_replica_context()
        if (
            wanted is True
            # Other strategies have another idea of `call_for_each_replica`.
            or not isinstance(replica.strategy, _MIRRORED)
            # Inside of XLA, replicas can't wait for each other in Python.
            or tf.__internal__.distribute.strategy_supports_no_merge_call()
        ):
            return all_reduce(answers)
        # TensorFlow refuses a `cond` in a replica if its branches communicate.
        # It has to be one for all of them, as in Keras' `LossScaleOptimizer`.
        return replica.merge_call(all_reduce_if_wanted, args=(answers, wanted))

    @staticmethod
    def differentiate(compute_loss, data, probes, variables):
        inputs = [probe.variable.value for probe in probes]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(inputs)
            loss = compute_loss(*data)
        return tape.gradient(loss, inputs)


def _replica():
    """The number of the replica that runs, or `None` if no one knows it."""
    replica = tf.distribute.get_replica_context()
    if replica is None:
        return None
    number = tf.get_static_value(replica.replica_id_in_sync_group)
    return None if number is None else int(number)


def _is_known_here(tensor):
    """Whether a tensor can be used in the graph that is being made.

    What a loop or a function inside of the step has computed can't.
    """
    graph = getattr(tensor, "graph", None)
    if graph is None:
        # It was computed eagerly.
        return True
    if tf.executing_eagerly():
        return False
    here = tf.compat.v1.get_default_graph()
    while here is not None and here is not graph:
        here = getattr(here, "outer_graph", None)
    return here is graph
