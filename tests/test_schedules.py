"""Learning rates without a known end, and the constructor that takes one."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops
from models import assert_close
from models import assert_same
from models import cross_entropy
from models import data
from models import mlp
from models import to_numpy
from models import weights

import keras_adafisher
from keras_adafisher import InverseSqrtDecay

OPTIMIZERS = [
    keras_adafisher.AdaFisher,
    keras_adafisher.AdaFisherW,
    keras_adafisher.AdaFisherMuon,
]


@contextlib.contextmanager
def with_floatx(dtype):
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


def value_of(schedule, step):
    return float(to_numpy(schedule(ops.convert_to_tensor(step, "int32"))))


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.5),
        (75, 0.25),
        (200, 1 / 6),
        (70_000, 0.0094474),
        (2_000_000_000, 5.5902e-5),
    ],
)
@pytest.mark.parametrize("floatx", ["float32", "float16"])
def test_inverse_square_roots(step, value, floatx):
    with with_floatx(floatx):
        found = value_of(InverseSqrtDecay(0.5, decay_steps=25), step)
    assert found == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("floatx", ["float32", "float16"])
def test_a_counter_that_ran_over_leaves_a_small_rate(floatx):
    with with_floatx(floatx):
        assert 0 < value_of(InverseSqrtDecay(0.5), -(2**31)) < 2e-4


@pytest.mark.once
def test_schedules_are_saved():
    schedule = InverseSqrtDecay(0.5, decay_steps=25, name="rate")
    config = keras.optimizers.schedules.serialize(schedule)
    assert config["registered_name"] == "keras_adafisher>InverseSqrtDecay"
    assert config["config"] == {
        "initial_learning_rate": 0.5,
        "decay_steps": 25.0,
        "name": "rate",
    }
    copy = keras.optimizers.schedules.deserialize(config)
    assert copy.get_config() == schedule.get_config()
    assert InverseSqrtDecay(0.5).decay_steps == 100


@pytest.mark.once
@pytest.mark.parametrize("value", [-0.1, float("nan"), None, "0.1", True])
def test_bad_rates(value):
    message = "learning_rate` must be a float >= 0"
    with pytest.raises(ValueError, match=f"Argument `initial_{message}"):
        InverseSqrtDecay(value)
    with pytest.raises(ValueError, match=f"Argument `{message}"):
        keras_adafisher.AdaFisher.anytime(value)


@pytest.mark.once
def test_schedules_and_models_are_no_first_rate():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    for value, error in ((schedule, ValueError), (mlp(), TypeError)):
        with pytest.raises(error, match="`learning_rate` must be a float"):
            keras_adafisher.AdaFisher.anytime(value)


@pytest.mark.once
@pytest.mark.parametrize("value", [0, -1, float("inf"), None, "100", True])
def test_bad_decay_steps(value):
    message = "Argument `decay_steps` must be a float > 0"
    for make in (InverseSqrtDecay, keras_adafisher.AdaFisher.anytime):
        with pytest.raises(ValueError, match=message):
            make(0.1, decay_steps=value)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_training_that_may_end_at_any_time(optimizer_class):
    """The same as with rates and averages by hand."""
    x, y = data()
    model, other = mlp(), mlp()
    other.set_weights(model.get_weights())
    optimizer = optimizer_class.anytime(0.02, decay_steps=2)
    model.compile(optimizer, loss=cross_entropy())
    other.compile(optimizer_class(0.02), loss=cross_entropy())
    average = None
    for step in range(5):
        other.optimizer.learning_rate = 0.02 / (1 + step / 2) ** 0.5
        model.train_on_batch(x, y)
        other.train_on_batch(x, y)
        now = weights(other)
        share = 10 / (step + 10)
        average = now if average is None else average
        average = [
            a + share * (w - a) for a, w in zip(average, now, strict=True)
        ]
    assert_close(weights(model), weights(other), 1e-5)
    optimizer.finalize_variable_values(model.trainable_variables)
    assert_close(weights(model), average, 1e-5)


@pytest.mark.once
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_other_arguments_of_the_constructor(optimizer_class):
    optimizer = optimizer_class.anytime(0.02, beta=0.8, ema_momentum=0.99)
    assert type(optimizer) is optimizer_class
    assert isinstance(optimizer.get_config()["learning_rate"], dict)
    assert (optimizer.beta, optimizer.ema_momentum) == (0.8, 0.99)
    assert optimizer_class.anytime(0.02).ema_momentum == "auto"
    assert optimizer_class.anytime(0.02).use_ema
    with pytest.raises(ValueError, match="Did you mean `beta`"):
        optimizer_class.anytime(0.02, betta=0.8)


@pytest.mark.parametrize("floatx", ["float16", "bfloat16"])
def test_weights_in_half_precision(floatx):
    x, y = data()
    with with_floatx(floatx):
        model = mlp()
        optimizer = keras_adafisher.AdaFisherMuon.anytime(0.02)
        model.compile(optimizer, loss=cross_entropy())
        before = weights(model)
        model.fit(x, y, batch_size=12, verbose=0)
    assert model.trainable_variables[0].dtype == floatx
    for old, new in zip(before, weights(model), strict=True):
        assert np.isfinite(new.astype("float32")).all()
        assert not np.array_equal(old, new)


def test_training_goes_on_from_a_file(tmp_path):
    x, y = data()
    model = mlp()
    optimizer = keras_adafisher.AdaFisherMuon.anytime(0.02, decay_steps=2)
    model.compile(optimizer, loss=cross_entropy())
    fit = {"batch_size": 12, "shuffle": False, "verbose": 0}
    model.fit(x, y, **fit)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == optimizer.get_config()
    model.fit(x, y, **fit)
    loaded.fit(x, y, **fit)
    assert_same(weights(model), weights(loaded))
