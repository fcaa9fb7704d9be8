import numpy as np
import pytest
import reference
from keras import ops
from models import to_numpy

from keras_adafisher import factors


def tensor(values):
    return ops.convert_to_tensor(np.array(values, "float32"))


def test_min_max_maps_the_range_to_zero_and_one():
    x = factors.min_max(tensor([[3.0, 5.0], [1.0, 2.0]]))
    np.testing.assert_allclose(to_numpy(x), [[0.5, 1.0], [0.0, 0.25]])


def test_epsilon_is_added_to_the_range():
    x = factors.min_max(tensor([1.0, 3.0]), epsilon=2.0)
    np.testing.assert_allclose(to_numpy(x), [0.0, 0.5])


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [0.0], [1e-42, 0.0]])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_a_constant_vector_normalizes_to_zeros(values, epsilon):
    x = to_numpy(factors.min_max(tensor(values), epsilon))
    np.testing.assert_allclose(x, np.zeros(len(values)), atol=1e-30)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_without_epsilon_the_scale_does_not_matter(scale):
    x = np.array([0.1, 0.7, 0.3, 0.9])
    expected = [0.0, 0.75, 0.25, 1.0]
    actual = to_numpy(factors.min_max(tensor(x * scale)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "expected", "expected_one"),
    [
        # 1 is the largest entry, lies between the others, is the smallest.
        ([0.0, 0.5], [0.0, 0.5], 1.0),
        ([0.0, 4.0], [0.0, 1.0], 0.25),
        ([3.0, 5.0], [0.5, 1.0], 0.0),
        # All entries are 1.
        ([1.0, 1.0], [0.0, 0.0], 0.0),
    ],
)
def test_the_entry_of_the_bias_takes_part(values, expected, expected_one):
    x, one = factors.min_max_with_one(tensor(values))
    np.testing.assert_allclose(to_numpy(x), expected)
    np.testing.assert_allclose(to_numpy(one), expected_one)


def test_min_max_with_one_is_min_max_of_the_longer_vector(rng):
    x = rng.gamma(2.0, size=9)
    expected = reference.min_max(np.append(x, 1.0), 1e-3)
    actual, one = factors.min_max_with_one(tensor(x), 1e-3)
    np.testing.assert_allclose(to_numpy(actual), expected[:-1], rtol=1e-5)
    np.testing.assert_allclose(to_numpy(one), expected[-1], rtol=1e-5)


def test_running_average():
    average = factors.running_average(
        tensor([1.0, 1.0]), tensor([0.0, 0.5]), gamma_1=0.92, gamma_2=0.008
    )
    np.testing.assert_allclose(to_numpy(average), [0.08, 0.084], rtol=1e-6)


def test_a_constant_measurement_settles_at_gamma_2_over_gamma_1():
    average = tensor([1.0])
    for _ in range(20):
        average = factors.running_average(average, tensor([1.0]), 0.92, 0.008)
    np.testing.assert_allclose(to_numpy(average), [0.008 / 0.92], rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, -2.0], True), ([1.0, np.nan], False), ([np.inf, 1.0], False)],
)
def test_is_finite_looks_at_every_entry(values, expected):
    finite = factors.is_finite(tensor([0.0]), tensor(values))
    assert bool(to_numpy(finite)) is expected
