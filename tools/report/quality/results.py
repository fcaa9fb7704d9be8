"""What the benchmark found, and what follows from it.

Of all values here less is better: an error on the test split in percent, or a
loss where a task has no classes.
"""

import json
import math
import statistics

TASKS = {
    "mlp": "MNIST, MLP",
    "cnn": "MNIST, shifted, CNN",
    "vit": "MNIST, ViT",
    "autoencoder": "MNIST, autoencoder",
    "lstm": "MNIST rows, LSTM",
    "gpt": "Python's source, GPT",
    "gpt2": "Python's source, larger GPT",
    "large": "MNIST, batches of 1,024",
    "raw": "diabetes in raw units",
    "diabetes": "diabetes, MLP",
    "cancer": "breast cancer, MLP",
    "digits": "digits, MLP",
    "tuning": "fine-tuning, CNN",
}
# The others are scored by their error.
BY_LOSS = ("autoencoder", "gpt", "gpt2", "diabetes", "raw")
# Three rates and more where they are better: too few for octaves.
FEW_RATES = ("gpt2",)
# Ours first: on a screen, the table's other end is out of sight.
MAIN = ("AdaFisherMuon", "AdaFisherW", "AdamW", "Nadam", "Muon")
RIVALS = (
    "AdaFisherMuon",
    "AdaFisherW",
    "AdaFisher",
    "AdamW",
    "Nadam",
    "Muon",
    "Adam",
    "SGD",
    "Lion",
    "ScheduleFreeAdamW",
    "AdaFisher, as published",
)
# One family: a task is won once.
OURS = ("AdaFisherMuon", "AdaFisherW", "AdaFisher")
OTHERS = tuple(rival for rival in RIVALS if rival not in OURS)
ABLATION = "AdaFisherMuon, not whitened"
# Whose steps cost what another's do: it is the same program.
PROGRAMS = {
    "AdaFisher": "AdaFisherW",
    "Adam": "AdamW",
    ABLATION: "AdaFisherMuon",
}
# What `benchmarks/quality_schedules.py` measures, and who needs no schedule.
ANYTIME, LONGER = "anytime", "longer"
NO_SCHEDULE = "ScheduleFreeAdamW"
# What a run counts that never reaches the target, as a multiple of AdamW's
# time. Where runs stop, it could be anything above 1.
NEVER = 2.0
# A difference is above the noise if it is more than so many standard errors.
ERRORS = 2
# The tasks that had no part in the choice of settings, but for a learning rate.
NOT_CHOSEN_ON = ("gpt2", "large", "raw")
# The defaults: a schedule, and what the default rate is multiplied by.
DEFAULTS = ("constant, 1", "constant, 3", "cosine, 1", "cosine, 3")


def load(folder):
    """From a task's name to what `benchmarks/quality.py` wrote of it."""
    found = {}
    for task in TASKS:
        path = folder / f"quality2-{task}-jax.json"
        if path.exists():
            data = json.loads(path.read_text())
            # In a run that goes on, a task may be half measured.
            if data["rows"].keys() >= {f"time: {rival}" for rival in MAIN}:
                found[task] = data
    return found


def ratio_of(data, rival):
    """What a step costs next to AdamW's."""
    return data["rows"]["step"][PROGRAMS.get(rival, rival)]["median"]


def form_ratio_of(data):
    """That of AdaFisherMuon's other form."""
    return data["rows"]["step of forms"]["AdaFisherMuon"]["median"]


def ratio_in_time(data, rival):
    """That of the form that `time` runs."""
    row = data["rows"].get(f"time: {rival}", {})
    return row.get("ratio", ratio_of(data, rival))


def runs_of(data, kind, rival):
    """The runs of an optimizer, empty if there are none.

    Args:
        data: What `load` gives for a task.
        kind: "steps", "time", or one of `DEFAULTS`.
        rival: String.

    Returns:
        List of dicts, one for each seed, in the same order for all.
    """
    rows = data["rows"]
    if kind in DEFAULTS:
        row = rows.get(f"defaults: {rival}", {})
        # Who needs no schedule is the same with one.
        return row.get(kind) or row.get(kind.replace("cosine", "constant"), [])
    row = rows.get(f"{kind}: {rival}", {})
    if row.get("same"):
        row = rows[f"steps: {rival}"]
    return row.get("runs", [])


def load_schedules(folder, results):
    """From a task's name to what `benchmarks/quality_schedules.py` wrote of it.

    Tasks without a file are left out. ScheduleFreeAdamW, which has neither a
    schedule nor a use for another average, has the same runs as in `results`.

    Args:
        folder: `pathlib.Path`.
        results: What `load` returned.
    """
    found = {}
    for task, data in results.items():
        path = folder / f"schedules-{task}-jax.json"
        if not path.exists():
            continue
        found[task] = json.loads(path.read_text())
        rows = found[task]["rows"]
        own = data["rows"].get(f"steps: {NO_SCHEDULE}")
        if own:
            rows[f"{ANYTIME}: {NO_SCHEDULE}"] = own
    return found


def value_of(task, run):
    """What counts of a run. Infinite where it gave no number."""
    score = run["test_score"]
    value = -score if task in BY_LOSS else 100 * (1 - score)
    return value if math.isfinite(value) else math.inf


def lowest_loss(_task, run):
    """The lowest validation loss of a run."""
    return min(filter(math.isfinite, run["validation"]), default=math.inf)


def table_of(task, data, kind, rivals=RIVALS, value=value_of):
    """From each optimizer that was measured to its values, seed by seed."""
    found = {
        rival: [value(task, run) for run in runs_of(data, kind, rival)]
        for rival in rivals
    }
    return {rival: values for rival, values in found.items() if values}


def is_better(one, other):
    """Whether values are lower than others by more than the noise.

    Both are of the same seeds: of their differences, the mean has to be more
    than `ERRORS` times its standard error. Where one of them has a single seed,
    its noise is taken to be that of the other.
    """
    pairs = list(zip(one, other, strict=False))
    longer = max(one, other, key=len)
    if len(longer) < 2 or not all(map(math.isfinite, one)):
        return False
    if not all(map(math.isfinite, other)):
        return True
    if len(pairs) < 2:
        error = statistics.stdev(longer) * (1 + 1 / len(longer)) ** 0.5
        difference = statistics.mean(other) - statistics.mean(one)
        return difference > ERRORS * error
    differences = [b - a for a, b in pairs]
    error = statistics.stdev(differences) / len(pairs) ** 0.5
    return statistics.mean(differences) > ERRORS * error


def best_of(values, among):
    """The one of some optimizers with the lowest mean, `None` without any."""
    among = [rival for rival in among if rival in values]
    return min(
        among, key=lambda rival: statistics.mean(values[rival]), default=None
    )


def marks(values):
    """How to show each optimizer of a row.

    Returns:
        Dict to "best", "tie" or "". There is a best one if it is better than
        all others but those of its family. All that aren't worse than any
        by more than the noise are ties.
    """
    if not values:
        return {}
    first = best_of(values, values)
    family = OURS if first in OURS else (first,)
    is_alone = all(
        is_better(values[first], other)
        for rival, other in values.items()
        if rival not in family
    )
    found = {
        rival: "" if any(is_better(v, own) for v in values.values()) else "tie"
        for rival, own in values.items()
    }
    if is_alone:
        return dict.fromkeys(found, "") | {first: "best"}
    return found


def verdict(values):
    """Who is best of a row, each family once.

    Returns:
        "ours" if the best of ours is better than each of the others, "theirs"
        likewise, or "tie"; and the best of ours and of the others.
    """
    ours, theirs = best_of(values, OURS), best_of(values, OTHERS)
    if ours is None or theirs is None:
        return "tie", ours, theirs
    for name, best, losers in (
        ("ours", ours, OTHERS),
        ("theirs", theirs, OURS),
    ):
        if all(
            is_better(values[best], values[r]) for r in losers if r in values
        ):
            return name, ours, theirs
    return "tie", ours, theirs


def verdicts(results, kind):
    """From each task to what `verdict` says of it."""
    return {
        task: verdict(table_of(task, data, kind))
        for task, data in results.items()
    }


def rates_of(data, rival):
    """Dict from learning rates to mean losses, empty if there are none."""
    row = data["rows"].get(f"rates: {rival}", {})
    return {
        rate: statistics.mean(losses) for rate, losses in row.get("rates", [])
    }


def octaves(data, rival):
    """How many octaves of rates are good, within 5 % of a lowest loss.

    Returns:
        Of this optimizer's own, of the lowest of all, and whether they may be
        more, since the window ends there.
    """
    rates = rates_of(data, rival)
    lowest = min(
        min(rates_of(data, other).values(), default=math.inf)
        for other in RIVALS
    )
    good = [loss <= 1.05 * min(rates.values()) for loss in rates.values()]
    close = [loss <= 1.05 * lowest for loss in rates.values()]
    return sum(good), sum(close), good[0] or good[-1]


def mean_octaves(results, rival):
    """Get the mean over tasks of what `octaves` gives, `None` without any.

    The last of the three is on how many tasks the window ends too early.
    """
    found = [
        octaves(data, rival)
        for task, data in results.items()
        if task not in FEW_RATES and rates_of(data, rival)
    ]
    if not found:
        return None
    own, best, is_open = zip(*found, strict=True)
    return statistics.mean(own), statistics.mean(best), sum(is_open)


def times_to_target(data, only_longest=False):
    """Per optimizer the time to AdamW's lowest loss, AdamW's own being 1."""

    def time_of(rival):
        trials = trials_of(data, rival)[: 1 if only_longest else None]
        return time_to_target(data, trials) * ratio_in_time(data, rival)

    own = time_of("AdamW")
    return {
        rival: time_of(rival) / own
        for rival in RIVALS
        if runs_of(data, "time", rival)
    }


def anytime_times(data, schedules):
    """The same of single runs without a known end, with averaged weights.

    AdamW's own with a cosine over all steps is 1. What takes longer than
    AdamW's whole run is infinite.

    Args:
        data: What `load` gives for a task.
        schedules: What `load_schedules` gives for it.
    """
    longest = trials_of(data, "AdamW")[:1]
    own, limit = time_to_target(data, longest), len(longest[0][0])
    times = {}
    for rival in (*MAIN, NO_SCHEDULE):
        curves = [
            run["validation"] for run in runs_of(schedules, ANYTIME, rival)
        ]
        if curves:
            time = time_to_target(data, [curves]) * ratio_of(data, rival)
            times[rival] = time / own if time <= limit else math.inf
    return times


def trials_of(data, rival):
    """Schedules of several lengths, the longest first: curves, by seeds."""
    shorter = data["rows"].get(f"sooner: {rival}", {})
    return [
        [run["validation"] for run in runs_of(data, "time", rival)],
        *(curves for curves in shorter.values() if isinstance(curves, list)),
    ]


def time_to_target(data, trials):
    """When the first of some trials gets to AdamW's lowest loss.

    Args:
        data: What `load` gives for a task.
        trials: List of lists of curves, one for each seed.

    Returns:
        Float, median of the seeds in evaluations, or infinity.
    """
    # As many seeds as all of its schedules have. Of an even number of them, at
    # least half reach the target, and the median time is that of one of these.
    reference = trials_of(data, "AdamW")
    seeds = min(map(len, reference))
    target = statistics.median_high(
        min(curve) for curve in reference[0][:seeds]
    )
    return statistics.median_low(
        min(steps_to(target, curve) for curve in study)
        for study in zip(*(trial[:seeds] for trial in trials), strict=False)
    )


def steps_to(target, curve):
    """When a loss gets to the target: evaluations, or infinity."""
    for index, loss in enumerate(curve):
        if loss <= target:
            if index:
                before = curve[index - 1]
                index -= (target - loss) / (before - loss)
            return index + 1
    return math.inf


def mean_time(values):
    """The geometric mean, with `NEVER` for times that aren't finite."""
    return statistics.geometric_mean(
        value if math.isfinite(value) else NEVER for value in values
    )


def geometric_means(times):
    """The mean time of each optimizer."""
    found = {}
    for rival in RIVALS:
        values = [row[rival] for row in times.values() if rival in row]
        if values:
            found[rival] = mean_time(values)
    return found


def ranks(results, kind):
    """Mean rank over tasks: 1 is the best of all."""
    found = {rival: [] for rival in RIVALS}
    for task, data in results.items():
        values = table_of(task, data, kind)
        means = {r: statistics.mean(own) for r, own in values.items()}
        for rival, own in means.items():
            better = sum(other < own for other in means.values())
            ties = sum(other == own for other in means.values())
            found[rival].append(better + (ties + 1) / 2)
    return {r: statistics.mean(v) for r, v in found.items() if v}


def divergences(results, kind, rival):
    """How many runs diverge, and of how many."""
    runs = [
        run for data in results.values() for run in runs_of(data, kind, rival)
    ]
    return sum(run["diverges"] for run in runs), len(runs)


def minutes(results):
    """Of the processor, for all rows."""
    return (
        sum(
            row.get("took", 0)
            for data in results.values()
            for row in data["rows"].values()
        )
        / 60
    )
