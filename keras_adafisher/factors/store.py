"""What the optimizer keeps of the layers: their running Kronecker factors.

The factors of all blocks are in one vector, one optimizer variable. A model has
many layers, but their factors are small: what takes time, to compile and to
run, is the number of operations, not that of entries.

What is normalized together, `H` of one block for instance, is a segment of the
vector.
"""

import collections
import math

import numpy as np
from keras import ops

from keras_adafisher import backend
from keras_adafisher.factors.block_factors import BlockFactors
from keras_adafisher.factors.block_factors import factor_shapes
from keras_adafisher.factors.block_factors import names_of_segments
from keras_adafisher.factors.normalization import NORMALIZATIONS
from keras_adafisher.factors.normalization import running_average
from keras_adafisher.factors.segments import Segments
from keras_adafisher.probe import BackendProbe


class FactorStore:
    """The running factors of all blocks, in one vector.

    Args:
        probes: List of the blocks' `Probe`s.
        normalization: See `AdaFisher`.
        accumulates: Bool. Whether several steps make up an update.
        add_variable: `Optimizer.add_variable`.

    Attributes:
        block_factors: List with the `BlockFactors` of each block.
        variables: List of `vector`, `records` and, with `accumulates`, the
            variable that sums up what the update's steps so far have measured.
            There is none without a probe.
        vector: Variable, the factors.
        records: Variable, how often each block's factors have taken in what
            was measured, and then how often each has dropped it.
    """

    def __init__(self, probes, normalization, accumulates, add_variable):
        self.block_factors = []
        # The keys of those that the update's steps so far have measured.
        self._measured = set()
        # How many entries each factor has, in the vector's order. Its key is
        # the number of its block and its name.
        self._sizes = {}
        self._is_held = False
        self._normalization = NORMALIZATIONS[normalization]
        self.variables = []
        self.vector = None
        self.records = None
        if not probes:
            return
        blocks = [probe.block for probe in probes]
        places = self._lay_out(blocks)
        sizes = {"factors": self._size, "records": 2 * len(probes)}
        if accumulates:
            sizes["answers"] = self._size
        self.variables = [
            add_variable(
                shape=(size,),
                initializer=backend.initializer(float(name == "factors")),
                dtype="float32",
                # All replicas write the same value.
                aggregation="only_first_replica",
                layout=backend.replicated_layout(probes[0].block.parameters[0]),
                name=name,
            )
            for name, size in sizes.items()
        ]
        self.vector, self.records = self.variables[:2]
        self.block_factors = [
            BlockFactors(probe, self.vector, places_of_block)
            for probe, places_of_block in zip(probes, places, strict=True)
        ]

    def hold(self):
        """Read the vector for all factors that are asked for until `release`.

        Where a backend would take longer to read each by itself.
        """
        if not self._sizes:
            return
        parts = backend.read_parts(self.vector, list(self._sizes.values()))
        if parts is not None:
            self._is_held = True
            for (number, name), part in zip(self._sizes, parts, strict=True):
                self.block_factors[number].held[name] = part

    def release(self):
        """Read the vector anew for each factor."""
        if self._is_held:
            self._is_held = False
            for factors in self.block_factors:
                factors.held.clear()

    def _lay_out(self, blocks):
        """Find a place for each factor.

        Returns:
            List with the `places` of each `BlockFactors`.
        """
        places = [{} for _ in blocks]
        # The names of the factors of each segment, with their block's number.
        segments = []
        lengths = []
        starts = []
        self._size = 0
        for number, block in enumerate(blocks):
            shapes = factor_shapes(block)
            starts.append(self._size)
            for names in names_of_segments(block, self._normalization):
                start = self._size
                for name in names:
                    places[number][name] = self._size, shapes[name]
                    self._sizes[number, name] = math.prod(shapes[name])
                    self._size += self._sizes[number, name]
                segments.append((number, names))
                lengths.append(self._size - start)
        self._segments = Segments(lengths)
        self._find_relatives(blocks, [n for n, _ in segments], starts)
        # Nothing is normalized together with the input that is always 1.
        self._is_bias_input = backend.constant(
            np.repeat(
                [names == ["bias_input"] for _, names in segments], lengths
            ),
            "bool",
        )
        # The scale of the loss is that of `s`.
        self._has_scale = backend.constant(
            ["gradient" in names[-1] for _, names in segments], "float32"
        )
        self._epsilon_scales = backend.constant(
            [
                blocks[number].epsilon_scale if "activation" in names else 1
                for number, names in segments
            ],
            "float32",
        )
        return places

    def _find_relatives(self, blocks, blocks_of_segments, starts):
        """Find what each segment has to know of others.

        Args:
            blocks: List of `Block`s.
            blocks_of_segments: List of ints, the number of each one's block.
            starts: List of ints, where the factors of each block begin, with
                the number of its calls.
        """
        self._places_of_calls = backend.constant(
            [starts[number] for number in blocks_of_segments], "int32"
        )
        of_blocks = [[] for _ in blocks]
        of_weights = collections.defaultdict(list)
        for segment, number in enumerate(blocks_of_segments):
            of_blocks[number].append(segment)
        for block, (first, *_) in zip(blocks, of_blocks, strict=True):
            of_weights[id(block.parameters[0])].append(first)
        # The segments of a segment's block, the last one first: its `S`, or
        # that of its bias, which isn't zero if the weight's isn't.
        self._siblings = _padded(
            [of_blocks[n][::-1] for n in blocks_of_segments]
        )
        # The first segment of each block of its weight. `None` if no weight
        # has several.
        self._uses = None
        if len(of_weights) < len(blocks):
            self._uses = _padded(
                [
                    of_weights[id(blocks[n].parameters[0])]
                    for n in blocks_of_segments
                ]
            )
        # The first segment of each block in one list of segments, and in a
        # second one behind it.
        firsts = np.array([first for first, *_ in of_blocks])
        self._places_of_records = backend.constant(
            np.append(firsts, len(blocks_of_segments) + firsts), "int32"
        )

    def counts(self):
        """`records` as NumPy has them.

        Returns:
            Array of shape `(2, number of blocks)`: how often each block's
            factors have taken in what was measured, and have dropped it.
        """
        return ops.convert_to_numpy(self.records).reshape(2, -1)

    def without_answer(self, answers, is_first):
        """The blocks of whose weight an update has measured nothing yet.

        Args:
            answers: Collection of the ids of the probes that have answered in
                this step.
            is_first: Bool. Whether it is the first step of the update. (A
                program that is traced is the same for all steps of one.)

        Returns:
            List of `BlockFactors`.
        """
        if is_first:
            self._measured = set()
        self._measured |= {
            factors.key
            for factors in self.block_factors
            if id(factors.probe) in answers
        }
        return [f for f in self.block_factors if f.key not in self._measured]

    def join(self, answers):
        """Put all that was measured into one vector.

        Args:
            answers: Dict from the id of each probe that has answered to its
                answer.

        Returns:
            A vector laid out as the factors are, with the sums of what was
            measured. That of "bias_input" is the number of calls.
        """
        vector = self._joined(answers)
        scale = BackendProbe.ANSWER_SCALE
        return vector if scale == 1 else vector * (1 / scale)

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
        for factors in self.block_factors:
            weight = gradients.get(id(factors))
            if weight is None:
                continue
            weight = ops.convert_to_tensor(weight)
            activation, gradient = factors.block.estimate_from_gradient(weight)
            # Like the input that is always 1, which is normalized together
            # with the others and becomes 1: the largest of them.
            largest = ops.max(activation)
            activation = activation / backend.filled(largest, largest <= 0, 1.0)
            # The gradient of an unused weight is zero.
            is_used = ops.cast(ops.any(weight != 0), "float32")
            parts = [is_used, activation, gradient]
            if "bias_gradient" in factors.places:
                _, shape = factors.places["bias_gradient"]
                parts.append(ops.zeros(shape))
            answers[id(factors.probe)] = ops.concatenate(
                list(map(_flat, parts))
            )
        return self._joined(answers)

    def _joined(self, answers):
        parts = [
            answers.get(id(factors.probe)) for factors in self.block_factors
        ]
        parts = [
            ops.zeros(factors.probe.size) if part is None else part
            for part, factors in zip(parts, self.block_factors, strict=True)
        ]
        vector = BackendProbe.join(parts)
        return backend.constrain_layout(vector, self.vector)

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

    def updated(self, answers, scale, epsilon, gamma_1, gamma_2):
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
            stay as they were if its weight wasn't used, or nothing in the loss
            depended on it, as in a batch of weight 0. They also stay, and the
            records count it, if what was measured can't be sums of squares: not
            all of it is finite and positive.
        """
        # The number of calls, once for each segment: to find it for blocks and
        # repeat it takes a kernel more on JAX.
        calls = backend.take(answers, self._places_of_calls)
        # Turn sums over calls into means, and undo the scale of the loss. (A
        # gradient that was clipped has less than one call.)
        divisors = backend.filled(calls, calls <= 0, 1.0)
        if not isinstance(scale, float) or scale != 1:
            divisors = divisors * (1 + (scale**2 - 1) * self._has_scale)
        epsilons = epsilon * self._epsilon_scales if epsilon else None
        answers = backend.mark_negatives(answers)
        x, means = self._normalized(answers, divisors, epsilons)
        means = backend.take(means, self._siblings)
        # A mean isn't finite if one of the entries isn't.
        is_possible = ops.all(ops.isfinite(means), axis=1)
        # Without a call, all is zeros.
        is_used = ops.not_equal(means[:, 0], 0.0)
        if self._uses is not None:
            is_used = ops.any(backend.take(is_used, self._uses), axis=1)
        is_usable = ops.logical_and(is_possible, is_used)
        is_dropped = ops.logical_xor(is_used, is_usable)
        records = backend.take(
            ops.concatenate([is_usable, is_dropped]), self._places_of_records
        )
        records = ops.add(self.records, ops.cast(records, "float32"))
        old = ops.convert_to_tensor(self.vector)
        new = running_average(old, x, gamma_1, gamma_2)
        new = ops.where(self._segments.to_entries(is_usable), new, old)
        return [new, backend.constrain_layout(records, self.records)]

    def _normalized(self, totals, divisors, epsilons):
        """Normalize each segment of what was measured.

        Args:
            totals: Vector, laid out as the factors are.
            divisors: Vector, what to divide each segment by.
            epsilons: Vector of each segment's `epsilon`, `None` for zeros.

        Returns:
            The normalized vector, and the mean of each segment before that.
        """
        x = totals / self._segments.to_entries(divisors)
        epsilon = (
            0.0 if epsilons is None else self._segments.to_entries(epsilons)
        )
        names = self._normalization.statistics
        found = self._segments.statistics(totals, names)
        found = {name: values / divisors for name, values in found.items()}
        x = self._normalization.function(
            x,
            epsilon,
            *(self._segments.to_entries(found[name]) for name in names),
        )
        x = backend.filled(x, self._is_bias_input, 1.0)
        return x, found["mean"]


def _flat(tensor):
    return backend.reshape(tensor, (-1,))


def _padded(lists):
    """Make lists of numbers equally long by repeating their first."""
    length = max(map(len, lists), default=0)
    segments = [
        numbers + numbers[:1] * (length - len(numbers)) for numbers in lists
    ]
    return backend.constant(segments, "int32")
