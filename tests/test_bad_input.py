"""Each public function with arguments of a wrong type, range or shape.

An error names the argument, what came and, where it isn't obvious, the way
out; and nothing is half changed. (Which values of an argument are wrong, and
not only that it is checked, is in `test_optimizer.py`; what `wrap`, `unwrap`
and `coverage` refuse also in `test_wrap.py`.)
"""

import keras
import numpy as np
import pytest
from models import assert_same
from models import cross_entropy
from models import data
from models import mlp
from models import to_numpy
from models import weights

import keras_adafisher
from keras_adafisher.wrappers import Block
from keras_adafisher.wrappers import DenseBlock
from keras_adafisher.wrappers import GradientBlock
from keras_adafisher.wrappers import ScaleBlock

NAN, INF = float("nan"), float("inf")

DECAY_RATE = "a float in the range [0, 1)"
POSITIVE = "a float > 0"
NOT_NEGATIVE = "a float >= 0"
NO_DECAY_RATES = [-0.1, 1.0, 2, NAN, INF, None, "0.9", True, [0.9]]

OPTIMIZER_ARGUMENTS = {
    "learning_rate": (NOT_NEGATIVE, [-1e-3, NAN, INF]),
    "beta": (DECAY_RATE, NO_DECAY_RATES),
    "damping": (POSITIVE, [0.0, -1.0, NAN, INF, None, "1", True, [1.0]]),
    "gamma_1": (DECAY_RATE, NO_DECAY_RATES),
    "gamma_2": (DECAY_RATE, NO_DECAY_RATES),
    "factor_update_steps": (
        "an integer >= 1",
        [0, -1, 1.0, 2.5, NAN, None, "1", True, [1]],
    ),
    "epsilon": (NOT_NEGATIVE, [-1e-9, NAN, INF, None, "0", False, [0.0]]),
    "normalization": ('"mean" or "min_max"', ["max", None, 1, True]),
    "nesterov": ("a boolean", [0, 1, None, "yes", [True]]),
    "rms_decay": (
        DECAY_RATE,
        [value for value in NO_DECAY_RATES if value is not None],
    ),
    "adam_beta_2": (DECAY_RATE, NO_DECAY_RATES),
    "adam_epsilon": (NOT_NEGATIVE, [-1e-9, NAN, INF, None, "0", False, [0.0]]),
    "weight_decay": (NOT_NEGATIVE, [-0.1, NAN, INF, "0.1", True, [0.1]]),
    "clipnorm": (NOT_NEGATIVE, [-1.0, NAN, INF, "1", True, [1.0]]),
    "clipvalue": (NOT_NEGATIVE, [-1.0, NAN, INF, "1", True, [1.0]]),
    "global_clipnorm": (NOT_NEGATIVE, [-1.0, NAN, INF, "1", True, [1.0]]),
    "ema_momentum": ("in the range [0, 1]", [-0.1, 1.1, NAN, None, "1", True]),
    "loss_scale_factor": (POSITIVE, [0.0, -1.0, NAN, INF, "1", True, [1.0]]),
    "gradient_accumulation_steps": (
        "an integer >= 2",
        [0, 1, -2, 2.0, NAN, "2", True, [2]],
    ),
}

# What Keras checks, by its words.
KERAS_ARGUMENTS = {
    "learning_rate": ["fast", None, 1, [0.1], True],
    "clipnorm, clipvalue": [(1.0, 1.0)],
    "ema_overwrite_frequency": [-1, 2.5, "2"],
    "name": [5, "a/b"],
}


@pytest.mark.parametrize(
    "optimizer", [keras_adafisher.AdaFisher, keras_adafisher.AdaFisherW]
)
@pytest.mark.parametrize("argument", OPTIMIZER_ARGUMENTS)
def test_arguments_of_the_optimizer(optimizer, argument):
    allowed, values = OPTIMIZER_ARGUMENTS[argument]
    for value in values:
        with pytest.raises(ValueError) as error:
            optimizer(**{argument: value})
        message = str(error.value)
        assert f"Argument `{argument}` must be " in message
        assert allowed in message
        assert f"Received: {argument}={value}" in message
        # As it comes from a file.
        config = {**optimizer().get_config(), argument: value}
        with pytest.raises(ValueError, match=argument):
            optimizer.from_config(config)


@pytest.mark.parametrize("names", KERAS_ARGUMENTS)
def test_arguments_that_keras_checks(names):
    first = names.split(", ")[0]
    for value in KERAS_ARGUMENTS[names]:
        values = value if isinstance(value, tuple) else (value,)
        arguments = dict(zip(names.split(", "), values, strict=True))
        with pytest.raises(ValueError, match=f"`{first}`"):
            keras_adafisher.AdaFisher(use_ema=True, **arguments)


def test_every_argument_of_the_optimizer_is_in_the_table():
    """An argument that comes later needs its row. The rest take anything."""
    names = set(keras_adafisher.AdaFisher().get_config())
    assert set(OPTIMIZER_ARGUMENTS) <= names
    keras_own = set(keras.optimizers.SGD().get_config())
    checked = {
        name
        for names in (*OPTIMIZER_ARGUMENTS, *KERAS_ARGUMENTS)
        for name in names.split(", ")
    }
    assert names & keras_own - checked <= {"use_ema"}


def test_an_argument_that_does_not_exist():
    with pytest.raises(ValueError, match=r"not recognized: {'momentum'"):
        keras_adafisher.AdaFisher(momentum=0.9)


NO_LAYERS = [
    None,
    5,
    "model",
    [keras.layers.Dense(2)],
    keras.layers.Dense,
    np.ones(3),
    lambda x: x,
    keras_adafisher.AdaFisher(),
]


@pytest.mark.parametrize("function", ["wrap", "unwrap", "coverage"])
@pytest.mark.parametrize("number", range(len(NO_LAYERS)))
def test_targets(function, number):
    with pytest.raises(TypeError) as error:
        getattr(keras_adafisher, function)(NO_LAYERS[number])
    message = str(error.value)
    assert f"Argument `target` of `{function}` must be" in message
    assert "Received: target=" in message


def test_coverage_of_what_is_not_built():
    for target in (
        keras.layers.Dense(2),
        keras.Sequential([keras.layers.Dense(2)]),
    ):
        with pytest.raises(ValueError, match="Build it first by calling"):
            keras_adafisher.coverage(target)


class Wrapper(keras_adafisher.LayerWrapper):
    """A wrapper for `test_wrappers_of_the_wrong_kind`."""

    made = None

    def make_blocks(self):
        return type(self).made


def test_registering():
    class Layer(keras.layers.Layer):
        pass

    for wrong in (None, 5, "Dense", Layer(), [Layer], int, keras.Variable):
        with pytest.raises(TypeError, match="Argument `layer_class` must be"):
            keras_adafisher.register_wrapper(wrong)
    register = keras_adafisher.register_wrapper(Layer)
    for wrong in (None, 5, Layer, int, lambda host: host):
        with pytest.raises(TypeError, match="decorates subclasses of"):
            register(wrong)
    # None of them took the place of the right one.
    register(Wrapper)
    with pytest.raises(ValueError, match="already has the wrapper `Wrapper`"):
        register(Wrapper)


def built_dense():
    layer = keras.layers.Dense(3)
    layer.build((None, 2))
    return layer


def test_hosts_of_wrappers():
    for wrong in (None, 5, "dense", keras.layers.Dense):
        with pytest.raises(TypeError, match="Argument `host` must be a"):
            keras_adafisher.LayerWrapper(wrong)
    with pytest.raises(ValueError, match="must be a layer that is built"):
        keras_adafisher.LayerWrapper(keras.layers.Dense(3))


def test_wrappers_of_the_wrong_kind():
    """The layer stays as it was."""
    layer = built_dense()
    with pytest.raises(
        NotImplementedError, match=r"override `make_blocks\(\)`"
    ):
        keras_adafisher.LayerWrapper(layer)
    for wrong in (None, 5, [None], ["block"], [layer], DenseBlock, {1: 2}):
        Wrapper.made = wrong
        with pytest.raises(TypeError, match=r"must return a list of blocks"):
            Wrapper(layer)
    for inputs, outputs in ((3, 3), (2, 2), (1, 7)):
        Wrapper.made = [DenseBlock(layer.kernel, layer.bias, inputs, outputs)]
        with pytest.raises(ValueError, match="must broadcast to their param"):
            Wrapper(layer)
    Wrapper.made = [DenseBlock(layer.kernel, layer.bias, 2, 3)]
    wrapper = Wrapper(layer)
    wrapper.build()
    for wrong in (1, -2, None, "kernel", 0.5):
        with pytest.raises(ValueError, match="Argument `block` of `tap` must"):
            wrapper.tap(keras.ops.ones((4, 3)), keras.ops.ones((4, 2)), wrong)
    assert "call" not in vars(layer)
    assert len(layer.trainable_variables) == 2


class Faulty(keras.layers.Dense):
    """Its wrapper's factors don't fit."""


class FaultyWrapper(keras_adafisher.LayerWrapper):
    def make_blocks(self):
        return [DenseBlock(self.host.kernel, self.host.bias, 99, 99)]


@pytest.fixture
def faulty_is_registered():
    from keras_adafisher.wrappers import registry

    keras_adafisher.register_wrapper(Faulty)(FaultyWrapper)
    yield
    del registry._WRAPPERS[Faulty]


@pytest.mark.usefixtures("faulty_is_registered")
def test_a_model_that_can_not_be_wrapped_stays_as_it_is():
    """By `wrap` or `compile`, and trains with Adam."""
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(4), Faulty(3)]
    )
    before = weights(model)
    with pytest.raises(ValueError, match="must broadcast to their parameter"):
        keras_adafisher.wrap(model)
    with pytest.raises(ValueError, match="must broadcast to their parameter"):
        model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    with pytest.raises(ValueError, match="must broadcast to their parameter"):
        keras_adafisher.coverage(model)
    for layer in model.layers:
        assert "call" not in vars(layer)
    assert len(model.trainable_variables) == 4
    assert_same(weights(model), before)
    model.compile(keras.optimizers.Adam(), loss=cross_entropy())
    model.train_on_batch(*data(examples=8))


@pytest.mark.parametrize(
    "make",
    [
        lambda weight, bias: Block(weight, bias),
        lambda weight, bias: DenseBlock(weight, bias, 2, 3),
        lambda weight, bias: ScaleBlock(weight, bias, (1,), (3,)),
        lambda weight, bias: GradientBlock(weight, (2, 1), (3,), bias),
    ],
    ids=["Block", "DenseBlock", "ScaleBlock", "GradientBlock"],
)
def test_parameters_of_blocks(make):
    layer = built_dense()
    for wrong in (5, "kernel", np.ones((2, 3)), [layer.kernel], layer):
        with pytest.raises(TypeError, match=r"Argument `weight` of `\w+` must"):
            make(wrong, None)
        with pytest.raises(TypeError, match=r"Argument `bias` of `\w+` must"):
            make(None, wrong)
    assert make(layer.kernel, layer.bias).parameters


def test_statistics_that_a_block_does_not_define():
    layer = built_dense()
    block = Block(layer.kernel)
    for method in (block.activation_statistic, block.gradient_statistic):
        with pytest.raises(NotImplementedError, match="must override"):
            method(np.ones((4, 2)))


@pytest.fixture(scope="module")
def optimizer():
    keras.utils.set_random_seed(1)
    model = mlp()
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
    model.compile(optimizer, loss=cross_entropy())
    optimizer.build(model.trainable_variables)
    return optimizer


def test_fisher_diagonals_of_what_has_none(optimizer):
    for wrong in (
        None,
        5,
        "kernel",
        np.ones(3),
        mlp().layers[0].kernel,
        mlp().layers[0],
        optimizer.iterations,
    ):
        with pytest.raises(ValueError) as error:
            optimizer.fisher_diagonal(wrong)
        message = str(error.value)
        assert "Argument `variable` must be a variable that" in message
        assert "`keras_adafisher.coverage(model)` lists them" in message
        assert "Received: variable=" in message


def test_requests_that_are_no_bools(optimizer):
    for wrong in (None, 1, 0.0, "yes", [True], np.ones(()), np.ones(3)):
        with pytest.raises(TypeError) as error:
            optimizer.ask(wrong)
        assert "Argument `wanted` of `ask` must be a bool" in str(error.value)
    for right in (False, True, np.bool_(True), keras.ops.ones((), "bool")):
        optimizer.ask(right)


def test_variables_to_build_with():
    model = mlp()
    keras_adafisher.wrap(model)
    for wrong in (None, 5, model, [1], ["kernel"], [np.ones(3)], "ab", [None]):
        optimizer = keras_adafisher.AdaFisher()
        with pytest.raises(TypeError) as error:
            optimizer.build(wrong)
        message = str(error.value)
        assert "Argument `variables` of `build` must be a list" in message
        assert "`model.trainable_variables` of a wrapped model" in message
        assert not optimizer.built
        assert len(optimizer.variables) == 2
        # It can still be.
        optimizer.build(model.trainable_variables)
        assert optimizer.built


def test_a_batch_of_the_wrong_shape_changes_nothing():
    """Neither as inputs nor as labels, nor what is measured next."""

    def values(model):
        # TensorFlow finds some wrong shapes when the step runs, and has then
        # counted it, with Adam too.
        counter = model.optimizer.iterations
        is_counted = keras.backend.backend() == "tensorflow"
        return weights(model) + [
            to_numpy(v)
            for v in model.optimizer.variables
            if not (is_counted and v is counter)
        ]

    ends = []
    for wrongs in (False, True):
        keras.utils.set_random_seed(1)
        model = mlp()
        model.compile(
            # Measures and moves alike at each step, whatever its number is.
            keras_adafisher.AdaFisher(
                beta=0.0, rms_decay=None, factor_update_steps=1
            ),
            loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        )
        model.optimizer.build(model.trainable_variables)
        x, y = data(examples=8)
        y = np.eye(3, dtype="float32")[y]
        for _ in range(3):
            if wrongs:
                before = values(model)
                for wrong in ((x[:, :5], y), (x, y[:, :2])):
                    with pytest.raises(Exception):  # noqa: B017
                        model.train_on_batch(*wrong)
                assert_same(values(model), before)
            model.train_on_batch(x, y)
        ends.append(values(model))
    assert_same(*ends)


def test_the_error_names_the_shapes_that_do_not_fit():
    layer = keras.layers.Conv1D(3, 2)
    layer.build((None, 5, 4))
    before = to_numpy(layer.kernel)

    Wrapper.made = [DenseBlock(layer.kernel, layer.bias, 7, 3)]
    with pytest.raises(ValueError) as error:
        Wrapper(layer)
    message = str(error.value)
    assert "parameter 'kernel' of shape (2, 4, 3)" in message
    assert "factors of shapes (7, 1) and (3,)" in message
    assert_same([to_numpy(layer.kernel)], [before])
