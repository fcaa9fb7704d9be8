"""Measure one model on one backend, with all optimizers. `gpu.py` starts this.

    KERAS_BACKEND=jax python benchmarks/gpu_worker.py MODEL FOLDER [--tiny]

It builds and compiles, beside other processes that do the same, and writes
`FOLDER/BACKEND-MODEL.ready`. Once `FOLDER/BACKEND-MODEL.go` is there, it is the
only one that uses the GPU, times all optimizers in turns, and writes
`FOLDER/BACKEND-MODEL.json`.

What is timed is what Keras' `fit` calls for each batch, `model.train_function`,
with the batch on the device already.
"""

import argparse
import concurrent.futures
import functools
import gc
import json
import os
import pathlib
import platform
import sys
import time

import keras
import numpy as np
from common import machine
from common import spread
from gpu_models import make_task
from gpu_models import MODELS
from gpu_models import OPTIMIZERS

import keras_adafisher

BACKEND = keras.backend.backend()
DEFAULT, EVERY_STEP = "AdaFisher, default", "AdaFisher, every step"
# Compiled one after the other, so that their times can be compared. SGD is the
# first, and pays for what a process does once.
ALONE = ("SGD", "Adam", DEFAULT, "AdaFisherMuon")
# What isn't a program of its own: steps of the default's that don't measure,
# and a hundredth of one that does.
EVERY_100 = "AdaFisher, every 100"
# Steps of a round: with the default settings, one of them measures.
STEPS = 10
# How many steps a model has behind it when timing begins. The last of them
# measures, with the default settings.
BEHIND = 11
LEAST_ROUNDS, MOST_ROUNDS = 5, 21
# Seconds after which there are no more rounds than the least, and after which
# there is no other at all.
LONG, TOO_LONG = 12, 35


class JaxProgram:
    """The program that JAX compiles of a model's training step.

    Args:
        task: `Task`, not compiled.
        optimizer: `keras.optimizers.Optimizer`.
    """

    def __init__(self, task, optimizer):
        import jax
        from jax_program import fit_step
        from jax_program import state_of

        step = fit_step(task, optimizer)
        self._data = jax.device_put((task.x, task.y))
        self._state = state_of(task.model)
        self._lowered = step.lower(self._state, self._data)
        self.steps = 0

    def compile(self):
        """Compile. Several programs may do so at a time."""
        self._program = self._lowered.compile()
        del self._lowered

    def facts(self):
        """What the program tells of itself."""
        from jax_program import peak_bytes

        text = self._program.as_text()
        return {
            "peak_bytes": peak_bytes(self._program),
            "conditionals": text.count(" conditional("),
            "instructions": text.count(" = "),
        }

    def run(self, steps):
        """Train for some steps, wait for the last, and return its loss."""
        import jax

        for _ in range(steps):
            logs, self._state = self._program(self._state, self._data)
        self.steps += steps
        jax.block_until_ready(self._state)
        return float(logs["loss"])


class TorchProgram:
    """A model that PyTorch trains, after its first step.

    Args:
        task: `Task`, not compiled.
        optimizer: `keras.optimizers.Optimizer`.
    """

    def __init__(self, task, optimizer):
        import torch

        self._has_gpu = torch.cuda.is_available()
        device = "cuda" if self._has_gpu else "cpu"
        task.compile(optimizer)
        task.x = torch.as_tensor(task.x, device=device)
        task.y = torch.as_tensor(task.y, device=device)
        self._task = task
        # As `fit` does it.
        task.model.train()
        task.step()
        self._wait()
        self.steps = 1

    def rest(self):
        """Free what one step leaves for the next: others need the memory."""
        import torch

        self._task.model.zero_grad()
        gc.collect()
        if self._has_gpu:
            torch.cuda.empty_cache()

    def run(self, steps):
        """Train for some steps, wait for the last, and return its loss."""
        data = [(self._task.x, self._task.y)]
        for _ in range(steps):
            logs = self._task.model.train_function(data)
        self.steps += steps
        self._wait()
        return float(logs["loss"])

    def _wait(self):
        import torch

        if self._has_gpu:
            torch.cuda.synchronize()


def clock():
    """Seconds that have passed, and that processors have worked for us."""
    # Without the last one, which is the time that passed.
    return np.array([time.perf_counter(), sum(os.times()[:4])])


def first_step(start):
    """What is kept of the time since `start`, which is a `clock()`."""
    passed, worked = clock() - start
    return {"first_seconds": passed, "first_processor_seconds": worked}


def prepare_jax(name, tiny, at_once):
    """Compile all programs.

    Args:
        name: String, the model.
        tiny: Bool.
        at_once: Bool, whether to compile all at once but the first, which
            finds out for all which kernels of convolutions are fastest.

    Returns:
        From optimizer to program, and from optimizer to what is known of it.
    """
    alone = ALONE[:1] if at_once else ALONE
    programs, facts = {}, {}
    for optimizer, make_optimizer in OPTIMIZERS.items():
        task = make_task(name, tiny)
        start = clock()
        # Traced one by one: Keras' state while tracing is that of a process.
        program = programs[optimizer] = JaxProgram(task, make_optimizer())
        facts[optimizer] = {}
        if optimizer in alone:
            program.compile()
            facts[optimizer] = first_step(start)
    others = [programs[name] for name in programs if name not in alone]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(JaxProgram.compile, others))
    for optimizer, program in programs.items():
        facts[optimizer].update(program.facts())
    return programs, facts


def prepare_torch(name, tiny, at_once):
    """Take the first steps, and measure the memory of more. As `prepare_jax`.

    There is nothing to compile, so `at_once` changes nothing. The peak is what
    was given out at most, less what was before the model was made. Nothing of
    others in this process is freed or made in between.
    """
    import torch

    # What libraries allocate once isn't the first optimizer's.
    TorchProgram(make_task(name, tiny=True), OPTIMIZERS["SGD"]()).run(1)
    has_gpu = torch.cuda.is_available()
    programs, facts = {}, {}
    for optimizer, make_optimizer in OPTIMIZERS.items():
        gc.collect()
        before = torch.cuda.memory_allocated() if has_gpu else 0
        task = make_task(name, tiny)
        start = clock()
        program = programs[optimizer] = TorchProgram(task, make_optimizer())
        facts[optimizer] = first_step(start)
        program.rest()
        if has_gpu:
            torch.cuda.reset_peak_memory_stats()
            program.run(STEPS)
            peak = torch.cuda.max_memory_allocated() - before
            facts[optimizer]["peak_bytes"] = peak
            program.rest()
    return programs, facts


def time_rounds(programs, least, most):
    """Time all programs in turns.

    Returns:
        From optimizer to an array, seconds of a step in each round.
    """
    for program in programs.values():
        program.run(BEHIND - program.steps)
    # Six models have far more objects than one: don't look through them again.
    gc.collect()
    gc.freeze()
    rng = np.random.default_rng(0)
    seconds = {optimizer: [] for optimizer in [*programs, EVERY_100]}

    def run(name, optimizer, steps):
        start = time.perf_counter()
        loss = programs[optimizer].run(steps)
        seconds[name].append((time.perf_counter() - start) / steps)
        if not np.isfinite(loss):
            raise RuntimeError(f"The loss of {optimizer} is {loss}.")

    begin = time.perf_counter()
    for number in range(most):
        passed = time.perf_counter() - begin
        if passed > (LONG if number >= least else TOO_LONG):
            break
        for name in rng.permutation(list(seconds)):
            if name == EVERY_100:
                run(name, DEFAULT, STEPS - 1)
                # The one that measures.
                programs[DEFAULT].run(1)
            else:
                run(name, name, STEPS)
    return {name: np.array(values) for name, values in seconds.items()}


def summary(seconds):
    """Medians, and ratios to Adam's step in the same round.

    With `factor_update_steps=100`, it is steps that don't measure, and the
    hundredth part of what one costs that does.
    """
    every_100 = 0.99 * seconds[EVERY_100] + 0.01 * seconds[EVERY_STEP]
    values = {**seconds, EVERY_100: every_100}
    return {
        "rounds": len(every_100),
        "milliseconds": {
            name: 1000 * float(np.median(value))
            for name, value in values.items()
        },
        "over Adam": {
            name: spread(value / values["Adam"])
            for name, value in values.items()
        },
    }


def wait_for(path):
    """Wait until a file exists, and give up if nobody is left to write it."""
    parent = os.getppid()
    while not path.exists():
        if os.getppid() != parent:
            sys.exit("gpu.py is gone")
        time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--at-once", action="store_true")
    arguments = parser.parse_args()
    name = f"{BACKEND}-{arguments.model}"
    file = functools.partial(pathlib.Path, arguments.folder)

    prepare = {"jax": prepare_jax, "torch": prepare_torch}[BACKEND]
    programs, facts = prepare(
        arguments.model, arguments.tiny, arguments.at_once
    )
    file(f"{name}.ready").touch()
    wait_for(file(f"{name}.go"))
    rounds = (2, 2) if arguments.tiny else (LEAST_ROUNDS, MOST_ROUNDS)
    seconds = time_rounds(programs, *rounds)
    found = {
        "machine": {
            **machine(),
            "python": platform.python_version(),
            "package": keras_adafisher.__version__,
        },
        "row": {**summary(seconds), "programs": facts},
    }
    # Never half a file.
    temporary = file(f"{name}.tmp")
    temporary.write_text(json.dumps(found))
    temporary.replace(file(f"{name}.json"))


if __name__ == "__main__":
    main()
