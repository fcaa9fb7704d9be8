"""Which kernels `AdaFisherMuon` orthogonalizes, and at what cost.

The mathematics is in `orthogonalization.py`. Here are the kernels that it is
for, as matrices of inputs by outputs; the batches of equal sizes in which they
are orthogonalized; and the inverse roots that are kept.
"""

import collections
import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_adafisher import backend
from keras_adafisher.optimizer.arguments import is_integer
from keras_adafisher.optimizer.orthogonalization import Whitened
from keras_adafisher.optimizer.orthogonalization import whitening

# How many rows share a kept root at most: its cost is the cube of that.
LARGEST_BLOCK = 128

# So many entries are orthogonalized together, so that what is temporary takes
# little memory where a backend makes it.
LARGEST_BATCH = 2**22

# Up to this side, roots are never kept: small networks end worse with them.
SMALL_SIDE = 64

# An orthogonalization takes this share of a layer's own work at most, or its
# root is kept. Taken for granted are so many examples in a batch, and positions
# on an axis whose length varies.
LARGEST_SHARE = 0.5
USUAL_BATCH = 64
USUAL_LENGTH = 64


@dataclasses.dataclass
class Kernel:
    """A weight whose steps are orthogonalized.

    Attributes:
        variable: The weight.
        curvature: The `BlockFactors` of its block.
        view: Its `MatrixView`.
        keeps_root: Bool, whether the root is kept for some steps.
    """

    variable: object
    curvature: object
    view: object
    keeps_root: bool

    @property
    def sizes(self):
        """The number of matrices, and of their rows and columns.

        Those of a kept root are cut into blocks along the smaller side.
        """
        maps, inputs, outputs = self.view.size
        block = -(-min(inputs, outputs) // self.blocks)
        if inputs > outputs:
            return maps * self.blocks, inputs, block
        return maps * self.blocks, block, outputs

    @property
    def blocks(self):
        """How many blocks each matrix is cut into."""
        side = min(self.view.size[1:])
        return -(-side // LARGEST_BLOCK) if self.keeps_root else 1

    @property
    def scale(self):
        """What a semi-orthogonal step is multiplied by.

        It changes the layer's outputs by as much as its inputs are large,
        whatever the numbers of both are: the spectral scale of Bernstein and
        Newhouse (2024, arXiv 2409.20325).
        """
        _, inputs, outputs = self.view.size
        return max(1.0, outputs / inputs) ** 0.5

    def whitened(self, momentum, damping):
        """Get the parts of `Whitened`.

        Args:
            momentum: Tensor of the weight's shape.
            damping: Float, `factor_damping`.

        Returns:
            Three float32 tensors, of matrices and of the scales of their rows
            and columns.
        """
        factors = self.view.split_factors(
            self.curvature.activation, self.curvature.gradient
        )
        rows, columns = (whitening(factor, damping) for factor in factors)
        rows = ops.expand_dims(rows, 2)
        columns = ops.expand_dims(columns, 1)
        matrices = ops.cast(self.view.split(momentum), rows.dtype)
        return [
            self._cut(matrices, fill=0),
            self._cut(rows, fill=1),
            self._cut(columns, fill=1),
        ]

    def joined(self, steps):
        """Put steps for the matrices together to one of the weight's shape."""
        steps = self._uncut(steps) * self.scale
        steps = self.view.join(steps, self.variable.shape)
        return backend.keep_layout(steps, self.variable)

    def _cut(self, x, fill):
        """Cut `(maps, m, n)` into blocks along the smaller side.

        What broadcasts along that side is the same for all blocks. Where the
        side can't be cut evenly, the last block is filled up.
        """
        if self.blocks == 1:
            return x
        maps, *_ = x.shape
        count, *sizes = self.sizes
        _, inputs, outputs = self.view.size
        axis = 2 if inputs > outputs else 1
        if x.shape[axis] == 1:
            return ops.repeat(x, self.blocks, axis=0)
        missing = self.blocks * sizes[axis - 1] - x.shape[axis]
        if missing:
            padding = [(0, 0)] * 3
            padding[axis] = (0, missing)
            x = ops.pad(x, padding, constant_values=fill)
        if axis == 2:
            x = backend.reshape(x, (maps, x.shape[1], self.blocks, sizes[1]))
            x = ops.transpose(x, (0, 2, 1, 3))
        return backend.reshape(x, (count, -1, x.shape[-1]))

    def _uncut(self, x):
        if self.blocks == 1:
            return x
        maps, inputs, outputs = self.view.size
        if inputs > outputs:
            x = backend.reshape(x, (maps, self.blocks, inputs, x.shape[-1]))
            x = ops.transpose(x, (0, 2, 1, 3))
            return backend.reshape(x, (maps, inputs, -1))[..., :outputs]
        return backend.reshape(x, (maps, -1, outputs))[:, :inputs]


class OrthogonalSteps:
    """The directions of all kernels that are orthogonalized.

    Matrices of the same sizes are orthogonalized together, whatever kernel they
    are from: a batched product is one kernel of the device, and compiles once.

    Args:
        kernels: Dict from a parameter's number in the optimizer to its
            `Kernel`.
        settings: What has the attributes `ns_steps` and `factor_damping`: the
            `AdaFisherMuon`.
        add_variable: Callable `(shape, initializer, name)`.

    Attributes:
        kernels: See above.
        roots: List of variables, the roots that are kept.
    """

    def __init__(self, kernels, settings, add_variable):
        self.kernels = kernels
        self._settings = settings
        groups = collections.defaultdict(list)
        entries = collections.Counter()
        for index, kernel in kernels.items():
            key = kernel.keeps_root, kernel.sizes[1:]
            entries[key] += math.prod(kernel.sizes)
            groups[*key, entries[key] // LARGEST_BATCH].append(index)
        # Dict from whether the root is kept, the sizes of matrices and the
        # number of the batch to the parameters' numbers.
        self._groups = dict(groups)
        self._root_of = {}
        for key, indices in self._groups.items():
            keeps_root, (rows, columns), _ = key
            if keeps_root:
                count = sum(kernels[index].sizes[0] for index in indices)
                side = min(rows, columns)
                self._root_of[key] = add_variable(
                    shape=(count, side, side),
                    # Until there is one, steps go along the momentum.
                    initializer=_multiples_of_identity,
                    name=f"root_{rows}x{columns}",
                )
        self.roots = list(self._root_of.values())

    def directions(self, momentums, assign_roots):
        """Get what to subtract from each kernel, but for the learning rate.

        Args:
            momentums: Dict from a parameter's number to a function without
                arguments that computes its momentum, of those that have a
                gradient.
            assign_roots: Function of a list of variables and a function without
                arguments that returns their new values. It assigns them if this
                step is one that makes roots anew.

        Returns:
            Dict from a parameter's number to a tensor of its shape.
        """
        groups = {
            key: indices
            for key, indices in self._groups.items()
            if any(index in momentums for index in indices)
        }
        # Those with kept roots are needed twice: the condition is one for all.
        whitened = {
            key: self._whitened(indices, momentums)
            for key, indices in groups.items()
            if key in self._root_of
        }
        count = self._settings.ns_steps
        if whitened:
            variables = [self._root_of[key] for key in whitened]
            assign_roots(
                variables,
                lambda: [
                    matrices.new_root(count, ops.convert_to_tensor(old))
                    for matrices, old in zip(
                        whitened.values(), variables, strict=True
                    )
                ],
            )
        found = {}
        for key, indices in groups.items():
            if key in self._root_of:
                root = ops.convert_to_tensor(self._root_of[key])
                steps = whitened.pop(key).step_along(root)
            else:
                steps = self._whitened(indices, momentums).step(count)
            start = 0
            for index in indices:
                kernel = self.kernels[index]
                end = start + kernel.sizes[0]
                if index in momentums:
                    found[index] = kernel.joined(steps[start:end])
                start = end
        return found

    def _whitened(self, indices, momentums):
        """The `Whitened` matrices of a group of kernels."""
        damping = self._settings.factor_damping
        parts = []
        for index in indices:
            kernel = self.kernels[index]
            if index in momentums:
                momentum = momentums[index]()
            else:
                # The gradient is missing in this step.
                momentum = ops.zeros(kernel.variable.shape)
            parts.append(kernel.whitened(momentum, damping))
        if len(parts) == 1:
            return Whitened(*parts[0])
        return Whitened(*map(ops.concatenate, zip(*parts, strict=True)))


def _multiples_of_identity(shape, dtype=None):
    """Roots that leave matrices as they are, but for their norm."""
    *_, side = shape
    root = np.sqrt(side) * np.eye(side)
    return ops.convert_to_tensor(np.broadcast_to(root, shape), dtype)


def costs_little(view, positions):
    """Whether a kernel can be orthogonalized anew at each step.

    Newton–Schulz takes about `4 m² n + 30 m³` operations for an `m` by `n`
    matrix, and the layer's own forward and backward pass `6 m n` for each row,
    a position of an example.

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
        Int: 1 where it isn't known, as in recurrent layers.
    """
    has_shape = type(layer).compute_output_shape is not (
        keras.layers.Layer.compute_output_shape
    )
    inputs = (layer.get_build_config() or {}).get("input_shape")
    if block.is_estimated or not has_shape or not inputs:
        return 1
    outputs = layer.compute_output_shape(inputs)
    if not all(size is None or is_integer(size) for size in outputs):
        # A layer with several outputs.
        return 1
    size = math.prod(USUAL_LENGTH if s is None else s for s in outputs[1:])
    return max(1, size // math.prod(block.gradient_shape))
