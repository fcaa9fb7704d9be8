"""How does the cost of a measuring step grow with the size of what it measures?

    KERAS_BACKEND=jax python benchmarks/scaling.py

AdaFisher measures at every other step here, and what counts is the difference
between a step and its neighbour. It is set against the bytes of what is
measured, the activations `h` and gradients `s` of all tapped layers: reading
them once is all that the statistics need to do. A line through the
measurements on logarithmic axes has a slope: 1 is "in proportion", 2 would be
"quadratic".
"""

import gc
import math
import time
from unittest import mock

import keras
import numpy as np
from common import parse_arguments
from common import published
from common import Results
from models import convolutions
from models import gpt
from models import mlp
from models import resnet

from keras_adafisher import steps
from keras_adafisher.probe import Probe

# From what grows to the model and the sizes.
SWEEPS = {
    "width": (mlp, "size", (256, 512, 1024, 2048, 4096)),
    "batch": (mlp, "batch", (32, 64, 128, 256, 512, 1024)),
    "sequence": (gpt, "sequence", (32, 64, 128, 256, 512)),
    "image": (resnet, "image", (16, 32, 64, 96)),
    "kernel": (convolutions, "kernel", (1, 3, 5, 7)),
    "depth": (mlp, "depth", (10, 25, 50, 100, 200)),
}
FIXED = {
    "width": {"batch": 128, "depth": 1},
    "batch": {"size": 1024, "depth": 1},
    "sequence": {"size": 64, "batch": 4, "depth": 1, "vocabulary": 256},
    # One thread and 8 channels of 64 x 64 crash on a CPU, with Adam too.
    "image": {"size": 16, "batch": 8, "blocks": 1},
    # Few channels: many bytes to measure, and little else to do.
    "kernel": {"size": 4, "batch": 32, "image": 64, "depth": 2},
    "depth": {"size": 128, "batch": 256},
}
TINY_FIXED = {
    mlp: {"size": 8, "batch": 8, "depth": 1},
    gpt: {"size": 8, "batch": 2, "sequence": 4, "depth": 1, "vocabulary": 9},
    resnet: {"size": 2, "batch": 2, "image": 8, "blocks": 1},
    convolutions: {"size": 2, "batch": 2, "image": 8, "depth": 1},
}
TINY = {
    "width": 16,
    "batch": 16,
    "sequence": 8,
    "image": 16,
    "kernel": 3,
    "depth": 2,
}
# Pairs of steps, and the time to spend on a point at most.
SETTINGS = {"full": (60, 6.0), "quick": (10, 1.0), "tiny": (5, 1.0)}


def activation_bytes(task):
    """Bytes of `h` and `s` of all taps in a step."""
    sizes = []

    def count(probe, z, h):
        sizes.extend(math.prod(t.shape) * 4 for t in (z, h))
        return z

    with (
        mock.patch.object(Probe, "tap", count),
        # Outside of a step, the plain layers would run.
        mock.patch.object(steps, "may_measure", return_value=True),
    ):
        task.model(task.x, training=True)
    if not sizes:
        raise RuntimeError("No layer has a tap")
    return sum(sizes)


def measure(sweep, size, pairs, seconds, tiny):
    """Time measuring and plain steps at one size."""
    keras.utils.clear_session()
    gc.collect()
    make_model, argument, _ = SWEEPS[sweep]
    fixed = TINY_FIXED[make_model] if tiny else FIXED[sweep]
    task = make_model(**{**fixed, argument: size})
    task.compile(published(learning_rate=1e-6, factor_update_steps=2))
    for _ in range(4):
        task.step()
    differences, plain = [], []
    end = time.perf_counter() + seconds
    while len(differences) < pairs:
        start = time.perf_counter()
        task.step()
        middle = time.perf_counter()
        task.step()
        stop = time.perf_counter()
        differences.append((middle - start) - (stop - middle))
        plain.append(stop - middle)
        if stop > end and len(differences) >= 5:
            break
    low, median, high = map(float, np.quantile(differences, [0.25, 0.5, 0.75]))
    return {
        "sweep": sweep,
        "size": size,
        "bytes": activation_bytes(task),
        "extra": median,
        "low": low,
        "high": high,
        # Half of the median's interval of 95 %, roughly: twice 1.25 standard
        # deviations of the mean, one of which is the range / 1.35.
        "error": 2 * 1.25 * (high - low) / 1.35 / len(differences) ** 0.5,
        "plain": float(np.median(plain)),
        "pairs": len(differences),
    }


def copy_bandwidth(megabytes):
    """Bytes per second that a thread that copies an array reads and writes."""
    source = np.ones(megabytes * 2**20 // 8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


def main():
    arguments = parse_arguments(__doc__)
    pairs, seconds = SETTINGS[arguments.level]
    results = Results("scaling", arguments)
    tiny = arguments.level == "tiny"
    megabytes = 8 if tiny else 256
    results.add(
        "bandwidth", lambda: {"bytes_per_second": copy_bandwidth(megabytes)}
    )
    for sweep, (_, _, sizes) in SWEEPS.items():
        if tiny:
            sizes = [TINY[sweep]]
        elif arguments.level == "quick":
            sizes = sizes[:4:2] + sizes[3:4]
        for size in sizes:
            results.add(
                f"{sweep} {size}",
                lambda sweep=sweep, size=size: measure(
                    sweep, size, pairs, seconds, tiny
                ),
            )


if __name__ == "__main__":
    main()
