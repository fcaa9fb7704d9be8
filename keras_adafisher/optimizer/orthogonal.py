"""Which kernels `AdaFisherMuon` orthogonalizes, and at what cost.

The mathematics is in `orthogonalization.py`. Here are the kernels that it is
for, as matrices of inputs by outputs; the batches of equal sizes in which they
are orthogonalized; and the inverse roots that are kept.
"""

import collections
import dataclasses
import itertools
import math

import keras
import numpy as np
from keras import ops

from keras_adafisher import backend
from keras_adafisher.optimizer.arguments import is_integer
from keras_adafisher.optimizer.orthogonalization import concatenated
from keras_adafisher.optimizer.orthogonalization import fresh_steps
from keras_adafisher.optimizer.orthogonalization import new_roots
from keras_adafisher.optimizer.orthogonalization import separated
from keras_adafisher.optimizer.orthogonalization import steps_along
from keras_adafisher.optimizer.orthogonalization import Whitened
from keras_adafisher.optimizer.orthogonalization import whitenings
from keras_adafisher.optimizer.orthogonalization import without_units
from keras_adafisher.optimizer.update_rms import are_measured

# How many rows share a kept root at most: its cost is the cube of that.
LARGEST_BLOCK = 128

# So many entries are orthogonalized together, so that what is temporary takes
# little memory where a backend makes it. An accelerator takes some time to
# start a kernel, however little it has to do: it gets more at once. What is
# temporary there is as much as Adam's second slot for 100 million weights, and
# less than activations take in most models.
LARGEST_BATCH = 2**22
LARGEST_BATCH_ON_ACCELERATOR = 2**24

# Up to this side, roots are never kept: small networks end worse with them.
SMALL_SIDE = 64

# An orthogonalization takes this share of a layer's own work at most, or its
# root is kept. Taken for granted are so many examples in a batch, and, where it
# varies or isn't known, so many steps of a recurrent layer, so long a sequence,
# and so many pixels along each side of an image.
LARGEST_SHARE = 0.5
USUAL_BATCH = 64
USUAL_STEPS = 64
USUAL_LENGTH = 256
USUAL_SIDE = 64


@dataclasses.dataclass
class Kernel:
    """A weight whose steps are orthogonalized.

    Attributes:
        variable: The weight.
        block_factors: The `BlockFactors` of its block.
        view: Its `MatrixView`.
        keeps_root: Bool, whether the root is kept for some steps.
    """

    variable: object
    block_factors: object
    view: object
    keeps_root: bool

    @property
    def sizes(self):
        """The numbers of inputs and of outputs of its matrices."""
        return self.view.size[1:]

    @property
    def blocks(self):
        """How many blocks each matrix is cut into."""
        return -(-min(self.sizes) // LARGEST_BLOCK) if self.keeps_root else 1

    @property
    def side(self):
        """The smaller side of a matrix, or of a block of it."""
        return -(-min(self.sizes) // self.blocks)

    def joined(self, steps):
        """Put the steps of its matrices together to one of its shape."""
        steps = self.view.join(steps, self.variable.shape)
        return backend.constrain_layout(steps, self.variable)


class Batch:
    """Kernels whose matrices are of the same size, all in one stack.

    Args:
        kernels: Dict from a parameter's number to its `Kernel`.
    """

    def __init__(self, kernels):
        self._kernels = kernels
        first = next(iter(kernels.values()))
        self._blocks, self._side = first.blocks, first.side
        self._inputs, self._outputs = first.sizes
        self._maps = sum(kernel.view.size[0] for kernel in kernels.values())
        self._is_tall = self._inputs > self._outputs
        # How many matrices there are, blocks counted one by one.
        self.count = self._maps * self._blocks

    @property
    def scale(self):
        """What a semi-orthogonal step is multiplied by.

        It changes the layer's outputs by as much as its inputs are large,
        whatever the numbers of both are: the spectral scale of Bernstein and
        Newhouse (2024, arXiv 2409.20325).
        """
        return max(1.0, self._outputs / self._inputs) ** 0.5

    def has_any_of(self, indices):
        """Whether one of some parameters' numbers is one of its kernels."""
        return any(index in indices for index in self._kernels)

    def whitened(self, indices, momentums_of, scales):
        """Get the `Whitened` matrices.

        Args:
            indices, momentums_of: See `OrthogonalSteps.directions`.
            scales: Dict from a parameter's number to the scales of rows and
                columns, two tensors of shape `(maps, entries)`.
        """
        known = [index for index in self._kernels if index in indices]
        momentums = dict(zip(known, momentums_of(known), strict=True))
        matrices = []
        for index, kernel in self._kernels.items():
            momentum = momentums.get(index)
            if momentum is None:
                # The gradient is missing in this step.
                momentum = ops.zeros(kernel.variable.shape)
            matrices.append(kernel.view.split(momentum))
        rows, columns = zip(*(scales[i] for i in self._kernels), strict=True)
        rows = ops.expand_dims(concatenated(rows), 2)
        columns = ops.expand_dims(concatenated(columns), 1)
        matrices = ops.cast(concatenated(matrices), rows.dtype)
        return Whitened(
            self._cut(without_units(matrices), fill=0),
            self._cut(rows, fill=1),
            self._cut(columns, fill=1),
        )

    def directions(self, steps, scale):
        """Get the direction of each kernel, by its parameter's number.

        Args:
            steps: Tensor, the steps of all matrices.
            scale: Number that they are multiplied by, beside that of `scale`.
        """
        steps = self._uncut(steps) * (self.scale * scale)
        lengths = [kernel.view.size[0] for kernel in self._kernels.values()]
        return {
            index: kernel.joined(own)
            for (index, kernel), own in zip(
                self._kernels.items(), separated(steps, lengths), strict=True
            )
        }

    def _cut(self, x, fill):
        """Cut `(maps, m, n)` into blocks along the smaller side.

        What broadcasts along that side is the same for all blocks. Where the
        side can't be cut evenly, the last block is filled up.
        """
        if self._blocks == 1:
            return x
        axis = 2 if self._is_tall else 1
        if x.shape[axis] == 1:
            return ops.repeat(x, self._blocks, axis=0)
        missing = self._blocks * self._side - x.shape[axis]
        if missing:
            padding = [(0, 0)] * 3
            padding[axis] = (0, missing)
            x = ops.pad(x, padding, constant_values=fill)
        if self._is_tall:
            x = backend.reshape(
                x, (self._maps, x.shape[1], self._blocks, self._side)
            )
            x = ops.transpose(x, (0, 2, 1, 3))
        return backend.reshape(x, (self.count, -1, x.shape[-1]))

    def _uncut(self, x):
        if self._blocks == 1:
            return x
        if self._is_tall:
            x = backend.reshape(
                x, (self._maps, self._blocks, self._inputs, self._side)
            )
            x = ops.transpose(x, (0, 2, 1, 3))
            x = backend.reshape(x, (self._maps, self._inputs, -1))
            return x[..., : self._outputs]
        x = backend.reshape(x, (self._maps, -1, self._outputs))
        return x[:, : self._inputs]


class OrthogonalSteps:
    """The directions of all kernels that are orthogonalized.

    Args:
        kernels: Dict from a parameter's number in the optimizer to its
            `Kernel`.
        settings: What has the attributes `ns_steps`, `factor_damping`,
            `factor_update_steps` and `kernel_update_steps`: the
            `AdaFisherMuon`.
        add_variable: Callable `(shape, initializer, name)`.

    Attributes:
        kernels: See above.
        roots: List of variables, the roots that are kept.
    """

    def __init__(self, kernels, settings, add_variable):
        self.kernels = kernels
        self._settings = settings
        # Dict from whether the roots are kept, their side and the number of the
        # group to the batches of it.
        self._groups = {
            key: [Batch(batch) for batch in group.values()]
            for key, group in _groups_of(kernels).items()
        }
        self._root_of = {}
        for key, batches in self._groups.items():
            keeps_root, side, _ = key
            if keeps_root:
                count = sum(batch.count for batch in batches)
                self._root_of[key] = add_variable(
                    shape=(count, side, side),
                    # Until there is one, steps go along the momentum.
                    initializer=_multiples_of_identity,
                    name=f"root_{side}",
                )
        self.roots = list(self._root_of.values())

    def moves_at(self, update):
        """Whether kernels move at an update.

        Args:
            update: Integer, a number or a tensor, counted from 0.

        Returns:
            Bool or boolean tensor.
        """
        interval = self._settings.kernel_update_steps
        return interval == 1 or (update + 1) % interval == 0

    def makes_roots_at(self, update):
        """Whether roots are made anew at an update at which kernels move.

        They are at all of the first `factor_update_steps` updates, and then if
        the factors have been measured since kernels moved last.

        Args:
            update: See `moves_at`.

        Returns:
            Bool or boolean tensor.
        """
        return are_measured(
            update,
            self._settings.factor_update_steps,
            within=self._settings.kernel_update_steps,
        )

    def resting(self, indices):
        """What `directions` returns, for an update at which kernels rest."""
        directions = {}
        for index in indices:
            variable = self.kernels[index].variable
            zeros = ops.zeros(variable.shape, "float32")
            directions[index] = backend.constrain_layout(zeros, variable)
        return directions, list(map(ops.convert_to_tensor, self.roots))

    def directions(self, indices, momentums_of, values_if_made):
        """Get what to subtract from each kernel, but for the learning rate.

        Args:
            indices: The numbers of the parameters that have a gradient.
            momentums_of: Function of a list of some of these numbers, which
                computes their momentums.
            values_if_made: Function of a list of roots' variables and a
                function without arguments that computes their new values. It
                returns them if this step is one that makes roots anew, or else
                the values that the variables have.

        Returns:
            Dict from a parameter's number to a float32 tensor of its shape, in
            the order of `indices`, and the list of the values of `roots`.
        """
        count = self._settings.ns_steps
        # As far as if kernels had moved at each update.
        interval = self._settings.kernel_update_steps
        scales = self._scales()

        def whitened(key):
            return [
                batch.whitened(indices, momentums_of, scales)
                for batch in self._groups[key]
            ]

        groups = {
            key: batches
            for key, batches in self._groups.items()
            if any(batch.has_any_of(indices) for batch in batches)
        }
        # Those with kept roots are needed twice: the condition is one for all.
        kept = {key: whitened(key) for key in groups if key in self._root_of}
        roots = {}
        if kept:
            variables = [self._root_of[key] for key in kept]
            values = values_if_made(
                variables,
                lambda: [
                    new_roots(stacks, count, ops.convert_to_tensor(old))
                    for stacks, old in zip(
                        kept.values(), variables, strict=True
                    )
                ],
            )
            roots = dict(zip(kept, values, strict=True))
        found = {}
        for key, batches in groups.items():
            if key in kept:
                steps = steps_along(kept.pop(key), roots[key])
            else:
                steps = fresh_steps(whitened(key), count)
            for batch, step in zip(batches, steps, strict=True):
                found.update(batch.directions(step, interval))
        return {index: found[index] for index in indices}, [
            roots.get(key, ops.convert_to_tensor(variable))
            for key, variable in self._root_of.items()
        ]

    def _scales(self):
        """What rows and columns of each kernel's matrices are whitened by."""
        factors = [
            kernel.block_factors.of_matrices(kernel.view)
            for kernel in self.kernels.values()
        ]
        scales = whitenings(
            list(itertools.chain(*factors)), self._settings.factor_damping
        )
        pairs = zip(scales[::2], scales[1::2], strict=True)
        return dict(zip(self.kernels, pairs, strict=True))


def _groups_of(kernels):
    """Which kernels are orthogonalized together.

    Args:
        kernels: See `OrthogonalSteps`.

    Returns:
        Dict from whether roots are kept, their side and a number to a dict from
        sizes of matrices to a dict as `kernels`.
    """
    # Roots that are kept are state, and that is the same on all devices. Of
    # others, those of equal sizes come together, and are one stack.
    largest = {True: LARGEST_BATCH, False: LARGEST_BATCH}
    if backend.has_accelerator():
        largest[False] = LARGEST_BATCH_ON_ACCELERATOR
    order = sorted(
        kernels,
        key=lambda i: () if kernels[i].keeps_root else kernels[i].sizes,
    )
    groups = collections.defaultdict(lambda: collections.defaultdict(dict))
    entries = collections.Counter()
    for index in order:
        kernel = kernels[index]
        key = kernel.keeps_root, kernel.side
        entries[key] += math.prod(kernel.view.size)
        number = entries[key] // largest[kernel.keeps_root]
        groups[*key, number][kernel.sizes][index] = kernel
    return groups


def _multiples_of_identity(shape, dtype=None):
    """Roots that leave matrices as they are, but for their norm."""
    *_, side = shape
    root = np.sqrt(side) * np.eye(side)
    return ops.convert_to_tensor(np.broadcast_to(root, shape), dtype)


def costs_little(view, positions):
    """Whether a kernel can be orthogonalized anew at each step.

    Newton–Schulz takes about `4 m² n + 30 m³` operations for an `m` by `n`
    matrix, and the layer's own forward and backward pass `6 m n` for each
    example, of which each position is one.

    Args:
        view: The kernel's `MatrixView`.
        positions: Int, how often the layer multiplies by the kernel for each
            example: once in a dense layer, once for each token in that of a
            transformer.

    Returns:
        Bool.
    """
    m, n = sorted(view.size[1:])
    own = 6 * m * n * USUAL_BATCH * positions
    is_small = m <= SMALL_SIDE
    return is_small or 4 * m**2 * n + 30 * m**3 <= LARGEST_SHARE * own


def positions_of(block, layer):
    """How often a layer multiplies by its kernel for each example.

    Args:
        block: The kernel's `Block`.
        layer: The layer.

    Returns:
        Int. For a recurrent cell, which runs once for each step of a sequence
        whose length it doesn't know, `USUAL_STEPS`. 1 for other layers of
        which it isn't known.
    """
    if block.is_estimated:
        return USUAL_STEPS
    has_shape = type(layer).compute_output_shape is not (
        keras.layers.Layer.compute_output_shape
    )
    inputs = (layer.get_build_config() or {}).get("input_shape")
    if not has_shape or not inputs:
        return 1
    shape, entries = layer.compute_output_shape(inputs), block.gradient_shape
    if not _is_shape(shape):
        # A layer with several outputs.
        return 1
    if None in shape[1:] and _is_shape(inputs) and None not in inputs[1:]:
        # `EinsumDense` forgets how long its inputs are if its `output_shape`
        # doesn't say it, as in `MultiHeadAttention`.
        shape, entries = inputs, block.activation_shape
    sizes = list(shape[1:])
    usual = USUAL_LENGTH if sizes.count(None) == 1 else USUAL_SIDE
    size = math.prod(usual if size is None else size for size in sizes)
    return max(1, size // math.prod(entries))


def _is_shape(shape):
    return all(size is None or is_integer(size) for size in shape)
