"""PyTorch's probes: tensors that keep gradients, in no list.

What a backward pass measures, a tap keeps on its probe. A wrapped module has
the `parameters()` and the `state_dict()` that it had before: optimizers of
PyTorch, `clip_grad_norm_` and `DistributedDataParallel` see nothing of a probe.

A condition on a tensor would make the host wait for the device, once per
layer and step. So the request is a Python value, and a step that doesn't
measure has no taps at all.
"""

import contextlib
import threading
import warnings

import torch
from keras import ops
from torch.nn.parallel import DistributedDataParallel

from keras_adafisher.backend.torch import kept_constant
from keras_adafisher.backend.torch import own_tensor
from keras_adafisher.probe.probe import Probe

# Whether this thread runs `TorchProbe.differentiate`.
_here = threading.local()


class TorchProbe(Probe):
    """Where one block reports what it measures, on PyTorch.

    Attributes:
        tensor: The tensor that has the gradient in a compiled function, in the
            place of a variable. No other list has it.
        answer: What was measured since the last update, or `None`: the number
            of the backward pass, and a list of the parts of the vector.
        process_group: The processes whose answers belong together, if any.
        is_requested: Bool, whether a compiled function measures.
    """

    HOW_TO_MEASURE = (
        "Call the wrapped model itself, not what `torch.jit.trace` or "
        "`torch.export` made of it, and not within a transform of "
        "`torch.func`. Use `loss.backward()` for what `torch.compile` has "
        "compiled."
    )

    def __init__(self, block, host, name="probe"):
        super().__init__(block, host, name)
        self.tensor = torch.zeros(
            self.size,
            device=block.parameters[0].value.device,
            requires_grad=True,
        )
        self.answer = None
        self.process_group = None
        self.is_requested = True

    def _make_variable(self, name):
        return None

    def add_optimizer(self, optimizer):
        super().add_optimizer(optimizer)
        # It measures at its first step, whatever another one has said.
        self.is_requested = True

    def is_requested_outside_of_steps(self):
        # A custom loop needs no decorator here.
        if torch.compiler.is_compiling():
            # A compiled function is made anew when a Python value has changed
            # that it depends on. Weak references can't be followed there.
            return self.is_requested
        optimizers = self.optimizers
        return not optimizers or any(o.measures_factors() for o in optimizers)

    def identity(self, z, h, request):
        # On the "meta" device, Keras infers shapes. There is nothing to
        # measure.
        if z.is_meta or _is_transformed():
            return z
        # What probes measure is summed up in `sum_over_replicas`. No public
        # name tells which processes take part. A checkpoint runs the layer
        # twice: here, maybe without gradients, and in the backward pass, where
        # no module is active.
        active = DistributedDataParallel._active_ddp_module
        if active is not None:
            self.process_group = active.process_group
        if not torch.is_grad_enabled():
            return z
        if active is not None:
            _check_not_joining(active)
        h = ops.convert_to_tensor(h)
        differentiates = getattr(_here, "differentiates", False)
        if torch.compiler.is_compiling() or differentiates:
            with torch.no_grad():
                first = self.measure_activations(h)
            # The parameters may have moved.
            tensor = self.tensor.to(z.device)
            return _TapWithGradient.apply(z, tensor, first, self)
        if not z.requires_grad:
            return z
        for variable in self.block.parameters:
            parameter = own_tensor(variable)
            if parameter.requires_grad:
                # In a list `h` is no input that autograd has to look after.
                return _Tap.apply(z, parameter, [h], self)
        return z

    @staticmethod
    def one_call(x):
        if torch.compiler.is_compiling():
            return torch.ones(1, device=x.device)
        return kept_constant(1.0, (1,), x.device)

    def answer_in(self, gradients, optimizer):
        _, parts = self.answer or (None, None)
        # What a compiled function has measured.
        gradient = self.tensor.grad
        if parts is None:
            return None if gradient is None else [gradient]
        return parts if gradient is None else [torch.cat(parts) + gradient]

    def clear_answer(self):
        self.process_group = None
        self.answer = None
        self.tensor.grad = None

    def keep(self, parts):
        """Add an answer to those that the probe has.

        Args:
            parts: List of vectors, the parts of the answer.
        """
        # The number of this backward pass: no public name tells one from
        # another.
        now = torch._C._current_graph_task_id()
        last, earlier = self.answer or (now, None)
        if earlier is not None and last != now:
            earlier = self._unless_cleared(earlier)
        if earlier is not None:
            parts = [torch.cat(earlier) + torch.cat(parts)]
        self.answer = now, parts

    def _unless_cleared(self, earlier):
        """What earlier passes have left here, if it still counts.

        Gradients add up until somebody clears them. `zero_grad()` doesn't know
        a probe. But if it has cleared those of the parameters, for instance
        after a step that was skipped, then an earlier answer is outdated too.
        """
        gradients = [p.value.grad for p in self.block.parameters]
        gradients = [g for g in gradients if g is not None]
        if not gradients:
            return None
        # `zero_grad(set_to_none=False)` leaves zeros. Reading them would make
        # the host wait for the device.
        is_kept = torch.stack([g.any() for g in gradients]).any()
        return [torch.where(is_kept, part, 0.0) for part in earlier]

    @staticmethod
    def join(answers):
        parts = []
        for answer in answers:
            parts += answer if isinstance(answer, list) else [answer]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def sum_over_replicas(probes, answers, wanted):
        group = next((p.process_group for p in probes if p.process_group), None)
        if group is None:
            _warn_of_processes()
            return answers
        # One transfer for all.
        sizes = [probe.size for probe in probes]
        flat = TorchProbe.join(answers)
        torch.distributed.all_reduce(flat, group=group)
        # The loss of a process is the mean over its own part of the batch, and
        # `DistributedDataParallel` averages the gradients. So `s` is larger
        # than that of the whole batch by the number of processes.
        scale = torch.distributed.get_world_size(group) ** 2
        for probe, answer in zip(probes, flat.split(sizes), strict=True):
            answer[sum(probe.sizes[:2]) :] /= scale
        return list(flat.split(sizes))

    @staticmethod
    def differentiate(compute_loss, data, probes, variables):
        with torch.enable_grad(), _answers_are_gradients():
            loss = compute_loss(*data)
        if not probes or not loss.requires_grad:
            # There are no taps, or none of them was reached.
            return [None for _ in probes]
        # Not `backward()`, which leaves gradients on the tensors.
        tensors = [probe.tensor for probe in probes]
        return torch.autograd.grad(loss, tensors, allow_unused=True)


def _is_transformed():
    """Whether something else is made of the computation than a training step.

    Measuring makes no sense there. In a transform of `torch.func`, tensors
    stand for many, and in a trace, for those of other calls.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return True
    # No public name tells. `torch.autograd.Function` asks in the same way.
    return torch._C._are_functorch_transforms_active()


def _check_not_joining(module):
    """Refuse what would wait for other processes for ever.

    Args:
        module: The `DistributedDataParallel` that runs.
    """
    # Not public. A process that has run out of batches answers the transfers of
    # the module, and nobody answers those of what probes measure.
    if module._join_config.enable:
        raise RuntimeError(
            "AdaFisher can't measure its Kronecker factors in "
            "`DistributedDataParallel.join()`, since a process that has joined "
            "doesn't measure any more. Give all processes as many batches, as "
            "`torch.utils.data.DistributedSampler(..., drop_last=True)` does, "
            "and train without `join()`."
        )


def _warn_of_processes():
    """Warn who may average gradients, but not what is measured."""
    if not torch.distributed.is_available():
        return
    if not torch.distributed.is_initialized():
        return
    count = torch.distributed.get_world_size()
    if count > 1:
        # Once: the filters of `warnings` know where it comes from.
        warnings.warn(
            f"There are {count} processes, but the model wasn't called through "
            "`torch.nn.parallel.DistributedDataParallel`. So AdaFisher "
            "measures Kronecker factors of this process' batches only. If "
            "processes average their gradients by other means, their weights "
            "will differ. If each trains a model of its own, all is well.",
            stacklevel=2,
        )


class _Tap(torch.autograd.Function):
    """An identity that keeps what it measures on the probe.

    As a list of the parts of the vector, so that those of all probes are joined
    by one operation.
    """

    # With a `setup_context`, PyTorch inspects a signature at each call, which
    # takes longer than all else here. Only `torch.func` needs one.
    @staticmethod
    def forward(ctx, z, parameter, h, probe):
        ctx.first = probe.activation_parts(*h)
        ctx.probe = probe
        # For autograd this is no view, so that it may be changed in place. It
        # shares the counter of changes with `z`.
        return z.detach()

    @staticmethod
    def backward(ctx, s):
        # The tap takes the parameter for this: it is no measurement if only
        # gradients for inputs are wanted, for a penalty for instance.
        if _is_computed(ctx.next_functions[1][0]):
            with torch.no_grad():
                second = ctx.probe.gradient_parts(s)
            ctx.probe.keep([*ctx.first, *second])
        return s, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *others):
        return tangent


class _TapWithGradient(torch.autograd.Function):
    """An identity that returns what it measures as a gradient.

    For `differentiate`, and for `torch.compile`, where a function has no side
    effects.
    """

    @staticmethod
    def forward(ctx, z, tensor, first, probe):
        ctx.first = first
        ctx.probe = probe
        return z.detach()

    @staticmethod
    def backward(ctx, s):
        with torch.no_grad():
            second = ctx.probe.measure_gradients(s)
            answer = torch.cat([ctx.first, second])
        return s, answer, None, None


def _is_computed(node):
    """Whether this backward pass comes to a node of the graph."""
    # Not public, but `torch.autograd.graph` has nothing else to tell it from.
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # `torch.autograd.grad` was asked for this parameter's gradient.
        return True


@contextlib.contextmanager
def _answers_are_gradients():
    """Context in which taps return what they measure as gradients."""
    _here.differentiates = True
    try:
        yield
    finally:
        _here.differentiates = False
