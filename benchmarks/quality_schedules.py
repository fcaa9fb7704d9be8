"""The quality benchmark's tasks without a schedule, and with a longer one.

    KERAS_BACKEND=jax python benchmarks/quality_schedules.py

What `benchmarks/quality.py` compares are runs with a cosine over the task's
number of steps. Here are two others, on the same tasks:

- averaged: a constant learning rate, without a warm-up, and what is evaluated
  is the average of the weights that Keras keeps with `use_ema=True`, over about
  a tenth of the run.
- longer: four times as many steps, with a warm-up and a cosine over all.

Momentum and weight decay are those that `benchmarks/quality.py` has chosen, for
AdaFisherMuon those of its default form. So that has to run before. Learning
rates are tuned anew, a factor of two apart. It takes an hour and a half of one
core.
"""

import dataclasses
import json

from benchmarks.common import Results
from benchmarks.quality import as_row
from benchmarks.quality import Contest
from benchmarks.quality import EXPENSIVE
from benchmarks.quality import FRESH_SEEDS
from benchmarks.quality import LENGTHS
from benchmarks.quality import measure_all
from benchmarks.quality import short
from benchmarks.quality import task_of
from benchmarks.quality import timed
from benchmarks.quality import total
from benchmarks.quality import TUNING_SEEDS
from benchmarks.quality import widened
from benchmarks.quality_rivals import MAIN
from benchmarks.quality_rivals import Plan

# Of the steps of a run, how many an average is over.
AVERAGED_SHARE = 0.1
TIMES_LONGER = 4


@dataclasses.dataclass(frozen=True)
class Regime:
    """What is changed of the quality benchmark's runs.

    Attributes:
        is_averaged: Bool, whether the rate is constant and weights averaged.
        times: Integer, how many times as many steps.
        octave: Integer, where learning rates are tried first, next to the one
            that is best with the quality benchmark's schedule.
    """

    is_averaged: bool
    times: int
    octave: int


REGIMES = {
    "averaged": Regime(is_averaged=True, times=1, octave=-1),
    "longer": Regime(is_averaged=False, times=TIMES_LONGER, octave=0),
}


def plan(rates, more, tuning, seeds):
    """A `Plan` without shorter schedules and defaults."""
    return Plan(rates, more, tuning, seeds, sooner=0, defaults=0)


PLANS = {
    "short": plan(rates=3, more=6, tuning=3, seeds=10),
    "middle": plan(rates=3, more=4, tuning=2, seeds=5),
    "long": plan(rates=3, more=3, tuning=1, seeds=5),
    "longest": plan(rates=3, more=2, tuning=1, seeds=3),
}
# Muon, where its steps take several times as long as all others'.
COSTLY = plan(rates=3, more=2, tuning=1, seeds=5)
OF_LEVEL = {
    "quick": plan(rates=3, more=1, tuning=1, seeds=2),
    "tiny": plan(rates=1, more=0, tuning=1, seeds=1),
}


def measure(name, arguments):
    """Add all rows of a task to its file."""
    path = arguments.results / f"quality2-{name}-jax.json"
    if not path.exists():
        raise SystemExit(f"Run benchmarks/quality.py first: no {path}.")
    found = json.loads(path.read_text())["rows"]
    results = Results(f"schedules-{name}", arguments)
    for kind, regime in REGIMES.items():
        for rival in MAIN:
            ratio = found["step"][rival]["median"]
            amount = plan_of(name, ratio, regime, arguments.level)
            if amount is None:
                continue
            contest = Contest(name, rival, ratio, amount)
            results.add(
                f"{kind}: {rival}",
                timed(tuned, contest, regime, found[f"rates: {rival}"]),
            )


def plan_of(name, ratio, regime, level):
    """How much of a rival is measured on a task, `None` for nothing."""
    length = LENGTHS[name]
    is_costly = ratio > EXPENSIVE and length != "short"
    if regime.times > 1 and (is_costly or length == "longest"):
        return None
    if level in OF_LEVEL:
        return OF_LEVEL[level]
    if is_costly:
        return COSTLY
    return PLANS["longest" if regime.times > 1 and length == "long" else length]


def tuned(contest, regime, found):
    """Tune the learning rate, then train fresh seeds at the best.

    Args:
        contest: `Contest`.
        regime: `Regime`.
        found: What the quality benchmark has found with its own schedule.
    """
    task = task_of(contest.name)
    parts = regime.times * task.parts
    changes = {}
    if regime.is_averaged:
        averaged = AVERAGED_SHARE * parts * task.steps
        changes = {"schedule": "constant", "ema_momentum": 1 - 1 / averaged}
    centre = found["learning_rate"] * 2.0**regime.octave

    def run(rate, seed):
        settings = found["momentum"], found["decay"]
        return contest.run(rate, seed, parts, *settings, **changes)

    def losses(octave):
        rate = centre * 2.0**octave
        seeds = TUNING_SEEDS[: contest.plan.tuning]
        return [short(run(rate, seed).lowest) for seed in seeds]

    rates = widened(losses, contest.plan)
    best = min(rates, key=lambda octave: total(rates, octave))
    return {
        "rates": [
            [short(centre * 2.0**octave), rates[octave]]
            for octave in sorted(rates)
        ],
        "learning_rate": centre * 2.0**best,
        "runs": [
            as_row(run(centre * 2.0**best, seed))
            for seed in FRESH_SEEDS[: contest.plan.seeds]
        ],
    }


if __name__ == "__main__":
    measure_all(__doc__, measure)
