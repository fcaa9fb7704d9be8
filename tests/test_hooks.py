import inspect
import subprocess
import sys

import keras
import numpy as np
import pytest
from models import cross_entropy
from models import data
from models import mlp
from models import probes_in

import keras_adafisher


def is_wrapped(model):
    return len(probes_in(model)) > 0


@pytest.mark.parametrize(
    "optimizer",
    [
        keras_adafisher.AdaFisher,
        lambda: "adafisher",
        lambda: "AdaFisherW",
        lambda: keras.optimizers.serialize(keras_adafisher.AdaFisher()),
        lambda: keras.optimizers.LossScaleOptimizer(
            keras_adafisher.AdaFisher()
        ),
    ],
)
def test_whatever_means_adafisher_wraps(optimizer):
    model = mlp()
    model.compile(optimizer=optimizer(), loss=cross_entropy())
    assert is_wrapped(model)


@pytest.mark.parametrize("optimizer", ["adam", None, keras.optimizers.SGD])
def test_other_optimizers_do_not_wrap(optimizer):
    model = mlp()
    model.compile(optimizer() if callable(optimizer) else optimizer, "mse")
    assert not is_wrapped(model)


def test_compiling_with_another_optimizer_unwraps_and_back():
    x, y = data()
    model = mlp()
    for _ in range(2):
        model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
        assert is_wrapped(model)
        model.fit(x, y, verbose=0)
        model.compile("adam", loss=cross_entropy())
        assert not is_wrapped(model)
        model.fit(x, y, verbose=0)


SCALED = keras.optimizers.LossScaleOptimizer


@pytest.mark.parametrize(
    "first, second",
    [
        (lambda optimizer: optimizer, lambda optimizer: optimizer),
        (SCALED, SCALED),
        (SCALED, lambda optimizer: optimizer),
    ],
    ids=["alone", "scaled", "scaled, then alone"],
)
def test_compiling_with_the_same_optimizer_once_more(first, second):
    """Keras puts it into a new `LossScaleOptimizer`, with float16."""
    x, y = data()
    model = mlp()
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=1)
    model.compile(first(optimizer), loss=cross_entropy())
    model.train_on_batch(x, y)
    model.compile(second(optimizer), cross_entropy(), metrics=["accuracy"])
    model.train_on_batch(x, y)
    rows = keras_adafisher.coverage(model).rows
    assert {row.source for row in rows} == {"measured"}
    (probe, *_) = probes_in(model)
    assert optimizer.records_of(probe) == (2, 0, False)


def test_compile_leaves_what_the_user_wrapped():
    """A GAN's parts are wrapped by hand; its `compile` knows no optimizer."""
    part = mlp()
    keras_adafisher.wrap(part)
    whole = keras.Sequential([keras.Input((6,)), part])
    whole.compile(loss="mse")
    assert is_wrapped(part)


def test_a_new_optimizer_measures_at_its_first_step():
    x, y = data()
    model = mlp()
    for _ in range(2):
        optimizer = keras_adafisher.AdaFisher.as_published()
        model.compile(optimizer, loss=cross_entropy())
        model.fit(x, y, batch_size=16, epochs=2, verbose=0)
        # 1 if it had never measured.
        factor = optimizer.preconditioner(model.layers[0].kernel)
        assert float(keras.ops.max(factor)) < 0.1


def test_a_former_optimizer_is_asked_no_more():
    """Or its layers would measure for it at steps of the other."""
    x, y = data()
    model = mlp()
    former = keras_adafisher.AdaFisher(factor_update_steps=1)
    for optimizer in (former, keras_adafisher.AdaFisher()):
        model.compile(optimizer, loss=cross_entropy())
        model.train_on_batch(x, y)
    assert is_wrapped(model)
    for probe in probes_in(model):
        assert list(probe.optimizers) == [optimizer]


def test_the_optimizer_is_built_before_the_first_step():
    """And not by `compile`: what is frozen after it isn't trained."""
    x, y = data()
    model = mlp()
    optimizer = keras_adafisher.AdaFisher()
    model.compile(optimizer, loss=cross_entropy())
    model.layers[0].trainable = False
    assert not optimizer.built
    model.make_train_function()
    assert optimizer.built
    kernel = model.layers[0].kernel.numpy()
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), kernel)


def test_a_model_that_is_not_built_yet():
    """Its optimizer waits for the first batch, like any other."""
    x, y = data()
    model = keras.Sequential([keras.layers.Dense(3)])
    optimizer = keras_adafisher.AdaFisher()
    model.compile(optimizer, loss=cross_entropy())
    model.make_train_function()
    assert not optimizer.built
    model.fit(x, y, verbose=0)
    assert optimizer.built
    assert len(probes_in(model)) == 1


IMPORT = """
import keras
import keras.src.trainers.trainer

classes = [
    keras.Model, *keras.Model.__mro__, keras.Sequential, keras.layers.Layer,
    keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer,
    keras.optimizers.MultiOptimizer,
]
if keras.backend.backend() == "tensorflow":
    import tensorflow
    classes.append(tensorflow.GradientTape)


def attributes():
    return {
        f"{c.__name__}.{name}": id(value)
        for c in classes if c is not object for name, value in vars(c).items()
    }


def changed(before):
    after = attributes()
    return sorted(name for name in after if after[name] != before.get(name))


before = attributes()
import keras_adafisher
assert changed(before) == ["Trainer.compile"], changed(before)
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile(keras.optimizers.Adam(), loss="mse")
keras_adafisher.AdaFisher()
assert changed(before) == ["Trainer.compile"], changed(before)
keras_adafisher.wrap(model)
print(*changed(before))
"""


CHANGED = {
    "jax": [
        "Layer.stateless_call",
        "Layer.trainable_variables",
        "Layer.trainable_weights",
        "MultiOptimizer.apply",
    ],
    "tensorflow": [
        "GradientTape.gradient",
        "GradientTape.watch",
        "GradientTape.watched_variables",
        "LossScaleOptimizer.apply",
    ],
    "torch": [],
}[keras.backend.backend()]


def test_importing_changes_compile_only():
    """All else is changed when the first model is wrapped."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == sorted(
        [
            *CHANGED,
            "LossScaleOptimizer.build",
            "Model.make_train_function",
            "MultiOptimizer.build",
            "Trainer.compile",
        ]
    )


def test_compile_keeps_its_signature():
    parameters = list(inspect.signature(keras.Model.compile).parameters)
    assert parameters[:3] == ["self", "optimizer", "loss"]
    assert "jit_compile" in parameters


def test_positional_arguments_of_compile():
    model = mlp()
    model.compile(keras_adafisher.AdaFisher(), "mse", None, ["mae"])
    assert model.loss == "mse"


def test_keras_still_sees_no_override_of_compile():
    """Or `load_model` wouldn't compile what it loads."""
    model = mlp()
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    copy = mlp()
    copy.compile_from_config(model.get_compile_config())
    assert isinstance(copy.optimizer, keras_adafisher.AdaFisher)
    assert is_wrapped(copy)


def test_a_wrong_optimizer_gets_keras_error():
    with pytest.raises(ValueError, match="Could not interpret optimizer"):
        mlp().compile(optimizer=3, loss="mse")


def test_training_after_unwrap_is_an_error():
    """Or the factors would stay as they are, without a word."""
    x, y = data()
    model = mlp()
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    model.fit(x, y, verbose=0)
    keras_adafisher.unwrap(model)
    assert model.evaluate(x, y, verbose=0) > 0
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match="aren't wrapped any more"):
            train(x, y)
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    model.fit(x, y, verbose=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("damping", 0.1),
        ("factor_update_steps", 1),
        ("rms_decay", 0.5),
        ("weight_decay", 0.3),
    ],
)
def test_a_setting_that_is_changed_between_two_fits_counts(name, value):
    """As `learning_rate` does, though the step is compiled already."""
    x, y = data()
    ends = []
    for compiles_again in (False, True):
        keras.utils.set_random_seed(0)
        model = mlp()
        optimizer = keras_adafisher.AdaFisher()
        model.compile(optimizer, loss=cross_entropy())
        model.fit(x, y, shuffle=False, verbose=0)
        setattr(optimizer, name, value)
        if compiles_again:
            model.compile(optimizer, loss=cross_entropy())
        model.fit(x, y, shuffle=False, verbose=0)
        ends.append(model.get_weights())
    for kept, compiled in zip(*ends, strict=True):
        np.testing.assert_array_equal(kept, compiled)


class PassesOn(keras.Sequential):
    def make_train_function(self, force=False):
        return super().make_train_function(force)


def test_an_override_of_make_train_function():
    x, y = data()
    model = PassesOn(mlp().layers)
    optimizer = keras_adafisher.AdaFisher()
    model.compile(optimizer, loss=cross_entropy())
    model.fit(x, y, verbose=0)
    optimizer.damping = 0.1
    model.fit(x, y, verbose=0)
    assert int(optimizer.iterations) > 1


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="With JAX and PyTorch, Keras builds it before the first step",
)
@pytest.mark.parametrize("name", ["Adam", "AdaFisher"])
def test_a_train_step_that_trains_other_variables_too(name):
    """An optimizer is built with what it is applied to first."""
    import tensorflow as tf

    scale = keras.Variable(1.0, name="scale")

    class Scaled(keras.Sequential):
        def train_step(self, data):
            x, y, *_ = data
            variables = [*self.trainable_variables, scale]
            with tf.GradientTape() as tape:
                outputs = scale * self(x, training=True)
                loss = self.compute_loss(x, y, outputs)
            gradients = tape.gradient(loss, variables)
            self.optimizer.apply(gradients, variables)
            return {"loss": loss}

    x, y = data()
    model = Scaled(mlp().layers)
    model.compile(name, loss=cross_entropy())
    model.fit(x, y, verbose=0)
    assert float(keras.ops.convert_to_numpy(scale)) != 1.0
    rows = keras_adafisher.coverage(model).rows
    expected = {"Adam": "not yet", "AdaFisher": "measured"}
    assert {row.source for row in rows} == {expected[name]}


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="JAX passes state along, and PyTorch needs no steps",
)
@pytest.mark.parametrize("make", [lambda o: [o], lambda o: {0: o}])
def test_optimizers_in_a_list_or_a_dict(make):
    import tensorflow as tf

    class Several(keras.Sequential):
        def train_step(self, data):
            x, y, *_ = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            variables = self.trainable_variables
            gradients = tape.gradient(loss, variables)
            self.several[0].apply(gradients, variables)
            return {"loss": loss}

    x, y = data()
    model = Several(mlp().layers)
    keras_adafisher.wrap(model)
    model.several = make(keras_adafisher.AdaFisher())
    model.compile("sgd", loss=cross_entropy())
    model.fit(x, y, verbose=0)
    sources = {row.source for row in keras_adafisher.coverage(model).rows}
    assert sources == {"measured"}
