"""How much memory do the optimizer's state and a training step take?

    KERAS_BACKEND=jax python benchmarks/memory.py

State: bytes of `optimizer.variables`, on ResNet50 and a GPT with 12 layers.

Peak of a step, activations and state included:

- JAX: the compiled program's own analysis. One program measures or doesn't.
- PyTorch: what the allocator gave out, from the profiler, on top of what the
  weights and the state take, at a measuring step.
- TensorFlow: what the allocator gave out, from its own counters, at a measuring
  step.
"""

import gc
import math
import statistics

import keras
import numpy as np
from common import OPTIMIZERS
from common import parse_arguments
from common import Results
from models import gpt
from models import make_task
from models import names

import keras_adafisher
from keras_adafisher.probe import probes_of

MEASURING = "AdaFisher, every step"
# TensorFlow runs independent operations in no fixed order.
STEPS = 9
# Larger than for timing: what the libraries themselves hold should be little.
BATCHES = {
    "wide MLP": 512,
    "ResNet": 128,
    "GPT": 32,
    "ViT": 32,
    "MobileNet": 128,
}


def state(make_model):
    """Bytes of the state of Adam and of AdaFisher."""
    result = {}
    for name in ("Adam", "AdaFisher, every 100"):
        keras.utils.clear_session()
        gc.collect()
        model = make_model()
        optimizer = OPTIMIZERS[name]()
        if name != "Adam":
            # Probes are Keras variables but on PyTorch, where they are tensors.
            keras_adafisher.wrap(model)
        optimizer.build(model.trainable_variables)
        result[name] = nbytes(optimizer.variables)
    # By identity: kernel and bias have the same.
    probes = probes_of(model.trainable_variables)
    probe_bytes = sum(4 * probe.size for probe in probes)
    adam, adafisher = result.values()
    return {
        **result,
        "probes": probe_bytes,
        "ratio": adafisher / adam,
        "ratio with probes": (adafisher + probe_bytes) / adam,
    }


def nbytes(variables):
    return sum(
        math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in variables
    )


def held(model):
    """Bytes that outlive a step."""
    return nbytes(model.weights) + nbytes(model.optimizer.variables)


def make_step_task(name, optimizer, tiny):
    task = make_task(name, tiny, {} if tiny else {"batch": BATCHES[name]})
    task.compile(OPTIMIZERS[optimizer]())
    return task


def peak_jax(name, optimizer, tiny):
    from jax_program import compiled_step
    from jax_program import peak_bytes

    task = make_step_task(name, optimizer, tiny)
    return peak_bytes(compiled_step(task.model, task.x, task.y))


def peak_torch(name, optimizer, tiny):
    import torch
    from torch.profiler import profile
    from torch.profiler import ProfilerActivity

    task = make_step_task(name, optimizer, tiny)
    task.step()
    task.step()
    # Gradients outlive the step that made them.
    task.model.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        task.step()
        return torch.cuda.max_memory_allocated()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        task.step()
    events = profiler.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    rise = int(np.cumsum([e.nbytes() for e in changes]).max())
    return rise + held(task.model)


def peak_tensorflow(name, optimizer, tiny):
    import tensorflow as tf

    task = make_step_task(name, optimizer, tiny)
    task.step()
    task.step()
    gc.collect()
    has_gpu = tf.config.list_physical_devices("GPU")
    device = "GPU:0" if has_gpu else "CPU:0"
    memory = tf.config.experimental
    # Earlier models may still be there.
    others = memory.get_memory_info(device)["current"] - held(task.model)
    peaks = []
    for _ in range(STEPS):
        memory.reset_memory_stats(device)
        task.step()
        peaks.append(memory.get_memory_info(device)["peak"] - others)
    return statistics.median(peaks)


def peak(name, level):
    """Peak bytes of SGD's and AdaFisher's step on one model."""
    function = {
        "jax": peak_jax,
        "torch": peak_torch,
        "tensorflow": peak_tensorflow,
    }[keras.backend.backend()]
    result = {}
    for optimizer in ("SGD", "Adam", MEASURING):
        keras.utils.clear_session()
        gc.collect()
        result[optimizer] = function(name, optimizer, level == "tiny")
    return {**result, "ratio": result[MEASURING] / result["SGD"]}


def resnet50():
    return keras.applications.ResNet50(weights=None)


def large_gpt():
    return gpt(size=768, sequence=128, depth=12, vocabulary=32768).model


def main():
    arguments = parse_arguments(__doc__)
    results = Results("memory", arguments)
    if arguments.level == "tiny":
        small = {"size": 16, "vocabulary": 64, "sequence": 8}
        models = {"GPT, 1 layer": lambda: gpt(**small, depth=1).model}
    else:
        models = {"ResNet50": resnet50, "GPT, 12 layers": large_gpt}
    for name, make_model in models.items():
        results.add(f"state: {name}", lambda make=make_model: state(make))
    for name in names(arguments.level):
        results.add(f"peak: {name}", lambda n=name: peak(n, arguments.level))


if __name__ == "__main__":
    main()
