"""AdaFisher under PyTorch's DistributedDataParallel, next to one device.

    KERAS_BACKEND=torch torchrun --standalone --nproc-per-node 2 \
        examples/distributed/torch_ddp.py

As in Keras' guide "Multi-GPU distributed training with PyTorch": each process
has the model and its part of each batch, and DistributedDataParallel averages
the gradients. Runs on CPUs (gloo); with as many GPUs as processes, on these
(NCCL). The first process then trains the model alone on the whole batches, and
prints the difference.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import common
import keras
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import keras_adafisher


def batches(epochs, rank=0, processes=1):
    """A process' part of each batch, as tensors on its device."""
    images, labels = common.load_digits()
    part = common.BATCH_SIZE // processes
    steps = epochs * common.EXAMPLES // common.BATCH_SIZE
    bar = keras.utils.Progbar(steps, unit_name="step", verbose=rank == 0)
    for step in range(steps):
        start = step * common.BATCH_SIZE % common.EXAMPLES + rank * part
        yield (
            keras.ops.convert_to_tensor(images[start : start + part]),
            keras.ops.convert_to_tensor(labels[start : start + part]),
        )
        bar.update(step + 1)


def train(model, forward, batches):
    """A training loop.

    Args:
        model: The Keras model.
        forward: What is called in its place: the model or what wraps it.
        batches: Iterable of inputs and labels.

    Returns:
        The optimizer.
    """
    loss_fn = common.make_loss()
    optimizer = common.make_optimizer()
    optimizer.build(model.trainable_variables)
    for x, y in batches:
        model.zero_grad()
        loss_fn(y, forward(x, training=True)).backward()
        variables = model.trainable_variables
        gradients = [v.value.grad for v in variables]
        with torch.no_grad():
            optimizer.apply(gradients, variables)
    return optimizer


def train_on_several(epochs):
    """What one of several processes does."""
    model = common.make_model()
    keras_adafisher.wrap(model)
    parallel = DistributedDataParallel(model)
    part = batches(epochs, dist.get_rank(), dist.get_world_size())
    optimizer = train(model, parallel, part)
    return common.state(model, optimizer)


def train_on_one(epochs):
    """The same on the whole batches."""
    model = common.make_model()
    keras_adafisher.wrap(model)
    optimizer = train(model, model, batches(epochs))
    return common.state(model, optimizer)


def main():
    """Train on several devices, then on one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    epochs = parser.parse_args().epochs

    on_gpus = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    several = train_on_several(epochs)
    if dist.get_rank() == 0:
        one = train_on_one(epochs)
        common.report(f"{dist.get_world_size()} processes", several, one)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
