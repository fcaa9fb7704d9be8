"""When the factors are measured, and what is done with a measurement."""

import math
import sys
import warnings
import weakref
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Sequence

import keras
from keras import ops

from keras_adafisher import backend
from keras_adafisher import steps
from keras_adafisher.aliases import Tensor
from keras_adafisher.optimizer.update_rms import are_measured
from keras_adafisher.probe import BackendProbe
from keras_adafisher.probe import Probe
from keras_adafisher.probe import probes_at


class Measuring:
    """The part of `AdaFisher` that takes in what the probes answer."""

    def measures_factors(self) -> bool | Tensor:
        """Whether the factors are measured at the step that comes next.

        Returns:
            Bool or boolean tensor.
        """
        return self._is_measuring(backend.step_number(self._iterations))

    def measures_anything(self) -> bool | Tensor:
        """Whether anything is measured at the step that comes next.

        The factors, with `rms_decay` the size of the steps, or what kept roots
        are made from.

        Returns:
            Bool or boolean tensor.
        """
        step = backend.step_number(self._iterations)
        update = self._updates_before(step)
        orthogonal = self._orthogonal
        # Where kernels rest at some updates, roots have a condition of their
        # own, inside of that for the kernels.
        makes_roots = (
            orthogonal is not None
            and orthogonal.roots
            and orthogonal.moves_at(update) is True
        )
        if self._mean_squares is None and not makes_roots:
            return self._is_measuring(step)
        return self._measures_steps(update)

    def leave(self, probes: Iterable[Probe]) -> None:
        """Ask some probes for nothing more: another optimizer has come.

        Args:
            probes: List of `Probe`s.
        """
        for probe in probes:
            probe.remove_optimizer(self)

    def measuring_probes(self) -> list[Probe]:
        """List of the probes that the optimizer measures with.

        There is none before it is built.
        """
        if not self.built:
            return []
        return [factors.probe for factors in self._store.block_factors]

    def trains_only(self, known: Collection[int]) -> bool:
        """Whether all weights that the optimizer trains are known.

        Args:
            known: Set of the ids of variables.
        """
        weights = self._trainable_variables[: self._weight_count]
        return all(id(w) in known for w in weights if w.trainable)

    def check_that_layers_are_wrapped(self) -> None:
        """Raise a `ValueError` if `unwrap` has taken the wrappers off.

        Then nothing would be measured any more, and the factors would stay.
        """
        if not self.built:
            return
        lost = [
            factors.block.parameters[0].path
            for factors in self._store.block_factors
            if factors.probe not in probes_at(factors.block.parameters[0])
        ]
        if lost:
            raise ValueError(
                f"Optimizer '{self.name}' measures for {', '.join(lost)}, but "
                "the layers aren't wrapped any more. Call `model.compile` with "
                "a new optimizer before you train on."
            )

    def set_loss_scale(self, variable: keras.Variable) -> None:
        """Say by what the loss is multiplied, beside `loss_scale_factor`.

        A `LossScaleOptimizer` does so when it is built.

        Args:
            variable: `keras.Variable`.
        """
        # A reference, which Keras doesn't take for a variable of this one's.
        self._loss_scale = weakref.ref(variable)

    def records_of(self, probe: Probe) -> tuple[float, float, bool] | None:
        """What has become of a block's measurements.

        Args:
            probe: The block's `Probe`.

        Returns:
            Tuple of two floats, how many the factors have taken in and how many
            they have dropped, and of a bool, whether the last one was an
            estimate from the weight's gradient. `None` if the optimizer has no
            factors of the block.
        """
        for number, factors in enumerate(self._store.block_factors):
            if factors.probe is probe:
                taken, dropped = self._store.counts()[:, number]
                return float(taken), float(dropped), factors.is_estimated
        return None

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        """Set the final value of model's trainable variables.

        `fit` calls it at its end. It warns if there are layers of which no
        measurement could be used, or nothing was measured though they train.

        Args:
            var_list: list of model variables.
        """
        super().finalize_variable_values(var_list)
        # After an error, variables may have no values on JAX.
        has_failed = sys.exc_info()[0] is not None
        if has_failed or not self.built or not self._store.block_factors:
            return
        counts = list(
            zip(self._store.block_factors, *self._store.counts(), strict=True)
        )
        self._warn_of_dropped(
            [f for f, taken, dropped in counts if dropped > taken]
        )
        self._warn_of_trained(
            [f for f, taken, dropped in counts if taken == dropped == 0]
        )

    def _warn_of_dropped(self, unusable):
        """Warn once of blocks most of whose measurements were dropped.

        Args:
            unusable: List of their `BlockFactors`.
        """
        if unusable and not self._has_warned_of_dropped:
            self._has_warned_of_dropped = True
            cause = "The loss may not be finite."
            if BackendProbe.is_listed:
                cause = (
                    "Either the loss isn't finite, or something changes "
                    "gradients before the optimizer gets them: noise, for "
                    "instance. Leave out the last of them then, those of "
                    "variables with `overwrite_with_gradient`."
                )
            warnings.warn(
                "AdaFisher has dropped most of what it measured for "
                f"{_paths(unusable)}, since it isn't finite or is negative, "
                f"which a mean square can't be. {cause}",
                stacklevel=3,
            )

    def _warn_of_trained(self, unmeasured):
        """Warn once of blocks that nothing is known of, though they train.

        Args:
            unmeasured: List of the `BlockFactors` that have taken in nothing.
        """
        # Before, the next measurement may not have come yet.
        updates = self._updates_before(ops.convert_to_numpy(self.iterations))
        has_measured = updates > self.factor_update_steps
        if self._has_warned_of_trained or not has_measured:
            return
        trained = []
        for factors in unmeasured:
            indices = map(self._index_of, factors.block.parameters)
            momentums = [self._momentums[i] for i in indices if i is not None]
            if any(
                ops.convert_to_numpy(ops.any(ops.not_equal(momentum, 0)))
                for momentum in momentums
            ):
                trained.append(factors)
        if trained:
            self._has_warned_of_trained = True
            warnings.warn(
                "AdaFisher has measured nothing so far for "
                f"{_paths(trained)}, which it trains: their Kronecker factors "
                f"are 1, as they began. {BackendProbe.HOW_TO_MEASURE}",
                stacklevel=3,
            )

    def _updates_before(self, step):
        if not self.gradient_accumulation_steps:
            # A division by 1 would be a kernel too on JAX.
            return step
        return step // self.gradient_accumulation_steps

    def _is_measuring(self, step):
        """Whether the factors are measured at a step, counted from 0."""
        if self.factor_update_steps == 1:
            return True
        return self._updates_before(step) % self.factor_update_steps == 0

    def _measures_steps(self, update):
        """Whether mean squares are measured."""
        return are_measured(update, self.factor_update_steps)

    def _update_factors(self, gradients, step):
        """Take in what the probes answered.

        Args:
            gradients: Dict from the id of a variable to its gradient.
            step: The number of this step, counted from 0.
        """
        measuring = self._update.is_measuring
        if measuring is False:
            return
        found = self._answers_by_probe(gradients)
        probes = [p for p in self.measuring_probes() if id(p) in found]
        count = self.gradient_accumulation_steps or 1
        is_first = count == 1 or backend.is_traced(step) or step % count == 0
        # Without an answer for any use of a weight, its gradient has to do.
        self._update.unmeasured = {
            id(factors)
            for factors in self._store.without_answer(found, is_first)
        }
        for factors in self._store.block_factors:
            if id(factors) not in self._update.unmeasured:
                factors.is_estimated = False
        self._warn_of_missing_answers(gradients)
        if not probes:
            return

        # All in one list, so that they can travel together.
        sums = BackendProbe.sum_over_replicas(
            probes, [found[id(probe)] for probe in probes], measuring
        )
        answered = dict(zip(map(id, probes), sums, strict=True))
        store = self._store

        # The scale of the loss is the scale of `s`.
        scale = self._loss_scale_now() * count

        def updated(total):
            return store.updated(
                total, scale, self.epsilon, self.gamma_1, self.gamma_2
            )

        def new_values():
            total = store.join(answered)
            if count == 1:
                return updated(total)
            is_last = (step + 1) % count == 0
            total, rest = store.add(total, is_last)
            values = backend.cond(
                is_last,
                lambda: updated(total),
                lambda: list(map(ops.convert_to_tensor, store.variables[:2])),
            )
            return [*values, rest]

        self._assign_if(measuring, store.variables, new_values)

    def _answers_by_probe(self, gradients):
        """Dict from the id of each probe that has answered to its answer."""
        found = {
            id(probe): probe.answer_in(gradients, self)
            for probe in self.measuring_probes()
        }
        return {key: found[key] for key in found if found[key] is not None}

    def _warn_of_missing_answers(self, gradients):
        """Warn once if no layer has reported what should have been seen.

        Args:
            gradients: See `_update_factors`.
        """
        if self._has_warned:
            return
        # Of several calls of `apply`, each may be for some of the weights.
        seen = [
            factors
            for factors in self._store.block_factors
            if factors.probe.is_seen
            and self._is_given(factors.block.parameters[0], gradients)
        ]
        if not seen:
            return
        if all(id(factors) in self._update.unmeasured for factors in seen):
            self._has_warned = True
            warnings.warn(
                "AdaFisher is at a step at which it measures its Kronecker "
                "factors, but no layer has reported anything. It estimates "
                "them from the weights' gradients. "
                + BackendProbe.HOW_TO_MEASURE,
                stacklevel=4,
            )

    @staticmethod
    def _is_given(parameter, gradients):
        # Keras takes variables of TensorFlow too.
        return (
            id(parameter) in gradients
            or id(backend.own_tensor(parameter)) in gradients
        )

    def _warn_of_turns(self, variables):
        """Warn once if lists take turns, and some are never measured.

        Args:
            variables: List of some of the parameters, which an update is for.
        """
        indices = map(self._get_variable_index, variables)
        new = frozenset(index for index in indices if self._fishers[index])
        if self._has_warned_of_turns or not new or new in self._applied_to:
            return
        # Lists that overlap are of what is frozen now and then.
        others = [known for known in self._applied_to if not known & new]
        self._applied_to = (*self._applied_to, new)
        count, interval = len(others) + 1, self.factor_update_steps
        if math.gcd(count, interval) == 1:
            return
        self._has_warned_of_turns = True
        warnings.warn(
            f"AdaFisher is applied to {count} lists of variables. If they take "
            f"turns, it never measures some of them with "
            f"`factor_update_steps={interval}`: each has every {count}th "
            f"update. Take a number that has no divisor in common with {count} "
            "(1 has none), or an optimizer for each list.",
            stacklevel=3,
        )

    def _loss_scale_now(self):
        """What the loss is multiplied by: a float or, if it varies, a tensor.

        Without `epsilon`, the normalization of the factors undoes it, and a
        scale that varies isn't read.
        """
        variable = self._loss_scale()
        if variable is None or not self.epsilon:
            return float(self.loss_scale_factor or 1)
        step = steps.current()
        if step is None:
            return ops.convert_to_tensor(variable)
        return step.value_of(variable)

    def _assign_if(self, condition, variables, new_values):
        """Set variables to what a function returns, or leave them."""
        if self._is_never(condition):
            return
        values = self._values_if(condition, variables, new_values)
        for variable, value in zip(variables, values, strict=True):
            self.assign(variable, value)

    def _values_if(self, condition, variables, new_values):
        """What a function returns, or the values that variables have."""
        if self._is_never(condition):
            return _present_values(variables)
        if steps.mode() == "measure" and condition is not True:
            # There is a condition already, around the whole step.
            pairs = zip(new_values(), _present_values(variables), strict=True)
            values = [ops.where(condition, new, old) for new, old in pairs]
            return _laid_out(values, variables)
        return values_in_branch(condition, variables, new_values)

    @staticmethod
    def _is_never(condition):
        """Whether a condition of measuring doesn't hold, whatever the step."""
        return condition is False or steps.mode() == "plain"


def values_in_branch(condition, variables, new_values):
    """What a function returns, or the values that variables have.

    Args:
        condition: Bool or boolean tensor. It has a branch of its own, also
            where there is a condition around the whole step.
        variables: List of variables.
        new_values: Function without arguments that returns as many tensors.

    Returns:
        List of tensors, laid out as the variables are.
    """

    def new():
        return _laid_out(new_values(), variables)

    if condition is True:
        return new()
    values = backend.cond(condition, new, lambda: _present_values(variables))
    return _laid_out(values, variables)


def _paths(several):
    """The names of some `BlockFactors`' weights, for a message."""
    return ", ".join(f.block.parameters[0].path for f in several)


def _present_values(variables):
    return _laid_out(map(ops.convert_to_tensor, variables), variables)


def _laid_out(values, variables):
    return list(map(backend.constrain_layout, values, variables))
