"""What tapes are asked for beside what their caller wants, on TensorFlow.

Batches are scaled differently, so that factors tell which of several backward
passes was measured.
"""

import gc
import sys
import warnings
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from models import assert_close
from models import to_numpy

import keras_adafisher
from keras_adafisher.probe import probes_at

X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
SCALES = np.array([1.0, 2.0, 4.0], "float32")

_diagonals = {}


def make_optimizer():
    """An optimizer that measures at each step, and moves nothing."""
    return keras_adafisher.AdaFisher(
        0.0, factor_update_steps=1, gamma_1=0.5, gamma_2=0.5
    )


class Trained:
    """A dense layer, trained by loops of one's own."""

    def __init__(self):
        self.layer = keras.layers.Dense(2, use_bias=False)
        self.model = keras.Sequential([keras.Input((3,)), self.layer])
        keras_adafisher.wrap(self.model)
        self.optimizer = make_optimizer()
        self.optimizer.build(self.model.trainable_variables)

    @property
    def variables(self):
        return self.model.trainable_variables

    def run(self, function, *args, eagerly=False):
        step = keras_adafisher.training_step(self.optimizer)(function)
        return (step if eagerly else tf.function(step))(*args)

    def loss(self, x):
        return ops.mean(ops.square(self.model(x, training=True)))

    def gradients(self, x):
        with tf.GradientTape() as tape:
            loss = self.loss(x)
        return tape.gradient(loss, self.variables)

    def gradients_of_a_loop(self, x):
        """The sum over two passes in a loop of TensorFlow's."""
        zeros = [tf.zeros(v.shape) for v in self.variables]
        _, *gradients = tf.while_loop(
            lambda n, *sums: n < 2,
            lambda n, *sums: (n + 1, *map(tf.add, sums, self.gradients(x))),
            (tf.constant(0), *zeros),
        )
        return gradients

    def apply(self, gradients):
        self.optimizer.apply(gradients, self.variables)

    def diagonal(self):
        return to_numpy(self.optimizer.preconditioner(self.layer.kernel))

    @property
    def source(self):
        (row,) = keras_adafisher.coverage(self.model).rows
        return row.source


def diagonal_after(x):
    """What the factors are after a plain step on a batch, from seed 0."""
    key = x.tobytes()
    if key not in _diagonals:
        keras.utils.set_random_seed(0)
        trained = Trained()
        trained.run(lambda: trained.apply(trained.gradients(x)))
        assert trained.source == "measured"
        _diagonals[key] = trained.diagonal()
    return _diagonals[key]


@pytest.fixture(autouse=True)
def _same_weights(_fresh_state):
    keras.utils.set_random_seed(0)


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda variables: variables,
        lambda variables: [v.value for v in variables],
        lambda variables: {"nested": tuple(variables)},
        lambda variables: variables[0],
    ],
    ids=["list", "of TensorFlow", "nested", "one"],
)
def test_the_caller_gets_what_it_asks_for(make, eagerly):
    trained = Trained()
    sources = make(trained.variables)

    def step():
        with tf.GradientTape() as tape:
            loss = trained.loss(X)
        found = tape.gradient(loss, sources)
        tf.nest.assert_same_structure(found, sources)
        flat = tf.nest.flatten(found)
        assert [g.shape for g in flat] == [(3, 2)]
        trained.apply(flat)

    trained.run(step, eagerly=eagerly)
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


def test_a_tape_that_watches_what_it_is_told_to():
    trained = Trained()

    def step():
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([v.value for v in trained.variables])
            loss = trained.loss(X)
        trained.apply(tape.gradient(loss, trained.variables))

    trained.run(step)
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


def test_zeros_for_what_is_not_connected():
    """A layer that the loss doesn't depend on measures nothing."""
    trained = Trained()

    def step(scale):
        variables = [v.value for v in trained.variables]
        with tf.GradientTape() as tape:
            loss = trained.loss(X) if scale else tf.constant(0.0)
        gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
        trained.apply(gradients)

    (probe,) = probes_at(trained.layer.kernel)
    for scale, records in ((0, (0, 0, False)), (1, (1, 0, False))):
        trained.run(step, scale)
        assert trained.optimizer.records_of(probe) == records


def test_what_a_tape_has_watched():
    trained = Trained()

    def step():
        with tf.GradientTape() as tape:
            loss = trained.loss(X)
        variables = tape.watched_variables()
        assert [v is trained.layer.kernel.value for v in variables] == [True]
        gradients = tape.gradient(loss, variables)
        trained.optimizer.apply(gradients, variables)

    trained.run(step)
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


def test_a_gradient_for_an_input_is_no_measurement():
    """The gradient penalty of WGAN-GP, of inputs with other scales."""
    trained = Trained()

    def step():
        with tf.GradientTape() as tape:
            loss = trained.loss(X)
            x = tf.constant(X * SCALES)
            with tf.GradientTape() as inner:
                inner.watch(x)
                z = ops.sum(trained.model(x))
            loss += 0.0 * ops.sum(ops.square(inner.gradient(z, x)))
        trained.apply(tape.gradient(loss, trained.variables))

    trained.run(step)
    # Autodiff sums over both calls, the second with a gradient of zeros.
    (probe,) = probes_at(trained.layer.kernel)
    assert trained.optimizer.records_of(probe) == (1, 0, False)


# What may become of gradients before they are applied.
CHANGES = {
    "as they are": lambda gradients: gradients,
    "clipped": lambda gradients: tf.clip_by_global_norm(gradients, 1e-3)[0],
    "in a branch": lambda gradients: tf.cond(
        tf.reduce_sum(gradients[0]) < 1e9,
        lambda: [2.0 * g for g in gradients],
        lambda: gradients,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_gradients_that_are_applied_are_those_that_count(change):
    """Sharpness-aware minimization: of two backward passes, the second."""
    trained = Trained()

    def step():
        trained.gradients(X * SCALES)
        gradients = trained.gradients(X)
        trained.gradients(X / SCALES)
        trained.apply(CHANGES[change](gradients))

    trained.run(step)
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


@pytest.mark.parametrize("has_variables", [False, True])
@pytest.mark.parametrize("eagerly", [False, True])
def test_they_are_those_before_the_scale_of_the_loss_is_undone(
    eagerly, has_variables
):
    trained = Trained()
    scaled = keras.optimizers.LossScaleOptimizer(trained.optimizer)
    scaled.build(trained.variables)

    def step():
        found = []
        for x in (X * SCALES, X, X / SCALES):
            with tf.GradientTape() as tape:
                loss = scaled.scale_loss(trained.loss(x))
            found.append(tape.gradient(loss, trained.variables))
        arguments = [trained.variables] if has_variables else []
        scaled.apply(found[1], *arguments)

    trained.run(step, eagerly=eagerly)
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


def test_an_optimizer_beside_one_that_scales_its_loss():
    """Of the same layer, and applied after it."""
    trained = Trained()
    scaled = keras.optimizers.LossScaleOptimizer(keras_adafisher.AdaFisher(0.0))
    scaled.build(trained.variables)

    @keras_adafisher.training_step(trained.optimizer, scaled)
    def step():
        gradients = trained.gradients(X * SCALES)
        scaled.apply(trained.gradients(X / SCALES), trained.variables)
        trained.apply(gradients)

    tf.function(step)()
    assert_close([trained.diagonal()], [diagonal_after(X * SCALES)], 1e-6)


@pytest.mark.parametrize("eagerly", [False, True])
def test_variables_of_tensorflow_are_as_good(eagerly):
    trained = Trained()
    variables = [v.value for v in trained.variables]

    def step():
        found = []
        for x in (X * SCALES, X, X / SCALES):
            with tf.GradientTape() as tape:
                loss = trained.loss(x)
            found.append(tape.gradient(loss, variables))
        trained.optimizer.apply(found[1], variables)

    trained.run(step, eagerly=eagerly)
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


def test_a_jacobian_is_no_measurement():
    """It is that of many losses: gradients for each example, for instance."""
    trained = Trained()

    def step():
        with tf.GradientTape() as tape:
            losses = ops.mean(ops.square(trained.model(X)), axis=1)
        (found,) = tape.jacobian(losses, trained.variables)
        trained.apply([tf.reduce_mean(found, 0)])

    with pytest.warns(UserWarning, match="no layer has reported anything"):
        trained.run(step)
    assert trained.source == "estimated"


@pytest.mark.parametrize("eagerly", [False, True])
def test_an_optimizer_takes_a_measurement_once(eagerly):
    """Also if it is applied to one list after another."""
    layers = [keras.layers.Dense(n, use_bias=False) for n in (3, 2)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=1)
    optimizer.build(model.trainable_variables)

    @keras_adafisher.training_step(optimizer)
    def step():
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(X)))
        variables = model.trainable_variables
        first, second = tape.gradient(loss, variables)
        optimizer.apply([first], variables[:1])
        optimizer.apply([second], variables[1:])
        # Of no tape: there is no measurement for it.
        optimizer.apply([tf.ones(v.shape) for v in variables], variables)

    (step if eagerly else tf.function(step))()
    for layer in layers:
        (probe,) = probes_at(layer.kernel)
        taken, dropped, is_estimated = optimizer.records_of(probe)
        # The last one.
        assert (taken, dropped, is_estimated) == (2, 0, True)


def test_an_optimizer_that_is_applied_in_a_branch():
    trained = Trained()

    def step():
        trained.gradients(X * SCALES)
        gradients = trained.gradients(X)

        def clip_and_apply():
            trained.apply(CHANGES["clipped"](gradients))
            return True

        is_finite = tf.reduce_all(tf.math.is_finite(gradients[0]))
        tf.cond(is_finite, clip_and_apply, lambda: False)

    trained.run(step)
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


@pytest.mark.parametrize("eagerly", [False, True])
def test_an_attack_on_inputs_is_no_measurement(eagerly):
    """Whatever becomes of the gradients of weights."""
    trained = Trained()

    def step():
        x = tf.constant(X * SCALES)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = trained.loss(x)
        assert tape.gradient(loss, x).shape == x.shape
        trained.apply([1.0 * g for g in trained.gradients(X)])

    trained.run(step, eagerly=eagerly)
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


def test_gradients_that_are_summed_up_by_hand():
    """All batches count, as in one that has all of them."""
    trained = Trained()

    def step():
        batches = [trained.gradients(X), trained.gradients(X * SCALES)]
        trained.apply([sum(gs) / 2 for gs in zip(*batches, strict=True)])

    trained.run(step)
    (probe,) = probes_at(trained.layer.kernel)
    assert trained.optimizer.records_of(probe) == (1, 0, False)
    both = diagonal_after(np.concatenate([X, X * SCALES]))
    # Of each product of two factors, that of the inputs.
    damping = trained.optimizer.damping
    ratios = [
        (d[:, 0] - damping) / (d[0, 0] - damping)
        for d in (trained.diagonal(), both)
    ]
    np.testing.assert_allclose(*ratios, rtol=1e-5)


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_two_optimizers_train(change, eagerly):
    """Both gradients are there before one is applied, as in many GANs.

    If they are changed eagerly, the first is applied before.
    """
    is_known = change == "as they are" or not eagerly

    trained, other = Trained(), make_optimizer()
    other.build(trained.variables)
    changed = CHANGES[change]

    @keras_adafisher.training_step(trained.optimizer, other)
    def step():
        first = trained.gradients(X)
        if not is_known:
            trained.apply(changed(first))
        second = trained.gradients(X * SCALES)
        if is_known:
            trained.apply(changed(first))
        other.apply(changed(second), trained.variables)

    (step if eagerly else tf.function(step))()
    diagonals = [
        to_numpy(o.preconditioner(trained.layer.kernel))
        for o in (trained.optimizer, other)
    ]
    expected = [diagonal_after(x) for x in (X, X * SCALES)]
    assert_close(diagonals, expected, 1e-6)


def test_what_was_applied_counts_no_more():
    """Also if gradients are changed, so that nothing tells whose they are."""
    trained, expected = Trained(), Trained()
    expected.layer.set_weights(trained.layer.get_weights())

    def step():
        for x in (X * SCALES, X):
            trained.apply([2.0 * g for g in trained.gradients(x)])

    trained.run(step)
    for x in (X * SCALES, X):
        expected.run(lambda x=x: expected.apply(expected.gradients(x)))
    assert_close([trained.diagonal()], [expected.diagonal()], 1e-6)


@pytest.mark.parametrize("eagerly", [False, True])
def test_a_step_that_is_not_applied_leaves_nothing(eagerly):
    trained = Trained()
    trained.run(lambda: trained.gradients(X * SCALES)[0], eagerly=eagerly)

    def step():
        trained.apply([1.0 * g for g in trained.gradients(X)])

    trained.run(step, eagerly=eagerly)
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


def test_a_function_that_is_the_whole_step():
    """As a `train_step` with a decorator of its own."""
    trained = Trained()
    whole = tf.function(lambda: trained.apply(trained.gradients(X)))
    trained.run(lambda: whole())
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


def test_a_function_that_is_a_part_of_the_model():
    """It is traced in the first step, and not in the second."""
    trained = Trained()
    loss_of = tf.function(trained.loss)

    def step(x):
        with tf.GradientTape() as tape:
            loss = loss_of(x)
        trained.apply(tape.gradient(loss, trained.variables))

    for _ in range(2):
        trained.run(step, tf.constant(X), eagerly=True)
        (probe,) = probes_at(trained.layer.kernel)
    assert trained.optimizer.records_of(probe) == (2, 0, False)


@pytest.mark.parametrize("kind", ["function", "loop", "branch"])
def test_gradients_from_inside_of_another_graph_are_estimated(kind):
    """No more of it comes out than is returned. A warning says so."""
    trained = Trained()

    def with_function(x):
        trained.apply(tf.function(trained.gradients)(x))

    def with_loop(x):
        trained.apply(trained.gradients_of_a_loop(x))

    def with_branch(x):
        trained.apply(
            tf.cond(
                tf.reduce_sum(x) < 1e9,
                lambda: trained.gradients(x),
                lambda: [tf.zeros(v.shape) for v in trained.variables],
            )
        )

    steps = {
        "function": with_function,
        "loop": with_loop,
        "branch": with_branch,
    }
    with pytest.warns(UserWarning, match="a loop or a branch"):
        trained.run(steps[kind], tf.constant(X))
    assert trained.source == "estimated"


class Averages(tf.GradientTape):
    def gradient(self, *args, **kwargs):
        return [0.5 * g for g in super().gradient(*args, **kwargs)]


def test_a_tape_that_may_average_over_processes():
    trained = Trained()

    def step():
        with Averages() as tape:
            loss = trained.loss(X)
        trained.apply(tape.gradient(loss, trained.variables))

    with pytest.warns(
        UserWarning, match="Averages has a `gradient` of its own"
    ):
        trained.run(step)
    assert trained.source == "measured"


# Where gradients are computed and applied.


def test_what_is_told_of_tapes_is_not_converted_by_autograph():
    """It would take many times as long as it takes to run."""
    trained = Trained()
    scaled = keras.optimizers.LossScaleOptimizer(trained.optimizer)
    scaled.build(trained.variables)
    called = set()

    def step():
        gradients = CHANGES["clipped"](trained.gradients(X))
        scaled.apply(gradients, trained.variables)

    sys.setprofile(lambda frame, *_: called.add(frame.f_code.co_name))
    try:
        trained.run(step)
    finally:
        sys.setprofile(None)
    assert "answer_in" in called
    # What is converted has this before its name.
    assert not {"tf__answer_in", "tf__behind", "tf__add"} & called


def test_an_eager_step_that_applies_in_a_function():
    """A measurement would be a constant in it, that of the first step."""
    trained = Trained()
    apply = tf.function(trained.apply)
    with pytest.warns(UserWarning, match="no layer has reported anything"):
        for x in (X, X * SCALES):
            trained.run(lambda x=x: apply(trained.gradients(x)), eagerly=True)
    assert trained.source == "estimated"


@pytest.mark.parametrize("scope", ["layer", "step"])
def test_an_optimizer_that_is_applied_in_both_branches(scope, request):
    request.addfinalizer(lambda: keras_adafisher.set_decision_scope("auto"))
    keras_adafisher.set_decision_scope(scope)
    trained = Trained()

    def step(is_large):
        gradients = trained.gradients(X)
        tf.cond(
            is_large,
            lambda: (trained.apply(CHANGES["clipped"](gradients)), 0)[1],
            lambda: (trained.apply(gradients), 0)[1],
        )

    step = tf.function(keras_adafisher.training_step(trained.optimizer)(step))
    (probe,) = probes_at(trained.layer.kernel)
    for number, is_large in enumerate((True, False)):
        step(tf.constant(is_large))
        records = trained.optimizer.records_of(probe)
        assert records == (number + 1, 0, False)
        if number == 0:
            assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


def test_a_loop_beside_a_pass_that_is_not_applied():
    """Nothing is known of the loop's passes. The other one says nothing."""
    trained = Trained()

    def step(x):
        trained.gradients(X * SCALES)
        trained.apply(trained.gradients_of_a_loop(x))

    with pytest.warns(UserWarning, match="no layer has reported anything"):
        trained.run(step, tf.constant(X))
    assert trained.source == "estimated"


def test_gradients_that_are_applied_once_more():
    """They have no measurement any more, and no other pass has one."""
    trained = Trained()

    def step():
        gradients = trained.gradients(X)
        trained.apply(gradients)
        trained.gradients(X * SCALES)
        trained.apply(gradients)

    with pytest.warns(UserWarning, match="no layer has reported anything"):
        trained.run(step)
    (probe,) = probes_at(trained.layer.kernel)
    assert trained.optimizer.records_of(probe) == (2, 0, True)


def test_eager_tensors_come_and_go():
    """One may have the address of another one that is gone."""
    trained, expected = Trained(), Trained()
    expected.layer.set_weights(trained.layer.get_weights())

    def step():
        for _ in range(20):
            trained.apply([1.0 * g for g in trained.gradients(X)])
            trained.gradients(X * SCALES)
            trained.apply(trained.gradients(X))

    trained.run(step, eagerly=True)
    expected.run(
        lambda: [expected.apply(expected.gradients(X)) for _ in range(40)],
        eagerly=True,
    )
    assert_close([trained.diagonal()], [expected.diagonal()], 1e-5)


def test_an_eager_step_keeps_no_gradients_alive():
    trained = Trained()

    def step():
        (gradient,) = trained.gradients(X)
        kept = weakref.ref(gradient)
        trained.apply([1.0 * gradient])
        del gradient
        gc.collect()
        assert kept() is None

    trained.run(step, eagerly=True)


def test_kernels_and_biases_apart():
    """A list without a weight has no measurement, and no warning."""
    layer = keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((3,)), layer])
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=1)
    optimizer.build(model.trainable_variables)

    @tf.function
    @keras_adafisher.training_step(optimizer)
    def step():
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(X)))
        kernel, bias = tape.gradient(loss, model.trainable_variables)
        optimizer.apply([kernel], [layer.kernel])
        optimizer.apply([bias], [layer.bias])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
    (probe,) = probes_at(layer.kernel)
    assert optimizer.records_of(probe) == (1, 0, False)


def test_a_step_inside_of_a_step():
    trained = Trained()
    inside = keras_adafisher.training_step(trained.optimizer)(lambda: None)

    def step():
        gradients = trained.gradients(X)
        inside()
        trained.apply(gradients)

    trained.run(step)
    assert_close([trained.diagonal()], [diagonal_after(X)], 1e-6)


def test_outside_of_steps_tapes_are_tensorflows_own():
    trained = Trained()
    with tf.GradientTape() as tape:
        loss = trained.loss(X)
    (gradient,) = tape.gradient(loss, trained.variables)
    assert gradient.shape == (3, 2)
    (probe,) = probes_at(trained.layer.kernel)
    gradients = {id(trained.layer.kernel): gradient}
    assert probe.answer_in(gradients, trained.optimizer) is None
