"""`AdaFisherMuon`: its steps against NumPy, and all that an optimizer does."""

import functools

import keras
import numpy as np
import pytest
import reference
from keras import ops
from models import assert_close
from models import assert_same
from models import cnn
from models import cross_entropy
from models import data
from models import image_data
from models import mlp
from models import product_loss
from models import state
from models import to_numpy
from models import train
from models import weights

import keras_adafisher
from keras_adafisher import AdaFisherMuon
from keras_adafisher import backend
from keras_adafisher.optimizer import orthogonal

BACKEND = keras.backend.backend()


def linear(inputs, outputs, **kwargs):
    model = keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(outputs, use_bias=False),
        ]
    )
    model.compile(AdaFisherMuon(**kwargs), loss=product_loss)
    return model


def batches(inputs, outputs, steps, rows=4):
    """Inputs, and the gradients of the loss at the outputs."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        x = rng.normal(size=(rows, inputs)) * np.linspace(0.2, 2, inputs)
        s = rng.normal(size=(rows, outputs)) * np.linspace(1, 3, outputs)
        yield x.astype("float32"), s.astype("float32")


class LinearReference:
    """A dense layer without a bias, trained in NumPy."""

    def __init__(
        self, weight, learning_rate=0.1, interval=1, rests=1, **kwargs
    ):
        self.weight = weight.astype("float64")
        self.learning_rate, self.interval = learning_rate, interval
        self.rests = rests
        self.factors = reference.LinearFactors(*weight.shape, 0, "mean")
        rule = kwargs.pop("rule", reference.OrthogonalMomentum)
        self.momentum = rule(weight.shape, 0.9, 0.1, **kwargs)
        self.t = 0

    def train(self, x, s):
        if self.t % self.interval == 0:
            self.factors.update(x, s, 0.2, 0.2)
        self.t += 1
        gradient = x.T @ s / s.size
        if self.t % self.rests:
            self.momentum.take_in(gradient)
            return
        step = self.momentum.step(gradient, self.factors.h, self.factors.s)
        self.weight -= self.rests * self.learning_rate * step


RULES = {
    "fresh": (False, {}),
    "classical momentum": (False, {"nesterov": False}),
    "kept": (
        True,
        {"rule": functools.partial(reference.KeptRootMomentum, interval=2)},
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("inputs, outputs", [(5, 3), (3, 5), (3, 1)])
def test_the_rule(inputs, outputs, name):
    keep_roots, rule = RULES[name]
    model = linear(
        inputs,
        outputs,
        learning_rate=0.1,
        factor_damping=0.1,
        weight_decay=None,
        factor_update_steps=2,
        keep_roots=keep_roots,
        nesterov=rule.get("nesterov", True),
    )
    truth = LinearReference(weights(model)[0], interval=2, **rule)
    for x, s in batches(inputs, outputs, 6):
        model.train_on_batch(x, s)
        truth.train(x, s)
        np.testing.assert_allclose(weights(model)[0], truth.weight, atol=5e-5)


@pytest.mark.parametrize("keep_roots", [False, True])
def test_kernels_that_move_at_one_update_in_three(keep_roots):
    model = linear(
        5,
        3,
        learning_rate=0.1,
        factor_damping=0.1,
        weight_decay=None,
        factor_update_steps=2,
        keep_roots=keep_roots,
        kernel_update_steps=3,
    )
    # The factors are measured more often than kernels move, so that each root
    # is a new one.
    rule = reference.OrthogonalMomentum
    if keep_roots:
        rule = functools.partial(reference.KeptRootMomentum, interval=1)
    truth = LinearReference(weights(model)[0], interval=2, rests=3, rule=rule)
    for x, s in batches(5, 3, 9):
        model.train_on_batch(x, s)
        truth.train(x, s)
        np.testing.assert_allclose(weights(model)[0], truth.weight, atol=5e-5)


def test_all_else_moves_at_each_update():
    model = mlp()
    optimizer = AdaFisherMuon(
        weight_decay=None, adam_weight_decay=None, kernel_update_steps=3
    )
    model.compile(optimizer, loss=cross_entropy())
    moved = []
    for step in range(6):
        before = [value.copy() for value in weights(model)]
        train(model, [step])
        moved.append(
            [
                bool(np.any(old != new))
                for old, new in zip(before, weights(model), strict=True)
            ]
        )
    # A kernel and a bias of each of two layers.
    rest, move = [False, True] * 2, [True] * 4
    assert moved == [rest, rest, move] * 2


def test_when_kept_roots_are_made_anew():
    """At the first five updates, and after the measurements at 5, 10, 15.

    If kernels move then: at the updates 1, 3, 5 and so on.
    """
    model = linear(
        6, 4, factor_update_steps=5, kernel_update_steps=2, keep_roots=True
    )
    model.optimizer.build(model.trainable_variables)
    (root,) = (v for v in model.optimizer.variables if "root" in v.path)
    changes = []
    for update, (x, s) in enumerate(batches(6, 4, 16)):
        before = to_numpy(root).copy()
        model.train_on_batch(x, s)
        if np.any(to_numpy(root) != before):
            changes.append(update)
    assert changes == [1, 3, 5, 11, 15]


def test_one_parameter_of_each_kind():
    """Kernels are orthogonalized, all else takes `AdaFisher`'s own rule."""
    model = cnn()
    model.compile(AdaFisherMuon(), loss=cross_entropy())
    directions = {
        row.parameter.split("/", 1)[1]: row.direction
        for row in keras_adafisher.coverage(model).rows
    }
    assert set(directions.values()) == {"orthogonalized", "diagonal"}
    for name, direction in directions.items():
        assert (direction == "orthogonalized") == name.endswith("kernel")


def test_what_is_not_orthogonalized_is_as_adafisher_has_it():
    """A layer that is left out takes the same steps as with `AdaFisherW`."""

    def run(optimizer):
        keras.utils.set_random_seed(1)
        model = mlp()
        model.compile(optimizer, loss=cross_entropy())
        train(model, range(3))
        return weights(model)

    ours = AdaFisherMuon(0.01, adam_weight_decay=0.3, exclude_layers=["."])
    plain = keras_adafisher.AdaFisherW(0.01, weight_decay=0.3)
    assert_same(run(ours), run(plain))


def embedding(optimizer, size, rows=8):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), keras.layers.Embedding(rows, size)]
    )
    model.compile(optimizer, loss=product_loss)
    return model


@pytest.mark.parametrize(
    # Of eight, `H` is 28/15 for one id, 16/15 for two, and 4/5 for the other
    # five. So its mean over ids of a batch is 0.6 of the largest.
    ("rows", "size", "rate"),
    [
        (8, 2, 0.1),
        (8, 64, 0.1 * 0.5**0.5),
        (8, 512, 0.06),
        (512, 64, 0.1),
        (512, 100, 0.08),
    ],
)
def test_how_large_steps_of_embeddings_are(rows, size, rate):
    """Not the mean square over rows, most of which a batch doesn't use."""
    model = embedding(
        AdaFisherMuon(0.1, adam_weight_decay=None, adam_epsilon=0.0),
        size,
        rows,
    )
    (before,) = weights(model)
    ids = [3, 3, 3, 3, 0, 7]
    s = np.random.default_rng(0).normal(size=(6, size))
    model.train_on_batch(np.array([ids]), s[None].astype("float32"))
    one_hot = np.eye(rows)[ids]
    factors = reference.LinearFactors(rows, size, 0, "mean")
    factors.update(one_hot, s, 0.2, 0.2)
    fisher, _ = factors.fisher(1.0)
    quotient = one_hot.T @ s / s.size / fisher
    # An id that makes up so much of the batches counts as much.
    share = factors.h / factors.h.sum()
    rms = np.sum(share * np.mean(quotient**2, axis=1)) ** 0.5
    expected = before - np.clip(rate * quotient / rms, -0.1, 0.1)
    assert_close(weights(model), [expected], tolerance=1e-5)
    assert rms > 1.05 * np.mean(quotient**2) ** 0.5


@pytest.mark.parametrize("normalization", ["mean", "min_max"])
def test_steps_of_positions_are_as_adafisher_has_them(normalization):
    """Each row is used as often as all others. Min–Max makes zeros of that."""
    # Nothing is left of the ones that factors start with.
    settings = {
        "gamma_1": 1 - 1e-12,
        "factor_update_steps": 1,
        "normalization": normalization,
    }
    found = []
    for make in (
        functools.partial(AdaFisherMuon, adam_weight_decay=None),
        keras_adafisher.AdaFisher,
    ):
        model = embedding(make(0.1, **settings), size=48)
        for seed in range(5):
            s = np.random.default_rng(seed).normal(size=(4, 6, 48))
            ids = np.arange(24).reshape(4, 6) % 8
            model.train_on_batch(ids, s.astype("float32"))
        found.append(weights(model))
    assert_close(*found, tolerance=1e-6)


def test_kernels_and_all_else_decay_by_different_amounts():
    """Gradients of zero make steps of zero."""
    model = mlp()
    optimizer = AdaFisherMuon(
        0.5, weight_decay=0.2, adam_weight_decay=0.1, adam_lr_ratio=0.25
    )
    model.compile(optimizer, loss=cross_entropy())
    first, second = model.layers
    for layer in (first, second):
        layer.bias.assign(np.ones(layer.bias.shape))
    optimizer.exclude_from_weight_decay(var_list=[second.kernel])
    optimizer.build(model.trainable_variables)
    before = weights(model)
    variables = [*first.weights, *second.weights]
    optimizer.apply([ops.zeros(v.shape) for v in variables], variables)
    for new, old, rest in zip(
        weights(model), before, (0.9, 0.95, 1, 0.95), strict=True
    ):
        np.testing.assert_allclose(new, rest * old, rtol=1e-6)
    for decay in ("weight_decay", "adam_weight_decay"):
        setattr(optimizer, decay, None)
    before = weights(model)
    optimizer.apply([ops.zeros(v.shape) for v in variables], variables)
    assert_same(weights(model), before)


@pytest.mark.parametrize("rms_decay", [0.99, None])
def test_all_else_has_a_learning_rate_of_its_own(rms_decay):
    """Embeddings, normalizations, biases, and what has no factors."""

    def changes(learning_rate, ratio):
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((3,), dtype="int32"),
                keras.layers.Embedding(5, 4),
                keras.layers.Dense(6),
                keras.layers.LayerNormalization(),
                keras.layers.PReLU(),
            ]
        )
        model.compile(
            AdaFisherMuon(
                learning_rate,
                adam_lr_ratio=ratio,
                rms_decay=rms_decay,
                weight_decay=None,
                adam_weight_decay=None,
            ),
            loss="mse",
        )
        kernel = model.layers[1].kernel.path
        before = {v.path: to_numpy(v) for v in model.trainable_variables}
        x = np.arange(12).reshape(4, 3) % 5
        model.train_on_batch(x, np.linspace(-1, 1, 72).reshape(4, 3, 6))
        found = [
            to_numpy(v) - before[v.path] for v in model.trainable_variables
        ]
        names = [v.path for v in model.trainable_variables]
        return found.pop(names.index(kernel)), found

    kernel, others = changes(0.5, 0.25)
    same_kernel, _ = changes(0.5, 1.0)
    _, same_others = changes(0.125, 1.0)
    assert_close([kernel], [same_kernel], tolerance=1e-6)
    assert_close(others, same_others, tolerance=1e-6)


@pytest.mark.parametrize("name", ["no bias", "no kernel", "excluded"])
def test_weight_decay_where_nothing_of_one_kind_decays(name):
    layers = {
        "no bias": [keras.layers.Dense(3, use_bias=False)],
        "no kernel": [keras.layers.BatchNormalization()],
        "excluded": [keras.layers.Dense(3)],
    }
    model = keras.Sequential([keras.Input((3,)), *layers[name]])
    optimizer = AdaFisherMuon()
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, loss="mse")
    model.fit(*2 * [np.ones((4, 3), "float32")], verbose=0)
    assert np.all(np.isfinite(weights(model)[0]))


def test_layers_are_left_out_by_regular_expressions():
    model = mlp()
    first, second = (layer.kernel.path for layer in model.layers)
    model.compile(AdaFisherMuon(exclude_layers=[f"^{first}$", "nothing"]))
    directions = {
        row.parameter: row.direction
        for row in keras_adafisher.coverage(model).rows
    }
    assert directions[first] == "diagonal"
    assert directions[second] == "orthogonalized"


def test_without_whitening_it_is_muon():
    """With a damping that outweighs the factors, all of them are equal."""
    x, y = data(inputs=5, classes=3, examples=8)
    results = []
    for optimizer in (
        AdaFisherMuon(0.1, factor_damping=1e9, weight_decay=None, beta=0.95),
        keras.optimizers.Muon(
            0.1,
            rms_rate=None,
            weight_decay=None,
            adam_weight_decay=None,
            momentum=0.95,
        ),
    ):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((5,)), keras.layers.Dense(3, use_bias=False)]
        )
        model.compile(optimizer, loss=cross_entropy())
        for _ in range(5):
            model.train_on_batch(x, y)
        results.append(weights(model))
    assert_close(*results, tolerance=5e-5)


def test_the_name():
    for name in ("adafishermuon", "AdaFisherMuon"):
        assert isinstance(keras.optimizers.get(name), AdaFisherMuon)
    model = mlp()
    model.compile("adafishermuon", loss=cross_entropy())
    train(model, range(2))
    assert model.optimizer.iterations == 2


def test_the_config():
    optimizer = AdaFisherMuon(
        0.5,
        factor_damping=0.25,
        ns_steps=3,
        keep_roots=True,
        kernel_update_steps=2,
        exclude_layers=["head"],
        adam_lr_ratio=0.25,
        beta=0.5,
    )
    config = keras.optimizers.serialize(optimizer)
    copy = keras.optimizers.deserialize(config)
    assert copy.get_config() == optimizer.get_config()
    assert copy.get_config()["exclude_layers"] == ["head"]
    assert copy.get_config()["adam_lr_ratio"] == 0.25


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"factor_damping": 0}, "`factor_damping` must be a float > 0"),
        ({"adam_lr_ratio": 0}, "`adam_lr_ratio` must be "),
        ({"adam_weight_decay": -1}, "`adam_weight_decay` must be "),
        ({"ns_steps": 0}, "`ns_steps` must be an integer from 1 to 6"),
        ({"kernel_update_steps": 0}, "`kernel_update_steps` must be an int"),
        ({"ns_steps": 2.5}, "`ns_steps` must be an integer from 1 to 6"),
        ({"ns_steps": 7}, "`ns_steps` must be an integer from 1 to 6"),
        ({"keep_roots": "never"}, '`keep_roots` must be a boolean or "auto"'),
        ({"exclude_layers": "head"}, "`exclude_layers` must be a list of str"),
        ({"exclude_layers": ["("]}, "`exclude_layers` must be a list of str"),
        ({"momentum": 0.95}, "Did you mean `beta`"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaFisherMuon(**arguments)


def test_there_is_no_published_method_of_it():
    with pytest.raises(NotImplementedError, match="no orthogonalized steps"):
        AdaFisherMuon.as_published()


def test_what_is_left_out_is_the_same_in_a_loaded_model(tmp_path):
    """Keras drops the model's name from the paths of one that is loaded."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, name="stem"),
            keras.layers.Dense(3, name="head"),
        ],
        name="net",
    )
    model.compile(AdaFisherMuon(exclude_layers=["^stem/"]), cross_entropy())
    train(model, range(2))

    def directions(model):
        return [row.direction for row in keras_adafisher.coverage(model).rows]

    before = directions(model)
    assert before[::2] == ["diagonal", "orthogonalized"]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert directions(loaded) == before
    assert loaded.optimizer.iterations == 2
    # As it was.
    loaded.optimizer.exclude_layers = ("^stem/",)


def test_what_is_decided_when_it_is_built():
    model = mlp()
    model.compile(AdaFisherMuon(), loss=cross_entropy())
    train(model, range(1))
    for name, value in {"keep_roots": True, "exclude_layers": ["a"]}.items():
        with pytest.raises(ValueError, match=f"`{name}` decides which variab"):
            setattr(model.optimizer, name, value)


def test_an_orthogonalized_kernel_has_no_rate_for_each_entry():
    model = mlp()
    model.compile(AdaFisherMuon(), loss=cross_entropy())
    train(model, range(1))
    layer = model.layers[0]
    rate = to_numpy(model.optimizer.effective_learning_rate(layer.bias))
    assert rate.shape == (5,)
    model.optimizer.adam_lr_ratio = 0.25
    found = to_numpy(model.optimizer.effective_learning_rate(layer.bias))
    assert_close([found], [rate / 4], tolerance=1e-6)
    with pytest.raises(
        ValueError, match="steps of this one are orthogonalized"
    ):
        model.optimizer.effective_learning_rate(layer.kernel)
    # The factors are there.
    assert model.optimizer.preconditioner(layer.kernel).shape == (6, 5)


SETTINGS = {
    "fresh": {"keep_roots": False},
    "resting": {"kernel_update_steps": 3},
    "resting, kept": {
        "keep_roots": True,
        "factor_update_steps": 4,
        "kernel_update_steps": 3,
        "gradient_accumulation_steps": 2,
    },
    "kept": {"keep_roots": True, "factor_update_steps": 3},
    "kept, not scaled": {
        "keep_roots": True,
        "factor_update_steps": 3,
        "rms_decay": None,
    },
    "accumulation": {"gradient_accumulation_steps": 2, "keep_roots": True},
    "clipping": {"global_clipnorm": 0.1},
    "average": {"use_ema": True, "ema_momentum": 0.5},
    "scaled loss": {"loss_scale_factor": 1024.0, "keep_roots": True},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.CosineDecay(0.02, 30)
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_with_each_setting(name):
    keras.utils.set_random_seed(0)
    model = cnn()
    model.compile(AdaFisherMuon(**SETTINGS[name]), loss=cross_entropy())
    x, y = image_data()
    losses = model.fit(x, y, 16, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.all(np.isfinite(v)) for v in state(model))


@pytest.mark.parametrize("name", ["kept", "accumulation", "resting, kept"])
@pytest.mark.parametrize("steps", [2, 5])
def test_resuming_is_as_if_there_had_been_no_interruption(
    name, steps, tmp_path
):
    def fresh():
        keras.utils.set_random_seed(0)
        model = mlp()
        model.compile(AdaFisherMuon(**SETTINGS[name]), loss=cross_entropy())
        return model

    model = fresh()
    train(model, range(steps))
    model.save(tmp_path / "model.keras")
    train(model, range(steps, 10))
    resumed = keras.models.load_model(tmp_path / "model.keras")
    train(resumed, range(steps, 10))
    assert_same(state(resumed), state(model))


def test_kernels_of_equal_sides_share_their_products():
    """The roots of all of them are in one variable."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(4),
            keras.layers.Dense(6),
            keras.layers.Dense(4),
        ]
    )
    model.compile(AdaFisherMuon(keep_roots=True), loss="mse")
    model.train_on_batch(np.ones((2, 6)), np.ones((2, 4)))
    roots = {
        v.name: tuple(v.shape)
        for v in model.optimizer.variables
        if "root" in v.name
    }
    assert roots == {"root_4": (3, 4, 4)}


@pytest.mark.parametrize("inputs, outputs", [(8, 5), (5, 8), (6, 9)])
def test_blocks_of_a_kept_root(inputs, outputs, monkeypatch):
    """Each block along the smaller side takes a root of its own."""
    monkeypatch.setattr(orthogonal, "LARGEST_BLOCK", 3)
    is_tall = inputs > outputs
    side = min(inputs, outputs)
    block = -(-side // -(-side // 3))
    axis = 1 if is_tall else 0

    class Blocks(reference.KeptRootMomentum):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.parts = [
                reference.KeptRootMomentum(*args, interval=2)
                for _ in range(-(-side // block))
            ]

        def orthogonalized(self, x):
            found = []
            for number, part in enumerate(self.parts):
                cut = np.take(
                    x,
                    range(number * block, min((number + 1) * block, side)),
                    axis=axis,
                )
                missing = block - cut.shape[axis]
                padding = [(0, 0), (0, 0)]
                padding[axis] = (0, missing)
                step = part.orthogonalized(np.pad(cut, padding))
                found.append(np.take(step, range(cut.shape[axis]), axis=axis))
            return np.concatenate(found, axis=axis)

    model = linear(
        inputs,
        outputs,
        learning_rate=0.1,
        factor_damping=0.1,
        weight_decay=None,
        factor_update_steps=2,
        keep_roots=True,
    )
    truth = LinearReference(weights(model)[0], interval=2, rule=Blocks)
    for x, s in batches(inputs, outputs, 5):
        model.train_on_batch(x, s)
        truth.train(x, s)
        np.testing.assert_allclose(weights(model)[0], truth.weight, atol=2e-4)


def test_batches_of_limited_size(monkeypatch):
    """They change nothing but the memory that is taken.

    An accelerator has others. But roots are state, which it shares with a CPU.
    """

    def run(keep_roots):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                *(keras.layers.Dense(size) for size in (6, 9, 6, 6)),
            ]
        )
        optimizer = AdaFisherMuon(keep_roots=keep_roots)
        model.compile(optimizer, loss="mse")
        model.fit(np.ones((4, 6)), np.eye(4, 6), epochs=3, verbose=0)
        return weights(model), [v.shape for v in optimizer.variables]

    together = [run(keep_roots)[0] for keep_roots in (False, True)]
    monkeypatch.setattr(orthogonal, "LARGEST_BATCH", 100)
    fresh, kept = run(False), run(True)
    assert_close(fresh[0], together[0], 1e-5)
    assert_close(kept[0], together[1], 1e-5)
    monkeypatch.setattr(orthogonal, "LARGEST_BATCH_ON_ACCELERATOR", 150)
    monkeypatch.setattr(backend, "has_accelerator", lambda: True)
    there = run(False), run(True)
    assert_close(there[0][0], together[0], 1e-5)
    assert_close(there[1][0], together[1], 1e-5)
    assert there[0][1] == fresh[1]
    assert there[1][1] == kept[1]


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="TensorFlow crashes at a product with an empty matrix",
)
@pytest.mark.parametrize("make", [AdaFisherMuon, keras_adafisher.AdaFisher])
@pytest.mark.filterwarnings("error:AdaFisher")
def test_a_kernel_without_entries(make):
    """Of a group of features that is empty, for instance."""
    inputs = keras.Input((6,)), keras.Input((0,))
    h = [keras.layers.Dense(4)(x) for x in inputs]
    outputs = keras.layers.Dense(2)(keras.layers.Concatenate()(h))
    model = keras.Model(inputs, outputs)
    model.compile(make(), loss="mse")
    before = model.get_weights()
    x = np.ones((8, 6), "float32"), np.ones((8, 0), "float32")
    model.fit(x, np.eye(8, 2), epochs=2, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert not old.size or np.any(new != old)


def test_without_a_root_a_kernel_moves_along_its_momentum():
    model = linear(4, 3, keep_roots=True, weight_decay=None)
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    # No step at which roots are made.
    optimizer.iterations.assign(1001)
    (kernel,) = weights(model)
    x, s = next(batches(4, 3, 1))
    model.train_on_batch(x, s)
    change = kernel - weights(model)[0]
    direction = x.T @ s
    expected = 0.01 * 3**0.5 * direction / np.linalg.norm(direction)
    np.testing.assert_allclose(change, expected, rtol=1e-4)


def test_its_state_is_no_larger_than_adams():
    """One momentum, and a root of the smaller side at most."""
    model = keras.Sequential(
        [keras.Input((32,)), keras.layers.Dense(32), keras.layers.Dense(8)]
    )
    sizes = {}
    for make in (keras.optimizers.Adam, lambda: AdaFisherMuon(keep_roots=True)):
        model.compile(make(), loss="mse")
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
        sizes[optimizer.name.split("_")[0]] = sum(
            np.prod(v.shape, dtype=int) for v in optimizer.variables
        )
    assert sizes["adafishermuon"] <= sizes["adam"]


def test_kernels_without_gradients_in_some_updates():
    """Of two heads that are trained in turn, one would never move."""
    keras.utils.set_random_seed(0)
    model = mlp()
    optimizer = AdaFisherMuon(kernel_update_steps=2)
    keras_adafisher.wrap(model)
    optimizer.build(model.trainable_variables)
    gradients = [ops.ones(v.shape) for v in model.trainable_variables]
    gradients[0] = None
    first = model.layers[0].kernel
    with pytest.warns(UserWarning, match=f"{first.path} had no gradient"):
        optimizer.apply(gradients, model.trainable_variables)


def test_a_kernel_without_a_gradient_stays():
    inputs = keras.Input((6,))
    used, unused = keras.layers.Dense(3), keras.layers.Dense(3)
    model = keras.Model(inputs, [used(inputs), unused(inputs)])
    optimizer = AdaFisherMuon(keep_roots=True, weight_decay=None)
    model.compile(optimizer, loss=[cross_entropy(), None])
    before = weights(model)
    x, y = data(examples=8)
    for _ in range(3):
        model.train_on_batch(x, [y, y])
    np.testing.assert_array_equal(weights(model)[2], before[2])
    assert not np.array_equal(weights(model)[0], before[0])


@pytest.mark.parametrize("keep_roots", [True, False])
def test_a_gradient_of_zeros_moves_nothing(keep_roots):
    model = linear(4, 3, keep_roots=keep_roots, weight_decay=None)
    before = weights(model)
    for _ in range(3):
        model.train_on_batch(np.ones((2, 4)), np.zeros((2, 3)))
    assert_same(weights(model), before)


@pytest.mark.parametrize("keep_roots", [True, False])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_no_step_is_larger_than_the_learning_rate_allows(keep_roots, scale):
    """Whatever comes: a semi-orthogonal step, whitened by factors above 0."""
    model = linear(4, 3, keep_roots=keep_roots, weight_decay=None)
    optimizer = model.optimizer
    rng = np.random.default_rng(0)
    for step in range(15):
        before = weights(model)[0]
        s = rng.normal(size=(2, 3)) * scale ** (step % 3 - 1)
        model.train_on_batch(rng.normal(size=(2, 4)), s)
        change = weights(model)[0] - before
        assert np.all(np.isfinite(change))
        # `(H + damping) / mean` isn't below a 1 / (1 + 1 / damping).
        largest = 3**0.5 * (1 + 1 / optimizer.factor_damping)
        rate = float(to_numpy(optimizer.learning_rate))
        assert np.linalg.norm(change) <= 1.3 * rate * largest


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16"])
def test_half_precision(dtype):
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = mlp()
    finally:
        keras.config.set_dtype_policy(policy)
    model.compile(AdaFisherMuon(keep_roots=True), loss=cross_entropy())
    x, y = data()
    losses = model.fit(x, y, 16, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(np.all(np.isfinite(w.astype("float32"))) for w in weights(model))


@pytest.mark.parametrize("name", ["kept", "kept, not scaled", "resting, kept"])
@pytest.mark.parametrize("scope", ["layer", "step"])
def test_one_decision_for_a_step_or_for_each_layer(scope, name):
    def run(scope):
        keras.utils.set_random_seed(0)
        keras_adafisher.set_decision_scope(scope)
        try:
            model = mlp()
            model.compile(AdaFisherMuon(**SETTINGS[name]), cross_entropy())
            train(model, range(14))
        finally:
            keras_adafisher.set_decision_scope("auto")
        return weights(model)

    assert_close(run(scope), run("layer"), tolerance=2e-6)


@pytest.mark.parametrize("interval", [1, 3])
def test_how_many_steps_measure_something(interval):
    """Roots of kernels that rest at some updates add none."""
    model = mlp()
    optimizer = AdaFisherMuon(
        factor_update_steps=5, kernel_update_steps=interval, keep_roots=True
    )
    model.compile(optimizer, loss=cross_entropy())
    optimizer.build(model.trainable_variables)
    measuring = []
    for update in range(20):
        optimizer.iterations.assign(update)
        if optimizer.measures_anything():
            measuring.append(update)
    assert measuring == [0, 1, 2, 3, 4, 5, 10, 15]


def test_layers_of_all_kinds():
    inputs = keras.Input((8, 8, 4))
    h = keras.layers.Conv2D(6, 3, groups=2, activation="tanh")(inputs)
    h = keras.layers.DepthwiseConv2D(3)(h)
    h = keras.layers.Conv2DTranspose(4, 2)(h)
    h = keras.layers.Reshape((25, 4))(h)
    h = keras.layers.MultiHeadAttention(2, 3)(h, h)
    h = keras.layers.GRU(5)(h)
    model = keras.Model(inputs, keras.layers.Dense(3)(h))
    model.compile(AdaFisherMuon(), loss=cross_entropy())
    kept = {
        row.parameter.split("/")[0]: row.direction
        for row in keras_adafisher.coverage(model).rows
        if row.parameter.endswith("kernel")
    }
    names = {name.rstrip("_0123456789") for name in kept}
    assert names == {
        *("conv2d", "depthwise_conv2d", "conv2d_transpose", "gru", "dense"),
        "multi_head_attention",
    }
    for name, direction in kept.items():
        assert (direction == "diagonal") == name.startswith("depthwise")
    x = np.random.default_rng(0).normal(size=(12, 8, 8, 4)).astype("float32")
    y = np.arange(12) % 3
    losses = model.fit(x, y, 6, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_a_custom_loop():
    model = mlp()
    optimizer = AdaFisherMuon(weight_decay=None, keep_roots=True)
    keras_adafisher.wrap(model)
    optimizer.build(model.trainable_variables)
    gradients = [ops.ones(v.shape) for v in model.trainable_variables]
    before = weights(model)
    optimizer.apply(gradients, model.trainable_variables)
    for old, new in zip(before, weights(model), strict=True):
        assert np.all(new < old)
