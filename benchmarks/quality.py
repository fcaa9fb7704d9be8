"""How well models end that AdaFisher trains, next to Keras' own optimizers.

    KERAS_BACKEND=jax python benchmarks/quality.py

Four comparisons, each with every optimizer of `RIVALS`:

- tuned: five learning rates on one seed, the best of them by validation loss
  with less momentum too, then three fresh seeds of the best. All have the
  seconds that Adam takes for the task's epochs: who takes longer for a step
  has fewer of them, and a cosine schedule that is as much shorter.
- sooner: the same three seeds with schedules that end before that time is over.
  Who wants a given loss as soon as possible doesn't wait for a long schedule.
- defaults: the optimizer as it is without arguments, without a schedule.
- robust: learning rates over four decades and three batch sizes, on the small
  tasks.

Losses don't depend on what else the machine does. What a step costs next to
Adam's does; it is the median over rounds in which all optimizers take turns,
in seconds of the processor.
docs/quality.py makes the page.
"""

import concurrent.futures
import functools
import statistics
import subprocess
import sys
import time

from benchmarks.common import parse_arguments
from benchmarks.common import published
from benchmarks.common import Results

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
import keras  # isort: skip
import numpy as np  # isort: skip

import keras_adafisher  # isort: skip
from benchmarks.quality_tasks import TASKS  # isort: skip
from benchmarks.training import Trainer  # isort: skip

ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# From a name to a function that makes the optimizer with its defaults, the
# five learning rates that it is tuned over, and what it calls its momentum.
RIVALS = {
    # Its default has no momentum, which nobody would use it without.
    "SGD": (
        functools.partial(keras.optimizers.SGD, momentum=0.9),
        (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        "momentum",
    ),
    "Adam": (keras.optimizers.Adam, ADAM_RATES, "beta_1"),
    "AdamW": (keras.optimizers.AdamW, ADAM_RATES, "beta_1"),
    "Nadam": (keras.optimizers.Nadam, ADAM_RATES, "beta_1"),
    "Muon": (keras.optimizers.Muon, ADAM_RATES, "momentum"),
    "Lion": (keras.optimizers.Lion, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "beta_1"),
    "ScheduleFreeAdamW": (
        keras.optimizers.ScheduleFreeAdamW,
        ADAM_RATES,
        "beta_1",
    ),
    "AdaFisher, as published": (
        published,
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        "beta",
    ),
    "AdaFisher": (keras_adafisher.AdaFisher, ADAM_RATES, "beta"),
    "AdaFisherW": (keras_adafisher.AdaFisherW, ADAM_RATES, "beta"),
}
LESS_MOMENTUM = 0.8
OURS = ("AdaFisher", "AdaFisherW")
# It has no use for a schedule: that is what it is for.
CONSTANT = ("ScheduleFreeAdamW",)
SEEDS = (1, 2, 3)
# Of Adam's time.
SHORTER = (0.5, 0.7)
SMALL = ("digits", "cancer", "diabetes")
# So that two processes end at about the same time.
LARGEST_FIRST = (
    *("gpt", "vit", "cnn", "autoencoder", "tuning", "lstm", "mlp"),
    *SMALL,
)
ROBUST_RATES = [10.0**x for x in np.arange(-5, 0.01, 0.5)]
ROBUST_BATCHES = (16, 64, 256)


def main():
    arguments = parse_arguments(__doc__, tasks=list(TASKS))
    if keras.backend.backend() != "jax":
        raise SystemExit(
            "benchmarks/quality.py compiles whole training runs with JAX. "
            "Set KERAS_BACKEND=jax."
        )
    of_level = {"full": TASKS, "quick": SMALL, "tiny": SMALL[-1:]}
    names = arguments.tasks or of_level[arguments.level]
    if len(names) == 1:
        measure(names[0], arguments)
        return
    # A process for each, and as many at once as there are cores to spare.
    names = sorted(names, key=LARGEST_FIRST.index)
    with concurrent.futures.ThreadPoolExecutor(arguments.processes) as pool:
        codes = list(
            pool.map(
                lambda name: subprocess.call(
                    [sys.executable, *sys.argv, "--tasks", name]
                ),
                names,
            )
        )
    failed = [name for name, code in zip(names, codes, strict=True) if code]
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}")


def measure(name, arguments):
    """Add all rows of a task to its file."""
    level = arguments.level
    results = Results(f"quality-{name}", arguments)
    results.add("step", lambda: step_ratios(name))
    ratios = results.data["rows"]["step"]
    comparisons = {
        "tuned": lambda rival: tuned(
            name, rival, ratios[rival]["median"], level
        ),
        "sooner": lambda rival: sooner(
            name, rival, results.data["rows"][f"tuned: {rival}"]
        ),
        "defaults": lambda rival: defaults(name, rival, level),
    }
    if name in SMALL:
        comparisons["robust"] = lambda rival: robust(name, rival, level)
    for rival in RIVALS:
        for comparison, rows in comparisons.items():
            results.add(
                f"{comparison}: {rival}", functools.partial(rows, rival)
            )


@functools.cache
def task_of(name):
    return TASKS[name]()


@functools.cache
def trainer(name, rival, batch_size=None, momentum=None):
    """One for each program: compiling takes longer than most runs."""
    make, _, argument = RIVALS[rival]
    if momentum is not None:
        make = functools.partial(make, **{argument: momentum})
    return Trainer(task_of(name), make, batch_size)


def schedule_of(rival):
    return "constant" if rival in CONSTANT else "cosine"


def step_ratios(name, rounds=7):
    """The time of a step next to Adam's, which is in "Adam" in seconds."""
    times = {rival: [] for rival in RIVALS}
    states = {}
    for turn in range(rounds + 1):
        for rival in RIVALS:
            program = trainer(name, rival)
            # Where an epoch is short, starting the program would count more
            # than its steps.
            steps = 500 if name in SMALL else program.steps
            if turn == 0:
                states[rival] = program.fresh_state(seed=0)
            batches = program.batches(seed=turn)
            order = jnp.asarray([next(batches) for _ in range(steps)])
            start = time.process_time()
            states[rival] = jax.block_until_ready(
                program.steps_from(states[rival], order, 1e-5)
            )
            # The first turn compiles.
            if turn:
                times[rival].append((time.process_time() - start) / steps)
    adam = times["Adam"]
    rows = {}
    for rival, values in times.items():
        ratios = [a / b for a, b in zip(values, adam, strict=True)]
        rows[rival] = {
            "median": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return {**rows, "Adam's seconds": statistics.median(adam)}


def tuned(name, rival, ratio, level):
    """Find the best trial, then train three fresh seeds of it."""
    task = task_of(name)
    # In units of the time between two evaluations.
    parts = max(1, round(task.epochs * task.evaluations / ratio))
    rates, seeds = RIVALS[rival][1], SEEDS
    if level == "tiny":
        rates, seeds, parts = rates[1:3], SEEDS[:1], min(parts, 2)

    def run(trial, seed):
        rate, momentum = trial
        return trainer(name, rival, momentum=momentum).run(
            rate, seed, parts, schedule_of(rival)
        )

    # `None`: the default.
    trials = {(rate, None): run((rate, None), 0).lowest for rate in rates}
    rate, _ = min(trials, key=trials.get)
    trials[rate, LESS_MOMENTUM] = run((rate, LESS_MOMENTUM), 0).lowest
    best = min(trials, key=trials.get)
    return {
        "learning_rate": best[0],
        "momentum": best[1],
        "trials": [[*trial, loss] for trial, loss in trials.items()],
        "parts": parts,
        "steps": trainer(name, rival).steps,
        "runs": [as_row(run(best, seed)) for seed in seeds],
    }


def sooner(name, rival, found):
    """Train the trial that `tuned` has found in shorter times.

    Returns:
        Dict from the share of Adam's time to a list of the seeds' validation
        losses.
    """
    schedule = schedule_of(rival)
    if schedule == "constant":
        # The longest run has all of them in it.
        return {}
    program = trainer(name, rival, momentum=found["momentum"])
    return {
        f"{share:g}": [
            [
                short(loss)
                for loss in program.run(
                    found["learning_rate"],
                    seed,
                    max(1, round(share * found["parts"])),
                    schedule,
                ).validation
            ]
            for seed in SEEDS[: len(found["runs"])]
        ]
        for share in SHORTER
    }


def defaults(name, rival, level):
    """Train with what the constructor gives, at a constant rate."""
    program = trainer(name, rival)
    seeds = range(10, 20 if rival in OURS else 13)
    if level == "tiny":
        seeds = (10,)
    rate = float(program.optimizer.learning_rate)
    return {
        "learning_rate": rate,
        "runs": [
            as_row(program.run(rate, seed, schedule="constant"))
            for seed in seeds
        ],
    }


def robust(name, rival, level):
    """The lowest validation loss for each batch size, rate and seed."""
    rates, batches, seeds = ROBUST_RATES, ROBUST_BATCHES, (20, 21, 22)
    if level == "tiny":
        # The program that `defaults` has compiled.
        rates, batches, seeds = ROBUST_RATES[4:6], (None,), (20,)
    cells = {}
    for batch in batches:
        size = () if batch is None else (batch,)
        program = trainer(name, rival, *size)
        for rate in rates:
            runs = [
                program.run(rate, seed, schedule="constant") for seed in seeds
            ]
            cells[f"{program.batch_size}/{rate:.3g}"] = [
                [short(run.lowest), diverges(run)] for run in runs
            ]
    return {"cells": cells}


def diverges(run):
    """Whether a run ends worse than where it began, or not at all."""
    return not run.validation[-1] <= 2 * run.validation[0]


def as_row(run):
    """What the page needs of a run."""
    return {
        "validation": [short(loss) for loss in run.validation],
        "test_score": short(run.test_score),
        "diverges": diverges(run),
    }


def short(value):
    """Five digits: the files are kept in the repository."""
    return float(f"{value:.5g}")


if __name__ == "__main__":
    main()
