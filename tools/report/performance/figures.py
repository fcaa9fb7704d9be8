"""The plots of docs/performance.md."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from tools.report.pages import BACKENDS
from tools.report.performance.results import bandwidths
from tools.report.performance.results import is_clear
from tools.report.performance.results import place
from tools.report.performance.results import points_of
from tools.report.performance.results import rows_of
from tools.report.performance.results import STEP_GOALS
from tools.report.performance.results import SWEEPS

# Okabe and Ito's colours, which colour-blind readers can tell apart, and marks
# for those who print without colours.
STYLES = {
    "jax": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "tensorflow": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "torch": {"color": "#009E73", "marker": "^", "linestyle": "-."},
}


def plot_step_times(found, path):
    """Plot the ratios of step times."""
    keys = list(STEP_GOALS)
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
            speed = bandwidths(found)[backend]
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
