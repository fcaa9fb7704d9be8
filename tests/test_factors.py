import numpy as np
import pytest
from keras import ops
from models import to_numpy

from keras_adafisher.factors import normalization


def tensor(values):
    return ops.convert_to_tensor(np.array(values, "float32"))


def test_min_max_maps_the_range_to_zero_and_one():
    x = normalization.min_max(tensor([[3.0, 5.0], [1.0, 2.0]]))
    np.testing.assert_allclose(to_numpy(x), [[0.5, 1.0], [0.0, 0.25]])


def test_epsilon_is_added_to_the_range():
    x = normalization.min_max(tensor([1.0, 3.0]), epsilon=2.0)
    np.testing.assert_allclose(to_numpy(x), [0.0, 0.5])


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [0.0], [1e-42, 0.0]])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_a_constant_vector_normalizes_to_zeros(values, epsilon):
    x = to_numpy(normalization.min_max(tensor(values), epsilon))
    np.testing.assert_allclose(x, np.zeros(len(values)), atol=1e-30)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_without_epsilon_the_scale_does_not_matter(scale):
    x = np.array([0.1, 0.7, 0.3, 0.9])
    expected = [0.0, 0.75, 0.25, 1.0]
    actual = to_numpy(normalization.min_max(tensor(x * scale)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_running_average():
    average = normalization.running_average(
        tensor([1.0, 1.0]), tensor([0.0, 0.5]), gamma_1=0.92, gamma_2=0.008
    )
    np.testing.assert_allclose(to_numpy(average), [0.08, 0.084], rtol=1e-6)


def test_a_constant_measurement_settles_at_gamma_2_over_gamma_1():
    average = tensor([1.0])
    for _ in range(20):
        average = normalization.running_average(
            average, tensor([1.0]), 0.92, 0.008
        )
    np.testing.assert_allclose(to_numpy(average), [0.008 / 0.92], rtol=1e-5)
