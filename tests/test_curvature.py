"""How measurements of many blocks enter the running factors."""

import keras
import numpy as np
import pytest
import reference
from keras import ops
from models import to_numpy

from keras_adafisher.curvature import Measurement
from keras_adafisher.curvature import take_in

GAMMA_1, GAMMA_2 = 0.3, 0.2


def tensor(x):
    return ops.convert_to_tensor(np.asarray(x, "float32"))


def measurement(rng, shape, calls=1, bias=True, uses=None, **kwargs):
    """A `Measurement`, and the mean that it is the sum of."""
    mean = rng.gamma(2.0, size=shape)
    scale = kwargs.get("scale", 1.0)
    return Measurement(
        keras.Variable(rng.uniform(size=shape).astype("float32")),
        tensor(mean * calls * scale),
        tensor(calls),
        tensor(calls if uses is None else uses),
        one=keras.Variable(np.float32(rng.uniform())) if bias else None,
        **kwargs,
    ), mean


def expected(row, mean):
    """The new values of `variable` and `one`, by NumPy."""
    if row.normalizes_one:
        *new, one = reference.min_max(np.append(mean, 1.0), row.epsilon)
    else:
        new, one = reference.min_max(mean.ravel(), row.epsilon), 1.0
    pairs = [(row.variable, np.reshape(new, mean.shape)), (row.one, one)]
    return [
        (1 - GAMMA_1) * to_numpy(variable) + GAMMA_2 * value
        for variable, value in pairs
        if variable is not None
    ]


def actual(row, values):
    return [
        to_numpy(values[id(variable)])
        for variable in (row.variable, row.one)
        if variable is not None
    ]


def assert_close(row, values, wanted):
    for value, number in zip(actual(row, values), wanted, strict=True):
        assert value.shape == np.shape(number)
        np.testing.assert_allclose(value, number, rtol=1e-5, atol=1e-6)


def test_each_row_is_normalized_on_its_own(rng):
    one = {"normalizes_one": True}
    # Many lengths, shapes and kinds, some of which have the same.
    rows = [
        measurement(rng, (6, 1), **one),
        measurement(rng, (6,), calls=3, **one),
        measurement(rng, (2, 3), bias=False),
        measurement(rng, (6,), bias=False, calls=2),
        measurement(rng, (6,), bias=False, scale=16.0),
        measurement(rng, (6,), bias=False, epsilon=0.5),
        measurement(rng, (6,), epsilon=0.5, **one),
        measurement(rng, (6,)),
        measurement(rng, (4,)),
        measurement(rng, ()),
        measurement(rng, (1, 1), **one),
        measurement(rng, (1,), calls=2, **one),
    ]
    values = take_in([[row] for row, _ in rows], GAMMA_1, GAMMA_2)
    for row, mean in rows:
        assert_close(row, values, expected(row, mean))


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
    rows = [
        Measurement(
            keras.Variable(np.zeros(2, "float32")),
            tensor(values),
            tensor(1),
            tensor(1),
            one=keras.Variable(np.float32(0.0)),
            normalizes_one=True,
        )
        for _ in range(copies)
    ]
    result = take_in([[row] for row in rows], 0.0, 1.0)
    for row in rows:
        assert_close(row, result, [new, new_one])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_is_taken_in_whole_or_not_at_all(rng, bad):
    blocks = [
        [measurement(rng, (3,)), measurement(rng, (5,), bias=False)]
        for _ in range(3)
    ]
    # One entry of the second block's second vector.
    broken = blocks[1][1][0]
    broken.total = tensor([1.0, 2.0, bad, 3.0, 4.0])
    values = take_in(
        [[row for row, _ in block] for block in blocks], GAMMA_1, GAMMA_2
    )
    for number, block in enumerate(blocks):
        for row, mean in block:
            variables = [v for v in (row.variable, row.one) if v is not None]
            old = [to_numpy(variable) for variable in variables]
            wanted = old if number == 1 else expected(row, mean)
            assert_close(row, values, wanted)


def test_unused_blocks_keep_their_factors(rng):
    unused, _ = measurement(rng, (3,), calls=0)
    # Not called, but its weight was used in another way: it measured zeros.
    other, _ = measurement(rng, (3,), calls=0, uses=2)
    used, mean = measurement(rng, (3,), calls=2)
    values = take_in([[unused], [other], [used]], GAMMA_1, GAMMA_2)
    old = [to_numpy(unused.variable), to_numpy(unused.one)]
    assert_close(unused, values, old)
    assert_close(other, values, expected(other, np.zeros(3)))
    assert_close(used, values, expected(used, mean))
