"""TensorFlow's exceptions: `tf.distribute` makes its replicas visible."""

import contextlib
import re

import tensorflow as tf
from keras import ops

from keras_adafisher.backend import common
from keras_adafisher.backend.common import AppliedAgain

_MIRRORED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
)


class Updater:
    """What `AdaFisher` overrides of `keras.optimizers.Optimizer`."""

    # Not public. It is where the gradients of all replicas are one.
    def _distributed_tf_update_step(
        self, distribution, grads_and_vars, learning_rate
    ):
        grads, variables = zip(*grads_and_vars, strict=True)
        # The same on each replica.
        grads = [distribution.experimental_local_results(g)[0] for g in grads]
        self._prepare_updates(grads, variables)
        super()._distributed_tf_update_step(
            distribution, grads_and_vars, learning_rate
        )


def differentiate(compute_loss, data, probes, variables):
    inputs = [probe.variable.value for probe in probes]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(inputs)
        loss = compute_loss(*data)
    return tape.gradient(loss, inputs)


def tap(z, h, probe, request):
    # `tf.vectorized_map` converts what a function consists of, and drops the
    # gradient of a tap. (It traces the function in a name scope of this name.)
    # Without a tap, the optimizer knows that it has to estimate the factors.
    scopes = tf.get_current_name_scope().split("/")
    if any(re.fullmatch(r"loop_body(_\d+)?", scope) for scope in scopes):
        return z

    # If a branch of `tf.cond` captures a tensor twice, here and where weights
    # are used, TensorFlow leaves one of the two without a value.
    is_graph = not tf.executing_eagerly()
    graph = getattr(h, "graph", None)
    if is_graph and graph is not tf.compat.v1.get_default_graph():
        h = tf.identity(h)

    # In the backward pass: a graph is run as it is, layers keep their inputs
    # for it, and another condition takes time to trace and to run.
    def answer(s):
        # A sparse tensor becomes a dense one only where it is measured.
        dense = ops.convert_to_tensor(h, sparse=False)
        return tf.concat(
            [probe.measure_activations(dense), probe.measure_gradients(s)], 0
        )

    @tf.custom_gradient
    def identity(z, vector):
        def grad(s):
            if request is True:
                return s, answer(s)
            # The probe itself is zero.
            return s, tf.cond(request, lambda: answer(s), lambda: vector)

        return tf.identity(z), grad

    return identity(z, tf.convert_to_tensor(probe.variable.value))


def run_step(make_step, inner, optimizers, function, args, kwargs, once):
    def run(mode, is_branch=False):
        with make_step(mode) as step:
            step.raises_if_applied_again = is_branch
            return function(*args, **kwargs)

    if not inner:
        return run("plain")
    # Of one replica among several, TensorFlow takes no condition whose branches
    # communicate. An optimizer that isn't built yet makes its variables in the
    # step, which no branch may do.
    is_built = all(optimizer.built for optimizer in optimizers)
    if not once or not is_built or in_replica() or tf.executing_eagerly():
        return run("ask")
    measures = [one.measures_anything() for one in inner]
    if any(one is True for one in measures):
        return run("measure")
    try:
        return tf.cond(
            tf.reduce_any(tf.stack(measures)),
            lambda: run("measure", is_branch=True),
            lambda: run("plain", is_branch=True),
        )
    except AppliedAgain:
        # One decision doesn't do: a GAN's critic is trained several times.
        return run("ask")


def is_traced(tensor):
    return not tf.executing_eagerly()


def has_accelerator():
    return any(map(tf.config.list_logical_devices, ("GPU", "TPU")))


def step_number(iterations):
    # `ops.convert_to_tensor` returns a variable as it is here, and it would be
    # read where the number is used, after the counter has moved on.
    return tf.convert_to_tensor(iterations.value)


def in_replica():
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync > 1


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
    # TensorFlow refuses a `cond` in a replica if its branches communicate. It
    # has to be one for all of them, as in Keras' `LossScaleOptimizer`.
    return replica.merge_call(all_reduce_if_wanted, args=(answers, wanted))


def check_same_strategy(variables, state):
    own = _strategy_of(state)
    for variable in variables:
        if _strategy_of(variable) is not own:
            raise _wrong_scope(variable, f"optimizer with strategy={own}")


def creation_scope(variable):
    # What is made outside the scope of a model's strategy isn't mirrored.
    strategy = _strategy_of(variable)
    current = tf.distribute.get_strategy()
    # In a model that is built while it is traced, variables come later.
    exists = isinstance(variable.value, tf.Variable)
    if exists and strategy is None and current.num_replicas_in_sync > 1:
        raise _wrong_scope(variable, f"scope of strategy={current}")
    if strategy is None or strategy is current:
        return contextlib.nullcontext()
    return strategy.scope()


def _strategy_of(variable):
    value = variable if isinstance(variable, tf.Variable) else variable.value
    return getattr(value, "distribute_strategy", None)


def _wrong_scope(variable, other):
    return ValueError(
        "A model and its optimizer must be created in the scope of the same "
        "`tf.distribute` strategy. Create both, and call `compile` or "
        "`keras_adafisher.wrap`, inside `with strategy.scope():`. "
        f"Received: variable '{getattr(variable, 'path', variable.name)}' with "
        f"strategy={_strategy_of(variable)}, {other}"
    )


def mean_square(x, axis):
    if not x.shape.rank or len(axis) < x.shape.rank:
        # A Euclidean norm would need no tensor of squares, but XLA has none.
        return common.mean_square(x, axis)
    # Without a tensor of squares.
    size = tf.cast(tf.size(x), "float32")
    return tf.nn.l2_loss(tf.cast(x, "float32")) * (2 / size)


def pointwise_conv(x, kernel, data_format, dilation_rate):
    # TensorFlow's convolutions take no channels-first tensors on the CPU, but
    # Keras' `separable_conv` does.
    if data_format == "channels_last" or tf.config.list_logical_devices("GPU"):
        return ops.conv(x, kernel, data_format=data_format)
    x = ops.moveaxis(x, 1, -1)
    x = ops.conv(x, kernel, data_format="channels_last")
    return ops.moveaxis(x, -1, 1)
