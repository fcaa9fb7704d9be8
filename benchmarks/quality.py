"""How well models end that AdaFisher trains, next to Keras' own optimizers.

    KERAS_BACKEND=jax python benchmarks/quality.py

For each task and optimizer of `RIVALS`:

- rates: learning rates a factor of two apart, with a warm-up and a cosine. They
  show how sensitive an optimizer is, and are its tuning: the best of them by
  validation loss, and what is within 1 % of it, is tried with other momentum,
  and what is best then with another weight decay. Where an optimizer has
  another form for a task, that is tuned likewise, and the better of both is
  taken from there on.
- steps: fresh seeds of what tuning chose, as many steps for all.
- time: the same in as much time as AdamW takes. Who takes longer for a step has
  fewer of them, and a cosine that is as much shorter. It is the same runs where
  steps take as long, to 3 % or to less than the distance of evaluations. Where
  they take more than 1.25 times as long, the rate is tuned for it.
- sooner: schedules that end before that time is over. Who wants a given loss
  as soon as possible doesn't wait for a long schedule.
- defaults: the optimizer as it is without arguments and at three times its
  rate, with a constant rate and with a cosine.

All optimizers have the same seeds: of the weights, of the order of examples and
of their augmentation. Losses don't depend on what else the machine does. What a
step costs next to AdamW's does; it is the median over rounds in which all take
turns, in seconds of the processor.
tools/report/quality/ makes the page.

What it takes, in minutes of one core that others use too, with the numbers of
rates and seeds in `benchmarks/quality_rivals.py`:

    task            rates  seeds  sooner  defaults  compiling  all
    gpt              11.5    6.2     2.3       7.5        1.0   28
    vit              10.3    6.1     2.4       7.1        1.0   27
    gpt2              9.3    5.9     6.8                  1.0   23
    autoencoder      11.9    6.8     0.8       8.0        0.4   28
    cnn               9.0    4.0     2.0       5.2        0.9   21
    lstm              9.9    3.5     1.0       8.2        0.4   23
    tuning            5.1    1.5     0.7       6.7        0.6   14
    mlp               4.2    2.1     0.3       2.9        0.3   10
    large             3.8    1.3     0.3       2.8        0.4    8
    four tables       1.4    0.6     0.1       1.9        1.1    5
    all                                                        189
"""

import concurrent.futures
import dataclasses
import functools
import math
import statistics
import subprocess
import sys
import time

from benchmarks.common import parse_arguments
from benchmarks.common import Results

import jax  # isort: skip
import numpy as np  # isort: skip

from benchmarks.quality_rivals import COSTLY  # isort: skip
from benchmarks.quality_rivals import MAIN  # isort: skip
from benchmarks.quality_rivals import Plan  # isort: skip
from benchmarks.quality_rivals import PLANS  # isort: skip
from benchmarks.quality_rivals import RIVALS  # isort: skip
from benchmarks.quality_tasks import TASKS  # isort: skip
from benchmarks.training import Trainer  # isort: skip
import keras  # isort: skip

REFERENCE = "AdamW"
FRESH_SEEDS = tuple(range(1, 11))
TUNING_SEEDS = (0, 100, 200)
# AdaFisherMuon's default learning rate was chosen on 10 to 12.
DEFAULTS_SEEDS = tuple(range(13, 23))
# Of AdamW's time.
SHORTER = (0.35, 0.5, 0.7)
# Times the default learning rate.
FACTORS = (1, 3)
# A step takes as long as AdamW's up to this. Above `RETUNED`, the best learning
# rate for so much fewer steps is another.
SAME, RETUNED = 0.03, 1.25
# Up to so many times the lowest loss, a learning rate may be as good.
CLOSE = 1.01
# An optimizer whose step takes so many times as long has the plan `COSTLY`.
EXPENSIVE = 8
# Octaves below an optimizer's centre where no learning rate is tried any more,
# and a sum of losses that no optimizer that trains has.
LOWEST, EXPLODED = -20, 1e6
QUICK = ("digits", "cancer", "diabetes")
# The longest first, so that two processes end at about the same time.
LENGTHS = {
    "gpt2": "longest",
    **dict.fromkeys(("vit", "cnn", "gpt"), "long"),
    **dict.fromkeys(
        ("autoencoder", "large", "mlp", "tuning", "lstm"), "middle"
    ),
    **dict.fromkeys((*QUICK, "raw"), "short"),
}
ORDER = tuple(LENGTHS)


def measure_all(description, measure):
    """Call `measure` for each task, in a process of its own.

    Args:
        description: String, the docstring of the script that runs.
        measure: Function of a task's name and of the command line's arguments.
    """
    arguments = parse_arguments(description, tasks=list(TASKS))
    if keras.backend.backend() != "jax":
        raise SystemExit(
            f"{sys.argv[0]} compiles whole training runs with JAX. "
            "Set KERAS_BACKEND=jax."
        )
    of_level = {"full": ORDER, "quick": QUICK, "tiny": QUICK[-1:]}
    names = arguments.tasks or of_level[arguments.level]
    if len(names) == 1:
        measure(names[0], arguments)
        return
    # As many at once as there are cores to spare.
    names = sorted(names, key=ORDER.index)
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
    results = Results(f"quality2-{name}", arguments)
    rows = results.data["rows"]
    results.add("step", timed(step_ratios, name))
    if any(name in rival.forms for rival in RIVALS.values()):
        results.add("step of forms", timed(step_ratios, name, True))
    for rival in rivals_of(name):
        program = RIVALS[rival].program or rival
        ratio = rows["step"][program]["median"]
        plan = plan_of(name, rival, ratio, arguments.level)
        own = Contest(name, rival, ratio, plan)
        if name in RIVALS[rival].forms:
            own.form_ratio = rows["step of forms"][program]["median"]
        results.add(f"rates: {rival}", timed(own.rates))
        found = rows[f"rates: {rival}"]
        results.add(f"steps: {rival}", timed(own.steps, found))
        if RIVALS[rival].effort == "ablation":
            continue
        results.add(f"time: {rival}", timed(own.time, found))
        if plan.sooner and RIVALS[rival].schedule != "constant":
            found = {**found, **rows[f"time: {rival}"]}
            results.add(f"sooner: {rival}", timed(own.sooner, found))
        if plan.defaults:
            results.add(f"defaults: {rival}", timed(own.defaults))


def timed(function, *arguments):
    """The function for these arguments, with what it took in its result."""

    def row():
        start, processor = time.time(), time.process_time()
        found = function(*arguments)
        found["took"] = short(time.process_time() - processor)
        found["wall"] = short(time.time() - start)
        return found

    return row


def rivals_of(name):
    """Those that are measured on a task."""
    if LENGTHS[name] == "longest":
        return MAIN
    return tuple(RIVALS)


def plan_of(name, rival, ratio, level):
    """How much of a rival is measured on a task."""
    plan = PLANS[LENGTHS[name], RIVALS[rival].effort]
    if ratio > EXPENSIVE and LENGTHS[name] != "short":
        plan = COSTLY
    if level == "quick":
        plan = Plan(5, 2, 1, 3, 3, 2)
    if level == "tiny":
        plan = Plan(2, 0, 1, 1, 1, 1)
    return plan


@functools.cache
def task_of(name):
    return TASKS[name]()


@functools.cache
def trainer(name, program, is_form):
    """One for each program: compiling takes longer than most runs."""
    rival = RIVALS[program]
    make = rival.make
    if is_form:
        make = functools.partial(make, **rival.forms[name])
    return Trainer(task_of(name), make, rival.traced)


def step_ratios(name, of_forms=False):
    """The time of a step next to AdamW's, and that in seconds.

    Args:
        name: String, the task's.
        of_forms: Bool, whether to measure the other forms on the task.
    """
    programs = [r for r in rivals_of(name) if RIVALS[r].program is None]
    if of_forms:
        programs = [
            r for r in programs if r == REFERENCE or name in RIVALS[r].forms
        ]
    trainers = {
        r: trainer(name, r, of_forms and r != REFERENCE) for r in programs
    }
    times = {program: [] for program in programs}
    states = {p: trainers[p].fresh_state(seed=0) for p in programs}
    # Where a part is short, starting the program would count more than its
    # steps.
    steps = 500 if LENGTHS[name] == "short" else task_of(name).steps
    rounds = 3 if LENGTHS[name] == "longest" else 7
    rates = np.full(steps, 1e-5, "float32")
    for turn in range(rounds + 1):
        for program in programs:
            own = trainers[program]
            order = own.next_steps(own.batches(seed=turn), steps)
            start = time.process_time()
            states[program] = jax.block_until_ready(
                own.advance(states[program], order, rates)
            )
            # The first turn compiles.
            if turn:
                times[program].append((time.process_time() - start) / steps)
    reference = times[REFERENCE]
    rows = {}
    for program, values in times.items():
        ratios = [a / b for a, b in zip(values, reference, strict=True)]
        rows[program] = {
            "median": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return {**rows, "seconds": statistics.median(reference)}


@dataclasses.dataclass
class Contest:
    """One rival on one task.

    Attributes:
        name: String, the task's.
        rival: String.
        ratio: Float, the time of a step next to AdamW's.
        plan: `Plan`.
        form_ratio: Float, that of its other form, `None` without one.
    """

    name: str
    rival: str
    ratio: float
    plan: Plan
    form_ratio: float = None

    def run(
        self,
        rate,
        seed,
        parts=None,
        momentum=None,
        decay=None,
        is_form=False,
        **changes,
    ):
        """One training run of what is tuned."""
        rival = RIVALS[self.rival]
        settings = dict(rival.tuned)
        if momentum is not None:
            settings[rival.momentum] = momentum
        if decay is not None:
            settings["weight_decay"] = decay
        return trainer(self.name, rival.program or self.rival, is_form).run(
            rate,
            seed,
            parts,
            **{"schedule": rival.schedule, **settings, **changes},
        )

    def rates(self, parts=None, form_parts=None):
        """Losses over learning rates, and the best of them.

        Args:
            parts: Integer, see `Trainer.run`.
            form_parts: That of the other form, if there is one.
        """
        found = self.tuned(parts)
        if self.form_ratio is not None:
            found["form"] = self.tuned(form_parts, is_form=True)
            found["is_form"] = lowest(found["form"]) < lowest(found)
        return found

    def tuned(self, parts, is_form=False):
        """What `rates` returns, of one form."""

        def losses(rate, momentum=None, decay=None):
            runs = [
                self.run(rate, seed, parts, momentum, decay, is_form)
                for seed in TUNING_SEEDS[: self.plan.tuning]
            ]
            return [short(run.lowest) for run in runs]

        rival = RIVALS[self.rival]
        found = widened(
            lambda octave: losses(rival.centre * 2.0**octave), self.plan
        )
        limit = CLOSE * min(total(found, octave) for octave in found)
        # `None`: the default.
        trials = {}
        for octave in sorted(found):
            if total(found, octave) <= limit:
                rate = rival.centre * 2.0**octave
                trials[rate, None] = found[octave]
                for value in rival.others:
                    trials[rate, value] = losses(rate, value)
        rate, momentum = min(trials, key=lambda trial: sum(trials[trial]))
        decays = {None: trials[rate, momentum]}
        decays |= {
            value: losses(rate, momentum, value) for value in rival.decays
        }
        return {
            "rates": [
                [short(rival.centre * 2.0**octave), found[octave]]
                for octave in sorted(found)
            ],
            "momentums": [
                [short(tried), value, found_losses]
                for (tried, value), found_losses in trials.items()
            ],
            "learning_rate": rate,
            "momentum": momentum,
            "decays": [[value, decays[value]] for value in decays],
            "decay": min(decays, key=lambda value: sum(decays[value])),
        }

    def steps(self, found):
        """Fresh seeds of what tuning found."""
        return {"runs": self.fresh(found, None)}

    def fresh(self, found, parts):
        return [
            as_row(self.run_of(found, seed, parts))
            for seed in FRESH_SEEDS[: self.plan.seeds]
        ]

    def run_of(self, found, seed, parts):
        """One training run of what tuning chose."""
        is_form = found.get("is_form", False)
        if is_form:
            found = found["form"]
        return self.run(
            found["learning_rate"],
            seed,
            parts,
            found["momentum"],
            found["decay"],
            is_form,
        )

    def time(self, found):
        """The same in AdamW's time."""
        whole = task_of(self.name).parts

        def parts_of(ratio):
            return ratio and max(1, round(whole / ratio))

        tuned = {}
        if self.ratio > RETUNED:
            found = tuned = self.rates(
                parts_of(self.ratio), parts_of(self.form_ratio)
            )
        ratio = self.form_ratio if found.get("is_form") else self.ratio
        parts = parts_of(ratio)
        if abs(ratio - 1) <= SAME or parts == whole:
            return {"parts": whole, "same": True}
        return {
            **tuned,
            "ratio": ratio,
            "parts": parts,
            "same": False,
            "runs": self.fresh(found, parts),
        }

    def sooner(self, found):
        """What `time` has trained, in shorter times."""
        return {
            f"{share:g}": [
                [
                    short(loss)
                    for loss in self.run_of(
                        found, seed, max(1, round(share * found["parts"]))
                    ).validation
                ]
                for seed in FRESH_SEEDS[: self.plan.sooner]
            ]
            for share in SHORTER
        }

    def defaults(self):
        """What the constructor gives, and three times its rate."""
        rival = RIVALS[self.rival]
        optimizer = rival.make()
        rate = float(optimizer.learning_rate)
        settings = {
            name: float(getattr(optimizer, name) or 0) for name in rival.traced
        }
        schedules = {"constant", rival.schedule}
        return {"learning_rate": rate} | {
            f"{schedule}, {factor}": [
                as_row(
                    self.run(factor * rate, seed, schedule=schedule, **settings)
                )
                for seed in DEFAULTS_SEEDS[: self.plan.defaults]
            ]
            for schedule in sorted(schedules)
            for factor in FACTORS
        }


def widened(losses, plan):
    """Try learning rates until both ends are worse than the best.

    Args:
        losses: Function of a whole number, of how many octaves a rate is above
            the centre.
        plan: `Plan`.

    Returns:
        Dict from octaves to what `losses` gave.
    """
    low = -(plan.rates // 2)
    high = low + plan.rates - 1
    found = {octave: losses(octave) for octave in range(low, high + 1)}
    # Where all rates are too high, it goes down until one isn't.
    while total(found, low) == math.inf and low > LOWEST:
        if any(total(found, octave) < math.inf for octave in found):
            break
        low -= 1
        found[low] = losses(low)
    for _ in range(plan.more):
        best = min(total(found, octave) for octave in found)
        ends = {low - 1: total(found, low), high + 1: total(found, high)}
        octave = min(ends, key=ends.get)
        if not ends[octave] <= 1.05 * best:
            break
        found[octave] = losses(octave)
        low, high = min(low, octave), max(high, octave)
    return found


def lowest(tuned):
    """The losses of what tuning chose."""
    return min(sum(losses) for _, losses in tuned["decays"])


def total(found, octave):
    """The losses of a rate. What has exploded is as good as infinite."""
    value = sum(found[octave])
    return value if value < EXPLODED else math.inf


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
    measure_all(__doc__, measure)
