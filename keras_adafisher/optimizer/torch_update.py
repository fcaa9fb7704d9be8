"""AdaFisher's update on PyTorch: a few kernels for all variables together.

PyTorch runs eagerly, and an operation on a small tensor costs as much as the
call. So its multi-tensor operations do for lists of tensors what
`AdaFisher.update_step` says for one, as Keras' own optimizers do it.
"""

import collections

import keras
import torch
from keras import ops

# Not public, but there is no other way to tell: a stateless call must leave the
# tensors that it is given as they are.
from keras.src.backend.common.stateless_scope import in_stateless_scope

from keras_adafisher.backend.torch import count_up
from keras_adafisher.backend.torch import step_number
from keras_adafisher.optimizer import update_rule
from keras_adafisher.optimizer.torch_diagonals import denominators_of
from keras_adafisher.optimizer.torch_diagonals import ScaledFactors

# Entries that are updated together, so that denominators take little memory.
# On a CPU they should fit into its cache, and lists save less.
_BATCH_SIZE = {"cpu": 2**17}
_OTHER_BATCH_SIZE = 2**26


class TorchUpdateMixin:
    """What `AdaFisher` overrides of `keras.optimizers.Optimizer`."""

    # What the probes know: `TorchProbe.is_requested`.
    _has_requested = True
    # `ScaledFactors`, once there was an update that needs them.
    _scaled_factors = None

    def apply(self, grads, trainable_variables=None):
        step_number(self._iterations)
        before = self._iterations.adafisher_number
        super().apply(grads, trainable_variables)
        count_up(self._iterations, before)
        self._tell_compiled_functions()

    def _tell_compiled_functions(self):
        """Say on all probes whether the next step is to measure."""
        if in_stateless_scope() or not self.built:
            return
        requests = self.measures_factors()
        if requests == self._has_requested:
            return
        self._has_requested = requests
        for factors in self._store.block_factors:
            probe = factors.probe
            probe.is_requested = probe.is_requested_outside_of_steps()

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if in_stateless_scope() or self._has_own_update_step():
            self._prepare_updates(grads, trainable_variables)
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
            return
        with torch.no_grad():
            indices = [
                self._get_variable_index(variable)
                for variable in trainable_variables
            ]
            # As the momentums: `model.double()` changes only what is PyTorch's
            # of a variable.
            grads = [
                _to_tensor(gradient, self._momentums[index].value.dtype)
                for index, gradient in zip(indices, grads, strict=True)
            ]
            self._prepare_updates(grads, trainable_variables)
            if self._mean_squares is not None:
                self._scale_factors()
            if _can_be_read(learning_rate):
                learning_rate = float(learning_rate)
            else:
                learning_rate = ops.convert_to_tensor(learning_rate)
            # Lists of one dtype on one device are what is fast.
            groups = collections.defaultdict(list)
            for index, gradient, variable in zip(
                indices, grads, trainable_variables, strict=True
            ):
                value = variable.value
                has_direction = index in self._update.directions
                is_factored = bool(self._fishers[index])
                kind = has_direction, is_factored
                groups[kind, value.dtype, value.device].append(
                    (index, value, gradient)
                )
            for (kind, _, device), group in groups.items():
                has_direction, is_factored = kind
                rate = learning_rate
                if not has_direction:
                    rate = self._own_learning_rate(rate)
                if isinstance(rate, torch.Tensor):
                    rate = rate.to(device)
                for batch in _batches(group, device):
                    if has_direction:
                        self._move_batch(*batch, rate)
                    else:
                        self._update_batch(is_factored, *batch, rate)

    def _move_batch(self, indices, values, gradients, learning_rate):
        """Move along the directions that are computed already."""
        self._advance_momentums(indices, gradients)
        steps = [self._update.directions[index] for index in indices]
        if steps[0] is None:
            # All kernels rest in this update.
            return
        steps = torch._foreach_mul(steps, learning_rate)
        steps = [step.to(values[0].dtype) for step in steps]
        torch._foreach_sub_(values, steps)

    def _scale_factors(self):
        """Multiply the factors by the size of this update's gradients."""
        roots = self._mean_squares.roots(self._update.number, self.adam_epsilon)
        factored = next(filter(None, self._fishers))
        vector = factored.vector.value
        scaled = self._scaled_factors
        if scaled is None or scaled.vector is not vector:
            scaled = ScaledFactors(
                vector, [self._fishers[i] for i in self._mean_squares.places]
            )
            self._scaled_factors = scaled
        scaled.update(roots / self._correction(), self.damping)

    def _update_batch(
        self, is_factored, indices, values, gradients, learning_rate
    ):
        momentums = self._advance_momentums(indices, gradients)
        size = self._correction()
        if not is_factored:
            velocities = [self._velocities[index].value for index in indices]
            torch._foreach_mul_(velocities, self.adam_beta_2)
            torch._foreach_addcmul_(
                velocities, gradients, gradients, 1 - self.adam_beta_2
            )
            size *= (1 - self.adam_beta_2 ** self._step_now()) ** 0.5
        is_bounded = is_factored and self._mean_squares is not None
        if is_bounded:
            places = [self._mean_squares.places[index] for index in indices]
        fishers = [self._fishers[index] for index in indices]
        for cut, value in _parts(values, fishers):
            momentum, gradient = _sliced(cut, momentums, gradients)
            if is_bounded:
                denominator = self._scaled_factors.denominators(places, cut)
            elif is_factored:
                denominator = denominators_of(fishers, self.damping, cut)
            else:
                (velocity,) = _sliced(cut, velocities)
                denominator = torch._foreach_sqrt(velocity)
                torch._foreach_add_(denominator, self.adam_epsilon)
            if self.nesterov:
                # The momentum as the next step would have it.
                momentum = torch._foreach_lerp(
                    momentum, gradient, 1 - self.beta
                )
            if is_bounded:
                _bounded_step(value, momentum, denominator, learning_rate)
            else:
                _step(value, momentum, denominator, learning_rate, size)

    def _advance_momentums(self, indices, gradients):
        momentums = [self._momentums[index].value for index in indices]
        torch._foreach_lerp_(momentums, gradients, 1 - self.beta)
        return momentums

    def _step_now(self):
        """The number of this update, counted from 1."""
        return update_rule.past_the_largest(self._update.number + 1)

    def _correction(self):
        """What the momentum is multiplied by, as an average from zero on."""
        step = self._step_now()
        return 1 / (1 - self.beta ** (step + 1 if self.nesterov else step))

    def _backend_reset_gradient_accumulators(self):
        if in_stateless_scope():
            super()._backend_reset_gradient_accumulators()
            return
        with torch.no_grad():
            torch._foreach_zero_([v.value for v in self._accumulated_gradients])

    def _backend_increment_gradient_accumulators(self, grads, acc_grads):
        if in_stateless_scope():
            super()._backend_increment_gradient_accumulators(grads, acc_grads)
            return
        with torch.no_grad():
            values = [v.value for v in acc_grads]
            grads = [
                _to_tensor(gradient, value.dtype)
                for gradient, value in zip(grads, values, strict=True)
            ]
            torch._foreach_add_(values, grads)

    def _mean_squares_of_quotients(self, gradients, fishers):
        groups = collections.defaultdict(list)
        for place, gradient in enumerate(gradients):
            groups[gradient.dtype, gradient.device].append((place, gradient))
        norms = {}
        for (_, device), group in groups.items():
            for places, batch in _batches(group, device):
                batch_fishers = [fishers[place] for place in places]
                parts = [
                    _norms_of_quotients(part, batch_fishers, self.damping, cut)
                    for cut, part in _parts(batch, batch_fishers)
                ]
                if len(parts) > 1:
                    # Those of the parts of one large tensor.
                    parts = [[torch.stack([norm for (norm,) in parts]).norm()]]
                norms.update(zip(places, *parts, strict=True))
        norms = [norms[place] for place in range(len(gradients))]
        roots = [gradient.numel() ** 0.5 for gradient in gradients]
        # In single precision, whatever the gradients are in.
        means = torch._foreach_div(norms, roots)
        squares = torch._foreach_mul(means, means)
        return torch.stack([square.float() for square in squares])


def _norms_of_quotients(gradients, fishers, damping, cut):
    denominators = denominators_of(fishers, damping, cut)
    return torch._foreach_norm(torch._foreach_div(gradients, denominators))


def _step(values, momentums, denominators, learning_rate, size):
    """Move values by `-learning_rate * size * momentum / denominator`."""
    if isinstance(learning_rate, float):
        size *= learning_rate
    else:
        # Half precision has no room for the quotient.
        dtype = torch.promote_types(denominators[0].dtype, torch.float32)
        denominators = [d.to(dtype) for d in denominators]
        torch._foreach_div_(denominators, learning_rate.to(dtype))
    torch._foreach_addcdiv_(values, momentums, denominators, value=-size)


def _bounded_step(values, momentums, denominators, learning_rate):
    """The same for a size of 1, but no entry by more than the learning rate."""
    steps = torch._foreach_div(momentums, denominators)
    torch._foreach_clamp_max_(steps, 1)
    torch._foreach_clamp_min_(steps, -1)
    if isinstance(learning_rate, float):
        torch._foreach_add_(values, steps, alpha=-learning_rate)
    else:
        torch._foreach_mul_(steps, learning_rate)
        torch._foreach_sub_(values, steps)


def _to_tensor(gradient, dtype):
    if not isinstance(gradient, torch.Tensor):
        gradient = ops.convert_to_tensor(gradient)
    return gradient.to(dtype)


def _batches(group, device):
    """Cut a list into lists of indices, values and gradients."""
    limit = _BATCH_SIZE.get(device.type, _OTHER_BATCH_SIZE)
    batch, total = [], 0
    # So that all small ones are in one.
    for entry in sorted(group, key=lambda entry: entry[1].numel()):
        size = entry[1].numel()
        if batch and total + size > limit:
            yield zip(*batch, strict=True)
            batch, total = [], 0
        batch.append(entry)
        total += size
    yield zip(*batch, strict=True)


def _parts(tensors, fishers):
    """Cut a batch into parts, so that what is temporary takes little memory.

    A large tensor is the only one of its batch.

    Yields:
        A slice of the tensor's first axis, `None` if nothing is cut, and the
        list of what it cuts out of the tensors.
    """
    is_cut = len(tensors) == 1 and fishers[0].takes_slices
    for cut in _slices(tensors[0]) if is_cut else [None]:
        (part,) = _sliced(cut, tensors)
        yield cut, part


def _slices(tensor):
    """Slices of a large tensor's first axis. `[None]`: it needn't be cut."""
    limit = _BATCH_SIZE.get(tensor.device.type, _OTHER_BATCH_SIZE)
    if tensor.numel() <= limit:
        return [None]
    size = max(limit * len(tensor) // tensor.numel(), 1)
    return [slice(i, i + size) for i in range(0, len(tensor), size)]


def _sliced(cut, *lists):
    """A slice of all tensors in some lists, which have one each."""
    if cut is None:
        return lists
    return [[tensor[cut] for tensor in tensors] for tensors in lists]


def _can_be_read(learning_rate):
    """Whether a learning rate can be read without waiting for a device."""
    if isinstance(learning_rate, keras.Variable):
        learning_rate = learning_rate.value
    if isinstance(learning_rate, torch.Tensor):
        return learning_rate.device.type == "cpu"
    return True
