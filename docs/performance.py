"""Write docs/performance.md and its plots from what the benchmarks found.

    make bench

runs the benchmarks and then this. `--results` and `--output` are folders.
"""

import argparse
import json
import math
import pathlib

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

ROOT = pathlib.Path(__file__).parents[1]
BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
BENCHMARKS = ("step_time", "memory", "scaling")
# Okabe and Ito's colours, which colour-blind readers can tell apart, and marks
# for those who print without colours.
STYLES = {
    "jax": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "tensorflow": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "torch": {"color": "#009E73", "marker": "^", "linestyle": "-."},
}

# What is compared, and the goal on each backend.
STEP_GOALS = {
    "every 100/Adam": dict.fromkeys(BACKENDS, 1.00),
    "every 100/SGD": dict.fromkeys(BACKENDS, 1.03),
    "measuring/Adam": {**dict.fromkeys(BACKENDS, 1.05), "torch": 1.10},
    "default/Adam": {**dict.fromkeys(BACKENDS, 1.05), "torch": 1.10},
    "first/Adam": dict.fromkeys(BACKENDS, 1.25),
}
STEP_TITLES = {
    "every 100/Adam": "A step with `factor_update_steps=100`, next to Adam's",
    "every 100/SGD": "A step with `factor_update_steps=100`, next to SGD's",
    "measuring/Adam": "A step with `factor_update_steps=1`, next to Adam's",
    "default/Adam": "A step with the default settings, next to Adam's",
    "first/Adam": "From `compile()` to the end of the first step, next to "
    "Adam's",
}
MILLISECONDS = (
    "SGD",
    "Adam",
    "AdaFisher, every 100",
    "AdaFisher, every step",
    "AdaFisher, default",
)
FIRST = ("Adam", "AdaFisher, every 100", "AdaFisher, default")
STATE_GOAL, PEAK_GOAL = 0.52, 1.01
SWEEPS = {
    "width": "activations, as the layer gets wider",
    "batch": "activations, as the batch grows",
    "sequence": "activations, as the sequence gets longer",
    "image": "activations, as the image grows",
    "depth": "activations, as layers are added",
    "kernel": "area of the kernel",
}
# A line that is fitted to timings isn't exact: 0.15 on top of 1 and of 0.
SLOPE_GOALS = {**dict.fromkeys(SWEEPS, 1.15), "kernel": 0.15}

INTRODUCTION = """\
# Performance

Written by `make bench` (`benchmarks/` and `docs/performance.py`). What counts
here are ratios: all optimizers train the same model in one process and take
turns, step by step, and a ratio is that of two steps in the same turn. **The
times themselves are no claim**: the machine has two cores and shares them with
other work. {threads}

{gpu}

| backend | version | Keras | device | compiled? |
|---|---|---|---|---|
{machines}

The models are in `benchmarks/models.py`, small enough for a CPU: a step takes
some tens of milliseconds. All figures are for float32.
{summary}"""

STEP_TEXT = """\
## Time of a step

`train_on_batch`, to the point where the weights are there. Medians of 60
rounds, with the range that 80 % of them are in. With `factor_update_steps=100`,
steps that measure are left out, and a hundredth of what one costs is added.
Adam and SGD (`momentum=0.9`) have the default settings but for the learning
rate, and AdaFisher those of the method as published. With its own default
settings, ten steps in a row are one measurement, since one of them measures the
factors.

![Ratios of step times](performance/step_time.svg)
"""

FIRST_TEXT = """\
The first step is mostly tracing and compiling; on PyTorch, which does neither,
it is an ordinary step that also makes the optimizer's variables. Each is that
of a freshly built model, in a process that has trained another model before.
The ratio is that of the method as published; the default settings have more to
compile, and are in the table of milliseconds.
"""

STATE_TEXT = """\
## Memory

### State of the optimizer, next to Adam's

Bytes of `optimizer.variables`. The probes, which the layers own, are counted in
the last column.
"""

PEAK_TEXT = """\
### Peak of a step that measures, next to SGD's

Weights, state and what the step makes in between. JAX: the compiled program's
own analysis; one program measures or doesn't. PyTorch: what the profiler saw
the allocator give out. TensorFlow: the allocator's own counters, median of 9
steps; it runs independent operations in no fixed order, and the peak of one
program varies by some per cent from step to step.
"""

SCALING_TEXT = """\
## What a measuring step costs more

AdaFisher with `factor_update_steps=2`: the difference between a step that
measures and the next, which doesn't, median over up to 60 pairs. What is
measured are the inputs `h` of all factored layers and the gradients `s` at
their outputs. The dotted line, the floor, is the time that copying takes for as
many bytes, read and written by one thread:
{bandwidth}.
Each is the fastest of 7 tries before the backend's turn, and the plot has the
fastest of all. Points that don't stand out of the noise are hollow, and don't
count.

![Extra time of a measuring step](performance/scaling.svg)

A line through the points on logarithmic axes has a slope: 1 means in
proportion, 2 quadratic, and 0 that it doesn't grow. Below 1, a fixed cost per
layer outweighs what grows. "points" says how many stood out of the noise; with
fewer than three, there is no line. Leaving out the others favours large
differences, and where the ± is about as large as the slope, "yes" and "no" say
little: `tests/test_cost.py` counts instead. The goal leaves 0.15 for the fit.
The last
columns are for the largest size of each row; "floors" is the extra time as a
multiple of the floor.
"""


def load(folder):
    """From backend and benchmark to what `benchmarks/common.py` wrote."""
    return {
        backend: {
            name: json.loads(path.read_text())
            for name in BENCHMARKS
            if (path := folder / f"{name}-{backend}.json").exists()
        }
        for backend in BACKENDS
    }


class Page:
    """Collects the lines, and counts the goals that are met."""

    def __init__(self):
        self.lines = []
        self.met = {}

    def add(self, text):
        self.lines += [text.rstrip("\n"), ""]

    def table(self, *columns):
        self.lines += [
            f"| {' | '.join(columns)} |",
            "|" + "---|" * len(columns),
        ]

    def row(self, *cells):
        self.lines.append(f"| {' | '.join(map(str, cells))} |")

    def goal(self, kind, value, goal):
        """The cells for a goal and for whether it is met."""
        is_met = value is not None and value <= goal
        self.met.setdefault(kind, []).append(is_met)
        return f"≤ {goal:.2f}", "yes" if is_met else "**no**"

    def end_table(self):
        self.lines.append("")


def rows_of(found, backend, benchmark):
    """What a benchmark measured, a dict of rows."""
    return found[backend].get(benchmark, {"rows": {}})["rows"]


def memory_rows(found, kind):
    """Backend, model and row of what `memory.py` found of one kind."""
    for backend, label in BACKENDS.items():
        for name, row in rows_of(found, backend, "memory").items():
            if name.startswith(kind):
                yield label, name.removeprefix(kind), row


def add_step_times(page, found):
    """Add the section about time."""
    page.add(STEP_TEXT)
    for key, title in STEP_TITLES.items():
        page.add(f"### {title}")
        if key == "first/Adam":
            page.add(FIRST_TEXT)
        page.table("backend", "model", "ratio", "80 %", "goal", "met")
        for backend, label in BACKENDS.items():
            for model, row in rows_of(found, backend, "step_time").items():
                ratio = row[key]
                page.row(
                    label,
                    model,
                    f"{ratio['median']:.3f}",
                    f"{ratio['low']:.3f} to {ratio['high']:.3f}",
                    *page.goal(
                        title, ratio["median"], STEP_GOALS[key][backend]
                    ),
                )
        page.end_table()
    page.add("### To read the ratios by: medians in milliseconds")
    page.table(
        *("backend", "model", *MILLISECONDS, "first step: Adam", "AdaFisher"),
        "default",
    )
    for backend, label in BACKENDS.items():
        for model, row in rows_of(found, backend, "step_time").items():
            first = row["first_seconds"]
            page.row(
                label,
                model,
                *(
                    f"{row['milliseconds'][column]:.1f}"
                    for column in MILLISECONDS
                ),
                *(f"{1000 * first[name]:.0f}" for name in FIRST),
            )
    page.end_table()


def add_memory(page, found):
    """Add the section about memory."""
    page.add(STATE_TEXT)
    page.table(
        *("backend", "model", "Adam", "AdaFisher", "ratio", "goal", "met"),
        "ratio with probes",
    )
    for label, name, row in memory_rows(found, "state: "):
        page.row(
            label,
            name,
            _megabytes(row["Adam"]),
            _megabytes(row["AdaFisher, every 100"]),
            f"{row['ratio']:.4f}",
            *page.goal("State", row["ratio"], STATE_GOAL),
            f"{row['ratio with probes']:.4f}",
        )
    page.end_table()
    page.add(PEAK_TEXT)
    page.table(
        *("backend", "model", "SGD", "Adam", "AdaFisher"),
        *("ratio to SGD", "goal", "met"),
    )
    for label, name, row in memory_rows(found, "peak: "):
        page.row(
            label,
            name,
            _megabytes(row["SGD"]),
            _megabytes(row["Adam"]),
            _megabytes(row["AdaFisher, every step"]),
            f"{row['ratio']:.3f}",
            *page.goal("Peak of a step", row["ratio"], PEAK_GOAL),
        )
    page.end_table()


def points_of(found, backend, sweep):
    """The points of one sweep, from the smallest size on."""
    rows = rows_of(found, backend, "scaling").values()
    points = [row for row in rows if row.get("sweep") == sweep]
    return sorted(points, key=lambda point: point["size"])


def is_clear(point):
    """Whether a point stands out of the noise."""
    return point["extra"] > point["error"] > 0


def place(point):
    """A point's position on the horizontal axis."""
    if point["sweep"] == "kernel":
        return point["size"] ** 2
    return point["bytes"]


def slope(points):
    """Slope on logarithmic axes and its error, `None` if nothing is there."""
    points = [p for p in points if is_clear(p)]
    if len(points) < 3:
        return None
    x = np.log([place(p) for p in points])
    extra = np.array([p["extra"] for p in points])
    errors = np.array([p["error"] for p in points]) / extra / 2
    # No timing is right to better than a tenth.
    weights = 1 / np.maximum(errors, 0.1)
    (value, _), covariance = np.polyfit(
        x, np.log(extra), 1, w=weights, cov="unscaled"
    )
    return float(value), 2 * math.sqrt(covariance[0, 0])


def add_scaling(page, found):
    """Add the section about measuring steps."""
    bandwidths = {
        backend: rows_of(found, backend, "scaling")["bandwidth"][
            "bytes_per_second"
        ]
        for backend in BACKENDS
        if rows_of(found, backend, "scaling")
    }
    speeds = ", ".join(
        f"{value / 1e9:.1f} GB/s ({BACKENDS[backend]})"
        for backend, value in bandwidths.items()
    )
    page.add(SCALING_TEXT.format(bandwidth=speeds))
    page.table(
        *("backend", "extra time against", "slope", "points", "goal", "met"),
        *("largest size", "extra ms", "plain step, ms", "floors"),
    )
    for backend, bandwidth in bandwidths.items():
        for sweep, title in SWEEPS.items():
            points = points_of(found, backend, sweep)
            if not points:
                continue
            fit = slope(points)
            last = points[-1]
            page.row(
                BACKENDS[backend],
                title,
                f"{fit[0]:.2f} ± {fit[1]:.2f}" if fit else "lost in noise",
                f"{sum(map(is_clear, points))} of {len(points)}",
                *(
                    page.goal("Growth", fit[0], SLOPE_GOALS[sweep])
                    if fit
                    else (f"≤ {SLOPE_GOALS[sweep]:.2f}", "can't tell")
                ),
                last["size"],
                f"{1000 * last['extra']:.2f} ± {1000 * last['error']:.2f}",
                f"{1000 * last['plain']:.1f}",
                f"{last['extra'] * bandwidth / last['bytes']:.1f}"
                if is_clear(last)
                else "lost in noise",
            )
    page.end_table()


def plot_step_times(found, path):
    """Plot the ratios of step times."""
    keys = list(STEP_TITLES)
    figure, axes = plt.subplots(
        1, len(keys), figsize=(12, 4), sharey=True, layout="constrained"
    )
    models = []
    for axis, key in zip(axes, keys, strict=True):
        for offset, backend in enumerate(BACKENDS):
            rows = rows_of(found, backend, "step_time")
            models = models or list(rows)
            ratios = [row[key] for row in rows.values()]
            middle = np.array([r["median"] for r in ratios])
            axis.errorbar(
                middle,
                np.arange(len(ratios)) + 0.22 * (offset - 1),
                xerr=[
                    middle - [r["low"] for r in ratios],
                    [r["high"] for r in ratios] - middle,
                ],
                **{**STYLES[backend], "linestyle": "none"},
                capsize=2,
                markersize=5,
                label=BACKENDS[backend],
            )
        for goal in set(STEP_GOALS[key].values()):
            axis.axvline(goal, color="black", linestyle=":", linewidth=1)
        axis.set_title(key.replace("/", " / "))
        axis.set_xlabel("ratio (dotted: goal)")
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(models)), models)
    axes[0].invert_yaxis()
    labels = axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=3)
    figure.savefig(path)
    plt.close(figure)


def plot_scaling(found, path):
    """Plot the extra time of measuring steps, with the floor."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained")
    for axis, sweep in zip(axes.flat, SWEEPS, strict=True):
        floor = {}
        for backend in BACKENDS:
            points = points_of(found, backend, sweep)
            if not points:
                continue
            clear = [p for p in points if is_clear(p)]
            style = STYLES[backend]
            axis.errorbar(
                [place(p) for p in clear],
                [1000 * p["extra"] for p in clear],
                yerr=[1000 * p["error"] for p in clear],
                **style,
                capsize=2,
                label=BACKENDS[backend],
            )
            noise = [p for p in points if not is_clear(p)]
            axis.plot(
                [place(p) for p in noise],
                [1000 * max(p["extra"], p["error"], 1e-6) for p in noise],
                color=style["color"],
                marker=style["marker"],
                linestyle="none",
                fillstyle="none",
            )
            rows = rows_of(found, backend, "scaling")
            speed = rows["bandwidth"]["bytes_per_second"]
            for p in points:
                best = min(floor.get(place(p), math.inf), p["bytes"] / speed)
                floor[place(p)] = best
        axis.set(
            title=sweep,
            xlabel="kernel area" if sweep == "kernel" else "bytes of h and s",
            ylabel="extra ms",
        )
        if not floor:
            continue
        axis.plot(
            list(floor),
            [1000 * seconds for seconds in floor.values()],
            color="black",
            linestyle=":",
            label="bandwidth",
        )
        axis.set(xscale="log", yscale="log")
        # The labels between powers of ten would overlap.
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(color="0.9")
    labels = axes.flat[-1].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=4)
    figure.savefig(path)
    plt.close(figure)


def introduction(found, met):
    """What stands above the tables."""
    data = [next(iter(d.values())) for d in found.values() if d]
    machines = "\n".join(
        f"| {BACKENDS[d['backend']]} | {d['version']} | {d['keras']} "
        f"| {d['device']} | {d['mode']} |"
        for d in data
    )
    settings = {f"`{k}={v}`" for d in data for k, v in d["environment"].items()}
    loads = [b["load"] for d in found.values() for b in d.values()]
    threads = (
        "The load was\n"
        f"{min(loads):.1f} to {max(loads):.1f} when a benchmark began. One "
        "thread each:\n"
        f"{', '.join(sorted(s for s in settings if 'LOG' not in s))}."
    )
    gpu = "All of these figures are a CPU's."
    if any("cores" not in d["device"] for d in data):
        gpu = "The device is named beside each backend."
    gpu += (
        " Those of a GPU have a page of their\n"
        "own: [Performance on a GPU](performance_gpu.md)."
    )
    summary = [
        "",
        "| goal | rows that meet it |",
        "|---|---|",
        *(f"| {k} | {sum(v)} of {len(v)} |" for k, v in met.items()),
    ]
    return INTRODUCTION.format(
        threads=threads,
        gpu=gpu,
        machines=machines,
        summary="\n".join(summary),
    )


def _megabytes(count):
    return f"{count / 1e6:,.2f} MB"


def main():
    """Write the page and the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=ROOT / "benchmarks" / "results" / "full",
    )
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs")
    arguments = parser.parse_args()

    found = load(arguments.results)
    page = Page()
    add_step_times(page, found)
    add_memory(page, found)
    add_scaling(page, found)
    plots = arguments.output / "performance"
    plots.mkdir(parents=True, exist_ok=True)
    # The same figures give the same files.
    plt.rcParams["svg.hashsalt"] = "performance"
    plot_step_times(found, plots / "step_time.svg")
    plot_scaling(found, plots / "scaling.svg")
    # Written by hand: what explains the figures.
    notes = arguments.output / "performance" / "notes.md"
    if notes.exists():
        page.add(notes.read_text())
    text = "\n".join([introduction(found, page.met), "", *page.lines])
    (arguments.output / "performance.md").write_text(text.rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
