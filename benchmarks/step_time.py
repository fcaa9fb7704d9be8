"""How long are a training step and the first one, next to Adam's and SGD's?

    KERAS_BACKEND=jax python benchmarks/step_time.py

All optimizers train the same model on the same batch, in one process: a round
has a step of each, in a random order, and what counts is their ratio within a
round. So work of others on the machine hits all of them alike.
"""

import gc
import time

import keras
import numpy as np
from common import OPTIMIZERS
from common import parse_arguments
from common import Results
from common import spread
from models import make_task
from models import names

# Rounds, and how many times all models are built and compiled.
SETTINGS = {"full": (60, 2), "quick": (10, 1), "tiny": (3, 1)}
WARM_UP = 2


def measure(name, rounds, builds, tiny):
    """Time all optimizers on one model."""
    first_seconds = {optimizer: [] for optimizer in OPTIMIZERS}
    for _ in range(builds):
        tasks = {}
        keras.utils.clear_session()
        gc.collect()
        for optimizer, make_optimizer in OPTIMIZERS.items():
            task = tasks[optimizer] = make_task(name, tiny)
            start = time.perf_counter()
            task.compile(make_optimizer())
            task.step()
            first_seconds[optimizer].append(time.perf_counter() - start)

    # The first step of "every 100" measures. The next to do so would be the
    # 101st: all that are timed are plain ones.
    assert 1 + WARM_UP + rounds <= 100
    rng = np.random.default_rng(0)
    seconds = {optimizer: [] for optimizer in OPTIMIZERS}
    for step in range(WARM_UP + rounds):
        for optimizer in rng.permutation(list(OPTIMIZERS)):
            start = time.perf_counter()
            tasks[optimizer].step()
            if step >= WARM_UP:
                seconds[optimizer].append(time.perf_counter() - start)

    def ratios(optimizer, base):
        return np.divide(seconds[optimizer], seconds[base])

    plain, measuring = "AdaFisher, every 100", "AdaFisher, every step"
    first = {
        optimizer: np.divide(first_seconds[optimizer], first_seconds["Adam"])
        for optimizer in (plain, measuring)
    }
    result = {
        "milliseconds": {
            optimizer: 1000 * float(np.median(values))
            for optimizer, values in seconds.items()
        },
        "first_seconds": {
            optimizer: float(np.median(values))
            for optimizer, values in first_seconds.items()
        },
        "SGD/Adam": spread(ratios("SGD", "Adam")),
        "measuring/Adam": spread(ratios(measuring, "Adam")),
        # Both run the same first step.
        "first/Adam": spread(np.concatenate(list(first.values()))),
    }
    for base in ("Adam", "SGD"):
        # With the hundredth part of a measuring step that is due.
        share = 0.99 * ratios(plain, base) + 0.01 * ratios(measuring, base)
        result[f"every 100/{base}"] = spread(share)
    # By tens, each with one step that measures.
    tens = {
        optimizer: np.add.reduceat(values, range(0, len(values), 10))
        for optimizer, values in seconds.items()
    }
    result["default/Adam"] = spread(tens["AdaFisher, default"] / tens["Adam"])
    return result


def main():
    arguments = parse_arguments(__doc__)
    rounds, builds = SETTINGS[arguments.level]
    tiny = arguments.level == "tiny"
    results = Results("step_time", arguments)
    # Whatever a process does only once.
    warm_up = make_task("wide MLP", tiny=True)
    warm_up.compile(OPTIMIZERS["AdaFisher, every 100"]())
    warm_up.step()
    for name in names(arguments.level):
        results.add(name, lambda n=name: measure(n, rounds, builds, tiny))


if __name__ == "__main__":
    main()
