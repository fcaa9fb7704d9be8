"""Quantiles and a histogram of one quantity: pure NumPy."""

import dataclasses
import math

import numpy as np

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 30

# Of parameters with more scalars, about as many are looked at: sorting all of
# them would take longer than a training step.
SAMPLE = 2**16


@dataclasses.dataclass(frozen=True)
class Record:
    """How one quantity of one parameter was distributed at one time.

    Attributes:
        epoch: Int, the epoch's number, from 0.
        step: Int, the number of the optimizer's updates until then.
        parameter: String, the parameter's path.
        quantity: String.
        quantiles: Float64 array of shape `(7,)`: the minimum, the quantiles
            at 5, 25, 50, 75 and 95 %, and the maximum.
        counts: Int array of shape `(30,)`, the histogram.
    """

    epoch: int
    step: int
    parameter: str
    quantity: str
    quantiles: np.ndarray
    counts: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        """Float64 array of shape `(31,)`, the edges of the histogram's bins.

        Where no value is negative, the edges have the same ratios: they divide
        the range from the minimum to the maximum evenly on a logarithmic
        scale. A bin that would lie below 1e-10 times the maximum reaches to
        the minimum. Where there are negative values, the bins are as wide as
        each other. If there is only one value, they reach from 1/2 below to
        1/2 above it.
        """
        return _edges(*self.quantiles[[0, -1]])


def summarize(values, epoch, step, parameter, quantity):
    """Make the `Record` of some values.

    Args:
        values: NumPy array of any shape, of float16 to float64.
        epoch, step, parameter, quantity: See `Record`.

    Returns:
        `Record`. If a value isn't finite, its quantiles are `nan` and its
        counts 0.
    """
    values = np.ravel(values)
    if values.size > SAMPLE:
        # No divisor of the size, so that it reaches all rows and columns.
        stride = math.ceil(values.size / SAMPLE)
        while math.gcd(stride, values.size) > 1:
            stride += 1
        extremes = np.min(values), np.max(values)
        values = np.append(values[::stride], extremes)
    values = values.astype("float64")
    if np.all(np.isfinite(values)):
        quantiles = np.quantile(values, QUANTILES)
        counts, _ = np.histogram(values, _edges(*quantiles[[0, -1]]))
    else:
        # Training has diverged.
        quantiles = np.full(len(QUANTILES), np.nan)
        counts = np.zeros(BINS, "int64")
    return Record(epoch, step, parameter, quantity, quantiles, counts)


def _edges(lowest, highest):
    """Edges of the bins between the smallest and the largest value."""
    if lowest < 0 or lowest == highest:
        return np.histogram_bin_edges([lowest, highest], BINS)
    edges = np.geomspace(max(lowest, 1e-10 * highest), highest, BINS + 1)
    # Exactly, and down to 0 if there are zeros.
    edges[0], edges[-1] = lowest, highest
    return edges
