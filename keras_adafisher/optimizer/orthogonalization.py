"""Orthogonalization of whitened momentums, as pure functions of tensors.

With the momentum `M` of a kernel, a matrix of inputs by outputs, and the scales
`r` of its rows and `c` of its columns, the step of `AdaFisherMuon` is

    X = r M c / |r M c|        whiten, and divide by the Frobenius norm
    O = (X Xᵀ)^(-1/2) X        orthogonalize
    step = r O c               back to the coordinates of the weight

With `r = H^(-1/2)` and `c = S^(-1/2)`, it is the steepest descent in the
spectral norm of the coordinates in which the Kronecker-factored Fisher
information is the identity. With ones, it is Muon's step (Jordan, 2024; Liu et
al., 2025, arXiv 2502.16982). The combination is ours.

The inverse root is a polynomial in the Gram matrix `X Xᵀ`: that of Muon's
Newton–Schulz iteration. It is worked out on the smaller side. For a tall `X`,
which has fewer columns than rows, it is `O = X (Xᵀ X)^(-1/2)`.

Nothing in this file knows about layers, variables or optimizers.
"""

from keras import ops

from keras_adafisher import backend
from keras_adafisher.backend import precise_matmul

# Of the quintic polynomial that Muon iterates: a x + b x³ + c x⁵. It is steep
# at zero, and takes what is between 0 and 1 to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# What is added to the Gram matrix of a root that is kept, times its mean
# eigenvalue. In directions in which the momentum was small, that of a later
# step may be large.
ROOT_DAMPING = 0.01

_TINY = 1e-30


def whitening(factor, damping):
    """What a momentum is multiplied by along one side: `D^(-1/2)`.

    Args:
        factor: Tensor of shape `(maps, entries)`, `H` or `S`.
        damping: Float.

    Returns:
        A tensor like it. `D` is the factor plus `damping`, divided by its mean,
        so that neither the scale of the factor nor `damping` changes the size
        of a step. A factor of equal entries gives ones.
    """
    damped = factor + damping
    return ops.rsqrt(damped / ops.mean(damped, axis=-1, keepdims=True))


def inverse_root(gram, steps):
    """About `G^(-1/2)`, by polynomials in `G`.

    Muon's iteration `X <- (a + b X Xᵀ + c (X Xᵀ)²) X` multiplies `X` by
    polynomials in `G = X Xᵀ` only. This is their product.

    Args:
        gram: Float tensor of shape `(..., m, m)`, symmetric, of trace 1.
        steps: Int, how many polynomials.

    Returns:
        `Q`, a tensor like it: `Q X` is what Muon's iteration makes of `X`.
    """
    root = None
    for step in range(steps):
        polynomial = _polynomial(gram)
        root = polynomial if root is None else precise_matmul(polynomial, root)
        if step + 1 < steps:
            gram = precise_matmul(precise_matmul(polynomial, gram), polynomial)
    return root


class Whitened:
    """Matrices `X = r M c / |r M c|`.

    What takes time is to pass over `M`, so `X` itself isn't made: the scales of
    the smaller side are put off until they meet the Gram matrix and its root.

    Args:
        matrices: Float tensor of shape `(count, m, n)`, `M`.
        rows: Tensor of shape `(count, m, 1)`, `r`, of positive entries.
        columns: Tensor of shape `(count, 1, n)`, `c`, likewise.
    """

    def __init__(self, matrices, rows, columns):
        *_, m, n = matrices.shape
        self._is_tall = m > n
        self._matrices = matrices
        self._rows, self._columns = rows, columns
        self._small = columns if self._is_tall else rows
        large = rows if self._is_tall else columns
        self._side = min(m, n)
        # Squares of large and small entries have no room in single precision.
        largest = ops.max(ops.abs(matrices), axis=(-2, -1), keepdims=True)
        is_zero = largest < _TINY
        self._unit = ops.where(is_zero, 0.0, 1 / ops.where(is_zero, 1, largest))
        self._scaled = matrices * (ops.square(large) * self._unit)

    def gram(self):
        """The Gram matrices of the smaller side, and the squares of norms.

        Returns:
            Tensor of shape `(count, side, side)`, of traces 1, or of zeros for
            zeros, and one of shape `(count, 1, 1)`.
        """
        first, second = self._matrices, self._scaled
        if self._is_tall:
            gram = precise_matmul(ops.swapaxes(first, -1, -2), second)
        else:
            gram = precise_matmul(first, ops.swapaxes(second, -1, -2))
        gram = gram * self._unit * self._by_small()
        squares = ops.trace(gram, axis1=-2, axis2=-1)[..., None, None]
        return gram / ops.maximum(squares, _TINY), squares

    def new_root(self, steps, old):
        """The inverse root, damped, to be kept.

        Args:
            steps: Int, how many polynomials.
            old: Tensor of shape `(count, side, side)`, what stays for zeros and
                for what isn't finite.

        Returns:
            A tensor like `old`.
        """
        gram, squares = self.gram()
        floor = ROOT_DAMPING / self._side
        damped = gram + floor * ops.eye(self._side, dtype=gram.dtype)
        is_usable = ops.logical_and(squares > _TINY, ops.isfinite(squares))
        return ops.where(is_usable, inverse_root(damped, steps), old)

    def step(self, steps):
        """The step whose root is of these matrices themselves.

        Args:
            steps: Int, how many polynomials.

        Returns:
            Tensor of shape `(count, m, n)`: `r O c`, where the singular values
            of `O` are between 0.7 and 1.2 but for those that are less than
            about `1 / 3.4445^steps` in `X`.
        """
        if backend.has_accelerator():
            return self._step_in_half_precision(steps)
        gram, squares = self.gram()
        return self._times(inverse_root(gram, steps), squares)

    def step_along(self, root):
        """The step of a root that was kept.

        Args:
            root: Tensor of shape `(count, side, side)`.

        Returns:
            Tensor of shape `(count, m, n)`: `r O c`, where `O` has a Frobenius
            norm of `sqrt(side)` at most, as a semi-orthogonal matrix has it.
        """
        step = self._times(root, _squares(self._whole()))
        squares = _squares(step / (self._rows * self._columns))
        return step * ops.sqrt(self._side / ops.maximum(squares, self._side))

    def _whole(self):
        """`X`, but for its norm: a pass over all of it."""
        return self._matrices * self._unit * self._rows * self._columns

    def _by_small(self):
        """What a matrix of the smaller side is whitened by, on both sides."""
        small = self._small
        return small * ops.swapaxes(small, -1, -2)

    def _times(self, root, squares):
        """`r Q X c` or, for tall matrices, `r X Q c`."""
        norm = ops.sqrt(ops.maximum(squares, _TINY))
        root = root * (self._by_small() / norm)
        if self._is_tall:
            return precise_matmul(self._scaled, root)
        return precise_matmul(root, self._scaled)

    def _step_in_half_precision(self, steps):
        """Many times as fast where a device has units for it.

        In half precision, a Gram matrix that is iterated on isn't positive any
        more after a few steps, and what is negative grows. So each polynomial
        begins with a new one.
        """
        x = self._whole()
        norm = ops.sqrt(ops.maximum(_squares(x), _TINY))
        x = ops.cast(x / norm, "bfloat16")
        for _ in range(steps):
            transposed = ops.swapaxes(x, -1, -2)
            if self._is_tall:
                x = ops.matmul(x, _polynomial(ops.matmul(transposed, x)))
            else:
                x = ops.matmul(_polynomial(ops.matmul(x, transposed)), x)
        o = ops.cast(x, self._matrices.dtype)
        return o * self._rows * self._columns


def _polynomial(gram):
    a, b, c = COEFFICIENTS
    identity = ops.eye(gram.shape[-1], dtype=gram.dtype)
    return a * identity + b * gram + c * precise_matmul(gram, gram)


def _squares(matrices):
    """The squares of Frobenius norms, of shape `(count, 1, 1)`."""
    return ops.sum(ops.square(matrices), axis=(-2, -1), keepdims=True)
