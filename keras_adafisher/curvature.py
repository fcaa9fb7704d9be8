"""What the optimizer keeps of the layers: their running Kronecker factors.

The factors of all blocks are in one vector, one optimizer variable. A model has
many layers, but their factors are small: what takes time, to compile and to
run, is the number of operations, not that of entries.

What is normalized together, `H` of one block for instance, is a row of the
vector. Rows of one length are neighbours, so that they are the rows of a matrix
as they are.
"""

import collections
import dataclasses
import math

from keras import ops

from keras_adafisher import backend
from keras_adafisher import factors


class Curvature:
    """The running factors of one block.

    Args:
        probe: The block's `Probe`.

    Attributes:
        places: Dict from the name of a factor to where it begins in the vector
            of all, and its shape. The names are "activation", "gradient", and
            in a block with a bias "one", the factor of the input that is
            always 1, and "bias_gradient" if the bias has an `S` of its own.
        vector: The variable that has the factors of all blocks.
    """

    def __init__(self, probe):
        self.probe = probe
        self.block = probe.block
        # Equal for the blocks of one weight. Once all are made, `Factors` puts
        # them into `blocks_of_weight`.
        self.key = id(self.block.parameters[0])
        self.blocks_of_weight = [self]
        self.places = {}
        self.vector = None
        self._views = {}

    @property
    def is_measured(self):
        """Whether a tap is there for one of the weight's uses."""
        return any(c.probe.is_tapped for c in self.blocks_of_weight)

    def factor(self, name):
        """One of the running factors, a tensor. `None` if there is none."""
        if name not in self.places:
            return None
        start, shape = self.places[name]
        return backend.view(
            self.vector,
            lambda vector: _part(vector, start, shape, self.vector),
            self._views,
            name,
        )

    @property
    def activation(self):
        """`H` of the weight."""
        return self.factor("activation")

    @property
    def gradient(self):
        """`S` of the weight."""
        return self.factor("gradient")

    @property
    def one(self):
        """`H` of the bias, a scalar. `None` without a bias."""
        return self.factor("one")

    @property
    def bias_gradient(self):
        """`S` of the bias. `None` without a bias."""
        if "one" not in self.places:
            return None
        has_own = "bias_gradient" in self.places
        return self.factor("bias_gradient" if has_own else "gradient")

    def values(self):
        """List of all running factors."""
        return [self.factor(name) for name in self.places]

    def terms(self):
        """Pairs of a parameter and the function for its Fisher diagonal."""
        pairs = [
            (self.block.weight, self.fisher_of_weight),
            (self.block.bias, self.fisher_of_bias),
        ]
        return [pair for pair in pairs if pair[0] is not None]

    def fisher_of_weight(self):
        return self.block.fisher_of_weight(self.activation, self.gradient)

    def fisher_of_bias(self):
        return self.block.fisher_of_bias(self.one, self.bias_gradient)

    def shapes(self):
        """Dict from the name of each factor to its shape."""
        block = self.block
        shapes = {
            "activation": block.activation_shape,
            "gradient": block.gradient_shape,
        }
        if block.bias is not None:
            shapes["one"] = ()
            if block.bias_gradient_shape is not None:
                shapes["bias_gradient"] = block.bias_gradient_shape
        return shapes

    def rows(self, normalization):
        """List of the names of the factors that make up each row."""
        names = list(self.shapes())
        takes_part = self.block.normalizes_one and normalization == "min_max"
        if "one" in names and takes_part:
            names.remove("one")
            return [["activation", "one"], *([name] for name in names[1:])]
        return [[name] for name in names]


class Factors:
    """The running factors of all blocks, in one vector.

    Args:
        probes: List of the blocks' `Probe`s.
        normalization: See `AdaFisher`.
        accumulates: Bool. Whether several steps make up an update.
        add_variable: `Optimizer.add_variable`.

    Attributes:
        curvatures: List with the `Curvature` of each block.
        variables: List of the vector and, with `accumulates`, the variable
            that sums up what the update's steps so far have measured. There is
            none without a probe.
        vector: The first of them.
    """

    def __init__(self, probes, normalization, accumulates, add_variable):
        self.curvatures = [Curvature(probe) for probe in probes]
        self._normalization = normalization
        self.variables = []
        if not probes:
            return
        self._find_uses()
        self._lay_out()
        sizes = {"factors": self._size}
        if accumulates:
            sizes["answers"] = len(self.curvatures) + self._size
        self.variables = [
            add_variable(
                shape=(size,),
                initializer="ones" if name == "factors" else "zeros",
                dtype="float32",
                # All replicas write the same value.
                aggregation="only_first_replica",
                # As long as no axis of a parameter is, and so whole on each
                # device.
                layout=backend.layout_like(
                    probes[0].block.parameters[:1], (size,)
                ),
                name=name,
            )
            for name, size in sizes.items()
        ]
        self.vector = self.variables[0]
        for curvature in self.curvatures:
            curvature.vector = self.vector

    def _find_uses(self):
        """Find the blocks that have a weight in common."""
        numbers = collections.defaultdict(list)
        for number, curvature in enumerate(self.curvatures):
            numbers[curvature.key].append(number)
        groups = [numbers[curvature.key] for curvature in self.curvatures]
        for curvature, group in zip(self.curvatures, groups, strict=True):
            curvature.blocks_of_weight = [self.curvatures[n] for n in group]
        # For each block the blocks of its weight. `None` if that is itself.
        self._uses = None
        if len(numbers) < len(self.curvatures):
            self._uses = _matrix(groups)

    def _lay_out(self):
        """Find a place for each factor."""
        groups = collections.defaultdict(list)
        for number, curvature in enumerate(self.curvatures):
            for names in curvature.rows(self._normalization):
                length = sum(math.prod(curvature.shapes()[n]) for n in names)
                groups[length, names == ["one"]].append((number, names))
        # In the order of the vector: matrices, the block's number and the
        # names of the factors of each row, and those of each factor.
        self._matrices = []
        rows = []
        self._order = []
        self._size = 0
        for (length, is_one), group in groups.items():
            numbers = slice(len(rows), len(rows) + len(group))
            self._matrices.append(_Matrix(self._size, numbers, length, is_one))
            rows += group
            for number, names in group:
                curvature = self.curvatures[number]
                for name in names:
                    shape = curvature.shapes()[name]
                    curvature.places[name] = self._size, shape
                    self._order.append((number, name))
                    self._size += math.prod(shape)
        rows_of_blocks = [[] for _ in self.curvatures]
        for row, (number, _) in enumerate(rows):
            rows_of_blocks[number].append(row)
        self._rows_of_blocks = _matrix(rows_of_blocks)
        self._blocks_of_rows = backend.constant([n for n, _ in rows], "int32")
        # The scale of the loss is that of `s`.
        self._has_scale = backend.constant(
            [["gradient" in names[0]] for _, names in rows], "float32"
        )
        self._epsilon_scales = backend.constant(
            [
                [
                    self.curvatures[number].block.epsilon_scale
                    if "activation" in names
                    else 1
                ]
                for number, names in rows
            ],
            "float32",
        )

    def join(self, answers):
        """Put all that was measured into one vector.

        Args:
            answers: Dict from the id of each probe that has answered to the
                sums of the gradients of its inputs.

        Returns:
            A vector: how often each block was called, and the sums, laid out
            as the factors are.
        """
        calls = []
        totals = {}
        for number, curvature in enumerate(self.curvatures):
            probe = curvature.probe
            answer = answers.get(id(probe))
            if answer is None:
                answer = map(ops.zeros, probe.shapes.values())
            # Not gathered on steps that don't measure.
            count, activation, gradient = map(
                backend.keep_layout, answer, probe.inputs
            )
            gradient, bias_gradient = curvature.block.split_gradient(gradient)
            calls.append(count)
            totals[number, "activation"] = activation
            totals[number, "gradient"] = gradient
            totals[number, "one"] = count
            totals[number, "bias_gradient"] = bias_gradient
        parts = [_flat(totals[place]) for place in self._order]
        answers = ops.concatenate([ops.stack(calls), *parts])
        return backend.keep_layout(answers, self.vector)

    def add(self, answers, is_last):
        """Add what was measured to that of the update's earlier steps.

        Args:
            answers: What `join` returned.
            is_last: Bool or boolean tensor, whether no more steps follow.

        Returns:
            The sum, and what to begin the next step with.
        """
        total = ops.add(self.variables[1], answers)
        return total, ops.where(is_last, ops.zeros_like(total), total)

    def taken_in(self, answers, scale, epsilon, gamma_1, gamma_2):
        """Average the factors with what was measured.

        A weight that has several blocks may be used in one of its ways only:
        a tied embedding that embeds, but isn't reversed. The blocks of the
        other ways then measured zeros.

        Args:
            answers: What `join` or `add` returned.
            scale: Float, what the loss was multiplied by.
            epsilon, gamma_1, gamma_2: See `AdaFisher`.

        Returns:
            The new vector. The factors of a block stay as they were if its
            weight wasn't used, or if not all that it measured is finite.
        """
        count = len(self.curvatures)
        calls, totals = answers[:count], answers[count:]
        # What makes means, for a loss that isn't scaled, of sums.
        divisors = self._of_rows(ops.maximum(calls, 1))
        if scale != 1:
            divisors = divisors * (1 + (scale**2 - 1) * self._has_scale)
        epsilons = epsilon * self._epsilon_scales if epsilon else None
        new = []
        is_finite = []
        for matrix in self._matrices:
            x, finite = _normalize(
                matrix.of(totals, self.vector) / divisors[matrix.rows],
                epsilons[matrix.rows] if epsilon else 0.0,
                self._normalization,
                matrix.is_one,
            )
            new.append(x)
            is_finite.append(finite)
        is_finite = ops.concatenate(is_finite)
        is_usable = ops.all(
            backend.take(is_finite, self._rows_of_blocks), axis=1
        )
        if self._uses is not None:
            calls = ops.max(backend.take(calls, self._uses), axis=1)
        is_usable = self._of_rows(ops.logical_and(is_usable, calls > 0))
        vector = ops.convert_to_tensor(self.vector)
        result = []
        for matrix, x in zip(self._matrices, new, strict=True):
            old = matrix.of(vector, self.vector)
            x = factors.running_average(old, x, gamma_1, gamma_2)
            result.append(_flat(ops.where(is_usable[matrix.rows], x, old)))
        return ops.concatenate(result)

    def _of_rows(self, values_of_blocks):
        """A column of the values of the rows' blocks."""
        values = backend.take(values_of_blocks, self._blocks_of_rows)
        return backend.reshape(values, (-1, 1))

    def estimated(self, curvature, gradient, gamma_1, gamma_2):
        """Average the factors of a block with what a gradient says of them.

        Args:
            curvature: `Curvature` of the block.
            gradient: Tensor, the gradient of its weight.
            gamma_1, gamma_2: See `AdaFisher`.

        Returns:
            The new vector.
        """
        block = curvature.block
        totals = dict.fromkeys(curvature.places)
        totals["activation"], totals["gradient"] = block.estimate_from_gradient(
            gradient
        )
        new = {}
        # The gradient of an unused weight is zero.
        is_usable = ops.any(gradient != 0)
        for name, (_, shape) in curvature.places.items():
            x = totals[name]
            x = ops.zeros((1, math.prod(shape))) if x is None else x
            # The scale is arbitrary. So there is no `epsilon` to add, and
            # nothing to compare the bias' input 1 with.
            new[name], is_finite = _normalize(
                backend.reshape(x, (1, -1)),
                0.0,
                self._normalization,
                name == "one",
            )
            is_usable = ops.logical_and(is_usable, is_finite[0])
        vector = ops.convert_to_tensor(self.vector)

        def old(start, stop):
            return _part(vector, start, (stop - start,), self.vector)

        parts = []
        end = 0
        for name, (start, shape) in sorted(
            curvature.places.items(), key=lambda item: item[1]
        ):
            stop = start + math.prod(shape)
            before = old(start, stop)
            after = factors.running_average(
                before, _flat(new[name]), gamma_1, gamma_2
            )
            parts += [old(end, start), ops.where(is_usable, after, before)]
            end = stop
        return ops.concatenate([*parts, old(end, self._size)])


@dataclasses.dataclass
class _Matrix:
    """Neighbouring rows of one length in a vector of factors.

    Attributes:
        start: Integer, where they begin.
        rows: Slice of their numbers, of all rows.
        length: Integer.
        is_one: Bool. Whether they are factors of the input that is always 1,
            which nothing is normalized together with.
    """

    start: int
    rows: slice
    length: int
    is_one: bool

    def of(self, vector, variable):
        """The matrix. `vector` is laid out over devices like `variable`."""
        shape = self.rows.stop - self.rows.start, self.length
        return _part(vector, self.start, shape, variable)


def _normalize(x, epsilon, normalization, is_one):
    """Normalize each row of a matrix, and tell which are finite."""
    if is_one:
        return ops.ones_like(x), ops.isfinite(x[:, 0])
    if normalization == "mean":
        mean = ops.mean(x, axis=1, keepdims=True)
        # It isn't if one of the entries isn't.
        is_finite = ops.isfinite(mean[:, 0])
        return factors.mean_scaled(x, epsilon, mean), is_finite
    low = ops.min(x, axis=1, keepdims=True)
    high = ops.max(x, axis=1, keepdims=True)
    is_finite = ops.all(ops.isfinite(x), axis=1)
    return factors.min_max(x, epsilon, low, high), is_finite


def _part(vector, start, shape, variable):
    """Neighbouring entries of a vector, as a tensor of some shape."""
    entries = vector[start : start + math.prod(shape)]
    # Otherwise JAX' compiler splits the vector like what it is used with, and
    # sends the entries to where they belong at each step.
    entries = backend.keep_layout(entries, variable)
    return backend.reshape(entries, shape)


def _flat(tensor):
    return backend.reshape(tensor, (-1,))


def _matrix(lists):
    """Make lists of numbers equally long by repeating their first."""
    length = max(map(len, lists), default=0)
    rows = [
        numbers + numbers[:1] * (length - len(numbers)) for numbers in lists
    ]
    return backend.constant(rows, "int32")
