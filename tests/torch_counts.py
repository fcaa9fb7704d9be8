"""What PyTorch does in a step, counted."""

import keras
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountReads(TorchDispatchMode):
    """Counts what PyTorch itself, Python or not, reads from a device.

    And operations, and what of these a GPU would do: a multi-tensor operation
    is one kernel there if all of its lists have tensors of the same shapes, or
    else one for each tensor. Views are counted too. Numbers that become tensors
    are copied to the GPU, which waits.
    """

    def __init__(self):
        super().__init__()
        self.reads = 0
        self.operations = 0
        self.kernels = 0
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        lists = [x for x in args if isinstance(x, (list, tuple)) and len(x)]
        lists = [x for x in lists if isinstance(x[0], torch.Tensor)]
        is_multi = "_foreach_" in str(func)
        shapes = {tuple(x.shape for x in tensors) for tensors in lists}
        is_one = not is_multi or len(shapes) == 1
        self.kernels += 1 if is_one else len(lists[0])
        self.numbers += func is torch.ops.aten.lift_fresh.default
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def deep(width=4, depth=3, dtype=None):
    return keras.Sequential(
        [
            keras.Input((6,)),
            *(keras.layers.Dense(width, dtype=dtype) for _ in range(depth)),
        ]
    )


def apply(model, optimizer):
    variables = model.trainable_variables
    optimizer.apply([v.value.grad for v in variables], variables)
