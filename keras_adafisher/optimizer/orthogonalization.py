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

# In half precision, a Gram matrix that is iterated on isn't positive any more
# after some polynomials, and what is negative grows. So there is a new one
# after as many as this. What a product loses is 8 times as much in "bfloat16",
# which has three bits less for it, as in "float16".
LONGEST_STAGE = {"float16": 3, "bfloat16": 1}

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
        parts = separated(together, [part.shape[0] for part in parts])
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
    scales = 1 / backend.at_least(largest, _TINY)
    return matrices * backend.filled(scales, largest < _TINY, 0.0)


def inverse_root(gram, steps, matmul=precise_matmul):
    """About `G^(-1/2)`, by polynomials in `G`.

    Muon's iteration `X <- (a + b X Xᵀ + c (X Xᵀ)²) X` multiplies `X` by
    polynomials in `G = X Xᵀ` only. This is their product.

    Args:
        gram: Float tensor of shape `(count, m, m)`, symmetric matrices whose
            largest eigenvalues are below 1.5.
        steps: Int, how many polynomials.
        matmul: Function of two tensors.

    Returns:
        `Q`, a tensor like it: `Q X` is what Muon's iteration makes of `X`.
    """
    root = None
    for step in range(steps):
        polynomial = backend.quadratic(gram, COEFFICIENTS, matmul)
        root = polynomial if root is None else matmul(polynomial, root)
        if step + 1 < steps:
            gram = matmul(matmul(polynomial, gram), polynomial)
    return root


class Whitened:
    """A stack of matrices `X = r M c / |r M c|`.

    Args:
        matrices: Float tensor of shape `(count, m, n)`, `M`, from
            `without_units`.
        rows: Tensor of shape `(count, m, 1)`, `r`, of positive entries.
        columns: Tensor of shape `(count, 1, n)`, `c`, likewise.

    Attributes:
        count: Int.
        x: Tensor of shape `(count, m, n)`: `X`, but for its norm. Dividing all
            of it would be one pass more.
        norm: Tensor of shape `(count, 1, 1)`: what it is to be divided by.
        scales: Tensor of shape `(count, m, n)`: `r` times `c`.
    """

    def __init__(self, matrices, rows, columns):
        self.count, m, n = matrices.shape
        self._is_tall = m > n
        self._side, self._length = sorted((m, n))
        self.scales = rows * columns
        self.x = matrices * self.scales
        self._squares = _squares(self.x)
        self.norm = ops.sqrt(backend.at_least(self._squares, _TINY))

    def gram(self):
        """The Gram matrices of the smaller side.

        Returns:
            Tensor of shape `(count, side, side)`, of traces 1, or of zeros for
            zeros.
        """
        gram = self.gram_of(self.x, precise_matmul)
        return gram / backend.at_least(self._squares, _TINY)

    def is_usable(self):
        """Whether there is a root of each matrix: it is finite, and not zero.

        Returns:
            Boolean tensor of shape `(count, 1, 1)`.
        """
        squares = self._squares
        return ops.logical_and(squares > _TINY, ops.isfinite(squares))

    def products(self, stages):
        """How many products of the smaller side `iterated` takes.

        A root of `n` polynomials takes `4 n - 3`, and it takes two products
        with `X`. So there should be few roots where `X` is long. Where it is
        nearly square, one for each polynomial takes the fewest: Muon's
        iteration as it stands.
        """
        length = self._length / self._side
        return sum(2 * length + 4 * n - 3 for n in stages)

    def along(self, root):
        """The step of a root of the Gram matrices.

        Args:
            root: Tensor of shape `(count, side, side)`.

        Returns:
            Tensor of shape `(count, m, n)`: `r O c`.
        """
        return self._orthogonal(root) * self.scales

    def along_kept(self, root):
        """The step of a root that was kept, of other matrices.

        Args:
            root: Tensor of shape `(count, side, side)`.

        Returns:
            Tensor of shape `(count, m, n)`: `r O c`, where `O` has a Frobenius
            norm of `sqrt(side)` at most, as a semi-orthogonal matrix has it.
        """
        o = self._orthogonal(root)
        squares = backend.at_least(_squares(o), self._side)
        bound = ops.sqrt(self._side / squares)
        return o * (self.scales * bound)

    def _orthogonal(self, root):
        return self.times(root / self.norm, self.x, precise_matmul)

    def gram_of(self, x, matmul):
        """The Gram matrices of a tensor like `x`, of the smaller side."""
        transposed = ops.swapaxes(x, -1, -2)
        return matmul(transposed, x) if self._is_tall else matmul(x, transposed)

    def times(self, small, x, matmul):
        """Products of matrices of the smaller side and a tensor like `x`."""
        return matmul(x, small) if self._is_tall else matmul(small, x)


def iterated(stacks, stages, half=None):
    """The steps of Muon's iteration `X <- (a + b X Xᵀ + c (X Xᵀ)²) X`.

    Args:
        stacks: List of `Whitened` whose smaller sides are equally long.
        stages: List of Ints, how many polynomials at a time become one root.
        half: String, the dtype if products are in half precision.

    Returns:
        See `fresh_steps`.
    """
    xs = [stack.x / stack.norm for stack in stacks]
    matmul = precise_matmul
    if half:
        xs = [ops.cast(x, half) for x in xs]
        matmul = backend.half_matmul
    for count in stages:
        pairs = list(zip(stacks, xs, strict=True))
        grams = [stack.gram_of(x, matmul) for stack, x in pairs]
        roots = inverse_root(concatenated(grams), count, matmul)
        roots = separated(roots, [stack.count for stack in stacks])
        xs = [
            stack.times(root, x, matmul)
            for (stack, x), root in zip(pairs, roots, strict=True)
        ]
    return [
        ops.cast(x, stack.x.dtype) * stack.scales
        for stack, x in zip(stacks, xs, strict=True)
    ]


def fresh_steps(stacks, steps):
    """The steps of matrices whose smaller sides are equally long.

    In half precision where a device has units for it, which is many times as
    fast. Roots are worked out together, however long the other sides are: many
    small products at once take less than one by one, and compile once.

    Args:
        stacks: List of `Whitened`.
        steps: Int, how many polynomials.

    Returns:
        List of a tensor of shape `(count, m, n)` for each: `r O c`, where the
        singular values of `O` are between 0.7 and 1.2 but for those that are
        less than about `1 / 3.4445^steps` in `X`.
    """
    half = backend.half_precision()
    most = LONGEST_STAGE.get(half, steps)
    count = -(-steps // most)
    few = [steps // count + (i < steps % count) for i in range(count)]
    many = [1] * steps
    are_square = [x.products(many) < x.products(few) for x in stacks]
    if half:
        # With several lengths, roots for all of them at once start fewer
        # kernels, although the square ones could do with fewer products.
        return iterated(stacks, many if are_square == [True] else few, half)
    grams = [
        x.gram() for x, own in zip(stacks, are_square, strict=True) if not own
    ]
    roots = []
    if grams:
        roots = inverse_root(concatenated(grams), steps)
        roots = separated(roots, [gram.shape[0] for gram in grams])
    roots = iter(roots)
    return [
        iterated([x], many)[0] if own else x.along(next(roots))
        for x, own in zip(stacks, are_square, strict=True)
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
    roots = separated(roots, [x.count for x in stacks])
    return [x.along_kept(root) for x, root in zip(stacks, roots, strict=True)]


def concatenated(tensors):
    """`keras.ops.concatenate`, of one tensor or several."""
    return tensors[0] if len(tensors) == 1 else ops.concatenate(tensors)


def separated(x, lengths):
    """Undo the concatenation of tensors of such lengths."""
    return [x] if len(lengths) == 1 else backend.split(x, lengths)


def _squares(matrices):
    """The squares of Frobenius norms, of shape `(count, 1, 1)`."""
    return ops.sum(ops.square(matrices), axis=(-2, -1), keepdims=True)
