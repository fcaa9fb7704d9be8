"""Two processes of DistributedDataParallel, next to one device.

Run by `test_distributed_torch.py` with torchrun. Prints one line of JSON.
"""

import collections
import contextlib
import functools
import gc
import json
import os
import pathlib
import sys

os.environ["KERAS_BACKEND"] = "torch"
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(
    0, str(pathlib.Path(__file__).parents[2] / "examples" / "distributed")
)

import keras
import numpy as np
import torch
import torch.distributed as dist
from common import difference
from models import cross_entropy
from models import image_data
from models import probes_in
from models import to_numpy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import keras_adafisher

BATCH = 16
STEPS = 6
MEASURING, OTHER = 4, 5  # With `factor_update_steps=2`.


def cnn():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Reshape((16, 4)),
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.Flatten(),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(3),
        ]
    )


def recurrent():
    """Its factors are estimated from the gradients."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Reshape((6, 12)),
            keras.layers.GRU(4),
            keras.layers.Dense(3),
        ]
    )


class Checkpointed(torch.nn.Module):
    """A model whose layers run without gradients first."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, training):
        run = functools.partial(self.model, training=training)
        return checkpoint(run, inputs.requires_grad_(), use_reentrant=True)


def train(
    parallel,
    make_model=cnn,
    optimizer=None,
    wrap_first=True,
    is_checkpointed=False,
    micro_batches=1,
    steps=STEPS,
    seed=3,
):
    """Weights and optimizer variables, and what each step communicated."""
    keras.utils.set_random_seed(seed)
    model = make_model()
    if optimizer is None:
        optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
    is_ours = isinstance(optimizer, keras_adafisher.AdaFisher)
    forward = Checkpointed(model) if is_checkpointed else model
    if is_ours and wrap_first:
        keras_adafisher.wrap(model)
    if parallel:
        forward = DistributedDataParallel(forward)
    if is_ours and not wrap_first:
        keras_adafisher.wrap(model)
    optimizer.build(model.trainable_variables)

    loss_fn = cross_entropy()
    part = BATCH // (dist.get_world_size() if parallel else 1) // micro_batches
    rank = dist.get_rank() if parallel else 0
    x, y = image_data(examples=BATCH * steps)
    transfers = []
    for step in range(steps):
        with profile() as profiler:
            model.zero_grad()
            for micro in range(micro_batches):
                start = step * BATCH + (rank * micro_batches + micro) * part
                inputs = torch.from_numpy(x[start : start + part])
                labels = torch.from_numpy(y[start : start + part])
                is_last = micro == micro_batches - 1
                with (
                    forward.no_sync()
                    if parallel and not is_last
                    else contextlib.nullcontext()
                ):
                    loss = loss_fn(labels, forward(inputs, training=True))
                    (loss / micro_batches).backward()
            variables = model.trainable_variables
            gradients = [v.value.grad for v in variables]
            with torch.no_grad():
                optimizer.apply(gradients, variables)
        names = collections.Counter(e.name for e in profiler.events())
        transfers.append(names["c10d::allreduce_"])
    arrays = [to_numpy(v) for v in (*model.weights, *optimizer.variables)]
    return arrays, transfers, model


def is_sharded():
    """Whether a Keras model computes with what `fully_shard` makes of it."""
    model = cnn()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    x, y = image_data(examples=2)
    outputs = model(torch.from_numpy(x), training=True)
    cross_entropy()(torch.from_numpy(y), outputs).backward()
    return any(p.grad is not None for p in model.parameters())


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    result = {"engine": "DistributedDataParallel", "devices": 2}

    one, none, model = train(False)
    several, ours, *_ = train(True)
    result["difference"] = difference(several, one)
    _, sgd, *_ = train(True, optimizer=keras.optimizers.SGD(momentum=0.9))
    result["transfers_alone"] = sum(none)
    result["extra_collectives_measuring"] = ours[MEASURING] - sgd[MEASURING]
    result["extra_collectives_other"] = ours[OTHER] - sgd[OTHER]
    numbers = sum(probe.size for probe in probes_in(model))
    result["extra_bytes"] = 4 * numbers
    result["gradient_bytes"] = 4 * model.count_params()

    late, *_ = train(True, wrap_first=False)
    result["difference_wrapped_after"] = difference(late, one)

    again, *_ = train(True, is_checkpointed=True)
    result["difference_checkpointed"] = difference(again, one)

    micro, *_ = train(True, micro_batches=4)
    result["difference_no_sync"] = difference(micro, one)

    # Only with the scale of `s` right does this hold.
    def with_epsilon():
        return keras_adafisher.AdaFisher(epsilon=1e-4, factor_update_steps=2)

    expected, *_ = train(False, optimizer=with_epsilon())
    actual, *_ = train(True, optimizer=with_epsilon())
    result["difference_epsilon"] = difference(actual, expected)

    expected, *_ = train(False, recurrent)
    actual, *_ = train(True, recurrent)
    result["difference_estimated"] = difference(actual, expected)

    def orthogonalizing(interval):
        return keras_adafisher.AdaFisherMuon(
            factor_update_steps=2,
            keep_roots=True,
            kernel_update_steps=interval,
        )

    for interval, name in ((1, "orthogonalized"), (2, "resting")):
        differences = []
        for seed in (3, 4, 5, 6):
            actual, expected = (
                train(parallel, optimizer=orthogonalizing(interval), seed=seed)[
                    0
                ]
                for parallel in (True, False)
            )
            differences.append(difference(actual, expected))
        result[f"difference_{name}"] = float(np.median(differences))
        result[f"largest_difference_{name}"] = max(differences)

    # The processes train alike.
    mine = torch.cat([torch.from_numpy(a).double().ravel() for a in several])
    first = mine.clone()
    dist.broadcast(first, 0)
    result["difference_of_processes"] = float((mine - first).abs().max())

    result["is_sharded"] = is_sharded()

    # Models that aren't parallel don't wait for other processes.
    train(False, steps=1 + rank)

    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, result)
    if rank == 0:
        for key in result:
            if "difference" in key:
                result[key] = float(np.max([r[key] for r in every]))
        print(json.dumps(result))
    # Parallel modules don't survive the end of their processes' group.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
