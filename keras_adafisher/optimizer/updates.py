"""What happens in a step: from the gradients to the parameters."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_adafisher import backend
from keras_adafisher import steps
from keras_adafisher.aliases import Tensor
from keras_adafisher.factors.block_factors import FisherDiagonal
from keras_adafisher.factors.store import FactorStore
from keras_adafisher.optimizer import arguments
from keras_adafisher.optimizer import update_rule
from keras_adafisher.optimizer.update_rms import UpdateRMS
from keras_adafisher.probe import probe_of
from keras_adafisher.probe import probes_of
from keras_adafisher.probe import with_probes


@dataclasses.dataclass
class _Update:
    """What the methods that Keras calls from `apply` know of it.

    Attributes:
        number: The number of this update, counted from 0.
        is_measuring: Bool or boolean tensor, whether the factors are measured.
        rates: Dict of what several parameters' steps are multiplied by, so that
            it is computed once.
        directions: Dict from a parameter's number to what is subtracted from
            it but for the learning rate, of those that are orthogonalized.
            `None` if they are known to rest.
        unmeasured: Set of the ids of `BlockFactors` that nothing was measured
            of in this update, so that the weight's gradient has to do.
    """

    number: object
    is_measuring: object = False
    rates: dict = dataclasses.field(default_factory=dict)
    directions: dict = dataclasses.field(default_factory=dict)
    unmeasured: set = dataclasses.field(default_factory=set)


class Updates:
    """The part of `AdaFisher` that Keras calls in a step."""

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Initialize optimizer variables.

        AdaFisher optimizer has 5 types of variables: momentums, velocities
        (for each parameter without factors), the running factors and how often
        they were measured (of all factored layers), and mean squares (of all
        parameters that take AdaFisher's own step). AdaFisherMuon has a sixth,
        the roots that are kept.

        Args:
            variables: list of model variables to build AdaFisher variables
                on, `model.trainable_variables` of a wrapped model.

        Raises:
            TypeError: `variables` is anything else.
        """
        if self.built:
            return
        variables = arguments.list_of_variables(variables)
        probes = probes_of(variables)
        if variables and not probes:
            warnings.warn(
                "AdaFisher found Kronecker factors for none of the "
                f"{len(variables)} variables that it is built with, and will "
                "update them by AdamW's rule. In a custom training loop, call "
                "`keras_adafisher.wrap(model)` first and pass "
                "`model.trainable_variables`. "
                "`keras_adafisher.coverage(model)` shows which layers of a "
                "model can be factored.",
                stacklevel=2,
            )
        # On JAX, lists have the probes too in a training step, behind the
        # others.
        variables = [v for v in variables if probe_of(v) is None]
        weight_count = len(variables)
        variables = with_probes(variables)
        backend.check_same_strategy(variables, self._iterations)
        super().build(variables)

        self._weight_count = weight_count
        self._momentums = self.add_optimizer_variables(variables, "momentum")
        self._store = FactorStore(
            probes,
            self.normalization,
            bool(self.gradient_accumulation_steps),
            self.add_variable,
        )
        for probe in probes:
            probe.add_optimizer(self)
        # Without one, AdamW's rule.
        self._fishers = [FisherDiagonal(self._store.vector) for _ in variables]
        # While `apply` runs.
        self._update = None
        for factors in self._store.block_factors:
            for parameter, *term in factors.terms():
                index = self._index_of(parameter)
                if index is None:
                    continue
                fisher = self._fishers[index]
                fisher.add(*term)
                if parameter is factors.block.weight:
                    fisher.factors_of_weight.append(factors)
        add_variable = functools.partial(
            self.add_variable,
            dtype="float32",
            # All replicas write the same value.
            aggregation="only_first_replica",
        )
        self._orthogonal = self._make_orthogonal_steps(variables, add_variable)
        orthogonalized = self._orthogonal.kernels if self._orthogonal else {}
        self._velocities = [None] * len(variables)
        factored = []
        for index, variable in enumerate(variables):
            if self._momentums[index] is None or index in orthogonalized:
                continue
            if self._fishers[index]:
                factored.append(index)
            else:
                self._velocities[index] = self.add_variable_from_reference(
                    variable, name="velocity"
                )
        self._mean_squares = None
        if factored and self.rms_decay is not None:
            self._mean_squares = UpdateRMS(
                factored,
                self,
                functools.partial(
                    add_variable,
                    layout=backend.replicated_layout(variables[factored[0]]),
                ),
            )

        if self.use_ema:
            # Keras has `None` in the place of a probe's average, and wants as
            # many as there are variables of the model. (A new list: TensorFlow
            # exports no model with a list that something was deleted from.)
            averages = self._model_variables_moving_average
            self._model_variables_moving_average = averages[:weight_count]

    def apply(
        self,
        grads: Sequence[Tensor],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> Any:
        """Update trainable variables according to provided gradient values.

        Args:
            grads: list of gradient tensors. In a training step on JAX, those
                of the probes are included.
            trainable_variables: list of the variables that the gradients
                belong to. Defaults to the list that the optimizer was built
                with.

        Raises:
            ValueError: There aren't as many gradients as variables, or the
                optimizer wasn't built with one of these.
        """
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                self.build(trainable_variables)
        elif self.built and len(grads) in (
            self._weight_count,
            len(self._trainable_variables),
        ):
            trainable_variables = self._trainable_variables[: len(grads)]
        if trainable_variables is None or len(grads) == 0:
            # Nothing to do, or Keras' own error.
            super().apply(grads, trainable_variables)
            return
        if len(grads) != len(trainable_variables):
            # What sums up gradients by hand was made outside of a step, with
            # one sum for each weight.
            weights = [v for v in trainable_variables if probe_of(v) is None]
            if len(grads) == len(weights):
                trainable_variables = weights
        if len(grads) != len(trainable_variables):
            raise ValueError(
                "Argument `grads` of `apply` must have one gradient for each "
                f"of the {len(trainable_variables)} variables. "
                f"Received: {len(grads)} gradients"
            )

        under_way = steps.current()
        if under_way is not None:
            under_way.count_apply(self)

        # Keras' part of the work (clipping, weight decay, accumulation,
        # averages, all-reduce) never sees a probe.
        gradients = {}
        parameters = []
        parameter_grads = []
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            gradients[id(variable)] = gradient
            if probe_of(variable) is None:
                parameters.append(variable)
                parameter_grads.append(gradient)

        if any(self._index_of(variable) is None for variable in parameters):
            # Keras' own error, before the factors have changed.
            super().apply(parameter_grads, parameters)
            return
        if len(parameters) < self._weight_count:
            self._warn_of_turns(parameters)

        # Read before `super().apply` increments it, and for the update too.
        step = backend.step_number(self._iterations)
        is_plain = steps.mode() == "plain"
        self._update = _Update(
            number=self._updates_before(step),
            is_measuring=not is_plain and self._is_measuring(step),
        )
        try:
            self._update_factors(gradients, step)
            for factors in self._store.block_factors:
                factors.probe.clear_answer()
            super().apply(parameter_grads, parameters)
        finally:
            # No tensor of a trace that failed stays here.
            self._update = None
            self._store.release()

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Tensor],
        grads: Sequence[Tensor],
        trainable_variables: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Stateless version of `apply` that returns modified variables.

        Args:
            optimizer_variables: list of tensors, the values of `variables`.
            grads: list of gradients, one for each of `trainable_variables`.
            trainable_variables: list of tensors, the values of the variables
                that the optimizer was built with, and in a training step those
                of the probes.

        Returns:
            A tuple of two lists of tensors, the updated `trainable_variables`
            and the updated `optimizer_variables`.
        """
        count = self.built and len(self._trainable_variables)
        if count and len(trainable_variables) == self._weight_count < count:
            # Outside of a training step there are no probes.
            missing = count - self._weight_count
            probes = self._trainable_variables[self._weight_count :]
            weights, others = super().stateless_apply(
                optimizer_variables,
                [*grads, *[None] * missing],
                [*trainable_variables, *probes],
            )
            return weights[:-missing], others
        return super().stateless_apply(
            optimizer_variables, grads, trainable_variables
        )

    def _prepare_updates(self, grads, variables):
        """Take in what gradients say, before any parameter is updated.

        Keras has accumulated and clipped them, and summed them over replicas.

        Args:
            grads: List of tensors.
            variables: List of the variables that they belong to.
        """
        gradients = {}
        unmeasured = {}
        for gradient, variable in zip(grads, variables, strict=True):
            index = self._get_variable_index(variable)
            if self._fishers[index]:
                gradients[index] = gradient
            for factors in self._fishers[index].factors_of_weight:
                if id(factors) in self._update.unmeasured:
                    unmeasured[id(factors)] = gradient
                    factors.is_estimated = True
        store = self._store

        def estimated():
            estimates = store.join_estimates(unmeasured)
            return store.updated(
                estimates, 1.0, 0.0, self.gamma_1, self.gamma_2
            )

        if unmeasured:
            self._assign_if(
                self._update.is_measuring, store.variables[:2], estimated
            )

        store.hold()
        update = self._update.number
        orthogonalized = {}
        if self._orthogonal is not None:
            for index in self._orthogonal.kernels:
                if index in gradients:
                    orthogonalized[index] = gradients.pop(index)

        def averaged():
            found = self._mean_squares_of_quotients(
                [
                    self._weighted(index, gradient)
                    for index, gradient in gradients.items()
                ],
                [self._fishers[index] for index in gradients],
            )
            return [self._mean_squares.averaged(found, list(gradients), update)]

        if gradients and self._mean_squares is not None:
            self._assign_if(
                self._measures_steps(update),
                [self._mean_squares.variable],
                averaged,
            )
        if orthogonalized:
            self._update.directions = self._find_directions(
                orthogonalized, update
            )

    def update_step(
        self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor
    ) -> None:
        """Update step given gradient and the associated model variable."""
        index = self._get_variable_index(variable)
        dtype = keras.backend.result_type(variable.dtype, "float32")
        directions = self._directions()
        if index not in directions:
            learning_rate = self._own_learning_rate(learning_rate)
        lr = ops.cast(learning_rate, dtype)
        gradient = ops.cast(gradient, variable.dtype)

        momentum, m = self._next_momentum(index, gradient)
        self.assign(self._momentums[index], momentum)

        is_factored = bool(self._fishers[index])
        if index in directions:
            direction = directions[index]
            if direction is None:
                return
            step = lr * ops.cast(direction, dtype)
        elif is_factored and self._mean_squares is not None:
            step = update_rule.quotient(
                m, self._rate(index, dtype), self._fisher(index)
            )
            step = lr * update_rule.bounded(step)
        elif is_factored:
            rate = lr * self._rate(index, dtype)
            step = update_rule.quotient(m, rate, self._fisher(index))
        else:
            # AdamW's rule, with Keras' placement of epsilon.
            v = self._velocities[index]
            velocity = update_rule.momentum(
                ops.convert_to_tensor(v), ops.square(gradient), self.adam_beta_2
            )
            self.assign(v, velocity)
            step = update_rule.quotient(
                m,
                lr * self._rate(index, dtype),
                ops.sqrt(velocity) + self.adam_epsilon,
            )
        self.assign_sub(variable, ops.cast(step, variable.dtype))

    def _directions(self):
        return {} if self._update is None else self._update.directions

    def _next_momentum(self, index, gradient):
        """A parameter's new momentum, and the one that its step is along."""
        old = ops.convert_to_tensor(self._momentums[index])
        gradient = ops.cast(gradient, old.dtype)
        new = update_rule.momentum(old, gradient, self.beta)
        if not self.nesterov:
            return new, new
        return new, update_rule.momentum(new, gradient, self.beta)

    def _momentums_of_steps(self, indices, gradients):
        """The momentums of some parameters, as `update_step` will have them.

        Args:
            indices: List of their numbers.
            gradients: List of tensors.
        """
        found = [ops.convert_to_tensor(self._momentums[i]) for i in indices]
        gradients = [
            ops.cast(gradient, momentum.dtype)
            for gradient, momentum in zip(gradients, found, strict=True)
        ]
        for _ in range(1 + bool(self.nesterov)):
            found = update_rule.momentums(found, gradients, self.beta)
        return found

    def _rate(self, index, dtype):
        """What a parameter's quotients are multiplied by, a scalar.

        But for the learning rate. It corrects for averages that start at zero
        and, with `rms_decay`, divides by the root mean square of the quotients.
        """
        # The same for many variables: made once in each `apply`.
        made = {} if self._update is None else self._update.rates
        is_factored = bool(self._fishers[index])
        key = is_factored, dtype
        if key not in made:
            step = update_rule.past_the_largest(
                ops.cast(self.iterations + 1, dtype)
            )
            rate = update_rule.momentum_correction(
                ops.cast(self.beta, dtype), step, self.nesterov
            )
            if not is_factored:
                decay = ops.cast(self.adam_beta_2, dtype)
                rate = rate * ops.sqrt(1 - ops.power(decay, step))
            elif self._mean_squares is not None:
                # Divided by what corrects the momentum, all that is one number
                # for all parameters is found in one kernel.
                roots = self._mean_squares.roots(
                    self.iterations,
                    self.adam_epsilon,
                    ops.cast(rate, "float32"),
                )
                rate = backend.entries(1 / ops.cast(roots, dtype))
            made[key] = rate
        rate = made[key]
        if is_factored and self._mean_squares is not None:
            rate = self._mean_squares.of(rate, index)
        return rate

    def _fisher(self, index):
        return self._fishers[index]() + self.damping

    def _index_of(self, variable):
        try:
            return self._get_variable_index(variable)
        # The latter on TensorFlow, for what is no variable.
        except (KeyError, AttributeError):
            return None

    def _has_own_update_step(self):
        """Whether a subclass has another rule than this class."""
        return type(self).update_step is not Updates.update_step
