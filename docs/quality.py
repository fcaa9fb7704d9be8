"""Write docs/quality.md and its plots from what the benchmark found.

    make quality

runs the benchmark and then this. `--results` and `--output` are folders.
"""

import argparse
import json
import math
import pathlib
import statistics

import matplotlib.pyplot as plt
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
TASKS = {
    "mlp": "MNIST, MLP",
    "cnn": "MNIST, CNN",
    "vit": "MNIST, ViT",
    "autoencoder": "MNIST, autoencoder",
    "lstm": "MNIST rows, LSTM",
    "gpt": "Python's source, GPT",
    "diabetes": "diabetes, MLP",
    "cancer": "breast cancer, MLP",
    "digits": "digits, MLP",
    "tuning": "fine-tuning, CNN",
}
# The others are scored by accuracy.
BY_LOSS = ("autoencoder", "gpt", "diabetes")
# Ours first: on a screen, the table's other end is out of sight.
RIVALS = (
    "AdaFisher",
    "AdaFisherW",
    "AdaFisher, as published",
    "SGD",
    "Adam",
    "AdamW",
    "Nadam",
    "Muon",
    "Lion",
    "ScheduleFreeAdamW",
)
OURS = ("AdaFisher", "AdaFisherW")
# Okabe and Ito's colours, which colour-blind readers can tell apart, and lines
# for those who print without colours.
STYLES = {
    "SGD": {"color": "#999999", "linestyle": "--"},
    "Adam": {"color": "#E69F00", "linestyle": "-."},
    "AdamW": {"color": "#F0E442", "linestyle": "-"},
    "Nadam": {"color": "#009E73", "linestyle": "--"},
    "Muon": {"color": "#CC79A7", "linestyle": "-"},
    "Lion": {"color": "#000000", "linestyle": ":"},
    "ScheduleFreeAdamW": {"color": "#56B4E9", "linestyle": "-."},
    "AdaFisher, as published": {"color": "#0072B2", "linestyle": ":"},
    "AdaFisher": {"color": "#D55E00", "linestyle": "-", "linewidth": 2.2},
    "AdaFisherW": {"color": "#0072B2", "linestyle": "-"},
}
# What a run counts that never reaches the target, as a multiple of AdamW's
# time. Where runs stop, it could be anything above 1.
NEVER = 2.0
ADAM_SECONDS = "Adam's seconds"

INTRODUCTION = """\
# Quality

Written by `make quality` (`benchmarks/quality.py` and `docs/quality.py`), on
{device}, JAX {version}, Keras {keras}. The tasks are in
`benchmarks/quality_tasks.py`: real data that ships inside PyPI packages, and
models that train in seconds. They say how optimizers compare on small models,
not on large ones.
{missing}
{summary}"""

TUNED = """\
## Tuned

Each optimizer has six trials on one seed: five learning rates, a factor of
about three apart, and the best of them with a momentum of 0.8. All else is at
its default (SGD has `momentum=0.9`). The trial with the lowest validation loss
is trained on three fresh seeds. Learning rates warm up over 5 % of the steps
and follow a cosine to zero, but for ScheduleFreeAdamW, which stays at its rate.

All have the time that Adam takes: where a step costs 1.1 times as much, there
are that many fewer of them. The cost is that of compiled epochs, of 500 steps
where an epoch is shorter than the start of a program, in seconds of the
processor, median of 7 rounds in which all take turns.

### Score on the test split

At the evaluation with the lowest validation loss; mean of three seeds, ± half
their range. Bold: the best of the row, and what is within 2 % of it. Accuracy
in % (more is better), or loss (less is better).
"""

TARGET = """\
### Time to AdamW's best

The target is the validation loss that AdamW, tuned, reaches at its lowest, the
median of the seeds. As in AlgoPerf, several trials run at once and the first
that reaches the target stops the clock. Here the trials are three lengths of
the schedule, all of Adam's time, 0.7 and 0.5 of it, with the learning rate and
momentum chosen above. The table has the median of the three seeds, as a share
of AdamW's own. "—": not reached in Adam's time; counts as {never:g} in the
geometric mean.

![Performance profiles](quality/profiles.svg)

The share of tasks on which an optimizer reaches the target in so much of
AdamW's time.

![Validation loss over time](quality/curves.svg)

The plots show the longest schedule, mean of the seeds.
"""

COST = """\
### Cost of a step, next to Adam's
"""

CHOSEN = """\
### Learning rates that tuning chose

"m": with less momentum.
"""

DEFAULTS = """\
## Defaults

The optimizer as its constructor makes it, no schedule (SGD with
`momentum=0.9`), for as many epochs as Adam has. Mean test score of three seeds,
for AdaFisher and AdaFisherW of ten. A run diverges if its last validation
loss isn't finite or is more than twice its first.
"""

ROBUST = """\
## Robustness

Learning rates from 1e-5 to 1, batches of 16, 64 and 256, three seeds, no
schedule, all else at its default, on the three smallest tasks. "good": the
share of runs whose lowest validation loss is within 10 % of the task's lowest.

![Share of good runs](quality/robustness.svg)
"""


def load(folder):
    """From a task's name to what `benchmarks/quality.py` wrote of it."""
    found = {}
    for task in TASKS:
        path = folder / f"quality-{task}-jax.json"
        if path.exists():
            found[task] = json.loads(path.read_text())
    return {
        task: data
        for task, data in found.items()
        if all(f"defaults: {rival}" in data["rows"] for rival in RIVALS)
    }


def scores(row):
    """The test scores of an optimizer's runs."""
    return [run["test_score"] for run in row["runs"]]


def mean_scores(data, kind):
    """From an optimizer to its mean score, `-inf` if that isn't finite."""
    means = {
        rival: statistics.mean(scores(data["rows"][f"{kind}: {rival}"]))
        for rival in RIVALS
    }
    return {r: m if math.isfinite(m) else -math.inf for r, m in means.items()}


def mean_curve(row):
    """The mean over seeds, as far as all of them go."""
    curves = [run["validation"] for run in row["runs"]]
    return np.mean([c[: min(map(len, curves))] for c in curves], axis=0)


def is_close(task, score, best):
    """Whether a score is within 2 % of the best one."""
    if task in BY_LOSS:
        return -score <= -best * 1.02
    return score >= best * 0.98


def show(task, values):
    """A mean with half its range."""
    mean, half = statistics.mean(values), (max(values) - min(values)) / 2
    if not math.isfinite(mean):
        return "diverges"
    if task in BY_LOSS:
        digits = 1 if abs(mean) > 10 else 3
        return f"{-mean:.{digits}f} ± {half:.{digits}f}"
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score_table(results, kind):
    """Test scores, "tuned" or with the "defaults"."""
    rows = []
    for task, data in results.items():
        values = {r: scores(data["rows"][f"{kind}: {r}"]) for r in RIVALS}
        means = mean_scores(data, kind)
        best = max(means.values())
        cells = [
            f"**{show(task, values[r])}**"
            if is_close(task, means[r], best)
            else show(task, values[r])
            for r in RIVALS
        ]
        rows.append([TASKS[task], *cells])
    return table(["task", *RIVALS], rows)


def times_to_target(data, only_longest=False):
    """Per optimizer the time to AdamW's lowest loss, AdamW's own being 1."""
    rows = data["rows"]

    def lowest(run):
        return min(run["validation"])

    target = statistics.median(map(lowest, rows["tuned: AdamW"]["runs"]))

    def time_of(rival):
        trials = [[r["validation"] for r in rows[f"tuned: {rival}"]["runs"]]]
        if not only_longest:
            trials += rows[f"sooner: {rival}"].values()
        studies = [
            min(steps_to(target, curve) for curve in study)
            for study in zip(*trials, strict=True)
        ]
        return statistics.median(studies) * rows["step"][rival]["median"]

    own = time_of("AdamW")
    return {rival: time_of(rival) / own for rival in RIVALS}


def steps_to(target, curve):
    """When a loss gets to the target: evaluations, or infinity."""
    for index, loss in enumerate(curve):
        if loss <= target:
            if index:
                before = curve[index - 1]
                index -= (target - loss) / (before - loss)
            return index + 1
    return math.inf


def geometric_means(times):
    """Per optimizer, with `NEVER` for times that aren't finite."""
    return {
        rival: statistics.geometric_mean(
            row[rival] if math.isfinite(row[rival]) else NEVER
            for row in times.values()
        )
        for rival in RIVALS
    }


def target_table(times, with_longest):
    """The table of the times, and each optimizer's geometric mean."""
    rows = [
        [
            TASKS[task],
            *(
                f"{row[rival]:.2f}" if math.isfinite(row[rival]) else "—"
                for rival in RIVALS
            ),
        ]
        for task, row in times.items()
    ]
    means = geometric_means(times)
    for what, of_all in (
        ("**geometric mean**", means),
        ("with the longest schedule only", geometric_means(with_longest)),
    ):
        rows.append([what, *(f"{of_all[r]:.2f}" for r in RIVALS)])
    return table(["task", *RIVALS], rows), means


def cost_table(results):
    """What a step costs next to Adam's."""
    rows = []
    for task, data in results.items():
        step = data["rows"]["step"]
        ratios = [f"{step[rival]['median']:.2f}" for rival in RIVALS]
        milliseconds = f"{1e3 * step[ADAM_SECONDS]:.2f}"
        rows.append([TASKS[task], *ratios, milliseconds])
    return table(["task", *RIVALS, "Adam, ms"], rows)


def chosen(row):
    """A learning rate, and a sign where the momentum isn't the default."""
    return f"{row['learning_rate']:g}" + (" m" if row["momentum"] else "")


def ranks(results):
    """Mean rank at the defaults: 1 is the best of all."""
    total = dict.fromkeys(RIVALS, 0.0)
    for data in results.values():
        means = mean_scores(data, "defaults")
        for rival, own in means.items():
            better = sum(other > own for other in means.values())
            ties = sum(other == own for other in means.values())
            total[rival] += better + (ties + 1) / 2
    return {rival: value / len(results) for rival, value in total.items()}


def divergences(results, rival):
    """How many runs diverge at the defaults, and of how many."""
    runs = [
        run
        for data in results.values()
        for run in data["rows"][f"defaults: {rival}"]["runs"]
    ]
    return sum(run["diverges"] for run in runs), len(runs)


def robust_shares(results):
    """Per optimizer and per batch and rate the share of good runs.

    Returns:
        Dict from the optimizer to a dict from "batch/rate" to a share, and one
        to the share of runs that diverge.
    """
    good = {rival: {} for rival in RIVALS}
    bad = {rival: [] for rival in RIVALS}
    for data in results.values():
        cells = {
            rival: data["rows"][f"robust: {rival}"]["cells"]
            for rival in RIVALS
            if f"robust: {rival}" in data["rows"]
        }
        if len(cells) < len(RIVALS):
            continue
        lowest = min(
            loss
            for own in cells.values()
            for runs in own.values()
            for loss, _ in runs
        )
        for rival, own in cells.items():
            for key, runs in own.items():
                good[rival].setdefault(key, []).extend(
                    loss <= 1.1 * lowest for loss, _ in runs
                )
                bad[rival] += [diverges for _, diverges in runs]
    shares = {
        rival: {key: statistics.mean(map(float, v)) for key, v in own.items()}
        for rival, own in good.items()
    }
    return shares, {
        r: statistics.mean(map(float, v)) for r, v in bad.items() if v
    }


def plot_curves(results, path):
    """Validation losses over time, a plot for each task."""
    columns = 5 if len(results) > 4 else max(1, len(results))
    lines = math.ceil(len(results) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(3 * columns, 2.7 * lines + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for axis, (task, data) in zip(axes.flat, results.items(), strict=False):
        steps = data["rows"]["step"]
        lowest, highest = math.inf, 0
        for rival in RIVALS:
            row = data["rows"][f"tuned: {rival}"]
            curve = mean_curve(row)
            seconds = steps[rival]["median"] * steps[ADAM_SECONDS]
            x = np.arange(1, len(curve) + 1) * row["steps"] * seconds
            axis.plot(x, curve, label=rival, **STYLES[rival])
            if rival in ("AdamW", *OURS):
                lowest = min(lowest, np.nanmin(curve))
                highest = max(highest, curve[min(1, len(curve) - 1)])
        if highest > lowest:
            axis.set_ylim(lowest * 0.97, highest)
        axis.set_title(TASKS[task], fontsize=10)
        axis.set_xlabel("seconds", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in list(axes.flat)[len(results) :]:
        axis.set_visible(False)
    axes[0, 0].set_ylabel("validation loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=5, fontsize=9
    )
    figure.savefig(path)
    plt.close(figure)


def plot_profiles(times, path):
    """Performance profiles, as AlgoPerf draws them."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    x = np.linspace(0.3, NEVER, 200)
    for rival in RIVALS:
        values = np.array([row[rival] for row in times.values()])
        axis.plot(
            x,
            [(values <= t).mean() for t in x],
            label=rival,
            **STYLES[rival],
        )
    axis.set_xlabel("time, as a multiple of AdamW's")
    axis.set_ylabel("share of tasks")
    axis.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def plot_robustness(shares, path):
    """A heat map for each optimizer."""
    columns = 5
    lines = math.ceil(len(RIVALS) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(14, 2 * lines + 0.9), layout="constrained"
    )
    for axis, rival in zip(axes.flat, RIVALS, strict=True):
        own = shares[rival]
        batches = sorted({int(key.split("/")[0]) for key in own})
        rates = sorted({float(key.split("/")[1]) for key in own})
        by_number = {
            (int(k.split("/")[0]), float(k.split("/")[1])): v
            for k, v in own.items()
        }
        grid = [[by_number[b, r] for r in rates] for b in batches]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axis.set_title(rival, fontsize=9)
        axis.set_yticks(range(len(batches)), batches, fontsize=8)
        ticks = range(0, len(rates), 2)
        axis.set_xticks(ticks, [f"{rates[i]:.0e}" for i in ticks], fontsize=7)
    axes[-1, 0].set_xlabel("learning rate", fontsize=9)
    axes[-1, 0].set_ylabel("batch size", fontsize=9)
    figure.colorbar(image, ax=axes, label="share of good runs", shrink=0.8)
    figure.savefig(path)
    plt.close(figure)


def summary(results, means, mean_ranks, shares):
    """The goals, and whether they are met."""
    rows = []

    def add(what, value, goal, is_met):
        rows.append([what, value, goal, "yes" if is_met else "no"])

    for rival in OURS:
        add(
            f"{rival}'s time to AdamW's best, geometric mean",
            f"{means[rival]:.2f}",
            "≤ 0.70",
            means[rival] <= 0.7,
        )
    best, close = 0, 0
    for task, data in results.items():
        own = mean_scores(data, "tuned")
        top = max(own.values())
        ours = max(own[r] for r in OURS)
        best += ours == top
        close += is_close(task, ours, top)
    count = len(results)
    add(
        "tasks on which AdaFisher or AdaFisherW, tuned, has the best score",
        f"{best} of {count}",
        "half",
        2 * best >= count,
    )
    add(
        "tasks on which it is within 2 % of the best",
        f"{close} of {count}",
        "all",
        close == count,
    )
    diverged = sum(divergences(results, r)[0] for r in OURS)
    runs = sum(divergences(results, r)[1] for r in OURS)
    add(
        "diverging runs at the defaults",
        f"{diverged} of {runs}",
        "0",
        not diverged,
    )
    rank = {r: v for r, v in mean_ranks.items() if r != "AdaFisherW"}
    place = sorted(rank.values()).index(rank["AdaFisher"]) + 1
    add(
        "AdaFisher's mean rank at the defaults",
        f"{rank['AdaFisher']:.1f} (place {place})",
        "place 1",
        place == 1,
    )
    if all(shares.values()):
        total = {r: statistics.mean(shares[r].values()) for r in RIVALS}
        add(
            "share of good runs over learning rates and batch sizes",
            f"{total['AdaFisher']:.2f}",
            f"≥ Adam's {total['Adam']:.2f}",
            total["AdaFisher"] >= total["Adam"],
        )
    return table(["", "found", "goal", "met"], rows)


def write(results, output):
    """Write the page and its plots."""
    folder = output / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    times = {task: times_to_target(data) for task, data in results.items()}
    target, means = target_table(
        times,
        {
            task: times_to_target(data, only_longest=True)
            for task, data in results.items()
        },
    )
    mean_ranks = ranks(results)
    shares, diverging = robust_shares(results)
    first = next(iter(results.values()))
    missing = [TASKS[task] for task in TASKS if task not in results]
    parts = [
        INTRODUCTION.format(
            **{key: first[key] for key in ("device", "version", "keras")},
            missing=f"\nNot measured yet: {'; '.join(missing)}.\n"
            if missing
            else "",
            summary=summary(results, means, mean_ranks, shares),
        ),
        TUNED,
        score_table(results, "tuned"),
        TARGET.format(never=NEVER),
        target,
        COST,
        cost_table(results),
        CHOSEN,
        table(
            ["task", *RIVALS],
            [
                [
                    TASKS[task],
                    *(chosen(data["rows"][f"tuned: {r}"]) for r in RIVALS),
                ]
                for task, data in results.items()
            ],
        ),
        DEFAULTS,
        score_table(results, "defaults"),
        table(
            ["", *RIVALS],
            [
                ["mean rank", *(f"{mean_ranks[r]:.1f}" for r in RIVALS)],
                [
                    "diverging runs",
                    *(
                        "{} of {}".format(*divergences(results, r))
                        for r in RIVALS
                    ),
                ],
            ],
        ),
    ]
    plot_curves(results, folder / "curves.svg")
    plot_profiles(times, folder / "profiles.svg")
    if all(shares.values()):
        parts += [
            ROBUST,
            table(
                ["", *RIVALS],
                [
                    [
                        "good",
                        *(
                            f"{statistics.mean(shares[r].values()):.2f}"
                            for r in RIVALS
                        ),
                    ],
                    ["diverge", *(f"{diverging[r]:.2f}" for r in RIVALS)],
                ],
            ),
        ]
        plot_robustness(shares, folder / "robustness.svg")
    notes = ROOT / "docs" / "quality" / "notes.md"
    if notes.exists():
        parts.append(notes.read_text())
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    (output / "quality.md").write_text(text)


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    results = load(arguments.results)
    if not results:
        raise SystemExit(f"No complete results in {arguments.results}.")
    write(results, arguments.output)


if __name__ == "__main__":
    main()
