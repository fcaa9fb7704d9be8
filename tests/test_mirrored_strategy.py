"""`tf.distribute.MirroredStrategy`: collected for TensorFlow only."""

import contextlib
import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import assert_close
from models import cnn
from models import cross_entropy
from models import data
from models import image_data
from models import mlp
from models import state
from models import to_numpy
from models import weights

import keras_adafisher

STEPS = 12


def train(
    strategy,
    make_model,
    batches,
    optimizer_class=keras_adafisher.AdaFisher,
    **kwargs,
):
    """Weights and Fisher diagonals after one step per batch."""
    with strategy.scope():
        model = make_model()
        optimizer = optimizer_class(factor_update_steps=4, **kwargs)
        model.compile(optimizer, loss=cross_entropy())
    rng = np.random.default_rng(3)
    model.set_weights([rng.uniform(size=w.shape) for w in model.get_weights()])
    for x, y in batches:
        model.train_on_batch(x, y)
    diagonals = [
        to_numpy(optimizer.preconditioner(v))
        for v in model.weights
        if v.trainable
    ]
    return weights(model), diagonals


# TensorFlow's collectives of two strategies on the same devices get into each
# other's way.
@functools.cache
def mirrored():
    devices = [d.name for d in tf.config.list_logical_devices("CPU")]
    assert len(devices) == 2
    return tf.distribute.MirroredStrategy(devices)


def test_two_replicas_give_the_weights_of_one_device():
    x, y = data(examples=16 * STEPS)
    batches = list(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))
    one, factors_of_one = train(tf.distribute.get_strategy(), mlp, batches)
    two, factors_of_two = train(mirrored(), mlp, batches)
    assert_close(two, one, 1e-6)
    assert_close(factors_of_two, factors_of_one, 1e-6)


@pytest.mark.parametrize("interval", [1, 3])
def test_orthogonalized_steps(interval):
    x, y = data(examples=16 * STEPS)
    batches = list(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))
    settings = {
        "optimizer_class": keras_adafisher.AdaFisherMuon,
        "keep_roots": True,
        "kernel_update_steps": interval,
    }
    one, _ = train(tf.distribute.get_strategy(), mlp, batches, **settings)
    two, _ = train(mirrored(), mlp, batches, **settings)
    assert_close(two, one, 1e-5)


@pytest.mark.parametrize("decay", [0.2, None])
def test_kernels_and_all_else_decay_by_different_amounts(decay):
    """Also in a second `fit`, which traces anew if a setting has changed."""
    x, y = data()

    def run(strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = mlp()
            optimizer = keras_adafisher.AdaFisherMuon(
                weight_decay=decay, adam_weight_decay=0.5
            )
            model.compile(optimizer, loss=cross_entropy())
        config = optimizer.get_config()
        for _ in range(2):
            model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
        assert optimizer.get_config() == config
        return weights(model)

    # Rounding errors of the orthogonalization add up.
    assert_close(run(mirrored()), run(tf.distribute.get_strategy()), 1e-4)


def test_convolutions_and_normalization_layers():
    """Without batch statistics, which differ between replicas in Keras."""

    def model():
        model = cnn()
        model.layers[1].trainable = False
        return model

    x, y = image_data(examples=16 * STEPS)
    batches = list(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))
    one, _ = train(tf.distribute.get_strategy(), model, batches)
    two, _ = train(mirrored(), model, batches)
    assert_close(two, one, 1e-6)


def test_fit_under_the_strategy():
    x, y = data()
    with mirrored().scope():
        model = mlp()
        model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    # Outside of the scope.
    rows = keras_adafisher.coverage(model).rows
    assert {row.source for row in rows} == {"measured"}


def test_wrapping_outside_of_the_scope():
    """The probes join the strategy of the weights, not the current one."""
    with mirrored().scope():
        model = mlp()
    keras_adafisher.wrap(model)
    for variable in model.trainable_variables:
        assert variable.value.distribute_strategy.num_replicas_in_sync == 2


def test_a_layer_that_is_built_late():
    x, y = data()
    with mirrored().scope():
        model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(3)])
        model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    model.fit(x, y, batch_size=16, verbose=0)
    assert len(model.optimizer.variables) > 0
    to_numpy(model.optimizer.preconditioner(model.layers[0].kernel))


def test_factors_that_are_estimated_from_gradients():
    """From the gradient of the whole batch, not of a replica's part."""

    def model():
        return keras.Sequential(
            [
                keras.Input((4, 3)),
                keras.layers.GRU(3),
                keras.layers.Dense(3),
            ]
        )

    rng = np.random.default_rng(0)
    x = rng.normal(size=(16 * STEPS, 4, 3)).astype("float32")
    y = rng.integers(0, 3, size=16 * STEPS)
    batches = list(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))
    one, factors_of_one = train(tf.distribute.get_strategy(), model, batches)
    two, factors_of_two = train(mirrored(), model, batches)
    assert_close(two, one, 1e-6)
    assert_close(factors_of_two, factors_of_one, 1e-6)


def scope(is_inside):
    return mirrored().scope() if is_inside else contextlib.nullcontext()


def one_step(strategy, optimizer):
    """The model after one step, and how far its weights went."""
    x, y = data(examples=16)
    with strategy.scope():
        model = mlp()
        model.compile(optimizer(), loss=cross_entropy())
    rng = np.random.default_rng(3)
    start = [rng.uniform(size=w.shape) for w in model.get_weights()]
    model.set_weights(start)
    model.train_on_batch(x, y)
    steps = [a - b for a, b in zip(start, weights(model), strict=True)]
    return model, steps


def test_synchronized_batch_normalization():
    """Its statistics are those of the whole batch. (Others are a replica's.)"""

    def model(synchronized):
        return keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                # A bias has no gradient here but noise.
                keras.layers.Conv2D(4, 3, use_bias=False),
                keras.layers.BatchNormalization(synchronized=synchronized),
                keras.layers.Activation("relu"),
                keras.layers.Flatten(),
                keras.layers.Dense(3),
            ]
        )

    x, y = image_data(examples=16 * STEPS)
    batches = list(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))
    one, factors_of_one = train(
        tf.distribute.get_strategy(), lambda: model(False), batches
    )
    two, factors_of_two = train(mirrored(), lambda: model(True), batches)
    assert_close(two, one, 2e-6)
    assert_close(factors_of_two, factors_of_one, 2e-6)


@pytest.mark.parametrize("clipping", ["clipnorm", "global_clipnorm"])
def test_clipping(clipping):
    """Keras clips a replica's gradients before it sums them up."""
    arguments = {clipping: 0.05}

    def sgd():
        return keras.optimizers.SGD(1.0, **arguments)

    def adafisher():
        return keras_adafisher.AdaFisher(**arguments)

    model, _ = one_step(mirrored(), adafisher)
    _, gradients = one_step(mirrored(), sgd)
    momentums = [
        to_numpy(v)
        for v in model.optimizer.variables
        if v.path.endswith("_momentum")
    ]
    # After one step, of `beta=0.9`.
    assert_close(momentums, [0.1 * g for g in gradients], 1e-5)
    # Of two gradients of norm 0.05 the sum is longer than that. One device
    # clips the sum.
    norms = [np.linalg.norm(g) for g in gradients]
    norm = max(norms) if clipping == "clipnorm" else np.linalg.norm(norms)
    assert 0.051 < norm < 0.1001
    _, gradients = one_step(tf.distribute.get_strategy(), sgd)
    norms = [np.linalg.norm(g) for g in gradients]
    norm = max(norms) if clipping == "clipnorm" else np.linalg.norm(norms)
    assert norm < 0.0501


def test_weight_decay_and_moving_averages():
    x, y = data(examples=16 * STEPS)
    batches = list(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))
    arguments = {"weight_decay": 0.01, "use_ema": True}
    one, _ = train(tf.distribute.get_strategy(), mlp, batches, **arguments)
    two, _ = train(mirrored(), mlp, batches, **arguments)
    assert_close(two, one, 1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2},
        {"use_ema": True, "ema_overwrite_frequency": 2},
    ],
)
def test_what_keras_refuses_under_the_strategy(arguments):
    """With all optimizers: Keras communicates inside a `cond` there."""
    for optimizer in (keras.optimizers.SGD, keras_adafisher.AdaFisher):
        with pytest.raises(RuntimeError, match="merge_call"):
            one_step(mirrored(), lambda cls=optimizer: cls(**arguments))


def test_compiling_with_xla_on_the_cpu_fails_with_all_optimizers():
    for optimizer in (keras.optimizers.SGD, keras_adafisher.AdaFisher):
        with mirrored().scope():
            model = mlp()
            model.compile(optimizer(), loss=cross_entropy(), jit_compile=True)
        with pytest.raises(
            tf.errors.InvalidArgumentError,
            match="tfvariable_on_a_different_device",
        ):
            model.fit(*data(), batch_size=16, verbose=0)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    def adafisher():
        return keras_adafisher.AdaFisher(factor_update_steps=4)

    try:
        keras.config.set_dtype_policy(policy)
        one, _ = one_step(tf.distribute.get_strategy(), adafisher)
        two, _ = one_step(mirrored(), adafisher)
        factors_of_one, factors_of_two = (
            [
                to_numpy(v)
                for v in model.optimizer.variables
                if v.path.endswith("/factors")
            ]
            for model in (one, two)
        )
        # Rounded alike, example by example, and summed in float32.
        assert [len(v) for v in factors_of_one] == [21]
        assert_close(factors_of_two, factors_of_one, 1e-5)
        # The weights' gradients are summed in 16 bits.
        precision = {"mixed_float16": 2e-3, "mixed_bfloat16": 2e-2}[policy]
        assert_close(weights(two), weights(one), precision)

        is_scaled = isinstance(
            two.optimizer, keras.optimizers.LossScaleOptimizer
        )
        assert is_scaled == (policy == "mixed_float16")
        if is_scaled:
            # Then nothing changes but the scale.
            before = weights(two) + factors_of_two
            x, y = data(examples=16)
            x[3] = np.inf
            two.train_on_batch(x, y)
            after = weights(two) + [
                to_numpy(v)
                for v in two.optimizer.variables
                if v.path.endswith("/factors")
            ]
            assert_close(after, before, 0)
            assert float(two.optimizer.dynamic_scale.numpy()) == 2.0**14
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("examples", [35, 33])
def test_a_last_batch_that_does_not_divide(examples):
    """Keras weighs replicas alike, and so neither the weights nor the factors
    are those of one device. One example leaves a replica without any.
    """
    x, y = data(examples=examples)
    for optimizer in (
        keras.optimizers.Adam(),
        keras_adafisher.AdaFisher(factor_update_steps=1),
    ):
        with mirrored().scope():
            model = mlp()
            copy = optimizer.from_config(optimizer.get_config())
            model.compile(copy, loss=cross_entropy())
        model.fit(x, y, batch_size=16, epochs=2, verbose=0)
        assert all(np.isfinite(array).all() for array in state(model))


@pytest.mark.parametrize(
    ("saves_inside", "loads_inside"),
    [(True, True), (False, True), (True, False)],
)
def test_saving_and_resuming(saves_inside, loads_inside, tmp_path):
    x, y = data()
    loop = {"batch_size": 16, "shuffle": False, "verbose": 0}

    def compiled():
        model = mlp()
        optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
        model.compile(optimizer, loss=cross_entropy())
        return model

    keras.utils.set_random_seed(0)
    expected = compiled()
    expected.fit(x, y, epochs=2, **loop)

    keras.utils.set_random_seed(0)
    with mirrored().scope():
        model = compiled()
    model.fit(x, y, **loop)
    with scope(saves_inside):
        model.save(tmp_path / "model.keras")
    with scope(loads_inside):
        model = keras.models.load_model(tmp_path / "model.keras")
    model.fit(x, y, **loop)
    replicas = model.distribute_strategy.num_replicas_in_sync
    assert replicas == (2 if loads_inside else 1)
    assert_close(state(model), state(expected), 2e-6)


def test_compiling_outside_of_the_scope():
    """It is enough to create model and optimizer inside."""
    with mirrored().scope():
        model = mlp()
        optimizer = keras_adafisher.AdaFisher()
    model.compile(optimizer, loss=cross_entropy())
    model.fit(*data(), batch_size=16, verbose=0)
    for variable in optimizer.variables:
        assert variable.value.distribute_strategy is mirrored()


def test_compiling_a_model_that_was_created_outside_of_the_scope():
    model = mlp()
    with (
        mirrored().scope(),
        pytest.raises(ValueError, match=r"inside `with strategy\.scope\(\)"),
    ):
        model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    # It isn't wrapped, and one device can train it.
    assert len(model.trainable_variables) == 4
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    model.fit(*data(), batch_size=16, verbose=0)


@pytest.mark.parametrize("model_is_inside", [False, True])
def test_model_and_optimizer_of_different_strategies(model_is_inside):
    with scope(model_is_inside):
        model = mlp()
    with scope(not model_is_inside):
        optimizer = keras_adafisher.AdaFisher()
    model.compile(optimizer, loss=cross_entropy())
    start = weights(model)
    with pytest.raises(ValueError, match=r"inside `with strategy\.scope\(\)"):
        model.fit(*data(), batch_size=16, verbose=0)
    # Nothing is half done.
    assert not optimizer.built
    assert len(optimizer.variables) == 2
    assert_close(weights(model), start, 0)
    with scope(model_is_inside):
        model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    model.fit(*data(), batch_size=16, verbose=0)


def custom_loop(wraps_inside, builds_before, is_traced):
    """Weights and optimizer variables after `strategy.run`."""
    x, y = data()
    strategy = mirrored()
    loss_fn = cross_entropy()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = mlp()
        model.optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
    with scope(wraps_inside):
        keras_adafisher.wrap(model)
    if builds_before:
        with strategy.scope():
            model.optimizer.build(model.trainable_variables)

    @keras_adafisher.training_step(model.optimizer)
    def replica_step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        variables = model.trainable_variables
        model.optimizer.apply(tape.gradient(loss, variables), variables)

    def step(x, y):
        strategy.run(replica_step, args=(x, y))

    if is_traced:
        step = tf.function(step)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    for batch in strategy.experimental_distribute_dataset(batches):
        step(*batch)
    return state(model)


def test_custom_loop():
    keras.utils.set_random_seed(0)
    expected = mlp()
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
    expected.compile(optimizer, loss=cross_entropy())
    expected.fit(*data(), batch_size=16, shuffle=False, verbose=0)
    for wraps_inside, builds_before, is_traced in [
        (True, True, True),
        (False, True, True),
        # As Adam may: not in a `tf.function`.
        (False, False, False),
    ]:
        actual = custom_loop(wraps_inside, builds_before, is_traced)
        assert_close(actual, state(expected), 2e-6)


def test_variables_of_tensorflow_in_and_outside_of_the_scope():
    """As Keras' own test of a single step has them."""
    strategy = mirrored()
    with strategy.scope():
        optimizer = keras_adafisher.AdaFisher(1e-3)
        inside = tf.Variable([1.0, 2.0])
    gradients = [tf.constant([1.0, 1.0])]
    with pytest.warns(UserWarning, match="none of the 1 variables"):
        strategy.run(
            lambda: optimizer.apply_gradients(
                zip(gradients, [inside], strict=True)
            )
        )
    np.testing.assert_allclose(inside.numpy(), [0.999, 1.999], rtol=1e-5)
    with strategy.scope():
        other = keras_adafisher.AdaFisher()
    outside = tf.Variable([1.0, 2.0])
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"with strategy\.scope"),
    ):
        warnings.simplefilter("ignore")
        strategy.run(
            lambda: other.apply_gradients(
                zip(gradients, [outside], strict=True)
            )
        )
