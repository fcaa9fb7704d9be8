"""PyTorch's exceptions: it runs eagerly.

Reading a tensor would make the host wait for the device. So the iteration
counter is read once for a step, and a condition is a Python value.
"""

import functools
import math
import threading
import weakref

import torch
from keras import ops

from keras_adafisher.backend import common
from keras_adafisher.backend.common import own_tensor

__all__ = [
    "at_least",
    "cond",
    "constant",
    "count_ids",
    "filled",
    "half_matmul",
    "half_precision",
    "has_accelerator",
    "keep_random_state",
    "lerp",
    "lerp_each",
    "mean_square",
    "precise_matmul",
    "quadratic",
    "reshape",
    "split",
    "stack",
    "step_number",
    "take",
    "view",
    "window_mean",
]

# Entries whose squares are in memory at a time.
_PART_SIZE = {"cpu": 2**18}
_OTHER_PART_SIZE = 2**24

# Where a norm takes longer than squares and their mean, and loses more digits,
# and of which dtypes a norm can be in single precision.
_SLOW_NORM = {"cpu"}
_NORM_DTYPES = {torch.float16, torch.bfloat16, torch.float32}

# The last mean square of this thread.
_here = threading.local()


def keep_random_state():
    # Keras' dropout draws from PyTorch's own generators.
    return torch.random.fork_rng(range(torch.cuda.device_count()))


def has_accelerator():
    return torch.cuda.is_available()


def half_precision():
    return "float16" if has_accelerator() else None


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
    if name in views:
        return views[name]
    # Only the tensors of a stateless call may require a gradient.
    found = make(value.detach() if value.requires_grad else value)
    # A copy wouldn't follow.
    storage = value.untyped_storage().data_ptr()
    tensors = found if isinstance(found, tuple) else [found]
    if all(x.untyped_storage().data_ptr() == storage for x in tensors):
        views[name] = found
    return found


def cond(pred, true_fn, false_fn):
    # Each call of `ops.cond` makes one of Keras' operations, which takes longer
    # than what a small layer measures. But `torch.compile` fails at the bare
    # call ("not in cell_and_freevars"), and breaks its graph at an operation.
    if torch.compiler.is_compiling():
        return ops.cond(pred, true_fn, false_fn)
    return true_fn() if pred else false_fn()


def step_number(iterations):
    # Reading the tensor waits for the device. So the number is kept until
    # somebody else writes to it, which PyTorch counts. In a stateless call,
    # there is another tensor.
    if torch.compiler.is_compiling():
        return _step_number_while_compiling(iterations)
    value = own_tensor(iterations)
    known = getattr(iterations, "adafisher_number", None)
    if known and known[0] is value and known[1] == value._version:
        return known[2]
    number = int(value)
    iterations.adafisher_number = value, value._version, number
    return number


# `torch.compile` reads no tensors, and would compile anew for each number. What
# is marked like this takes Python time where nothing is compiled.
@torch.compiler.disable
def _step_number_while_compiling(iterations):
    return step_number(iterations)


@torch.compiler.disable
def count_up(iterations, before):
    """Keep the number of a step that was applied.

    Args:
        iterations: The optimizer's iteration counter.
        before: What `iterations.adafisher_number` was before.
    """
    value, version, number = before
    # One write, that of `Optimizer.apply`. The counter is an int32.
    now = own_tensor(iterations)
    is_one_more = now is value and value._version == version + 1
    if is_one_more and number < 2**31 - 1:
        iterations.adafisher_number = value, version + 1, number + 1


def mean_square(x, axis):
    # What was made in inference mode doesn't count its changes.
    if torch.compiler.is_compiling() or x.is_inference():
        return _mean_square_in_order(x, axis)
    # The queries, keys and values of attention are made of one tensor.
    of, version, last_axis, result = getattr(_here, "last", (None,) * 4)
    is_same = of is not None and of() is x
    if not is_same or (version, last_axis) != (x._version, axis):
        result = _mean_square_in_order(x, axis)
        _here.last = weakref.ref(x), x._version, axis, result
    return result


def _mean_square_in_order(x, axis):
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
    is_slow = x.device.type in _SLOW_NORM or torch.compiler.is_compiling()
    if x.dtype in _NORM_DTYPES and x.numel() and not is_slow:
        # Two kernels, whatever the dtype is, the second a small one. Squares,
        # and before them a copy in single precision, would go through memory.
        # (Not in compiled functions, where they are one kernel.)
        norm = torch.linalg.vector_norm(x, 2, axis, dtype=torch.float32)
        share = norm.numel() / x.numel()
        zero = kept_constant(0.0, (), x.device)
        return torch.addcmul(zero, norm, norm, value=share)
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


@functools.cache
def kept_constant(number, shape, device):
    """A tensor that is made once. Not for compiled functions."""
    return torch.full(shape, number, device=device)


def count_ids(ids, size):
    # `torch.bincount` waits for the device. The first and last are for others.
    counts = torch.zeros(size + 2, device=ids.device)
    if ids.dtype not in (torch.int32, torch.int64):
        ids = ids.long()
    ids = (ids + 1).clamp_(0, size + 1)
    return counts.index_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))[
        1:-1
    ]


def stack(scalars):
    # Keras' own looks at each of them, which takes longer.
    return torch.stack(scalars)


def at_least(x, number):
    return x.clamp_min(number)


def filled(x, condition, number):
    return x.masked_fill(condition, number)


def lerp(x, y, weight):
    # One operation for three.
    return torch.lerp(x, y, weight)


def lerp_each(xs, ys, weight):
    return torch._foreach_lerp(xs, ys, weight) if xs else []


def precise_matmul(x, y):
    # Of stacks of matrices, without the views that `torch.matmul` makes. Its
    # default precision on a GPU is the full one.
    return torch.bmm(x, y) if x.ndim == y.ndim == 3 else torch.matmul(x, y)


half_matmul = precise_matmul


def quadratic(x, coefficients, matmul):
    # Two operations. One by one, they are seven.
    a, b, c = coefficients
    found = torch.baddbmm(x, x, x, beta=b, alpha=c)
    # Only now, since it is so large that a sum that began with it would lose
    # digits with each of the others.
    found.diagonal(dim1=-2, dim2=-1).add_(a)
    return found


def take(x, indices):
    # Keras' own looks for negative indices.
    return x[indices]


def split(x, lengths):
    # One operation for all.
    return x.split(lengths)


def reshape(x, shape):
    # Keras' own takes ten times as long.
    is_flat = x.ndim == 1 and shape == (-1,)
    return x if is_flat or x.shape == shape else x.reshape(shape)
