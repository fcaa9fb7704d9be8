"""Each public function with arguments of a wrong type, range or shape.

An error names the argument, what came and, where it isn't obvious, the way
out; and nothing is half changed. (Which values of an argument are wrong, and
not only that it is checked, is in `test_optimizer.py`; what `wrap`, `unwrap`
and `coverage` refuse also in `test_wrapping.py`.)
"""

import inspect

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
from keras_adafisher import analysis
from keras_adafisher import callbacks
from keras_adafisher import plotting
from keras_adafisher.wrappers import Block
from keras_adafisher.wrappers import DenseBlock
from keras_adafisher.wrappers import GradientBlock
from keras_adafisher.wrappers import ScaleBlock

OPTIMIZERS = [
    keras_adafisher.AdaFisher,
    keras_adafisher.AdaFisherW,
    keras_adafisher.AdaFisherMuon,
]

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
    "ema_momentum": (
        'in the range [0, 1] or "auto"',
        [-0.1, 1.1, NAN, None, "1", True, ["auto"], np.array(["auto", "1"])],
    ),
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


@pytest.mark.once
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
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


@pytest.mark.once
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


@pytest.mark.once
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_error_says_where_none_is_allowed(optimizer):
    for argument in OPTIMIZER_ARGUMENTS:
        try:
            optimizer(**{argument: None})
            takes_none = True
        except ValueError:
            takes_none = False
        with pytest.raises(ValueError) as error:
            optimizer(**{argument: -1.0})
        assert ("`None`" in str(error.value)) == takes_none, argument


# What other optimizers and the authors' code call them, and slips.
OTHER_NAMES = {
    "lr": "`learning_rate`?",
    "beta_1": "`beta`?",
    "betas": "`beta`?",
    "momentum": "`beta`?",
    "beta_2": "`adam_beta_2` (of parameters without factors)?",
    "Lambda": "`damping`?",
    "TCov": "`factor_update_steps`?",
    "gamma": "`gamma_1` and `gamma_2` (the authors' `gamma=0.8` is "
    "`gamma_1=0.92` and `gamma_2=0.008`)?",
    "gammas": "`gamma_1` and `gamma_2` (the authors'",
    "eps": "`epsilon`?",
    "dampening": "`damping`?",
    "learnig_rate": "`learning_rate`?",
    "clip_norm": "`clipnorm`?",
    "factor_update_step": "`factor_update_steps`?",
    "weightdecay": "`weight_decay`?",
    "ema_overwrite_freq": "`ema_overwrite_frequency`?",
}


@pytest.mark.once
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", OTHER_NAMES)
def test_arguments_of_another_name(optimizer, name):
    with pytest.raises(ValueError) as error:
        optimizer(**{name: 0.9})
    message = str(error.value)
    assert message.startswith(f"Argument(s) not recognized: {{'{name}': 0.9}}")
    assert f". Did you mean {OTHER_NAMES[name]}" in message


@pytest.mark.once
@pytest.mark.parametrize(
    "optimizer", [keras_adafisher.AdaFisher, keras_adafisher.AdaFisherW]
)
@pytest.mark.parametrize(
    "name", ["kernel_update_steps", "ns_steps", "exclude_layers"]
)
def test_arguments_that_only_adafishermuon_has(optimizer, name):
    with pytest.raises(ValueError) as error:
        optimizer(**{name: 2})
    assert str(error.value) == (
        f"Argument(s) not recognized: {{'{name}': 2}}. Did you mean "
        "`AdaFisherMuon`, which has this argument?"
    )


@pytest.mark.once
def test_arguments_of_muon_that_have_no_counterpart():
    """Who comes from it leaves them out. All others have Keras' names."""
    muon = inspect.signature(keras.optimizers.Muon).parameters
    adafishermuon = inspect.signature(keras_adafisher.AdaFisherMuon).parameters
    refused = set(muon) - set(adafishermuon) - {"kwargs"}
    reasons = {
        "rms_rate": "steps have the spectral scale",
        "exclude_embeddings": "embeddings are never orthogonalized",
        "muon_a": "the polynomial is that of Keras' defaults",
        "muon_b": "the polynomial is that of Keras' defaults",
        "muon_c": "the polynomial is that of Keras' defaults",
    }
    assert refused == {*reasons, "momentum", "adam_beta_1"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError) as error:
            keras_adafisher.AdaFisherMuon(**{name: 0.2})
        assert str(error.value) == (
            f"Argument(s) not recognized: {{'{name}': 0.2}}. "
            f"Leave `{name}` out: {reason}."
        )


@pytest.mark.once
def test_arguments_that_resemble_none():
    for name in ("centered", "amsgrad", "initial_accumulator_value"):
        with pytest.raises(ValueError) as error:
            keras_adafisher.AdaFisher(**{name: True})
        assert str(error.value) == (
            f"Argument(s) not recognized: {{'{name}': True}}"
        )


@pytest.mark.once
def test_several_arguments_of_another_name():
    with pytest.raises(ValueError) as error:
        keras_adafisher.AdaFisher(lr=0.1, amsgrad=True, Lambda=1e-3)
    assert str(error.value) == (
        "Argument(s) not recognized: {'lr': 0.1, 'amsgrad': True, "
        "'Lambda': 0.001}. For `lr`, did you mean `learning_rate`? "
        "For `Lambda`, did you mean `damping`?"
    )
    with pytest.raises(ValueError) as error:
        keras_adafisher.AdaFisherMuon(momentum=0.95, rms_rate=0.2)
    assert str(error.value) == (
        "Argument(s) not recognized: {'momentum': 0.95, 'rms_rate': 0.2}. "
        "For `momentum`, did you mean `beta`? "
        "Leave `rms_rate` out: steps have the spectral scale."
    )


def models_and_parameters():
    model = mlp()
    yield model
    yield model.layers[0]
    yield model.trainable_variables
    yield tuple(model.trainable_variables)
    yield {v.path: v for v in model.trainable_variables}
    # As optimizers of PyTorch take them.
    yield [{"params": model.trainable_variables, "lr": 0.1}]
    yield iter(model.trainable_variables)
    if keras.backend.backend() == "torch":
        import torch

        yield torch.nn.Linear(2, 3)
        yield model.parameters()
        yield list(model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_model_is_no_learning_rate(optimizer):
    """The authors' optimizer is given the network."""
    for wrong in models_and_parameters():
        with pytest.raises(TypeError) as error:
            optimizer(wrong)
        message = str(error.value)
        assert "Argument `learning_rate` must be a float, a " in message
        assert "In Keras an optimizer isn't given the model" in message
        assert "`model.compile(optimizer=AdaFisher())`" in message
        assert "Received: learning_rate=" in message


def test_learning_rates_that_are_none_of_these():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    for right in (0.1, 0.0, np.float64(0.1), schedule, lambda: 0.1):
        keras_adafisher.AdaFisher(right)


@pytest.mark.once
@pytest.mark.parametrize(
    "argument",
    # Which is a property of Keras' own, and a variable.
    [name for name in OPTIMIZER_ARGUMENTS if name != "learning_rate"],
)
def test_values_that_are_assigned_later(argument):
    """By the rules of the constructor. What was there stays."""
    optimizer = keras_adafisher.AdaFisher()
    before = getattr(optimizer, argument)
    allowed, values = OPTIMIZER_ARGUMENTS[argument]
    for value in values:
        with pytest.raises(ValueError) as error:
            setattr(optimizer, argument, value)
        message = str(error.value)
        assert f"Argument `{argument}` must be " in message
        assert allowed in message
        assert f"Received: {argument}={value}" in message
        assert getattr(optimizer, argument) is before


@pytest.mark.once
def test_right_values_that_are_assigned_later():
    optimizer = keras_adafisher.AdaFisher()
    for name, given, kept in (
        ("damping", 2, 2.0),
        ("factor_update_steps", np.int32(5), 5),
        ("rms_decay", None, None),
        ("nesterov", False, False),
        ("weight_decay", 0.1, 0.1),
        ("clipnorm", None, None),
    ):
        setattr(optimizer, name, given)
        assert getattr(optimizer, name) == kept
        assert type(getattr(optimizer, name)) is type(kept)
    config = optimizer.get_config()
    assert (config["damping"], config["factor_update_steps"]) == (2.0, 5)
    copy = keras_adafisher.AdaFisher.from_config(config)
    assert copy.get_config() == config


@pytest.mark.once
@pytest.mark.parametrize(
    "cls", [keras_adafisher.AdaFisher, keras_adafisher.AdaFisherW]
)
def test_attributes_that_only_the_other_optimizer_has(cls):
    """What would be ignored isn't taken."""
    optimizer = cls()
    others = set(keras_adafisher.AdaFisherMuon().get_config())
    others -= set(optimizer.get_config())
    assert len(others) >= 7
    for name in others:
        with pytest.raises(AttributeError, match="of `AdaFisherMuon`"):
            setattr(optimizer, name, 1)
        assert not hasattr(optimizer, name)


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


@pytest.mark.once
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


@pytest.mark.once
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
    for wrong in ("3", None, 2.5, -2):
        block = DenseBlock(layer.kernel, layer.bias, wrong, 3)
        Wrapper.made = [block]
        with pytest.raises(ValueError, match="`activation_shape` of a Dense"):
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
def model():
    keras.utils.set_random_seed(1)
    model = mlp()
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
    model.compile(optimizer, loss=cross_entropy())
    optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def optimizer(model):
    return model.optimizer


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
        for method in (
            optimizer.preconditioner,
            optimizer.effective_learning_rate,
        ):
            with pytest.raises(ValueError) as error:
                method(wrong)
            message = str(error.value)
            assert "Argument `variable` must be a variable that" in message
            assert "`keras_adafisher.coverage(model)` lists them" in message
            assert "Received: variable=" in message


def test_gradients_and_values_that_do_not_fit(model, optimizer):
    variables = model.trainable_variables
    before = [to_numpy(v) for v in [*variables, *optimizer.variables]]
    gradient = keras.ops.ones(variables[0].shape)
    for wrong in ([gradient], [gradient] * 99):
        with pytest.raises(ValueError) as error:
            optimizer.apply(wrong, variables)
        message = str(error.value)
        assert "Argument `grads` of `apply` must have one" in message
        assert f"Received: {len(wrong)} gradients" in message
    count = len(optimizer.variables)
    for wrong in (1.0, None, "weight", np.ones((7, 7))):
        with pytest.raises(ValueError, match="nothing of it was loaded"):
            optimizer.set_weights([wrong] * count)
    after = [to_numpy(v) for v in [*variables, *optimizer.variables]]
    assert_same(after, before)


def test_settings_that_the_optimizer_is_built_with():
    """They decide which variables there are, and what is in them."""
    model = mlp()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher()
    optimizer.normalization = "min_max"
    optimizer.build(model.trainable_variables)
    for name, value in (
        ("normalization", "mean"),
        ("rms_decay", None),
        ("gradient_accumulation_steps", 2),
    ):
        before = getattr(optimizer, name)
        with pytest.raises(ValueError) as error:
            setattr(optimizer, name, value)
        assert f"`{name}` decides which variables" in str(error.value)
        assert getattr(optimizer, name) == before
        setattr(optimizer, name, before)
    optimizer.rms_decay = 0.5


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


# What looks at the curvature: for each function right arguments and, for each
# of them, wrong ones.

NO_MATRICES = [
    *(None, 5, "abc", [], [1.0], np.ones((2, 3)), {"a": 1}),
    [[1.0], [2.0, 3.0]],
    [[NAN, 0.0], [0.0, 1.0]],
    [[INF, 0.0], [0.0, 1.0]],
]
FACTOR = {"factor": (np.eye(2), NO_MATRICES)}
SYMMETRIC_FACTOR = {
    "factor": (np.eye(2), [*NO_MATRICES, [[1.0, 2.0], [0.0, 1.0]]])
}
NOISE = {
    "noise": (0.1, [-0.1, NAN, INF, "much", True, None, [0.1]]),
    "seed": (0, [-1, 0.5, "seed", {}]),
}
# Anything can be drawn.
TITLE = {"title": ("", [])}
NO_FACTORS = [5, "abc", np.eye(2), [np.eye(2)]]
HISTORY = {
    "every": ("epoch", [0, -1, 1.5, NAN, True, None, "step", [1]]),
    "csv_path": (None, [5, True, b"name", ["name"]]),
    "log_dir": (None, [5, True, b"name", ["name"]]),
}
COUNTS = [0, -1, 1.5, NAN, True, None, "5", [5]]
FUNCTIONS = {
    analysis.gershgorin: FACTOR,
    analysis.spectrum: {**SYMMETRIC_FACTOR, **NOISE},
    analysis.diagonal_energy: FACTOR,
    analysis.fourier_spectrum: FACTOR,
    analysis.diagonal_energy_table: {"factors": ([], [None, *NO_FACTORS])},
    analysis.kronecker_factors: {
        "model": (None, [None, 5, "model", keras.Model, np.ones(3)]),
        # What doesn't fit the model or the loss, they refuse themselves.
        "x": (None, []),
        "y": (None, []),
        "layers": (None, [5, "name", ["name"], [None], keras.layers.ReLU()]),
        "loss": (None, []),
    },
    callbacks.FisherHistory: HISTORY,
    callbacks.SecondMomentHistory: HISTORY,
    keras_adafisher.FisherHistory().select: {
        "parameter": ("kernel", [None, 5, "kernel", np.ones(3)]),
        "quantity": ("fisher", [None, 5, "loss", np.ones(3)]),
    },
    plotting.plot_histograms: {
        "histories": ((), [5, None, "history", keras_adafisher.FisherHistory]),
        # By `select`.
        "parameter": ("kernel", []),
        "quantity": ("fisher", []),
    },
    plotting.plot_bars: {
        "histories": ((), [5, None, "history", keras_adafisher.FisherHistory]),
        "parameter": ("kernel", []),
        "quantity": ("fisher", []),
        "moments": (3, COUNTS),
    },
    plotting.paper_style: {"columns": (1, [3, *COUNTS])},
    plotting.plot_gershgorin: {**SYMMETRIC_FACTOR, **TITLE, **NOISE},
    plotting.plot_spectrum: {**SYMMETRIC_FACTOR, **NOISE, **TITLE},
    plotting.plot_factors: {"factors": (None, [None, *NO_FACTORS])},
    plotting.loss_surface_trajectories: {
        "function": (lambda x, y: x + y, [None, 5, "x + y"]),
        "optimizers": ({"SGD": keras.optimizers.SGD()}, [None, {}, "sgd", []]),
        "start": (
            (1.0, 2.0),
            [None, 1.0, (1.0, 2.0, 3.0), "ab", ("a", "b"), (NAN, 0.0)],
        ),
        "steps": (1, COUNTS),
        "limits": (
            None,
            [5, (0, 1), ((0, 1), (1, 0)), ((0, NAN), (0, 1)), "abcd"],
        ),
        "resolution": (2, [1, *COUNTS]),
        "verbose": (0, [2, -1, None, "auto", 0.5]),
    },
    plotting.weight_trajectories: {
        "model": (None, [None, 5, "model", np.ones(3)]),
        "x": (None, []),
        "y": (None, []),
        "trajectories": (
            None,
            [None, 5, [], {}, {"a": 5}, {"a": []}, {"a": [5]}, {"a": [[5]]}],
        ),
        "loss": (None, []),
        "resolution": (2, [1, *COUNTS]),
        "verbose": (0, [2, -1, None, "auto", 0.5]),
    },
}


@pytest.mark.once
def test_every_argument_of_every_function_is_in_the_table():
    public = {
        function
        for module in (analysis, plotting)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name in module.__all__
    }
    assert len(public) >= 10
    assert public <= set(FUNCTIONS)
    for function, arguments in FUNCTIONS.items():
        assert list(inspect.signature(function).parameters) == list(arguments)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        # A model has variables, which are to stay as they are.
        pytest.param(
            *(function, argument),
            marks=() if "model" in arguments else pytest.mark.once,
        )
        for function, arguments in FUNCTIONS.items()
        for argument, (_, wrongs) in arguments.items()
        if wrongs
    ],
    ids=lambda value: getattr(value, "__qualname__", value),
)
def test_arguments_of_functions(function, argument):
    arguments = {n: right for n, (right, _) in FUNCTIONS[function].items()}
    if "model" in arguments:
        model = mlp()
        model.compile("sgd", loss=cross_entropy())
        snapshot = model.get_weights()
        arguments.update(
            model=model, **dict(zip("xy", data(examples=4), strict=True))
        )
        if "trajectories" in arguments:
            arguments["trajectories"] = {"a": [snapshot]}
    for wrong in FUNCTIONS[function][argument][1]:
        named = {**arguments, argument: wrong}
        # Not by name: `*histories`.
        listed = [named.pop("histories")] if "histories" in named else []
        with pytest.raises((TypeError, ValueError)) as error:
            function(*listed, **named)
        message = str(error.value)
        assert argument in message, message
        assert "Received: " in message, message
        if "model" in arguments:
            assert_same(model.get_weights(), snapshot)


def test_what_the_loss_and_the_model_refuse():
    """In their own words. The model stays as it was."""
    model = mlp()
    model.compile("sgd", loss=cross_entropy())
    before = weights(model)
    x, y = data(examples=4)
    for wrong in ((None, y), (x, None), (x[:, :5], y), (x, y[:3]), ("x", y)):
        with pytest.raises(Exception):  # noqa: B017
            analysis.kronecker_factors(model, *wrong)
    for wrong in (5, "nope", ["mse"]):
        with pytest.raises(ValueError, match="loss"):
            analysis.kronecker_factors(model, x, y, loss=wrong)
    assert_same(weights(model), before)
    assert len(model.trainable_variables) == 4
    assert analysis.kronecker_factors(model, x, y)
