"""PyTorch's exceptions: it runs eagerly, and tensors keep gradients.

A condition on a tensor would make the host wait for the device, once per
layer and step. So the request is a Python value, the iteration counter is
read once per step, and a step that doesn't measure has no taps at all.

What a backward pass measures, a tap keeps on its probe. A wrapped module has
the `parameters()` and the `state_dict()` that it had before: optimizers of
PyTorch, `clip_grad_norm_` and `DistributedDataParallel` see nothing of a probe.
"""

import contextlib
import math
import threading
import weakref

import torch
from keras import ops
from torch.nn.parallel import DistributedDataParallel

from keras_adafisher.backend import common

# Entries whose squares are in memory at a time.
_PART_SIZE = {"cpu": 2**18}
_OTHER_PART_SIZE = 2**24

# What `one` returns, by device: it is made once.
_ones = {}

# Whether this thread runs `differentiate`, and its last mean square.
_here = threading.local()

# What to do if no layer has reported anything.
HOW_TO_MEASURE = (
    "Call the wrapped model itself, not what `torch.jit.trace` or "
    "`torch.export` made of it, and not within a transform of `torch.func`."
)

# No list of gradients has an answer in it.
ANSWER_SCALE = 1.0


def make_probe_tensor(size, parameter):
    return torch.zeros(size, device=parameter.value.device, requires_grad=True)


def answer_of(probe, gradients):
    _, parts = probe.answer or (None, None)
    # What a compiled function has measured.
    gradient = probe.tensor.grad
    if parts is None:
        return None if gradient is None else [gradient]
    return parts if gradient is None else [torch.cat(parts) + gradient]


def clear_answer(probe):
    probe.process_group = None
    probe.answer = None
    probe.tensor.grad = None


def join_answers(answers):
    parts = []
    for answer in answers:
        parts += answer if isinstance(answer, list) else [answer]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def request_outside_of_steps(probe):
    # A custom loop needs no decorator here.
    if torch.compiler.is_compiling():
        # A compiled function is made anew when a Python value has changed that
        # it depends on. A weak set can't be looked through there.
        return probe.is_asked
    optimizers = probe.optimizers
    return not optimizers or any(o.measures_factors() for o in optimizers)


def differentiate(compute_loss, data, probes, variables):
    with torch.enable_grad(), _answers_are_gradients():
        loss = compute_loss(*data)
    if not probes or not loss.requires_grad:
        # There are no taps, or none of them was reached.
        return [None for _ in probes]
    # Not `backward()`, which leaves gradients on the tensors.
    tensors = [probe.tensor for probe in probes]
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def keep_random_state():
    # Keras' dropout draws from PyTorch's own generators.
    return torch.random.fork_rng(range(torch.cuda.device_count()))


def sum_over_replicas(probes, answers, wanted):
    group = next((p.process_group for p in probes if p.process_group), None)
    if group is None:
        return answers
    # One transfer for all.
    sizes = [probe.size for probe in probes]
    flat = join_answers(answers)
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


def one(x):
    if torch.compiler.is_compiling():
        return torch.ones(1, device=x.device)
    if x.device not in _ones:
        _ones[x.device] = torch.ones(1, device=x.device)
    return _ones[x.device]


def view(variable, make, views, name):
    # It follows what is assigned to the variable, in place, and is made again
    # where the variable has another tensor: in a stateless call.
    value = variable.value
    if views.get("of") is not value:
        views.clear()
        views["of"] = value
    if name not in views:
        # Only the tensors of a stateless call may require a gradient.
        value = value.detach() if value.requires_grad else value
        views[name] = make(value)
    return views[name]


def cond(pred, true_fn, false_fn):
    # Each call of `ops.cond` makes one of Keras' operations, which takes longer
    # than what a small layer measures. But `torch.compile` fails at the bare
    # call ("not in cell_and_freevars"), and breaks its graph at an operation.
    if torch.compiler.is_compiling():
        return ops.cond(pred, true_fn, false_fn)
    return true_fn() if pred else false_fn()


def tap(z, h, probe, request):
    # On the "meta" device, Keras infers shapes. There is nothing to measure.
    if z.is_meta or not torch.is_grad_enabled() or _is_transformed():
        return z
    h = ops.convert_to_tensor(h)
    # What probes measure is summed up in `sum_over_replicas`. No public name
    # tells which processes take part. Keep it if a checkpoint runs the layer
    # once more in the backward pass.
    active = DistributedDataParallel._active_ddp_module
    if active is not None:
        probe.process_group = active.process_group
    if torch.compiler.is_compiling() or getattr(_here, "differentiates", False):
        with torch.no_grad():
            first = probe.measure_activations(h)
        # The parameters may have moved.
        tensor = probe.tensor.to(z.device)
        return _TapWithGradient.apply(z, tensor, first, probe)
    if not z.requires_grad:
        return z
    for variable in probe.block.parameters:
        parameter = variable.value
        if parameter.requires_grad:
            # In a list `h` is no input that autograd has to look after.
            return _Tap.apply(z, parameter, [h], probe)
    return z


def _is_transformed():
    """Whether something else is made of the computation than a training step.

    Measuring makes no sense there. In a transform of `torch.func`, tensors
    stand for many, and in a trace, for those of other calls.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return True
    # No public name tells. `torch.autograd.Function` asks in the same way.
    return torch._C._are_functorch_transforms_active()


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
            _keep(ctx.probe, [*ctx.first, *second])
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


def _keep(probe, parts):
    """Add an answer to those that a probe has."""
    # The number of this backward pass: no public name tells one from another.
    now = torch._C._current_graph_task_id()
    last, earlier = probe.answer or (now, None)
    # Gradients add up until somebody clears them. `zero_grad()` doesn't know a
    # probe. But if it has cleared those of the parameters, for instance after a
    # step that was skipped, then what an earlier pass has left here is outdated
    # too.
    if last != now and all(
        p.value.grad is None for p in probe.block.parameters
    ):
        earlier = None
    if earlier is not None:
        parts = [torch.cat(earlier) + torch.cat(parts)]
    probe.answer = now, parts


@contextlib.contextmanager
def _answers_are_gradients():
    """Context in which taps return what they measure as gradients."""
    _here.differentiates = True
    try:
        yield
    finally:
        _here.differentiates = False


# `torch.compile` reads no tensors, and would compile anew for each number.
@torch.compiler.disable
def step_number(iterations):
    # Reading the tensor waits for the device. So the number is kept until
    # somebody else writes to it, which PyTorch counts. In a stateless call,
    # there is another tensor.
    value = iterations.value
    known = getattr(iterations, "adafisher_number", None)
    if known and known[0] is value and known[1] == value._version:
        return known[2]
    number = int(value)
    iterations.adafisher_number = value, value._version, number
    return number


@torch.compiler.disable
def count_up(iterations, before):
    """Keep the number of a step that was applied.

    Args:
        iterations: The optimizer's iteration counter.
        before: What `iterations.adafisher_number` was before.
    """
    value, version, number = before
    # One write, that of `Optimizer.apply`. The counter is an int32.
    is_one_more = iterations.value is value and value._version == version + 1
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
    if ids.dtype not in (torch.int32, torch.int64):
        ids = ids.long()
    ids = (ids + 1).clamp_(0, size + 1)
    return counts.index_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))[
        1:-1
    ]


def stack(scalars):
    # Keras' own looks at each of them, which takes longer.
    return torch.stack(scalars)


def precise_matmul(x, y):
    # Of stacks of matrices, without the views that `torch.matmul` makes. Its
    # default precision on a GPU is the full one.
    return torch.bmm(x, y) if x.ndim == y.ndim == 3 else torch.matmul(x, y)


def take(x, indices):
    # Keras' own looks for negative indices.
    return x[indices]


def reshape(x, shape):
    # Keras' own takes ten times as long.
    is_flat = x.ndim == 1 and shape == (-1,)
    return x if is_flat or x.shape == shape else x.reshape(shape)
