"""The algorithm as pure functions of tensors.

AdaFisher (Martins Gomes et al., ICLR 2025, arXiv 2405.16397) approximates the
Fisher information of a linear map by the Kronecker product of two vectors and
divides the momentum by it:

    theta -= learning_rate * m / (H * S + damping)

`H` holds one number per input coordinate (the Kronecker factor of the
activations), `S` one per output coordinate (the Kronecker factor of the
pre-activation gradients). Nothing in this file knows about layers, variables
or backends.
"""

import collections.abc
import dataclasses

from keras import ops

# Below the smallest normal float32, devices differ in what a quotient is.
_SMALLEST_NORMAL = 1.1754944e-38


def min_max(x, epsilon=0.0, low=None, high=None):
    """Min–Max normalization of all entries of a tensor.

    `x' = (x - low) / (high - low + epsilon)`; arXiv 2405.16397, Section 3.2.

    A bias is the weight of an input that is always 1, so the activation
    factor of a linear map with a bias has one more entry, which takes part in
    the normalization: `low` and `high` are then those of all entries.

    Args:
        x: Float tensor of any shape.
        epsilon: Float. Added to the range. With 0 the result doesn't depend
            on the scale of `x`.
        low: Tensor that broadcasts to `x`, the value that maps to 0.
            Defaults to the minimum of `x`.
        high: Tensor that broadcasts to `x`, the value that maps to 1 (for
            `epsilon=0`). Defaults to the maximum of `x`.

    Returns:
        A tensor like `x`. A range of zero (a constant `x`) gives zeros.
    """
    low = ops.min(x) if low is None else low
    high = ops.max(x) if high is None else high
    span = high - low + epsilon
    span = ops.where(span > _SMALLEST_NORMAL, span, ops.ones_like(span))
    return (x - low) / span


def mean_scaled(x, epsilon=0.0, mean=None):
    """Divide all entries of a tensor by their mean.

    `x' = x / (mean + epsilon)`. Where Min–Max normalization says how an entry
    compares with the smallest and the largest, this keeps how many times larger
    one is than another, and one outlier doesn't squeeze all others together.
    Ours.

    Args:
        x: Float tensor of any shape, of entries that aren't negative.
        epsilon: Float. Added to the mean. With 0 the result doesn't depend
            on the scale of `x`.
        mean: Tensor that broadcasts to `x`. Defaults to the mean of `x`.

    Returns:
        A tensor like `x`. Zeros give zeros.
    """
    mean = ops.mean(x) if mean is None else mean
    if not isinstance(epsilon, float) or epsilon:
        mean = mean + epsilon
    mean = ops.where(mean > _SMALLEST_NORMAL, mean, ops.ones_like(mean))
    return x / mean


@dataclasses.dataclass(frozen=True)
class Normalization:
    """One way to normalize what is measured.

    Attributes:
        function: Callable `(x, epsilon, *statistics)`, see `min_max`.
        statistics: Tuple of the names of what it has to know of all entries
            that are normalized together: "mean", "low" and "high".
        joins_bias_input: Bool, whether the input that is always 1 is
            normalized together with the others. It is 1 after it otherwise.
    """

    function: collections.abc.Callable
    statistics: tuple
    joins_bias_input: bool


# What the argument `normalization` may be.
NORMALIZATIONS = {
    "mean": Normalization(mean_scaled, ("mean",), joins_bias_input=False),
    "min_max": Normalization(min_max, ("low", "high"), joins_bias_input=True),
}


def running_average(average, value, gamma_1, gamma_2):
    """`(1 - gamma_1) * average + gamma_2 * value`.

    arXiv 2405.16397, Section 3.2. The weights needn't add up to one: a
    constant `value` settles at `gamma_2 / gamma_1 * value`.

    Args:
        average: Float tensor.
        value: Float tensor like `average`.
        gamma_1: Float, the share of the old average that is dropped.
        gamma_2: Float, the weight of the new value.

    Returns:
        A tensor like `average`.
    """
    return (1.0 - gamma_1) * average + gamma_2 * value
