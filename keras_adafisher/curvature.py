"""What the optimizer keeps of the layers: their running Kronecker factors.

The factors of all blocks are in one vector, one optimizer variable. A model has
many layers, but their factors are small: what takes time, to compile and to
run, is the number of operations, not that of entries.

What is normalized together, `H` of one block for instance, is a row of the
vector.
"""

import collections
import math

import numpy as np
from keras import ops

from keras_adafisher import backend
from keras_adafisher import factors
from keras_adafisher.probe import ANSWER_SCALE
from keras_adafisher.rows import Rows


class Curvature:
    """The running factors of one block.

    Args:
        probe: The block's `Probe`.

    Attributes:
        places: Dict from the name of a factor to where it begins in the vector
            of all, and its shape. The names are those of the parts of an
            answer, in their order: "one", the factor of the input that is
            always 1 (a block without a bias doesn't read it), "activation",
            "gradient", and "bias_gradient" if the bias has an `S` of its own.
        vector: The variable that has the factors of all blocks.
        is_estimated: Bool. Whether the last measurement was an estimate from
            the weight's gradient.
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
        self.is_estimated = self.block.is_estimated
        self._views = {}

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
        return None if self.block.bias is None else self.factor("one")

    @property
    def bias_gradient(self):
        """`S` of the bias. `None` without a bias."""
        if self.block.bias is None:
            return None
        has_own = "bias_gradient" in self.places
        return self.factor("bias_gradient" if has_own else "gradient")

    def values(self):
        """List of all running factors."""
        names = [n for n in self.places if n != "one" or self.one is not None]
        return [self.factor(name) for name in names]

    def terms(self):
        """List of tuples: what the block adds to Fisher diagonals.

        A parameter, a function for the diagonal, one for the two tensors whose
        product it is, `None` if it is none, and a bool, whether both can be
        called with `rows`.
        """
        block = self.block
        of_weight = of_bias = None
        if block.has_operands_of_weight:
            of_weight = self.operands_of_weight
        if block.has_operands_of_bias:
            of_bias = self.operands_of_bias
        terms = [
            (block.weight, self.fisher_of_weight, of_weight, block.takes_rows),
            (block.bias, self.fisher_of_bias, of_bias, False),
        ]
        return [term for term in terms if term[0] is not None]

    def fisher_of_weight(self, rows=None):
        return self.block.fisher_of_weight(*self._factors_of_weight(rows))

    def operands_of_weight(self, rows=None):
        return self.block.operands_of_weight(*self._factors_of_weight(rows))

    def fisher_of_bias(self):
        return self.block.fisher_of_bias(self.one, self.bias_gradient)

    def operands_of_bias(self):
        return self.block.operands_of_bias(self.one, self.bias_gradient)

    def _factors_of_weight(self, rows):
        factors = [self.activation, self.gradient]
        if rows is not None:
            rank = len(self.block.weight.shape)
            factors = [_rows_of(factor, rows, rank) for factor in factors]
        return factors

    def shapes(self):
        """Dict from the name of each factor to its shape."""
        block = self.block
        shapes = {
            "one": (),
            "activation": block.activation_shape,
            "gradient": block.gradient_shape,
        }
        if block.bias_gradient_shape is not None:
            shapes["bias_gradient"] = block.bias_gradient_shape
        return shapes

    def rows(self, normalization):
        """List of the names of the factors that make up each row."""
        one, activation, *others = self.shapes()
        takes_part = self.block.bias is not None and self.block.normalizes_one
        if takes_part and normalization == "min_max":
            return [[one, activation], *([name] for name in others)]
        return [[name] for name in self.shapes()]


class FisherDiagonal:
    """The undamped Fisher diagonal of one parameter, computed when called.

    The sum over the blocks that it belongs to. It is false if there are none.

    Args:
        vector: The variable that has the factors of all blocks.

    Attributes:
        takes_rows: Bool, whether it can be called with `rows`.
        kept: On PyTorch, what `operands()` returned, and for which tensor.
    """

    def __init__(self, vector):
        self.vector = vector
        self._terms = []
        self._operands = []
        self.takes_rows = True
        self.kept = None

    def add(self, function, operands, takes_rows):
        """Add what a block has: see `Curvature.terms`."""
        self._terms.append(function)
        self._operands.append(operands)
        self.takes_rows = self.takes_rows and takes_rows

    def __bool__(self):
        return bool(self._terms)

    def __call__(self, rows=None):
        """A new tensor that broadcasts to the parameter's shape.

        Args:
            rows: Slice of the first axis, if `takes_rows`. Defaults to all.
        """
        first, *others = (
            term() if rows is None else term(rows) for term in self._terms
        )
        return sum(others, start=first)

    def operands(self, rows=None):
        """The two tensors whose product it is. `None` if it is none.

        Args:
            rows: See `__call__`.
        """
        if len(self._operands) > 1 or self._operands[0] is None:
            return None
        (operands,) = self._operands
        return operands() if rows is None else operands(rows)


class Factors:
    """The running factors of all blocks, in one vector.

    Args:
        probes: List of the blocks' `Probe`s.
        normalization: See `AdaFisher`.
        accumulates: Bool. Whether several steps make up an update.
        add_variable: `Optimizer.add_variable`.

    Attributes:
        curvatures: List with the `Curvature` of each block.
        variables: List of `vector`, `records` and, with `accumulates`, the
            variable that sums up what the update's steps so far have measured.
            There is none without a probe.
        vector: Variable, the factors.
        records: Variable, how often each block's factors have taken in what
            was measured, and then how often each has dropped it.
    """

    def __init__(self, probes, normalization, accumulates, add_variable):
        self.curvatures = [Curvature(probe) for probe in probes]
        self._normalization = normalization
        self.variables = []
        self.vector = None
        self.records = None
        if not probes:
            return
        self._find_uses()
        self._lay_out()
        sizes = {"factors": self._size, "records": 2 * len(self.curvatures)}
        if accumulates:
            sizes["answers"] = self._size
        self.variables = [
            add_variable(
                shape=(size,),
                initializer="ones" if name == "factors" else "zeros",
                dtype="float32",
                # All replicas write the same value.
                aggregation="only_first_replica",
                layout=backend.whole_layout(probes[0].block.parameters[0]),
                name=name,
            )
            for name, size in sizes.items()
        ]
        self.vector, self.records = self.variables[:2]
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
        # The names of the factors of each row, with the number of their block.
        rows = []
        lengths = []
        self._starts = []
        self._size = 0
        for number, curvature in enumerate(self.curvatures):
            shapes = curvature.shapes()
            self._starts.append(self._size)
            for names in curvature.rows(self._normalization):
                start = self._size
                for name in names:
                    curvature.places[name] = self._size, shapes[name]
                    self._size += math.prod(shapes[name])
                rows.append((number, names))
                lengths.append(self._size - start)
        self._rows = Rows(lengths)
        self._places_of_ones = backend.constant(self._starts, "int32")
        rows_of_blocks = [[] for _ in self.curvatures]
        for row, (number, _) in enumerate(rows):
            rows_of_blocks[number].append(row)
        self._rows_of_blocks = _matrix(rows_of_blocks)
        self._blocks_of_rows = backend.constant([n for n, _ in rows], "int32")
        # Nothing is normalized together with the input that is always 1.
        self._is_one = backend.constant(
            np.repeat([names == ["one"] for _, names in rows], lengths), "bool"
        )
        # The scale of the loss is that of `s`.
        self._has_scale = backend.constant(
            ["gradient" in names[-1] for _, names in rows], "float32"
        )
        self._epsilon_scales = backend.constant(
            [
                self.curvatures[number].block.epsilon_scale
                if "activation" in names
                else 1
                for number, names in rows
            ],
            "float32",
        )

    def join(self, answers):
        """Put all that was measured into one vector.

        Args:
            answers: Dict from the id of each probe that has answered to its
                answer.

        Returns:
            A vector laid out as the factors are, with the sums of what was
            measured. That of "one" is the number of calls.
        """
        vector = self._joined(answers)
        return vector if ANSWER_SCALE == 1 else vector * (1 / ANSWER_SCALE)

    def join_estimates(self, gradients):
        """Put what weights' gradients say of the factors into one vector.

        Args:
            gradients: Dict from the id of a `Curvature` to the gradient of its
                weight, for those that nothing is measured of.

        Returns:
            See `join`. The scale of an estimate is arbitrary: it takes no
            `epsilon`.
        """
        answers = {}
        for curvature in self.curvatures:
            weight = gradients.get(id(curvature))
            if weight is None:
                continue
            weight = ops.convert_to_tensor(weight)
            activation, gradient = curvature.block.estimate_from_gradient(
                weight
            )
            # Like the input that is always 1, which is normalized together
            # with the others and becomes 1: the largest of them.
            largest = ops.max(activation)
            activation = activation / ops.where(largest > 0, largest, 1.0)
            # The gradient of an unused weight is zero.
            is_used = ops.cast(ops.any(weight != 0), "float32")
            parts = [is_used, activation, gradient]
            if "bias_gradient" in curvature.places:
                _, shape = curvature.places["bias_gradient"]
                parts.append(ops.zeros(shape))
            answers[id(curvature.probe)] = ops.concatenate(
                list(map(_flat, parts))
            )
        return self._joined(answers)

    def _joined(self, answers):
        parts = [
            answers.get(id(curvature.probe)) for curvature in self.curvatures
        ]
        parts = [
            ops.zeros(curvature.probe.size) if part is None else part
            for part, curvature in zip(parts, self.curvatures, strict=True)
        ]
        vector = backend.join_answers(parts)
        return backend.keep_layout(vector, self.vector)

    def add(self, answers, is_last):
        """Add what was measured to that of the update's earlier steps.

        Args:
            answers: What `join` returned.
            is_last: Bool or boolean tensor, whether no more steps follow.

        Returns:
            The sum, and what to begin the next step with.
        """
        total = ops.add(self.variables[2], answers)
        return total, ops.where(is_last, ops.zeros_like(total), total)

    def taken_in(self, answers, scale, epsilon, gamma_1, gamma_2):
        """Average the factors with what was measured.

        A weight that has several blocks may be used in one of its ways only:
        a tied embedding that embeds, but isn't reversed. The blocks of the
        other ways then measured zeros.

        Args:
            answers: What `join` or `add` returned.
            scale: Float or scalar tensor, what the loss was multiplied by.
            epsilon, gamma_1, gamma_2: See `AdaFisher`.

        Returns:
            List of the new factors and the new records. The factors of a block
            stay as they were if its weight wasn't used, or if what it measured
            can't be sums of squares: not all of it is finite and positive.
        """
        calls = backend.take(answers, self._places_of_ones)
        # Turn sums over calls into means, and undo the scale of the loss. (A
        # gradient that was clipped has less than one call.)
        is_used = calls > 0
        divisors = ops.where(is_used, calls, 1.0)
        divisors = backend.take(divisors, self._blocks_of_rows)
        if not isinstance(scale, float) or scale != 1:
            divisors = divisors * (1 + (scale**2 - 1) * self._has_scale)
        epsilons = epsilon * self._epsilon_scales if epsilon else None
        answers = ops.where(answers < 0, np.float32(np.nan), answers)
        x, is_finite = self._normalized(answers, divisors, epsilons)
        is_possible = ops.all(
            backend.take(is_finite, self._rows_of_blocks), axis=1
        )
        if self._uses is not None:
            is_used = ops.any(backend.take(is_used, self._uses), axis=1)
        is_usable = ops.logical_and(is_possible, is_used)
        is_dropped = ops.logical_xor(is_used, is_usable)
        records = ops.concatenate([is_usable, is_dropped])
        records = ops.add(self.records, ops.cast(records, "float32"))
        is_usable = backend.take(is_usable, self._blocks_of_rows)
        old = ops.convert_to_tensor(self.vector)
        new = factors.running_average(old, x, gamma_1, gamma_2)
        new = ops.where(self._rows.to_entries(is_usable), new, old)
        return [new, backend.keep_layout(records, self.records)]

    def _normalized(self, totals, divisors, epsilons):
        """Normalize each row of what was measured.

        Args:
            totals: Vector, laid out as the factors are.
            divisors: Vector, what to divide each row by.
            epsilons: Vector of each row's `epsilon`, `None` for zeros.

        Returns:
            The normalized vector, and for each row whether it is finite.
        """
        x = totals / self._rows.to_entries(divisors)
        epsilon = 0.0 if epsilons is None else self._rows.to_entries(epsilons)
        if self._normalization == "min_max":
            mean, *low_and_high = (
                values / divisors for values in self._rows.mean_min_max(totals)
            )
            low, high = map(self._rows.to_entries, low_and_high)
            x = factors.min_max(x, epsilon, low, high)
        else:
            mean = self._rows.mean(totals) / divisors
            x = factors.mean_scaled(x, epsilon, self._rows.to_entries(mean))
        x = ops.where(self._is_one, 1.0, x)
        # A mean isn't finite if one of the entries isn't.
        return x, ops.isfinite(mean)


def _part(vector, start, shape, variable):
    """Neighbouring entries of a vector, as a tensor of some shape."""
    entries = backend.part(vector, start, math.prod(shape))
    # Otherwise JAX' compiler splits the vector like what it is used with, and
    # sends the entries to where they belong at each step.
    entries = backend.keep_layout(entries, variable)
    return backend.reshape(entries, shape)


def _rows_of(factor, rows, rank):
    """The part of a factor that some rows of a parameter meet."""
    has_rows = len(factor.shape) == rank and factor.shape[0] > 1
    return factor[rows] if has_rows else factor


def _flat(tensor):
    return backend.reshape(tensor, (-1,))


def _matrix(lists):
    """Make lists of numbers equally long by repeating their first."""
    length = max(map(len, lists), default=0)
    rows = [
        numbers + numbers[:1] * (length - len(numbers)) for numbers in lists
    ]
    return backend.constant(rows, "int32")
