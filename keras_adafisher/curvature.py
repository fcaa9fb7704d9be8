"""What the optimizer keeps of a block: its running Kronecker factors."""

import dataclasses
import functools
import itertools
import math

import keras
from keras import ops

from keras_adafisher import backend
from keras_adafisher import factors


class Curvature:
    """The running factors of one block: optimizer state.

    Args:
        probe: The block's `Probe`.
        add_variable: `Optimizer.add_variable`.
    """

    def __init__(self, probe, add_variable):
        self.probe = probe
        self.block = block = probe.block
        self._add_variable = add_variable
        # Equal for the blocks of one weight. Once all are made, the optimizer
        # puts them into `blocks_of_weight`.
        self.key = id(block.parameters[0])
        self.blocks_of_weight = [self]
        self.activation = self._add_factor("activation", block.activation_shape)
        self.gradient = self._add_factor("gradient", block.gradient_shape)
        self.variables = [self.activation, self.gradient]
        self.one = self.bias_gradient = None
        if block.bias is not None:
            # The factor of the input that is always 1.
            self.one = self._add_factor("request", ())
            self.variables.append(self.one)
            self.bias_gradient = self.gradient
            if block.bias_gradient_shape is not None:
                self.bias_gradient = self._add(
                    "gradient",
                    block.bias_gradient_shape,
                    "ones",
                    "bias_factor",
                    [block.bias],
                )
                self.variables.append(self.bias_gradient)

    @property
    def is_measured(self):
        """Whether a tap is there for one of the weight's uses."""
        return any(c.probe.is_tapped for c in self.blocks_of_weight)

    def _add_factor(self, of, shape):
        return self._add(of, shape, "ones", "factor")

    def _add(self, of, shape, initializer, what, parameters=None):
        if parameters is None:
            parameters = self.probe.parameters_of(of)
        return self._add_variable(
            shape=shape,
            initializer=initializer,
            dtype="float32",
            # All replicas write the same value.
            aggregation="only_first_replica",
            layout=backend.layout_like(parameters, shape),
            name=f"{self.probe.name(of)}_{what}",
        )

    def values(self):
        return [ops.convert_to_tensor(v) for v in self.variables]

    def pick(self, values):
        """The new values of `variables` from a dict of their ids."""
        return [values[id(variable)] for variable in self.variables]

    def assign(self, values, assign):
        """Set `variables` to new values by `Optimizer.assign`."""
        for variable, value in zip(self.variables, values, strict=True):
            assign(variable, backend.keep_layout(value, variable))

    def terms(self):
        """Pairs of a parameter and the function for its Fisher diagonal."""
        pairs = [
            (self.block.weight, self.fisher_of_weight),
            (self.block.bias, self.fisher_of_bias),
        ]
        return [pair for pair in pairs if pair[0] is not None]

    def fisher_of_weight(self):
        return self.block.fisher_of_weight(
            ops.convert_to_tensor(self.activation),
            ops.convert_to_tensor(self.gradient),
        )

    def fisher_of_bias(self):
        return self.block.fisher_of_bias(
            ops.convert_to_tensor(self.one),
            ops.convert_to_tensor(self.bias_gradient),
        )

    def add_accumulators(self):
        self.accumulators = [
            self._add(name, shape, "zeros", "accumulator")
            for name, shape in self.probe.shapes.items()
        ]

    def accumulate(self, answer, is_last, assign):
        """Add an answer to those of the update's earlier steps."""
        totals = []
        for accumulator, tensor in zip(self.accumulators, answer, strict=True):
            total = ops.add(accumulator, tensor)
            rest = ops.where(is_last, ops.zeros_like(total), total)
            assign(accumulator, rest)
            totals.append(total)
        return totals

    def measured(self, answer, uses, scale, epsilon):
        """What a measurement says of `variables`.

        A weight that has several blocks may be used in one of its ways only:
        a tied embedding that embeds, but isn't reversed. The blocks of the
        other ways then measured zeros.

        Args:
            answer: The sums over the gradients of `probe.inputs`.
            uses: Number of answers that all blocks of the weight gave.
            scale: Float, what the loss was multiplied by.
            epsilon: See `AdaFisher`.

        Returns:
            List of `Measurement`.
        """
        calls, activation, gradient = answer
        gradient, bias_gradient = self.block.split_gradient(gradient)
        return self._measurements(
            activation,
            gradient,
            bias_gradient,
            calls=calls,
            uses=uses,
            epsilon=epsilon,
            scale=scale,
            normalizes_one=self.block.normalizes_one,
        )

    def estimated(self, gradient):
        """What the gradient of the block's weight says of `variables`."""
        activation, gradient_factor = self.block.estimate_from_gradient(
            gradient
        )
        # The scale is arbitrary. So there is no `epsilon` to add, and nothing
        # to compare the bias' input 1 with: it counts as the largest.
        shape = self.block.bias_gradient_shape
        return self._measurements(
            activation,
            gradient_factor,
            None if shape is None else ops.zeros(shape),
            calls=ops.ones(()),
            # The gradient of an unused weight is zero.
            uses=ops.cast(ops.any(gradient != 0), "float32"),
        )

    def _measurements(
        self,
        activation,
        gradient,
        bias_gradient,
        calls,
        uses,
        epsilon=0.0,
        scale=1.0,
        normalizes_one=False,
    ):
        of_activation = Measurement(
            self.activation,
            activation,
            calls,
            uses,
            epsilon=epsilon * self.block.epsilon_scale,
            one=self.one,
            normalizes_one=normalizes_one and self.one is not None,
        )
        of_gradients = [
            Measurement(variable, total, calls, uses, epsilon, scale**2)
            for variable, total in (
                (self.gradient, gradient),
                (self.bias_gradient, bias_gradient),
            )
            if total is not None
        ]
        return [of_activation, *of_gradients]


@dataclasses.dataclass
class Measurement:
    """A sum of mean squares, and the running factor that takes it in.

    Attributes:
        variable: The factor.
        total: Tensor of its shape, the sum over calls of the layer.
        calls: Scalar tensor, how many there were.
        uses: Scalar tensor. The factor is to change unless it is 0.
        epsilon: Float, see `factors.min_max`.
        scale: Float, what else to divide `total` by.
        one: Scalar variable or `None`: the entry that belongs to the bias.
        normalizes_one: Bool. Whether it takes part in the normalization. Its
            new value is 1 otherwise.
        is_finite: Boolean scalar tensor, whether all is that the block
            measured. `take_in` finds out.
    """

    variable: keras.Variable
    total: object
    calls: object
    uses: object
    epsilon: float = 0.0
    scale: float = 1.0
    one: keras.Variable | None = None
    normalizes_one: bool = False
    is_finite: object = None

    @property
    def kind(self):
        """Equal for those that can be the rows of one matrix."""
        return (
            math.prod(self.variable.shape),
            self.epsilon,
            self.scale,
            self.one is not None,
            self.normalizes_one,
        )


def take_in(measured, gamma_1, gamma_2, normalization="min_max"):
    """Normalize measurements and average them with what the factors are.

    Args:
        measured: List of lists of `Measurement`, one for each block.
        gamma_1, gamma_2, normalization: See `AdaFisher`.

    Returns:
        Dict from the id of a variable to its new value: the old one if the
        block's layer wasn't used, or if not all that it measured is finite.
    """
    groups = [
        (rows, _join([row.total for row in rows]))
        for rows in backend.groups_of_rows(itertools.chain(*measured))
    ]
    for rows, totals in groups:
        finite = ops.all(ops.isfinite(totals), axis=_axis(rows))
        for row, is_finite in zip(rows, _split(finite, rows), strict=True):
            row.is_finite = is_finite
    for rows in measured:
        is_finite = functools.reduce(
            ops.logical_and, [row.is_finite for row in rows]
        )
        for row in rows:
            row.is_finite = is_finite
    values = {}
    for rows, totals in groups:
        normalized = _normalize(rows, totals, normalization)
        values.update(_average(rows, *normalized, gamma_1, gamma_2))
    return values


def _normalize(rows, totals, normalization):
    """Normalize measurements of one kind, the rows of one matrix.

    Returns:
        A tensor like `totals`, and one with an entry for each row: the
        factors of the inputs that are 1.
    """
    first = rows[0]
    calls = ops.maximum(_join([row.calls for row in rows]), 1)
    x = totals / (calls * first.scale)
    axis = _axis(rows)
    if normalization == "mean":
        mean = ops.mean(x, axis=axis, keepdims=axis is not None)
        x = factors.mean_scaled(x, first.epsilon, mean)
        return x, ops.ones_like(mean)
    low = ops.min(x, axis=axis, keepdims=axis is not None)
    high = ops.max(x, axis=axis, keepdims=axis is not None)
    one = ops.ones_like(low)
    if first.normalizes_one:
        low = ops.minimum(low, 1)
        high = ops.maximum(high, 1)
        one = factors.min_max(one, first.epsilon, low, high)
    return factors.min_max(x, first.epsilon, low, high), one


def _average(rows, x, one, gamma_1, gamma_2):
    """Pairs of a variable's id and its new value."""
    is_usable = ops.logical_and(
        _join([row.uses for row in rows]) > 0,
        _join([row.is_finite for row in rows]),
    )
    pairs = [([row.variable for row in rows], x)]
    if rows[0].one is not None:
        pairs.append(([row.one for row in rows], one))
    for variables, new in pairs:
        old = _join([v.value for v in variables])
        new = factors.running_average(old, new, gamma_1, gamma_2)
        new = _split(ops.where(is_usable, new, old), variables)
        for variable, value in zip(variables, new, strict=True):
            value = _reshape(value, variable.shape)
            yield id(variable), backend.keep_layout(value, variable)


def _join(tensors):
    """Make tensors of one size the rows of a matrix. A single one stays."""
    if len(tensors) == 1:
        return tensors[0]
    if all(len(tensor.shape) == 0 for tensor in tensors):
        return ops.expand_dims(ops.stack(tensors), 1)
    size = math.prod(tensors[0].shape)
    return ops.stack([_reshape(tensor, (size,)) for tensor in tensors])


def _axis(rows):
    """The axes that one row has in what `_join` returns."""
    return None if len(rows) == 1 else 1


def _split(tensor, rows):
    """Undo `_join`, up to the shapes."""
    return [tensor] if len(rows) == 1 else ops.unstack(tensor)


def _reshape(tensor, shape):
    return tensor if tensor.shape == shape else ops.reshape(tensor, shape)
