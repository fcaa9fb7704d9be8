"""The quality benchmark's tasks without a known end, and with a later one.

    KERAS_BACKEND=jax python benchmarks/quality_schedules.py

What `benchmarks/quality.py` compares are runs with a cosine over the task's
number of steps. Here are two others, on the same tasks:

- anytime: a learning rate that falls as one over the square root of the number
  of steps, without a warm-up, and what is evaluated is the average of the
  weights over about a tenth of the steps so far. That is what
  `AdaFisher.anytime` makes of ours; all others get the same. A rate that falls
  later is tried too.
- longer: four times as many steps, with a warm-up and a cosine over all.

Momentum and weight decay are those that `benchmarks/quality.py` has chosen, for
AdaFisherMuon those of its default form. So that has to run before. Learning
rates are tuned anew, a factor of two apart. It takes nearly two hours of one
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

TIMES_LONGER = 4


@dataclasses.dataclass(frozen=True)
class Regime:
    """What is changed of the quality benchmark's runs.

    Attributes:
        schedules: Tuple of keys of `SCHEDULES`. The first is tuned, the others
            are tried at the best learning rate and at half of it.
        is_averaged: Bool, whether averages of the weights are evaluated.
        times: Integer, how many times as many steps.
    """

    schedules: tuple
    is_averaged: bool
    times: int


REGIMES = {
    "anytime": Regime(
        ("inverse_sqrt, 100", "inverse_sqrt, 400"), is_averaged=True, times=1
    ),
    "longer": Regime(("cosine",), is_averaged=False, times=TIMES_LONGER),
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
    # The one that is best with the quality benchmark's schedule.
    centre = found["learning_rate"]

    def run(rate, schedule, seed):
        settings = found["momentum"], found["decay"]
        return contest.run(
            rate,
            seed,
            parts,
            *settings,
            schedule=schedule,
            is_averaged=regime.is_averaged,
        )

    def losses(rate, schedule):
        seeds = TUNING_SEEDS[: contest.plan.tuning]
        return [short(run(rate, schedule, seed).lowest) for seed in seeds]

    first, *others = regime.schedules
    rates = widened(
        lambda octave: losses(centre * 2.0**octave, first), contest.plan
    )
    octave = min(rates, key=lambda octave: total(rates, octave))
    best = centre * 2.0**octave
    trials = {(best, first): rates[octave]}
    for schedule in others:
        for rate in (best, best / 2):
            trials[rate, schedule] = losses(rate, schedule)
    rate, schedule = min(trials, key=lambda trial: sum(trials[trial]))
    return {
        "rates": [
            [short(centre * 2.0**octave), rates[octave]]
            for octave in sorted(rates)
        ],
        "schedules": [
            [short(tried), name, found_losses]
            for (tried, name), found_losses in trials.items()
        ],
        "learning_rate": rate,
        "schedule": schedule,
        "runs": [
            as_row(run(rate, schedule, seed))
            for seed in FRESH_SEEDS[: contest.plan.seeds]
        ],
    }


if __name__ == "__main__":
    measure_all(__doc__, measure)
