"""TensorFlow's probes: variables that tapes know, and no list has.

`integration/tensorflow_hooks.py` asks tapes for their gradients, and keeps
these here until the optimizer is applied.
"""

import contextlib
import dataclasses
import re

import tensorflow as tf
from keras import ops

from keras_adafisher.backend.common import own_tensor
from keras_adafisher.backend.tensorflow import in_replica
from keras_adafisher.probe.probe import Probe
from keras_adafisher.steps.passes import graph_of
from keras_adafisher.steps.passes import is_around
from keras_adafisher.steps.passes import Passes
from keras_adafisher.steps.passes import present_graph

_MIRRORED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
)


@dataclasses.dataclass
class _Answer:
    """What a tape has returned for a probe.

    Attributes:
        tensor: The gradient of the probe.
        passes: The `Passes` of the step.
        number: Int, the number of the pass that it is from.
        readers: List of pairs of an optimizer that has taken it in and of the
            graph that it did so in: in one branch perhaps, and in the other.
    """

    tensor: tf.Tensor
    passes: Passes
    number: int
    readers: list = dataclasses.field(default_factory=list)

    @property
    def is_known(self):
        """Whether the tensor can be used here."""
        return is_around(graph_of(self.tensor))

    def is_read_by(self, optimizer):
        """Whether an optimizer has taken it in, where this is run."""
        return any(
            reader is optimizer and is_around(graph)
            for reader, graph in self.readers
        )


class TensorFlowProbe(Probe):
    """Where one block reports what it measures, on TensorFlow."""

    HOW_TO_MEASURE = (
        "In a custom training loop, decorate the step with "
        "`keras_adafisher.training_step(optimizer)`. Compute gradients in it "
        "by `tf.GradientTape.gradient`, where they are applied too, not in a "
        "`tf.function`, a loop or a branch of TensorFlow's inside of it."
    )

    def __init__(self, block, host, name="probe"):
        super().__init__(block, host, name)
        # By the number of the replica, and with the id of an optimizer.
        self._answers = {}
        self._selected = {}

    @property
    def trained_parameter(self):
        """The block's weight or, if it is frozen, what else is trained."""
        return next((p for p in self.block.parameters if p.trainable), None)

    def keep(self, answer, passes, number):
        """Keep an answer until an optimizer is applied.

        Args:
            answer: Tensor, the gradient of the probe.
            passes: `Passes` of the step.
            number: Int, the number of the pass that the answer is from.
        """
        answers = self._answers.setdefault(_replica(), [])
        # What has been read was for an update before, and so was what had come
        # before that and wasn't.
        read = [n for n, kept in enumerate(answers) if kept.readers]
        del answers[: max(read, default=-1) + 1]
        answers.append(_Answer(answer, passes, number))

    # AutoGraph would convert all that is called, which takes many times as
    # long as it takes to run.
    @tf.autograph.experimental.do_not_convert
    def answer_in(self, gradients, optimizer):
        found = self._selected.get((_replica(), id(optimizer)))
        if found is None:
            found = self._answers_for(gradients)
        found = [answer for answer in found if not answer.is_read_by(optimizer)]
        for answer in found:
            answer.readers.append((optimizer, present_graph()))
        return tf.add_n([answer.tensor for answer in found]) if found else None

    @contextlib.contextmanager
    def selecting(self, gradients, optimizer):
        """Context in which gradients count as they are here.

        A `LossScaleOptimizer` hands others on.

        Args:
            gradients, optimizer: See `answer_in`.
        """
        key = _replica(), id(optimizer)
        self._selected[key] = self._answers_for(gradients)
        try:
            yield
        finally:
            del self._selected[key]

    def _answers_for(self, gradients):
        """The answers from the passes that the weight's gradient is from."""
        parameter = self.trained_parameter
        if parameter is None:
            return []
        # Keras takes variables of TensorFlow too.
        keys = [id(parameter), id(own_tensor(parameter))]
        given = [gradients[key] for key in keys if key in gradients]
        kept = self._answers.get(_replica(), [])
        if not given or not kept:
            return []
        # Each step has its own numbers, and one may be inside of another.
        origins = [answer.passes.behind(given[0]) for answer in kept]
        if any(origins):
            return [
                answer
                for answer, passes in zip(kept, origins, strict=True)
                if answer.is_known and answer.number in passes
            ]
        # Nothing tells. If a loop or a branch has measured too, the gradient
        # may come from there, otherwise from all that the step has measured.
        return kept if all(answer.is_known for answer in kept) else []

    def forget_answers(self, passes):
        """Drop what the tapes of a step have returned.

        Args:
            passes: `Passes` of the step.
        """
        replica = _replica()
        kept = self._answers.pop(replica, [])
        # Those of a step around it.
        kept = [answer for answer in kept if answer.passes is not passes]
        if kept:
            self._answers[replica] = kept

    def identity(self, z, h, request):
        # What is converted has no gradient of a tap. Without a tap, the
        # optimizer knows that it has to estimate the factors.
        if in_vectorized_map():
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


def in_vectorized_map():
    """Whether a function is being traced to be converted.

    `tf.vectorized_map` does it, and `tf.GradientTape.jacobian`. What is
    computed there is that of one of many calls.
    """
    scopes = tf.get_current_name_scope().split("/")
    return any(re.fullmatch(r"loop_body(_\d+)?", scope) for scope in scopes)
