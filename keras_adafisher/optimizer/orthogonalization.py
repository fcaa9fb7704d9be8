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

import collections
import itertools

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


def whitenings(factors, damping):
    """`whitening` of many factors, those of equal lengths at once.

    Args:
        factors: List of tensors of shape `(maps, entries)`.
        damping: Float.

    Returns:
        List of tensors like them.
    """
    places = collections.defaultdict(list)
    for place, factor in enumerate(factors):
        places[factor.shape[1]].append(place)
    found = [None] * len(factors)
    for equal in places.values():
        parts = [factors[place] for place in equal]
        together = whitening(concatenated(parts), damping)
        parts = _split(together, [part.shape[0] for part in parts])
        for place, part in zip(equal, parts, strict=True):
            found[place] = part
    return found


def without_units(matrices):
    """Divide matrices by their largest entries.

    Squares of large and small entries have no room in single precision.

    Args:
        matrices: Tensor of shape `(count, m, n)`.

    Returns:
        A tensor like it. Entries that are too small to be divided by are zeros.
    """
    largest = ops.max(ops.abs(matrices), axis=(-2, -1), keepdims=True)
    is_zero = largest < _TINY
    return matrices * ops.where(
        is_zero, 0.0, 1 / ops.where(is_zero, 1, largest)
    )


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
    """A stack of matrices `X = r M c / |r M c|`.

    Args:
        matrices: Float tensor of shape `(count, m, n)`, `M`, from
            `without_units`.
        rows: Tensor of shape `(count, m, 1)`, `r`, of positive entries.
        columns: Tensor of shape `(count, 1, n)`, `c`, likewise.
    """

    def __init__(self, matrices, rows, columns):
        self.count, m, n = matrices.shape
        self._is_tall = m > n
        self._side, self._length = sorted((m, n))
        self._scales = rows * columns
        # `X`, but for its norm: dividing all of it would be one pass more.
        self._x = matrices * self._scales
        self._squares = _squares(self._x)
        self._norm = ops.sqrt(ops.maximum(self._squares, _TINY))

    def gram(self):
        """The Gram matrices of the smaller side.

        Returns:
            Tensor of shape `(count, side, side)`, of traces 1, or of zeros for
            zeros.
        """
        gram = self._gram_of(self._x, precise_matmul)
        return gram / ops.maximum(self._squares, _TINY)

    def is_usable(self):
        """Whether there is a root of each matrix: it is finite, and not zero.

        Returns:
            Boolean tensor of shape `(count, 1, 1)`.
        """
        squares = self._squares
        return ops.logical_and(squares > _TINY, ops.isfinite(squares))

    def is_iterated(self, steps):
        """Whether Muon's iteration is done as it stands, without roots.

        It takes two products with `X` and one of the smaller side for each
        polynomial. A root takes four of the smaller side for each polynomial,
        less three, and two products with `X` in all. So it is the root where
        `X` is long, and the iteration where it is nearly square.
        """
        length = self._length / self._side
        return backend.has_accelerator() or (
            steps * (2 * length + 1) < 4 * steps - 3 + 2 * length
        )

    def iterated(self, steps):
        """The step of Muon's iteration `X <- (a + b X Xᵀ + c (X Xᵀ)²) X`.

        In half precision where a device has units for it, which is many times
        as fast. There a root is no choice: a Gram matrix that is iterated on
        isn't positive any more after a few steps, and what is negative grows.

        Args:
            steps: Int, how many polynomials.

        Returns:
            Tensor of shape `(count, m, n)`: `r O c`.
        """
        x = self._x / self._norm
        matmul = precise_matmul
        if backend.has_accelerator():
            x = ops.cast(x, "bfloat16")
            matmul = ops.matmul
        for _ in range(steps):
            x = self._times(_polynomial(self._gram_of(x, matmul)), x, matmul)
        return ops.cast(x, self._x.dtype) * self._scales

    def along(self, root):
        """The step of a root of the Gram matrices.

        Args:
            root: Tensor of shape `(count, side, side)`.

        Returns:
            Tensor of shape `(count, m, n)`: `r O c`.
        """
        return self._orthogonal(root) * self._scales

    def along_kept(self, root):
        """The step of a root that was kept, of other matrices.

        Args:
            root: Tensor of shape `(count, side, side)`.

        Returns:
            Tensor of shape `(count, m, n)`: `r O c`, where `O` has a Frobenius
            norm of `sqrt(side)` at most, as a semi-orthogonal matrix has it.
        """
        o = self._orthogonal(root)
        bound = ops.sqrt(self._side / ops.maximum(_squares(o), self._side))
        return o * (self._scales * bound)

    def _orthogonal(self, root):
        return self._times(root / self._norm, self._x, precise_matmul)

    def _gram_of(self, x, matmul):
        transposed = ops.swapaxes(x, -1, -2)
        return matmul(transposed, x) if self._is_tall else matmul(x, transposed)

    def _times(self, small, x, matmul):
        return matmul(x, small) if self._is_tall else matmul(small, x)


def fresh_steps(stacks, steps):
    """The steps of matrices whose smaller sides are equally long.

    Roots are worked out together, however long the other sides are: many small
    products at once take less than one by one, and compile once.

    Args:
        stacks: List of `Whitened`.
        steps: Int, how many polynomials.

    Returns:
        List of a tensor of shape `(count, m, n)` for each: `r O c`, where the
        singular values of `O` are between 0.7 and 1.2 but for those that are
        less than about `1 / 3.4445^steps` in `X`.
    """
    grams = [x.gram() for x in stacks if not x.is_iterated(steps)]
    roots = []
    if grams:
        roots = inverse_root(concatenated(grams), steps)
        roots = _split(roots, [gram.shape[0] for gram in grams])
    return [
        x.iterated(steps) if x.is_iterated(steps) else x.along(roots.pop(0))
        for x in stacks
    ]


def new_roots(stacks, steps, old):
    """Inverse roots, damped, to be kept.

    Args:
        stacks: List of `Whitened` whose smaller sides are equally long.
        steps: Int, how many polynomials.
        old: Tensor of shape `(count, side, side)`, what stays for zeros and
            for what isn't finite.

    Returns:
        A tensor like `old`, with the roots of all stacks.
    """
    grams = concatenated([x.gram() for x in stacks])
    side = grams.shape[-1]
    damped = grams + ROOT_DAMPING / side * ops.eye(side, dtype=grams.dtype)
    is_usable = concatenated([x.is_usable() for x in stacks])
    return ops.where(is_usable, inverse_root(damped, steps), old)


def steps_along(stacks, roots):
    """The steps of matrices along roots that `new_roots` made.

    Args:
        stacks: List of `Whitened`, as many and as large as those were.
        roots: Tensor of shape `(count, side, side)`.

    Returns:
        List as that of `fresh_steps`.
    """
    roots = _split(roots, [x.count for x in stacks])
    return [x.along_kept(root) for x, root in zip(stacks, roots, strict=True)]


def concatenated(tensors):
    """`keras.ops.concatenate`, of one tensor or several."""
    return tensors[0] if len(tensors) == 1 else ops.concatenate(tensors)


def _split(x, lengths):
    """Undo the concatenation of tensors of such lengths."""
    ends = itertools.accumulate(lengths)
    return [
        x[end - length : end] for end, length in zip(ends, lengths, strict=True)
    ]


def _polynomial(gram):
    a, b, c = COEFFICIENTS
    identity = ops.eye(gram.shape[-1], dtype=gram.dtype)
    return a * identity + b * gram + c * precise_matmul(gram, gram)


def _squares(matrices):
    """The squares of Frobenius norms, of shape `(count, 1, 1)`."""
    return ops.sum(ops.square(matrices), axis=(-2, -1), keepdims=True)
