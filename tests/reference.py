"""The algorithm in plain NumPy, written down independently of the package.

Everything is float64 and follows the formulas of the paper (arXiv 2405.16397)
with explicit loops where the package uses an identity.
"""

import numpy as np


def min_max(x, epsilon=0.0):
    """`(x - min) / (max - min + epsilon)`, and 0 for a constant vector."""
    span = x.max() - x.min() + epsilon
    return (x - x.min()) / span if span > 0 else np.zeros_like(x)


def mean_scaled(x, epsilon=0.0):
    """`x / (mean + epsilon)`, and 0 for zeros."""
    mean = x.mean() + epsilon
    return x / mean if mean > 0 else np.zeros_like(x)


def rows(x):
    """All axes but the last, flattened."""
    return np.asarray(x, "float64").reshape(-1, np.shape(x)[-1])


def second_moment(x):
    """Mean of the squares over rows."""
    return np.mean(np.square(rows(x)), axis=0)


def padding_of(size, kernel, stride, dilation, padding):
    """Zeros before and after, and the number of outputs, along one axis."""
    reach = (kernel - 1) * dilation + 1
    if padding == "valid":
        return 0, 0, (size - reach) // stride + 1
    outputs = -(-size // stride)
    needed = max((outputs - 1) * stride + reach - size, 0)
    if padding == "causal":
        return reach - 1, 0, outputs
    return needed // 2, needed - needed // 2, outputs


def patches(x, kernel_size, strides, dilation, padding):
    """Every patch that a channels-last convolution sees, by explicit loops.

    Returns:
        Array of shape `(batch * positions, *kernel_size, channels)`.
    """
    x = np.asarray(x, "float64")
    spatial = x.shape[1:-1]
    pads, counts = [(0, 0)], []
    for axis, size in enumerate(spatial):
        before, after, outputs = padding_of(
            size, kernel_size[axis], strides[axis], dilation[axis], padding
        )
        pads.append((before, after))
        counts.append(outputs)
    x = np.pad(x, [*pads, (0, 0)])
    result = []
    for example in x:
        for position in np.ndindex(*counts):
            patch = np.zeros((*kernel_size, x.shape[-1]))
            for tap in np.ndindex(*kernel_size):
                index = tuple(
                    p * s + t * d
                    for p, s, t, d in zip(
                        position, strides, tap, dilation, strict=True
                    )
                )
                patch[tap] = example[index]
            result.append(patch)
    return np.stack(result)


class LinearFactors:
    """Factors of `z = [h, 1] W`: the activation factor has a bias entry.

    With Min–Max normalization that entry takes part in it; divided by the mean
    of the others, it counts as average.
    """

    def __init__(self, inputs, outputs, bias, normalization="min_max"):
        self.bias = bias
        self.normalization = normalization
        self.h = np.ones(inputs + bias)
        self.s = np.ones(outputs)

    def update(self, h_rows, s_rows, gamma_1, gamma_2, epsilon=0.0):
        h = np.mean(np.square(h_rows), axis=0)
        s = np.mean(np.square(s_rows), axis=0)
        if self.normalization == "mean":
            h, s = mean_scaled(h, epsilon), mean_scaled(s, epsilon)
            h = np.append(h, [1.0] * self.bias)
        else:
            h = min_max(np.append(h, [1.0] * self.bias), epsilon)
            s = min_max(s, epsilon)
        self.h = (1 - gamma_1) * self.h + gamma_2 * h
        self.s = (1 - gamma_1) * self.s + gamma_2 * s

    def fisher(self, damping):
        """Fisher diagonals `(inputs, outputs)` and `(outputs,)` or `None`."""
        fisher = np.outer(self.h, self.s) + damping
        return (fisher[:-1], fisher[-1]) if self.bias else (fisher, None)


class ScaleFactors:
    """Factors of `z = scale * x + shift`, per channel."""

    def __init__(self, channels):
        self.h_scale = np.ones(channels)
        self.h_shift = np.ones(())
        self.s = np.ones(channels)

    def update(self, h_rows, s_rows, gamma_1, gamma_2, epsilon=0.0):
        h = np.mean(np.square(h_rows), axis=0)
        s = np.mean(np.square(s_rows), axis=0)
        keep = 1 - gamma_1
        self.h_scale = keep * self.h_scale + gamma_2 * min_max(h, epsilon)
        self.h_shift = keep * self.h_shift + gamma_2 * 1.0
        self.s = keep * self.s + gamma_2 * min_max(s, epsilon)

    def fisher(self, damping):
        return self.h_scale * self.s + damping, self.h_shift * self.s + damping


class Momentum:
    """`m <- beta m + (1 - beta) g`, and the bias-corrected step `m / F`.

    Args:
        shape: Tuple.
        beta: Float.
        nesterov: Bool. Whether to look one step ahead with the same gradient.
        rms_decay: Float or `None`. If a float, the step is divided by the root
            of the running mean square of `g / F`, and its entries bounded.
        interval: Int. Mean squares are taken at each of so many first steps,
            and then at one in so many, and count until the next.
    """

    def __init__(self, shape, beta, nesterov=False, rms_decay=None, interval=1):
        self.beta, self.nesterov, self.rms_decay = beta, nesterov, rms_decay
        self.interval = interval
        self.m = np.zeros(shape)
        # For each step that a measurement so far stands for.
        self.squares = []
        self.t = 0

    def step(self, gradient, fisher):
        self.t += 1
        self.m = self.beta * self.m + (1 - self.beta) * gradient
        step = self.m / (1 - self.beta**self.t)
        if self.nesterov:
            ahead = self.beta * self.m + (1 - self.beta) * gradient
            step = ahead / (1 - self.beta ** (self.t + 1))
        step = step / fisher
        if self.rms_decay is not None:
            if len(self.squares) < self.t:
                mean_square = np.mean((gradient / fisher) ** 2)
                is_early = self.t <= self.interval
                count = 1 if is_early else self.interval
                self.squares += [mean_square] * count
            ages = np.arange(len(self.squares))[::-1]
            average = np.average(self.squares, weights=self.rms_decay**ages)
            step = np.clip(step / np.sqrt(average), -1, 1)
        return step


class AdamW:
    """The AdamW rule with Keras' placement of epsilon."""

    def __init__(self, shape, beta_1, beta_2=0.999, epsilon=1e-7):
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def step(self, gradient):
        self.t += 1
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * gradient
        self.v = self.beta_2 * self.v + (1 - self.beta_2) * gradient**2
        correction = np.sqrt(1 - self.beta_2**self.t)
        correction /= 1 - self.beta_1**self.t
        return correction * self.m / (np.sqrt(self.v) + self.epsilon)


def newton_schulz(x, steps=5):
    """What Muon's iteration makes of a matrix, by its singular values.

    An odd polynomial of a matrix leaves its singular vectors as they are.
    """
    u, sigma, vt = np.linalg.svd(np.asarray(x, "float64"), full_matrices=False)
    norm = np.sqrt(np.sum(sigma**2))
    sigma = sigma / (norm if norm > 0 else 1)
    for _ in range(steps):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return (u * sigma) @ vt


def kept_root(x, steps=5, damping=0.01):
    """The inverse root of the damped Gram matrix of a wide matrix."""
    values, vectors = np.linalg.eigh(x @ x.T / np.sum(x**2))
    sigma = np.sqrt(values + damping / len(x))
    found = sigma
    for _ in range(steps):
        found = 3.4445 * found - 4.7750 * found**3 + 2.0315 * found**5
    return (vectors * (found / sigma)) @ vectors.T


def whitening(factor, damping):
    """`D^(-1/2)`, with the damped factor divided by its mean."""
    damped = factor + damping
    return (damped / np.mean(damped)) ** -0.5


class OrthogonalMomentum:
    """The steps of `AdaFisherMuon` for one matrix of inputs by outputs."""

    def __init__(self, shape, beta, damping, nesterov=True, steps=5):
        self.beta, self.damping, self.nesterov = beta, damping, nesterov
        self.steps = steps
        self.m = np.zeros(shape)

    def take_in(self, gradient):
        self.m = self.beta * self.m + (1 - self.beta) * gradient

    def step(self, gradient, h, s):
        self.take_in(gradient)
        m = self.m
        if self.nesterov:
            m = self.beta * m + (1 - self.beta) * gradient
        h, s = whitening(h, self.damping), whitening(s, self.damping)
        scales = np.outer(h, s)
        inputs, outputs = m.shape
        size = np.sqrt(max(1, outputs / inputs))
        return size * scales * self.orthogonalized(scales * m)

    def orthogonalized(self, x):
        return newton_schulz(x, self.steps)


class KeptRootMomentum(OrthogonalMomentum):
    """The same with a root that is kept between refreshes.

    Args:
        interval: Int. The root is made anew at each of so many first steps,
            and then at one in so many.
    """

    def __init__(self, *args, interval=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.interval, self.t = interval, 0

    def orthogonalized(self, x):
        is_tall = x.shape[0] > x.shape[1]
        x = x.T if is_tall else x
        if self.t < self.interval or self.t % self.interval == 0:
            self.root = kept_root(x, self.steps)
        self.t += 1
        step = self.root @ x / np.linalg.norm(x)
        step *= min(1, np.sqrt(len(x)) / np.linalg.norm(step))
        return step.T if is_tall else step
