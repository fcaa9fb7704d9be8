"""What the optimizer keeps of a block: its running Kronecker factors."""

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

    def measured(self, answer, uses, scale, gamma_1, gamma_2, epsilon):
        """The values of `variables` after a measurement.

        A weight that has several blocks may be used in one of its ways only:
        a tied embedding that embeds, but isn't reversed. The blocks of the
        other ways then measured zeros.

        Args:
            answer: The sums over the gradients of `probe.inputs`.
            uses: Number of answers that all blocks of the weight gave.
            scale: Float, what the loss was multiplied by.
            gamma_1, gamma_2, epsilon: See `AdaFisher`.

        Returns:
            List of tensors. The old values if there was no answer, or one
            that isn't finite.
        """
        calls, activation, gradient = answer
        is_usable = ops.logical_and(
            uses > 0, factors.is_finite(activation, gradient)
        )
        calls = ops.maximum(calls, 1)
        activation, one = self.block.normalize_activation(
            activation / calls, epsilon
        )
        gradient, bias_gradient = self.block.split_gradient(
            gradient / (calls * scale**2)
        )
        measurement = [activation, factors.min_max(gradient, epsilon), one]
        if bias_gradient is not None:
            measurement.append(factors.min_max(bias_gradient, epsilon))
        return self._averaged(measurement, is_usable, gamma_1, gamma_2)

    def estimated(self, gradient, gamma_1, gamma_2):
        """The values of `variables` after an estimate from a gradient.

        Args:
            gradient: The gradient of the block's weight.
            gamma_1, gamma_2: See `AdaFisher`.

        Returns:
            List of tensors. The old values if the gradient is zero, as that of
            an unused weight, or isn't finite.
        """
        estimate = self.block.estimate_from_gradient(gradient)
        is_usable = ops.logical_and(
            ops.any(gradient != 0), factors.is_finite(*estimate)
        )
        # Its scale is arbitrary. So there is no `epsilon` to add, and nothing
        # to compare the bias' input 1 with: it counts as the largest.
        measurement = [*map(factors.min_max, estimate), ops.ones(())]
        if self.block.bias_gradient_shape is not None:
            measurement.append(ops.zeros(self.block.bias_gradient_shape))
        return self._averaged(measurement, is_usable, gamma_1, gamma_2)

    def _averaged(self, measurement, is_usable, gamma_1, gamma_2):
        values = []
        for variable, new in zip(self.variables, measurement, strict=False):
            old = ops.convert_to_tensor(variable)
            new = factors.running_average(old, new, gamma_1, gamma_2)
            new = ops.where(is_usable, new, old)
            values.append(backend.keep_layout(new, variable))
        return values
