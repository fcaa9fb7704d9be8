"""Segments of different lengths, next to NumPy's answer one by one."""

import numpy as np
import pytest
from keras import ops
from models import to_numpy

from keras_adafisher import backend
from keras_adafisher.factors.segments import Segments

LENGTHS = {
    "one": [1],
    "equal": [4, 4, 4],
    "mixed": [3, 1, 17, 2, 16, 1, 15, 9],
    "one long": [1, 1000, 2],
}


def segments_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.random(length).astype("float32") + 0.5 for length in lengths]


def assert_found(found, segments):
    for tensor, function in zip(found, (np.mean, np.min, np.max), strict=False):
        expected = [function(segment) for segment in segments]
        rtol = 1e-6 if function is np.mean else 0
        np.testing.assert_allclose(to_numpy(tensor), expected, rtol=rtol)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_means_and_extremes(lengths):
    segments = segments_of(lengths)
    vector = ops.convert_to_tensor(np.concatenate(segments))
    assert_found([Segments(lengths).mean(vector)], segments)
    assert_found(Segments(lengths).mean_min_max(vector), segments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_segment(bad):
    segments = segments_of([3, 5, 2])
    # The last entry of a segment is what a chunk is filled up with.
    for place in (2, 4):
        segments[1][place] = bad
        vector = ops.convert_to_tensor(np.concatenate(segments))
        mean = to_numpy(Segments([3, 5, 2]).mean(vector))
        assert not np.isfinite(mean[1])
        mean, low, high = map(
            to_numpy, Segments([3, 5, 2]).mean_min_max(vector)
        )
        assert not np.isfinite(mean[1])
        for found in (mean, low, high):
            assert np.isfinite(found[[0, 2]]).all()
        segments[1][place] = 1.0


def test_values_of_segments_are_repeated():
    values = ops.convert_to_tensor(np.array([5.0, 6.0, 7.0], "float32"))
    found = to_numpy(Segments([2, 1, 3]).to_entries(values))
    np.testing.assert_array_equal(found, [5, 5, 6, 7, 7, 7])


@pytest.mark.parametrize("longest", [100, 10_000, 1_000_000])
def test_filling_up_takes_little_memory(longest):
    lengths = [longest, *[1] * 50, *[30] * 10]
    entries = sum(
        int(np.prod(index.shape)) for index, _ in Segments(lengths)._stages
    )
    # All entries, less than one chunk more for each segment, and as many chunks
    # of each segment as the longest has. A matrix would have 61 times the
    # longest.
    assert entries <= sum(lengths) + 61 * 2 * (longest**0.5 + 1)


def test_a_row_without_entries_leaves_the_others():
    segments = segments_of([3, 0, 5])
    vector = ops.convert_to_tensor(np.concatenate(segments))
    found = Segments([3, 0, 5]).mean_min_max(vector)
    assert_found([tensor[:1] for tensor in found], segments[:1])
    assert_found([tensor[2:] for tensor in found], segments[2:])
    # Nothing was measured that isn't finite.
    assert to_numpy(found[0])[1] == 0


@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
def test_backend_sums_and_extremes(bad):
    x, low, high = np.random.default_rng(0).random((3, 4, 5)).astype("float32")
    if bad is not None:
        x[1, 2] = low[1, 2] = high[1, 2] = bad
    found = backend.sum_min_max(*map(ops.convert_to_tensor, (x, low, high)))
    total, *extremes = map(to_numpy, found)
    np.testing.assert_allclose(total, x.sum(1), rtol=1e-6)
    np.testing.assert_array_equal(extremes[0], low.min(1))
    np.testing.assert_array_equal(extremes[1], high.max(1))
