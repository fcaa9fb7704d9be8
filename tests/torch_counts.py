"""What PyTorch does in a step, counted."""

import keras
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountReads(TorchDispatchMode):
    """Counts what PyTorch itself, Python or not, reads from a device."""

    def __init__(self):
        super().__init__()
        self.reads = 0
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def deep(width=4, depth=3):
    return keras.Sequential(
        [
            keras.Input((6,)),
            *(keras.layers.Dense(width) for _ in range(depth)),
        ]
    )


def apply(model, optimizer):
    variables = model.trainable_variables
    optimizer.apply([v.value.grad for v in variables], variables)
