"""How diagonal a matrix is: pure NumPy, for any square matrix.

The measures are those of Martins Gomes et al., ICLR 2025, arXiv 2405.16397,
Section 3.1 and Appendix A.
"""

import dataclasses
import numbers

import numpy as np
from numpy.typing import ArrayLike

_SMALLEST_RATIO = 1e-16


@dataclasses.dataclass(frozen=True)
class GershgorinDisks:
    """The disks that hold the eigenvalues of a matrix.

    Attributes:
        centres: Float64 array of shape `(n,)`, the diagonal.
        radii: Float64 array of shape `(n,)`: for each row, the sum of the
            absolute values off the diagonal.
    """

    centres: np.ndarray
    radii: np.ndarray

    @property
    def dominated_share(self) -> float:
        """Share of the disks that don't contain 0: of the rows in which the
        diagonal outweighs all other entries together.
        """
        return float(np.mean(np.abs(self.centres) > self.radii))


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a factor, and those of a perturbed one.

    Attributes:
        eigenvalues: Float64 array of shape `(n,)`, the largest first.
        perturbed: The same with noise off the diagonal.
        noise: Float, the size of the noise.
    """

    eigenvalues: np.ndarray
    perturbed: np.ndarray
    noise: float

    @property
    def largest_shift(self) -> float:
        """The largest change of an eigenvalue, relative to the largest one."""
        shift = np.max(np.abs(self.perturbed - self.eigenvalues))
        largest = np.max(np.abs(self.eigenvalues))
        return float(shift / largest) if largest else 0.0


def gershgorin(factor: ArrayLike) -> GershgorinDisks:
    """Gershgorin's disks of a square matrix.

    Each eigenvalue lies in one of them: the diagonal gives the centres, the
    sums of the other absolute values of a row its radius. If the radii are
    small, the diagonal says where the eigenvalues are. arXiv 2405.16397,
    Section 3.1.

    Args:
        factor: Array of shape `(n, n)`.

    Returns:
        `GershgorinDisks`.

    Raises:
        ValueError: `factor` is no finite square matrix.
    """
    factor = _matrix(factor)
    centres = np.diag(factor).copy()
    radii = np.sum(np.abs(factor - np.diag(centres)), axis=1)
    return GershgorinDisks(centres, radii)


def spectrum(
    factor: ArrayLike, noise: float = 0.0, seed: int | None = None
) -> Spectrum:
    """Eigenvalues of a symmetric matrix, with and without noise.

    If symmetric Gaussian noise off the diagonal hardly moves the eigenvalues,
    what is there hardly matters. arXiv 2405.16397, Section 3.1.

    Args:
        factor: Array of shape `(n, n)`, symmetric.
        noise: Float >= 0. The standard deviation of what is added to each pair
            of entries off the diagonal, in units of the mean of the diagonal:
            `S` shrinks with the batch size, and no absolute size fits both
            factors. Defaults to `0.0`.
        seed: Int or `None`, for `numpy.random.default_rng`. Defaults to
            `None`, another noise at each call.

    Returns:
        `Spectrum`.

    Raises:
        ValueError: `factor` is no finite symmetric matrix, `noise` is
            negative, or `seed` is no seed.
    """
    factor = _symmetric(factor)
    if (
        not isinstance(noise, numbers.Real)
        or isinstance(noise, bool)
        or not 0 <= noise < float("inf")
    ):
        raise ValueError(
            f"Argument `noise` must be a float >= 0. Received: noise={noise}"
        )
    try:
        rng = np.random.default_rng(seed)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Argument `seed` must be an integer >= 0 or `None`. "
            f"Received: seed={seed}"
        ) from error
    perturbation = rng.normal(size=factor.shape)
    perturbation = np.triu(perturbation, 1)
    perturbation += perturbation.T
    scale = noise * np.mean(np.diag(factor))
    return Spectrum(
        np.linalg.eigvalsh(factor)[::-1],
        np.linalg.eigvalsh(factor + scale * perturbation)[::-1],
        float(noise),
    )


def diagonal_energy(factor: ArrayLike) -> float:
    """The share of a matrix' squared Frobenius norm that the diagonal has.

    1 for a diagonal matrix, `1 / n` for one whose entries are all equal.

    Args:
        factor: Array of shape `(n, n)`.

    Returns:
        Float from 0 to 1, and `nan` for a matrix of zeros.

    Raises:
        ValueError: `factor` is no finite square matrix.
    """
    factor = _matrix(factor)
    # Scaled, since squares of small numbers underflow.
    largest = np.max(np.abs(factor))
    if largest == 0:
        return float("nan")
    squares = np.square(factor / largest)
    return float(np.trace(squares) / np.sum(squares))


def fourier_spectrum(factor: ArrayLike) -> np.ndarray:
    """The magnitude of a matrix' 2-D Fourier transform, on a log scale.

    A diagonal matrix has a constant magnitude along one diagonal direction:
    the sharper that line, the more of the matrix is near its diagonal. arXiv
    2405.16397, Appendix A.

    Args:
        factor: Array of shape `(n, n)`.

    Returns:
        Float64 array of shape `(n, n)`: the decimal logarithm of the
        magnitude, relative to the largest, so 0 at most, and -16 at least.
        The frequency zero is at `[n // 2, n // 2]`.

    Raises:
        ValueError: `factor` is no finite square matrix.
    """
    magnitude = np.abs(np.fft.fftshift(np.fft.fft2(_matrix(factor))))
    largest = magnitude.max()
    if largest:
        magnitude = magnitude / largest
    return np.log10(np.maximum(magnitude, _SMALLEST_RATIO))


def _matrix(factor):
    try:
        matrix = np.asarray(factor, "float64")
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Argument `factor` must be a matrix of numbers. "
            f"Received: factor={factor}"
        ) from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            "Argument `factor` must be a square matrix: `activation` or "
            "`gradient` of what `kronecker_factors` returns. "
            f"Received: factor of shape {np.shape(factor)}"
        )
    if not matrix.size or not np.all(np.isfinite(matrix)):
        raise ValueError(
            "Argument `factor` must have entries, and all of them finite. "
            f"Received: factor={factor}"
        )
    return matrix


def _symmetric(factor):
    matrix = _matrix(factor)
    if np.max(np.abs(matrix - matrix.T)) > 1e-4 * np.max(np.abs(matrix)):
        raise ValueError(
            "Argument `factor` must be a symmetric matrix. "
            f"Received: factor={factor}"
        )
    return (matrix + matrix.T) / 2
