"""How measurements of many blocks enter the vector of factors."""

import types

import keras
import numpy as np
import pytest
import reference
from keras import ops
from models import probes_in
from models import to_numpy

import keras_adafisher
from keras_adafisher import backend
from keras_adafisher.factors.block_factors import FisherDiagonal
from keras_adafisher.factors.store import FactorStore
from keras_adafisher.probe import BackendProbe
from keras_adafisher.wrappers import Block

GAMMA_1, GAMMA_2 = 0.3, 0.2


class Map(Block):
    """A block of which only shapes and how to normalize are asked for."""

    def __init__(self, h, s, weight=None, bias=True, joins=True, scale=1):
        if weight is None:
            weight = keras.Variable(np.zeros(1, "float32"))
        super().__init__(weight, keras.Variable(0.0) if bias else None)
        self.activation_shape, self.gradient_shape = h, s
        self.normalizes_bias_input, self.epsilon_scale = joins, scale


class OwnBiasMap(Map):
    """The gradient at the bias has a shape of its own."""

    bias_gradient_shape = (2,)

    def split_gradient(self, statistic):
        return statistic[:3], statistic[3:]


def probe(block):
    return BackendProbe(block, host=types.SimpleNamespace(trainable=True))


def make(blocks, normalization="min_max", accumulates=False):
    """`FactorStore`, with random values, of some blocks."""

    def add_variable(shape, layout, **kwargs):
        assert layout is None
        return keras.Variable(
            shape=shape,
            initializer=kwargs.pop("initializer"),
            dtype=kwargs.pop("dtype"),
        )

    factors = FactorStore(
        [probe(block) for block in blocks],
        normalization,
        accumulates,
        add_variable,
    )
    rng = np.random.default_rng(1)
    factors.vector.assign(rng.uniform(size=factors.vector.shape))
    return factors


def measure(factors, rng, calls, scale=1.0):
    """Answers of all probes, and the means that they are the sums of."""
    answers, means = {}, []
    for of_block, count in zip(factors.block_factors, calls, strict=True):
        _, inputs, *outputs = of_block.probe.sizes
        means.append(
            [
                rng.gamma(2.0, size=size) * (count > 0)
                for size in (inputs, sum(outputs))
            ]
        )
        h, s = means[-1]
        answers[id(of_block.probe)] = answer(
            count, count * h, count * scale**2 * s
        )
    return answers, means


def answer(*parts):
    """What a probe's gradient is: see `probe/probe.py`."""
    parts = [np.ravel(part) for part in parts]
    vector = 2.0**-40 * np.concatenate(parts)
    return ops.convert_to_tensor(vector.astype("float32"))


def take_in(factors, answers, scale=1.0, epsilon=0.0):
    """Set the factors to what `updated` returns."""
    assign(
        factors,
        factors.updated(
            factors.join(answers), scale, epsilon, GAMMA_1, GAMMA_2
        ),
    )


def assign(factors, values):
    for variable, value in zip(factors.variables[:2], values, strict=True):
        variable.assign(value)


def state(factors):
    return [
        {
            name: to_numpy(of_block.factor(name))
            for name in of_block.places
            if name != "bias_input" or of_block.block.bias is not None
        }
        for of_block in factors.block_factors
    ]


def expected(old, block, means, normalization="min_max", epsilon=0.0):
    """A block's new factors, by NumPy."""
    normalize = {
        "min_max": reference.min_max,
        "mean": reference.mean_scaled,
    }[normalization]
    h, s = means
    s, own = block.split_gradient(s)
    of_h = epsilon * block.epsilon_scale
    new = {"gradient": normalize(s, epsilon)}
    if block.bias is not None:
        if normalization == "min_max" and block.normalizes_bias_input:
            entries = normalize(np.append(h, 1.0), of_h)
            new["activation"], new["bias_input"] = entries[:-1], entries[-1]
        else:
            new["activation"], new["bias_input"] = normalize(h, of_h), 1.0
        if own is not None:
            new["bias_gradient"] = normalize(own, epsilon)
    else:
        new["activation"] = normalize(h, of_h)
    return {
        name: (1 - GAMMA_1) * old[name]
        + GAMMA_2 * np.reshape(new[name], old[name].shape)
        for name in old
    }


def assert_state(factors, wanted):
    for actual, block in zip(state(factors), wanted, strict=True):
        assert actual.keys() == block.keys()
        for name, value in block.items():
            np.testing.assert_allclose(
                actual[name], value, rtol=1e-5, atol=1e-6, err_msg=name
            )


@pytest.mark.parametrize("normalization", ["mean", "min_max"])
@pytest.mark.parametrize(("epsilon", "scale"), [(0.0, 1.0), (0.5, 4.0)])
def test_each_block_is_normalized_on_its_own(
    rng, normalization, epsilon, scale
):
    # Many lengths, shapes and kinds, some of which are the same.
    blocks = [
        Map((6, 1), (1, 6)),
        Map((5,), (2, 3)),
        Map((2, 3), (6,), bias=False, scale=9),
        Map((6,), (6,), joins=False),
        Map((4,), (1,)),
        Map((), ()),
        Map((1, 1), (1, 4), scale=3),
        OwnBiasMap((6,), (3,)),
    ]
    factors = make(blocks, normalization)
    before = state(factors)
    answers, means = measure(factors, rng, [1, 3, 2, 1, 1, 2, 1, 2], scale)
    take_in(factors, answers, scale, epsilon)
    assert_state(
        factors,
        [
            expected(old, block, mean, normalization, epsilon)
            for old, block, mean in zip(before, blocks, means, strict=True)
        ],
    )


@pytest.mark.parametrize(
    ("values", "new", "new_one"),
    [
        # 1 is the largest entry, lies between the others, is the smallest.
        ([0.0, 0.5], [0.0, 0.5], 1.0),
        ([0.0, 4.0], [0.0, 1.0], 0.25),
        ([3.0, 5.0], [0.5, 1.0], 0.0),
        # All entries are 1.
        ([1.0, 1.0], [0.0, 0.0], 0.0),
    ],
)
@pytest.mark.parametrize("copies", [1, 3])
def test_the_entry_of_the_bias_takes_part(values, new, new_one, copies):
    factors = make([Map((2,), (1,)) for _ in range(copies)])
    answers = {
        id(of_block.probe): answer(1.0, values, 1.0)
        for of_block in factors.block_factors
    }
    total = factors.join(answers)
    assign(factors, factors.updated(total, 1.0, 0.0, 0.0, 1.0))
    before = make([Map((2,), (1,)) for _ in range(copies)])
    for old, of_block in zip(
        before.block_factors, factors.block_factors, strict=True
    ):
        np.testing.assert_allclose(
            to_numpy(of_block.activation) - to_numpy(old.activation),
            new,
            atol=1e-6,
        )
        np.testing.assert_allclose(
            to_numpy(of_block.bias_input) - to_numpy(old.bias_input),
            new_one,
            atol=1e-6,
        )


@pytest.mark.parametrize("normalization", ["mean", "min_max"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-3])
@pytest.mark.parametrize("broken", ["activation", "gradient"])
def test_a_block_is_taken_in_whole_or_not_at_all(
    rng, broken, bad, normalization
):
    blocks = [Map((3,), (5,)) for _ in range(3)]
    factors = make(blocks, normalization)
    before = state(factors)
    answers, means = measure(factors, rng, [1, 1, 1])
    # One entry of one of the second block's vectors.
    of_block = dict(zip(("activation", "gradient"), means[1], strict=True))
    of_block[broken] = np.array(of_block[broken])
    of_block[broken][1] = bad
    answers[id(factors.block_factors[1].probe)] = answer(1, *of_block.values())
    take_in(factors, answers)
    wanted = [
        expected(old, block, mean, normalization)
        for old, block, mean in zip(before, blocks, means, strict=True)
    ]
    wanted[1] = before[1]
    assert_state(factors, wanted)
    # What was taken in, and what was dropped.
    np.testing.assert_array_equal(to_numpy(factors.records), [1, 0, 1, 0, 1, 0])


def test_unused_blocks_keep_their_factors(rng):
    shared = keras.Variable(np.zeros(1, "float32"))
    blocks = [
        Map((3,), (2,), bias=False),
        # Not called, but its weight was used in the other way of the two: it
        # measured zeros.
        Map((3,), (2,), shared, bias=False),
        Map((3,), (2,), shared, bias=False),
        # Its layer isn't there in this step.
        Map((4,), (2,)),
    ]
    factors = make(blocks)
    before = state(factors)
    answers, means = measure(factors, rng, [0, 0, 2, 1])
    del answers[id(factors.block_factors[3].probe)]
    take_in(factors, answers)
    assert_state(
        factors,
        [
            before[0],
            expected(before[1], blocks[1], means[1]),
            expected(before[2], blocks[2], means[2]),
            before[3],
        ],
    )


def test_answers_add_up_until_the_last_one(rng):
    factors = make([Map((3,), (2,)), Map((2,), (4,))], accumulates=True)
    first, second = (
        factors.join(measure(factors, rng, [1, 2])[0]) for _ in range(2)
    )
    total, rest = factors.add(first, False)
    np.testing.assert_array_equal(to_numpy(total), to_numpy(first))
    factors.variables[2].assign(rest)
    total, rest = factors.add(second, True)
    np.testing.assert_allclose(
        to_numpy(total), to_numpy(first) + to_numpy(second), rtol=1e-6
    )
    assert not np.any(to_numpy(rest))


def test_an_estimate_changes_the_factors_of_its_block_only(rng):
    weight = keras.Variable(np.zeros((3, 2), "float32"))
    blocks = [Map((4,), (2,)), Map((3, 1), (1, 2), weight), Map((3,), (2,))]
    factors = make(blocks, "mean")
    before = state(factors)
    h, s = rng.normal(size=(3, 1)), rng.normal(size=(1, 2))
    gradient = ops.convert_to_tensor((h * s).astype("float32"))
    of_block = factors.block_factors[1]

    def take_in(gradient):
        estimates = factors.join_estimates({id(of_block): gradient})
        assign(factors, factors.updated(estimates, 1.0, 0.0, GAMMA_1, GAMMA_2))

    take_in(gradient)
    after = expected(before[1], blocks[1], (h**2, s**2), "mean")
    assert_state(factors, [before[0], after, before[2]])
    # The gradient of a weight that isn't used.
    take_in(gradient * 0)
    assert_state(factors, [before[0], after, before[2]])


LAYERS = {
    "Dense": (lambda: keras.layers.Dense(3), (4,)),
    "EinsumDense": (
        lambda: keras.layers.EinsumDense("abc,cde->abde", (None, 3, 2)),
        (5, 4),
    ),
    "Embedding": (lambda: keras.layers.Embedding(7, 3), (4,)),
    "Conv2D": (lambda: keras.layers.Conv2D(4, 3), (6, 6, 2)),
    "Conv2D, groups": (lambda: keras.layers.Conv2D(6, 3, groups=2), (6, 6, 4)),
    "Conv1DTranspose": (lambda: keras.layers.Conv1DTranspose(4, 3), (6, 2)),
    "DepthwiseConv1D": (lambda: keras.layers.DepthwiseConv1D(3), (6, 2)),
    "LayerNormalization": (lambda: keras.layers.LayerNormalization(), (5,)),
    "GRU": (lambda: keras.layers.GRU(3), (5, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_slices_of_a_fisher_diagonal(name):
    """All slices, one by one, are the whole."""
    make_layer, shape = LAYERS[name]
    model = keras.Sequential([keras.Input(shape), make_layer()])
    keras_adafisher.wrap(model)
    (layer,) = model.layers
    weight = layer.trainable_variables[0]
    blocks = [found.block for found in probes_in(layer)]
    factors = make(blocks, normalization="mean")
    fisher = FisherDiagonal(factors.vector)
    for of_block in factors.block_factors:
        for parameter, *term in of_block.terms():
            if parameter is weight:
                fisher.add(*term)
    assert fisher.takes_slices
    whole = ops.broadcast_to(fisher(), weight.shape)
    for size in (1, 2):
        parts = []
        for start in range(0, weight.shape[0], size):
            part = whole[start : start + size]
            rows = fisher(slice(start, start + size))
            parts.append(ops.broadcast_to(rows, part.shape))
        np.testing.assert_array_equal(
            to_numpy(ops.concatenate(parts)), to_numpy(whole)
        )


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_part_of_a_vector(platform, monkeypatch):
    """JAX reads it in another way on an accelerator."""
    if keras.backend.backend() == "jax":
        monkeypatch.setattr("jax.default_backend", lambda: platform)
    vector = ops.arange(7, dtype="float32")
    for start, size in ((0, 7), (2, 3), (6, 1), (0, 1)):
        np.testing.assert_array_equal(
            to_numpy(backend.part(vector, start, size)),
            np.arange(start, start + size),
        )
