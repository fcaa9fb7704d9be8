"""Segments of different lengths, one after the other in a vector."""

import math

import numpy as np
from keras import ops

from keras_adafisher import backend


class Segments:
    """Means and extremes of all segments at once.

    A matrix that is filled up to the longest segment may be much larger than
    the vector. So segments are cut into chunks as long as the root of that, and
    what is found of the chunks is put together in the same way. It takes two
    steps whatever lengths there are: a compiler needs as long for a reduction
    of ten entries as for one of a million.

    Scatter operations, such as `keras.ops.segment_sum`, would need less code.
    But they take longer for the factors of a large model, Keras has none for
    minima, and on a GPU they add up in no fixed order: a run that is resumed
    would differ from one that isn't.

    Args:
        lengths: List of ints, one for each segment. There is one at least.
            The mean of a segment without entries is 0.
    """

    def __init__(self, lengths):
        self._lengths = backend.constant(np.maximum(lengths, 1), "float32")
        self._segment_of_entries = backend.constant(
            np.repeat(np.arange(len(lengths)), lengths), "int32"
        )
        chunk = math.isqrt(max(lengths)) + 1
        counts = [_count(length, chunk) for length in lengths]
        self._stages = [_cut(lengths, chunk), _cut(counts, max(counts))]

    def mean(self, vector):
        """The mean of each segment.

        Args:
            vector: Float tensor of one axis, of all segments' entries.

        Returns:
            Tensor with an entry for each segment.
        """
        for index, is_entry in self._stages:
            vector = ops.sum(backend.take(vector, index) * is_entry, axis=1)
        return vector / self._lengths

    def mean_min_max(self, vector):
        """The mean, the minimum and the maximum of each segment.

        Args:
            vector: See `mean`.

        Returns:
            Three tensors with an entry for each segment.
        """
        (index, is_entry), (chunks, is_chunk) = self._stages
        x = backend.take(vector, index)
        found = backend.sum_min_max(x * is_entry, x, x)
        total, low, high = (backend.take(values, chunks) for values in found)
        total, low, high = backend.sum_min_max(total * is_chunk, low, high)
        return total / self._lengths, low, high

    def statistics(self, vector, names):
        """What a normalization has to know of each segment.

        Args:
            vector: See `mean`.
            names: Tuple of strings, `Normalization.statistics`.

        Returns:
            Dict with the "mean" and, if one of them is among the names, "low"
            and "high", tensors with an entry for each segment.
        """
        if set(names) <= {"mean"}:
            return {"mean": self.mean(vector)}
        found = self.mean_min_max(vector)
        return dict(zip(("mean", "low", "high"), found, strict=True))

    def to_entries(self, values):
        """Repeat what belongs to a segment for each of its entries.

        Args:
            values: Tensor with an entry for each segment.

        Returns:
            Tensor of the size of a vector of all segments.
        """
        return backend.take(values, self._segment_of_entries)


def _count(length, width):
    """How many chunks of a width a segment is cut into, one at least."""
    return max(-(-length // width), 1)


def _cut(lengths, width):
    """Cut segments into chunks of one width, which the last ones don't fill.

    Args:
        lengths: List of the segments' lengths.
        width: Int.

    Returns:
        Where the entries of each chunk are in the vector, the last of a segment
        repeated, and 0 for repetitions, 1 for others.
    """
    index, is_entry = [], []
    start = 0
    for length in lengths:
        places = np.arange(_count(length, width) * width).reshape(-1, width)
        index.append(np.maximum(start + np.minimum(places, length - 1), 0))
        is_entry.append(places < length)
        start += length
    return (
        backend.constant(np.concatenate(index), "int32"),
        backend.constant(np.concatenate(is_entry), "float32"),
    )
