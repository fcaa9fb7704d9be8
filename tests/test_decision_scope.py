"""Where is decided whether a step measures: `set_decision_scope`.

With "step" there is one condition around the training step, on JAX and on
TensorFlow. The weights are those of "layer", where each tap has
one of its own.
"""

import keras
import numpy as np
import pytest
from keras import ops
from models import assert_close
from models import cross_entropy
from models import data
from models import mlp
from models import probes_in
from models import state

import keras_adafisher

BACKEND = keras.backend.backend()
TRACED = pytest.mark.skipif(
    BACKEND == "torch",
    reason="PyTorch traces no step: Python decides whether one measures",
)
JAX = pytest.mark.skipif(
    BACKEND != "jax",
    reason="TensorFlow and PyTorch have no steps that are functions of state",
)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    keras_adafisher.set_decision_scope("auto")


def test_the_scope_is_an_argument_of_its_own():
    assert keras_adafisher.decision_scope() == "layer"
    keras_adafisher.set_decision_scope("step")
    assert keras_adafisher.decision_scope() == "step"
    with pytest.raises(ValueError, match="Argument `scope` must be one of"):
        keras_adafisher.set_decision_scope("nope")
    assert keras_adafisher.decision_scope() == "step"


class OwnStep(keras.Sequential):
    """A `train_step` of one's own, around Keras' one."""

    def train_step(self, *args):
        result = super().train_step(*args)
        if BACKEND == "jax":
            logs, state = result
            return {**logs, "one": ops.ones(())}, state
        return {**result, "one": ops.ones(())}


def own_step():
    return OwnStep(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dropout(0.2),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )


def rematerialized():
    if BACKEND == "tensorflow":
        pytest.skip("plain Keras fails in a `RematScope` on TensorFlow")
    with keras.RematScope(mode="full"):
        return mlp()


def optimizer(**kwargs):
    kwargs = {"factor_update_steps": 3, **kwargs}
    return keras_adafisher.AdaFisher(1e-2, **kwargs)


def several():
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            optimizer(), {".*/bias": optimizer(factor_update_steps=2)}
        )
    )


def several_of_which_one_has_nothing_to_train():
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(optimizer(), {".*": optimizer()})
    )


CASES = {
    "default": (mlp, optimizer, {}),
    "published": (
        mlp,
        lambda: optimizer(
            normalization="min_max", rms_decay=None, epsilon=1e-3
        ),
        {},
    ),
    "every step": (mlp, lambda: optimizer(factor_update_steps=1), {}),
    "own train_step": (own_step, optimizer, {}),
    "several steps in one": (mlp, optimizer, {"steps_per_execution": 2}),
    "accumulated": (
        mlp,
        lambda: optimizer(gradient_accumulation_steps=2),
        {},
    ),
    "loss scale": (
        mlp,
        lambda: keras.optimizers.LossScaleOptimizer(
            optimizer(epsilon=1e-3), initial_scale=2.0**10
        ),
        {},
    ),
    "several optimizers": (mlp, several, {}),
    "rematerialized": (rematerialized, optimizer, {}),
    "one optimizer too many": (
        mlp,
        several_of_which_one_has_nothing_to_train,
        {},
    ),
    "averages": (
        mlp,
        lambda: optimizer(use_ema=True, ema_overwrite_frequency=4),
        {},
    ),
    "eager": (mlp, optimizer, {"run_eagerly": True}),
}


@TRACED
@pytest.mark.parametrize("name", CASES)
def test_both_ways_have_the_same_weights(name):
    make_model, make_optimizer, arguments = CASES[name]
    x, y = data(examples=56)
    ends = []
    for scope in ("layer", "step"):
        keras_adafisher.set_decision_scope(scope)
        keras.utils.set_random_seed(0)
        model = make_model()
        model.compile(
            make_optimizer(),
            loss=cross_entropy(),
            metrics=["accuracy"],
            **arguments,
        )
        model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0)
        if name == "default":
            # A batch of another size is traced and compiled anew. Once shows
            # what that does to a step.
            model.train_on_batch(x[:8], y[:8])
        ends.append(state(model))
    assert_close(ends[1], ends[0], 2e-6)


@TRACED
def test_training_goes_on_at_any_step(tmp_path):
    keras_adafisher.set_decision_scope("step")
    x, y = data()

    def model():
        keras.utils.set_random_seed(0)
        model = mlp()
        model.compile(optimizer(), loss=cross_entropy())
        return model

    expected = model()
    expected.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    for steps in (4, 7):
        actual = model()
        for start in range(0, 4 * steps, 4):
            actual.train_on_batch(x[start : start + 4], y[start : start + 4])
        actual.save(tmp_path / "model.keras")
        actual = keras.models.load_model(tmp_path / "model.keras")
        for step in range(steps, 24):
            start = 4 * step % 48
            actual.train_on_batch(x[start : start + 4], y[start : start + 4])
        assert_close(state(actual), state(expected), 1e-6)


@TRACED
def test_a_step_that_fails_leaves_nothing_switched():
    keras_adafisher.set_decision_scope("step")
    model = mlp()
    model.compile(optimizer(), loss=cross_entropy())
    x, _ = data()
    with pytest.raises((ValueError, TypeError)):
        model.train_on_batch(x, np.zeros((48, 7, 7)))
    plain = [v.name for v in mlp().trainable_variables]
    assert [v.name for v in model.trainable_variables] == plain


# Custom loops on JAX.


def custom_loop(
    scope, make_optimizer=optimizer, pack=lambda *s: s, unpack=None
):
    """Weights and the optimizer's state after ten steps."""
    import jax

    keras_adafisher.set_decision_scope(scope)
    keras.utils.set_random_seed(0)
    model = mlp()
    keras_adafisher.wrap(model)
    optimizer = make_optimizer()
    optimizer.build(model.trainable_variables)
    loss_fn = cross_entropy()

    def loss_of(trainable, other, x, y):
        z, other = model.stateless_call(trainable, other, x, training=True)
        return loss_fn(y, z), other

    @jax.jit
    @keras_adafisher.training_step(optimizer)
    def step(state, x, y):
        trainable, other, own = unpack(state) if unpack else state
        (loss, other), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            trainable, other, x, y
        )
        trainable, own = optimizer.stateless_apply(own, gradients, trainable)
        return loss, pack(trainable, other, own)

    lists = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables,
    )
    state = pack(*([v.value for v in variables] for variables in lists))
    x, y = data()
    for start in range(0, 40, 4):
        _, state = step(state, x[start : start + 4], y[start : start + 4])
    return [np.array(value) for value in jax.tree.leaves(state)]


@JAX
@pytest.mark.parametrize(
    "make_optimizer",
    [
        optimizer,
        lambda: keras.optimizers.LossScaleOptimizer(optimizer()),
        several,
    ],
    ids=["plain", "loss scale", "several"],
)
def test_custom_loops_both_ways(make_optimizer):
    layer, step = (
        custom_loop(scope, make_optimizer) for scope in ("layer", "step")
    )
    assert_close(step, layer, 2e-6)


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="JAX has no gradient that is `None`, and PyTorch no decision scope",
)
@pytest.mark.parametrize("scope", ["layer", "step"])
@pytest.mark.parametrize("name", ["measured", "estimated"])
def test_no_gradient_is_none(name, scope):
    """A `train_step` may compute with gradients as it does with Adam."""
    import tensorflow as tf

    class Scaled(keras.Sequential):
        def train_step(self, data):
            x, y, *_ = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            variables = self.trainable_variables
            gradients = tape.gradient(loss, variables)
            gradients = [gradient * 0.5 for gradient in gradients]
            self.optimizer.apply(gradients, variables)
            return {"loss": loss}

    keras_adafisher.set_decision_scope(scope)
    layers = {
        "measured": [keras.layers.Dense(4)],
        "estimated": [keras.layers.Reshape((6, 1)), keras.layers.LSTM(4)],
    }
    model = Scaled([keras.Input((6,)), *layers[name], keras.layers.Dense(3)])
    model.compile(optimizer(), loss=cross_entropy())
    x, y = data()
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    rows = keras_adafisher.coverage(model).rows
    assert {row.source for row in rows} <= {"measured", "estimated"}


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="the step is written with TensorFlow's tape and variables",
)
@pytest.mark.parametrize("scope", ["layer", "step"])
def test_gradients_that_are_added_up_by_hand(scope):
    """In variables that were made before the first step."""
    import tensorflow as tf

    class AddsUp(keras.Sequential):
        def train_step(self, data):
            x, y, *_ = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            for total, gradient in zip(self.totals, gradients, strict=True):
                total.assign_add(gradient)
            totals = [total + 0.0 for total in self.totals]
            self.optimizer.apply(totals, self.trainable_variables)
            return {"loss": loss}

    keras_adafisher.set_decision_scope(scope)
    model = AddsUp([keras.Input((6,)), keras.layers.Dense(3)])
    model.totals = [
        keras.Variable(np.zeros(v.shape), trainable=False)
        for v in model.trainable_variables
    ]
    model.compile(optimizer(), loss=cross_entropy())
    x, y = data()
    model.fit(x, y, batch_size=4, verbose=0)
    rows = keras_adafisher.coverage(model).rows
    assert {row.source for row in rows} == {"measured"}


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="JAX passes state along, and PyTorch has no decision scope",
)
def test_a_step_that_applies_its_optimizer_twice():
    """Every second step would otherwise pass a measuring one by."""
    import tensorflow as tf

    class Twice(keras.Sequential):
        def train_step(self, data):
            x, y, *_ = data
            variables = self.trainable_variables
            for _ in range(2):
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(x, y, self(x, training=True))
                gradients = tape.gradient(loss, variables)
                self.optimizer.apply(gradients, variables)
            return {"loss": loss}

    ends = []
    x, y = data()
    for scope in ("layer", "step"):
        keras_adafisher.set_decision_scope(scope)
        keras.utils.set_random_seed(0)
        model = Twice(mlp().layers)
        model.compile(optimizer(), loss=cross_entropy())
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        records = [model.optimizer.records_of(p)[0] for p in probes_in(model)]
        ends.append((model.get_weights(), records))
    assert ends[0][1] == ends[1][1]
    for layer, step in zip(ends[0][0], ends[1][0], strict=True):
        np.testing.assert_allclose(step, layer, rtol=1e-5, atol=1e-7)


class Either(keras.layers.Layer):
    """Calls one of two layers, by its input."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(6)
        self.second = keras.layers.Dense(6)

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x):
        return ops.cond(
            ops.mean(x) > 0, lambda: self.first(x), lambda: self.second(x)
        )


@pytest.mark.parametrize("scope", ["layer", "step"])
def test_layers_in_a_condition(scope):
    keras_adafisher.set_decision_scope(scope)
    model = keras.Sequential([keras.Input((6,)), Either(), *mlp().layers])
    model.compile(optimizer(), loss=cross_entropy())
    x, y = data()
    x = np.abs(x) * np.where(np.arange(len(x)) < len(x) // 2, 1, -1)[:, None]
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    rows = keras_adafisher.coverage(model).rows
    assert {row.source for row in rows} == {"measured"}


@JAX
def test_state_may_be_in_dicts_and_tuples():
    expected = custom_loop("step")
    actual = custom_loop(
        "step",
        pack=lambda t, o, s: {
            "a": tuple(t),
            "b": {"other": o, "own": tuple(s)},
        },
        unpack=lambda s: (s["a"], s["b"]["other"], s["b"]["own"]),
    )
    assert len(actual) == len(expected)
    for a, b in zip(
        sorted(actual, key=lambda v: (v.shape, v.sum())),
        sorted(expected, key=lambda v: (v.shape, v.sum())),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@TRACED
@pytest.mark.parametrize("scope", ["layer", "step"])
def test_other_values_have_the_shapes_of_the_weights(scope):
    """A batch like a kernel, and moving averages like scales."""
    keras_adafisher.set_decision_scope(scope)
    for layer in (
        keras.layers.Dense(4, use_bias=False),
        keras.layers.BatchNormalization(),
    ):
        model = keras.Sequential([keras.Input((4,)), layer])
        model.compile(optimizer(), loss="mse")
        x = np.random.default_rng(0).normal(size=(4, 4)).astype("float32")
        model.fit(x, x + 1, epochs=3, verbose=0)
        assert len(model.trainable_variables) == len(model.trainable_weights)
        for row in keras_adafisher.coverage(model).rows:
            assert row.source == "measured"


class WithCopy(keras.Model):
    """A model that is trained next to a copy that isn't."""

    def __init__(self):
        super().__init__()
        self.trained = mlp()
        self.frozen = mlp()
        self.frozen.trainable = False

    def call(self, x):
        return self.trained(x) + self.frozen(x)


def test_a_frozen_copy_inside_of_the_model():
    """What isn't trained has the shapes of what is."""
    model = WithCopy()
    model.compile(optimizer(), loss=cross_entropy())
    x, y = data()
    model.fit(x, y, verbose=0)
    rows = keras_adafisher.coverage(model).rows
    assert {row.source for row in rows} == {"measured"}


@JAX
@pytest.mark.parametrize("scope", ["layer", "step"])
def test_an_average_of_the_weights_in_the_state(scope):
    """A plain model is called with it, and it is computed with."""
    import jax

    keras_adafisher.set_decision_scope(scope)
    model, teacher, own = mlp(), mlp(), optimizer()
    keras_adafisher.wrap(model)
    own.build(model.trainable_variables)

    def loss_of(trainable, x, y):
        z, _ = model.stateless_call(trainable, [], x, training=True)
        return cross_entropy()(y, z)

    @jax.jit
    @keras_adafisher.training_step(own)
    def step(average, trainable, state, x, y):
        z, _ = teacher.stateless_call(average, [], x, training=False)
        gradients = jax.grad(loss_of)(trainable, x, ops.argmax(z, axis=1))
        trainable, state = own.stateless_apply(state, gradients, trainable)
        average = jax.tree.map(lambda a, b: (a + b) / 2, average, trainable)
        return average, trainable, state

    lists = (
        teacher.trainable_variables,
        model.trainable_variables,
        own.variables,
    )
    state = [[v.value for v in variables] for variables in lists]
    x, y = data()
    state = step(*state, x, y)
    assert [len(values) for values in state] == [len(vs) for vs in lists]
    for variable, value in zip(own.variables, state[2], strict=True):
        variable.assign(value)
    kernel = model.trainable_variables[0]
    assert np.ptp(own.preconditioner(kernel)) > 0


@JAX
@pytest.mark.parametrize("scope", ["layer", "step"])
def test_two_optimizers_of_equal_models(scope):
    """Each is asked whether it measures, though their states look alike."""
    import jax

    keras_adafisher.set_decision_scope(scope)
    models = mlp(), mlp()
    owns = optimizer(factor_update_steps=3), optimizer(factor_update_steps=3)
    for model, own in zip(models, owns, strict=True):
        keras_adafisher.wrap(model)
        own.build(model.trainable_variables)
    # At another step than the first one.
    owns[1].iterations.assign(2)

    @jax.jit
    @keras_adafisher.training_step(*owns)
    def step(states, x, y):
        results = []
        for model, own, (trainable, values) in zip(
            models, owns, states, strict=True
        ):

            def loss_of(trainable, model=model):
                z, _ = model.stateless_call(trainable, [], x, training=True)
                return cross_entropy()(y, z)

            gradients = jax.grad(loss_of)(trainable)
            results.append(own.stateless_apply(values, gradients, trainable))
        return results

    states = [
        (
            [v.value for v in model.trainable_variables],
            [v.value for v in own.variables],
        )
        for model, own in zip(models, owns, strict=True)
    ]
    x, y = data()
    taken = []
    for _ in range(2):
        states = step(states, x, y)
        for own, (_, values) in zip(owns, states, strict=True):
            for variable, value in zip(own.variables, values, strict=True):
                variable.assign(value)
        taken.append(
            [
                own.records_of(probe)[0]
                for model, own in zip(models, owns, strict=True)
                for probe in probes_in(model)[:1]
            ]
        )
    assert taken == [[1, 0], [1, 1]]


@JAX
def test_an_error_of_the_function_is_its_own():
    keras_adafisher.set_decision_scope("step")

    def unpack(state):
        raise TypeError("the second argument is wrong")

    with pytest.raises(TypeError, match=r"^the second argument is wrong"):
        custom_loop("step", unpack=unpack)


@JAX
def test_a_function_without_the_state_of_the_optimizer():
    model = mlp()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher()

    @keras_adafisher.training_step(optimizer)
    def my_step(trainable, own):
        return trainable, own

    trainable = [v.value for v in model.trainable_variables]
    with pytest.raises(ValueError, match="must be built before `my_step`"):
        my_step(trainable, [])
    optimizer.build(model.trainable_variables)
    own = [v.value for v in optimizer.variables]
    with pytest.raises(ValueError) as error:
        my_step(trainable, own[:-1])
    assert "`[v.value for v in optimizer.variables]`" in str(error.value)
    assert f"lists of [4, {len(own) - 1}] arrays" in str(error.value)
    with pytest.raises(ValueError, match=r"`model\.trainable_variables`"):
        my_step(trainable[:3], own)
    trainable, own = my_step(trainable, own)
    assert len(trainable) == 4


@JAX
def test_a_function_that_returns_something_else_where_it_measures():
    import jax

    keras_adafisher.set_decision_scope("step")
    model = mlp()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher()
    optimizer.build(model.trainable_variables)
    results = iter([np.zeros(2), np.zeros(3)])

    @keras_adafisher.training_step(optimizer)
    def my_step(trainable, own):
        return next(results)

    trainable = [v.value for v in model.trainable_variables]
    own = [v.value for v in optimizer.variables]
    with pytest.raises(TypeError, match="`my_step` must return the same"):
        jax.jit(my_step)(trainable, own)
    assert len(model.trainable_variables) == 4


@pytest.mark.parametrize("wrong", [(), (None,), ("adafisher",), (mlp,)])
def test_what_is_no_optimizer(wrong):
    with pytest.raises(TypeError, match="takes the optimizers that the step"):
        keras_adafisher.training_step(*wrong)


def test_with_another_optimizer_the_function_is_what_it_was():
    step = keras_adafisher.training_step(keras.optimizers.Adam())
    assert step(lambda x, y=1: x + y)(2, y=3) == 5


# Programs.


def gpt(blocks):
    width, length = 8, 6
    inputs = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(16, width)(inputs)
    for _ in range(blocks):
        h = keras.layers.LayerNormalization()(x)
        attention = keras.layers.MultiHeadAttention(2, width // 2)
        x = x + attention(h, h, use_causal_mask=True)
        h = keras.layers.LayerNormalization()(x)
        h = keras.layers.Dense(2 * width, activation="gelu")(h)
        x = x + keras.layers.Dense(width)(h)
    return keras.Model(inputs, keras.layers.Dense(16)(x))


def program(optimizer, blocks):
    from benchmarks.jax_program import compiled_step

    keras_adafisher.set_decision_scope("step")
    model = gpt(blocks)
    model.compile(optimizer, loss=cross_entropy())
    x = np.zeros((2, 6), "int32")
    return compiled_step(model, x, x).as_text()


@JAX
@pytest.mark.parametrize(
    ("blocks", "most"),
    [(3, 1.25), pytest.param(12, 1.15, marks=pytest.mark.slow)],
)
def test_a_step_of_a_gpt_has_one_condition(blocks, most, record_property):
    """And about as many instructions as Adam's where it doesn't measure.

    What doesn't depend on the number of layers counts less in a deep model.
    """
    from benchmarks.jax_program import conditionals
    from benchmarks.jax_program import instructions

    default = program(keras_adafisher.AdaFisher(), blocks)
    adam = program(keras.optimizers.Adam(), blocks)
    plain, measuring = (instructions(default, branch) for branch in (0, 1))
    record_property(
        "figure",
        f"GPT of {blocks} blocks, one decision: {conditionals(default)} "
        f"condition, {plain} instructions in a plain step, {measuring} in a "
        f"measuring one, Adam {instructions(adam)}",
    )
    assert conditionals(default) == 1
    assert conditionals(adam) == 0
    assert plain < measuring
    assert plain <= most * instructions(adam)


@JAX
def test_measuring_at_every_step_takes_no_condition():
    from benchmarks.jax_program import conditionals

    every = keras_adafisher.AdaFisher(factor_update_steps=1)
    assert conditionals(program(every, blocks=2)) == 0


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="JAX' programs have a test of their own, and PyTorch has no graph",
)
@pytest.mark.parametrize(("scope", "count"), [("layer", 4), ("step", 1)])
def test_conditions_in_a_graph(scope, count):
    """With "layer" one for each of two layers, and two in the update."""
    import tensorflow as tf

    keras_adafisher.set_decision_scope(scope)
    model = mlp()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher()
    optimizer.build(model.trainable_variables)

    @tf.function(input_signature=[tf.TensorSpec((4, 6))])
    @keras_adafisher.training_step(optimizer)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)

    graph = step.get_concrete_function().graph.as_graph_def()
    nodes = [
        *graph.node,
        *(n for function in graph.library.function for n in function.node_def),
    ]
    found = [n for n in nodes if n.op in ("If", "StatelessIf")]
    assert len(found) == count
