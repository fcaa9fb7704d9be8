"""PyTorch's exceptions: it runs eagerly, and modules keep gradients.

A condition on a tensor would make the host wait for the device, once per
layer and step. So the request is a Python value, the iteration counter is
read once per step, and a step that doesn't measure has no taps at all.
"""

import torch
from torch.nn.parallel import DistributedDataParallel


def open_tap(probe):
    if not probe.listening:
        return False
    # `DistributedDataParallel` reduces the parameters that it knew when it was
    # made, and expects a gradient for each at each step. A probe has one at
    # measuring steps only, so it isn't among them: see `close_tap`. What it
    # measures is reduced in `sum_over_replicas`. No public name tells which
    # processes take part. Keep it if a checkpoint runs the layer once more in
    # the backward pass.
    active = DistributedDataParallel._active_ddp_module
    if active is not None:
        probe.process_group = active.process_group
    if not torch.is_grad_enabled():
        return False
    for variable in probe.variables:
        variable.value.requires_grad_(True)
    return True


def close_tap(probe):
    probe.process_group = None
    for variable in probe.variables:
        # Gradients add up in `.grad` until somebody clears them.
        variable.value.grad = None
        variable.value.requires_grad_(False)


def sum_over_replicas(probes, answers, wanted):
    group = next((p.process_group for p in probes if p.process_group), None)
    if group is None:
        return answers
    # One transfer for all.
    tensors = [tensor for answer in answers for tensor in answer]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    sums = iter(
        part.view(tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    )
    # The loss of a process is the mean over its own part of the batch, and
    # `DistributedDataParallel` averages the gradients. So `s` is larger than
    # that of the whole batch by the number of processes.
    scale = torch.distributed.get_world_size(group) ** 2
    return [
        (calls, activation, gradient / scale)
        for calls, activation, gradient in zip(sums, sums, sums, strict=True)
    ]


def is_requested(request):
    return True


def write_request(probe, mask, wanted, bit, assign):
    probe.listening = probe.listening & mask | (bit if wanted else 0)


def step_number(iterations):
    return int(iterations.value)


def register_parameters(layer, variables):
    # `zero_grad()`, `parameters()` and DistributedDataParallel read the
    # registry that a Keras layer fills when it is built.
    for variable in variables:
        layer.torch_params[variable.path] = variable.value


def forget_parameters(layer, variables):
    for variable in variables:
        if variable.path in layer.torch_params:
            del layer.torch_params[variable.path]
