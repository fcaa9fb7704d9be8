"""PyTorch's exceptions: it runs eagerly, and modules keep gradients.

A condition on a tensor would make the host wait for the device, once per
layer and step. So the request is a Python value, the iteration counter is
read once per step, and a step that doesn't measure has no taps at all.
"""

import torch


def must_tap(probe):
    return probe.listening > 0 and torch.is_grad_enabled()


def is_requested(request):
    return True


def write_request(probe, mask, wanted, bit, assign):
    probe.listening = probe.listening & mask | (bit if wanted else 0)


def step_number(iterations):
    return int(iterations.value)


def release_gradients(variables):
    # Gradients add up in `.grad` until somebody clears them.
    for variable in variables:
        variable.value.grad = None


def register_parameters(layer, variables):
    # `zero_grad()`, `parameters()` and DistributedDataParallel read the
    # registry that a Keras layer fills when it is built.
    for variable in variables:
        layer.torch_params[variable.path] = variable.value


def forget_parameters(layer, variables):
    for variable in variables:
        if variable.path in layer.torch_params:
            del layer.torch_params[variable.path]
