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
from keras_adafisher.factors.block_factors import BlockFactors
from keras_adafisher.factors.normalization import NORMALIZATIONS
from keras_adafisher.factors.normalization import running_average
from keras_adafisher.factors.segments import Segments
from keras_adafisher.probe import ANSWER_SCALE


class FactorStore:
    """The running factors of all blocks, in one vector.

    Args:
        probes: List of the blocks' `Probe`s.
        normalization: See `AdaFisher`.
        accumulates: Bool. Whether several steps make up an update.
        add_variable: `Optimizer.add_variable`.

    Attributes:
        curvatures: List with the `BlockFactors` of each block.
        variables: List of `vector`, `records` and, with `accumulates`, the
            variable that sums up what the update's steps so far have measured.
            There is none without a probe.
        vector: Variable, the factors.
        records: Variable, how often each block's factors have taken in what
            was measured, and then how often each has dropped it.
    """

    def __init__(self, probes, normalization, accumulates, add_variable):
        self.curvatures = [BlockFactors(probe) for probe in probes]
        self._normalization = NORMALIZATIONS[normalization]
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
        self._rows = Segments(lengths)
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
            gradients: Dict from the id of a `BlockFactors` to the gradient of
                its weight, for those that nothing is measured of.

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
        new = running_average(old, x, gamma_1, gamma_2)
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
        names = self._normalization.statistics
        found = self._rows.statistics(totals, names)
        found = {name: values / divisors for name, values in found.items()}
        x = self._normalization.function(
            x, epsilon, *(self._rows.to_entries(found[name]) for name in names)
        )
        x = ops.where(self._is_one, 1.0, x)
        # A mean isn't finite if one of the entries isn't.
        return x, ops.isfinite(found["mean"])


def _flat(tensor):
    return backend.reshape(tensor, (-1,))


def _matrix(lists):
    """Make lists of numbers equally long by repeating their first."""
    length = max(map(len, lists), default=0)
    rows = [
        numbers + numbers[:1] * (length - len(numbers)) for numbers in lists
    ]
    return backend.constant(rows, "int32")
