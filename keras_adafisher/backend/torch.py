"""PyTorch's exceptions: it runs eagerly, and tensors keep gradients.

A condition on a tensor would make the host wait for the device, once per
layer and step. So the request is a Python value, the iteration counter is
read once per step, and a step that doesn't measure has no taps at all.

`backward()` leaves gradients on all tensors that require one, so those that a
tap takes needn't be parameters. A wrapped module has the `parameters()` and the
`state_dict()` that it had before: optimizers of PyTorch, `clip_grad_norm_` and
`DistributedDataParallel` see nothing of a probe.
"""

import math

import torch
from keras import ops
from torch.nn.parallel import DistributedDataParallel

from keras_adafisher.backend import common

# Entries whose squares are in memory at a time.
_PART_SIZE = {"cpu": 2**16}
_OTHER_PART_SIZE = 2**24


# What to do if no layer has reported anything.
HOW_TO_MEASURE = (
    "Compute the gradients by `loss.backward()`: `torch.autograd.grad` reaches "
    "only the tensors that it is given."
)


def make_probe_tensor(size, parameter):
    return torch.zeros(size, device=parameter.value.device, requires_grad=True)


def answer_of(probe, gradients):
    return probe.tensor.grad


def request_outside_of_steps(probe):
    # A custom loop needs no decorator here.
    optimizers = probe.optimizers
    return not optimizers or any(o.measures_factors() for o in optimizers)


def differentiate(compute_loss, data, probes, variables):
    with torch.enable_grad():
        loss = compute_loss(*data)
    if not probes or not loss.requires_grad:
        # There are no taps, or none of them was reached.
        return [None for _ in probes]
    # Not `backward()`, which leaves gradients on the tensors. A forward pass
    # may have moved the probes: these are their tensors now.
    tensors = [probe.tensor for probe in probes]
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def keep_random_state():
    # Keras' dropout draws from PyTorch's own generators.
    return torch.random.fork_rng(range(torch.cuda.device_count()))


def _drop_stale_answer(probe):
    # Gradients add up until somebody clears them. `zero_grad()` doesn't know a
    # probe. But if it has cleared those of the parameters, for instance after
    # a step that was skipped, then what an earlier backward pass has left here
    # is outdated too.
    if probe.tensor.grad is None:
        return
    if all(p.value.grad is None for p in probe.block.parameters):
        probe.tensor.grad = None


def _open_tap(probe):
    """Get a probe ready for a forward pass that measures."""
    # What probes measure is summed up in `sum_over_replicas`. No public name
    # tells which processes take part. Keep it if a checkpoint runs the layer
    # once more in the backward pass.
    active = DistributedDataParallel._active_ddp_module
    if active is not None:
        probe.process_group = active.process_group
    # The parameters may have moved. They begin on the "meta" device if Keras
    # infers shapes when it builds the layer.
    parameter = probe.block.parameters[0]
    if probe.tensor.device != parameter.value.device:
        probe.tensor = make_probe_tensor(probe.size, parameter)


def clear_answer(probe):
    probe.process_group = None
    probe.tensor.grad = None


def sum_over_replicas(probes, answers, wanted):
    group = next((p.process_group for p in probes if p.process_group), None)
    if group is None:
        return answers
    # One transfer for all.
    sizes = [probe.size for probe in probes]
    flat = torch.cat(answers)
    torch.distributed.all_reduce(flat, group=group)
    # The loss of a process is the mean over its own part of the batch, and
    # `DistributedDataParallel` averages the gradients. So `s` is larger than
    # that of the whole batch by the number of processes.
    scale = torch.distributed.get_world_size(group) ** 2
    for probe, answer in zip(probes, flat.split(sizes), strict=True):
        answer[sum(probe.sizes[:2]) :] /= scale
    return list(flat.split(sizes))


def constant(values, dtype):
    # Copied to the device once, not at each use. Of a list, Keras would look at
    # each entry, to find tensors among them.
    return ops.convert_to_tensor(common.constant(values, dtype))


def view(variable, make, views, name):
    # It follows what is assigned to the variable, in place, and is made again
    # where the variable has another tensor: in a stateless call.
    value = variable.value
    if views.get("of") is not value:
        views.clear()
        views["of"] = value
    if name not in views:
        views[name] = make(value.detach())
    return views[name]


def is_requested(request):
    return True


def cond(pred, true_fn, false_fn):
    # Each call of `ops.cond` makes one of Keras' operations, which takes longer
    # than what a small layer measures. But `torch.compile` fails at the bare
    # call ("not in cell_and_freevars"), and breaks its graph at an operation.
    if torch.compiler.is_compiling():
        return ops.cond(pred, true_fn, false_fn)
    return true_fn() if pred else false_fn()


def tap(z, h, probe, request):
    # On the "meta" device, Keras infers shapes. There is nothing to measure.
    if z.is_meta or not torch.is_grad_enabled():
        return z
    _open_tap(probe)
    with torch.no_grad():
        first = probe.measure_activations(ops.convert_to_tensor(h))
    return _Tap.apply(z, probe.tensor, first, probe)


class _Tap(torch.autograd.Function):
    """An identity in whose backward pass a probe answers."""

    @staticmethod
    def forward(ctx, z, tensor, first, probe):
        ctx.probe = probe
        ctx.first = first
        return z

    @staticmethod
    def backward(ctx, s):
        _drop_stale_answer(ctx.probe)
        second = ctx.probe.measure_gradients(s)
        return s, torch.cat([ctx.first, second]), None, None


def step_number(iterations):
    return int(iterations.value)


def mean_square(x, axis):
    if x.is_contiguous():
        return _mean_square(x, axis)
    # What Keras hands on from a convolution is channels-last by its strides
    # only. PyTorch writes a result in the order of its axes and then reads the
    # input against its order in memory, which takes ten times as long.
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    kept = [a for a in order if a not in axis]
    axis = [a for a in range(x.ndim) if order[a] in axis]
    if order != sorted(order):
        x = x.permute(order)
    x = _mean_square(x, axis)
    if kept == sorted(kept):
        return x
    return x.permute([kept.index(a) for a in sorted(kept)])


def window_mean(x, axis, kernel_size, stride, dilation, before, outputs):
    # All taps in one view.
    reach = (outputs - 1) * stride + 1
    after = (kernel_size - 1) * dilation + reach - before - x.shape[axis]
    if before or after:
        # The last axis comes first. What is negative is cut off.
        x = torch.nn.functional.pad(
            x, [0, 0] * (x.ndim - 1 - axis) + [before, after]
        )
    x = x.unfold(axis, reach, dilation)
    return (x if stride == 1 else x[..., ::stride]).mean(-1)


def _mean_square(x, axis):
    # For PyTorch, no axes are all axes.
    if not axis:
        return _squares(x)
    # Squares of a part only are in memory at any time, on a CPU in its cache:
    # the largest activations are those that are there at the peak of a step.
    limit = _PART_SIZE.get(x.device.type, _OTHER_PART_SIZE)
    parts = [x]
    if x.numel() > limit:
        rows = max(limit * x.shape[axis[0]] // x.numel(), 1)
        parts = x.split(rows, axis[0])
    if len(parts) == 1:
        return _squares(x).mean(axis)
    total = _squares(parts[0]).sum(axis)
    for part in parts[1:]:
        total += _squares(part).sum(axis)
    return total.div_(math.prod(x.shape[a] for a in axis))


def _squares(x):
    x = x.float()
    return x * x


def count_ids(ids, size):
    # `torch.bincount` waits for the device. The first and last are for others.
    counts = torch.zeros(size + 2, device=ids.device)
    ids = (ids.long() + 1).clamp_(0, size + 1)
    return counts.index_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))[
        1:-1
    ]


def take(x, indices):
    # Keras' own looks for negative indices.
    return x[indices]


def reshape(x, shape):
    # Keras' own takes ten times as long.
    return x if x.shape == shape else x.reshape(shape)
