"""TensorFlow's probes: `tf.distribute` makes its replicas visible."""

import re

import tensorflow as tf
from keras import ops

from keras_adafisher.backend.tensorflow import in_replica
from keras_adafisher.probe.probe import Probe

_MIRRORED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
)


class TensorFlowProbe(Probe):
    """Where one block reports what it measures, on TensorFlow."""

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
