"""The plots of docs/quality.md.

They are as narrow as a telephone, whose screen has 375 pixels: two plots beside
each other, five lines in each, and letters that keep their size there.
"""

import math
import statistics
import textwrap

import matplotlib.pyplot as plt
import numpy as np

from tools.report.quality.results import MAIN
from tools.report.quality.results import NEVER
from tools.report.quality.results import rates_of
from tools.report.quality.results import ratio_in_time
from tools.report.quality.results import runs_of
from tools.report.quality.results import TASKS

# Okabe and Ito's colours, which colour-blind readers can tell apart, and lines
# for those who print without colours.
STYLES = {
    "AdaFisherMuon": {"color": "#D55E00", "linestyle": "-", "linewidth": 3},
    "AdaFisherW": {"color": "#0072B2", "linestyle": "-", "linewidth": 2.2},
    "AdamW": {"color": "#000000", "linestyle": "--", "linewidth": 1.8},
    "Nadam": {"color": "#009E73", "linestyle": "-.", "linewidth": 1.8},
    "Muon": {"color": "#CC79A7", "linestyle": ":", "linewidth": 2.4},
}
# In inches of 72 pixels.
WIDTH = 4.8
SETTINGS = {
    "font.size": 11.5,
    "axes.titlesize": 11.5,
    "figure.labelsize": 11.5,
    "svg.hashsalt": "quality",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def figure_of(count, height=2.1):
    """A plot for each task, and room for the legend."""
    plt.rcParams.update(SETTINGS)
    lines = math.ceil(count / 2)
    figure, axes = plt.subplots(
        lines,
        2,
        figsize=(WIDTH, height * lines + 1),
        squeeze=False,
        layout="constrained",
    )
    for axis in list(axes.flat)[count:]:
        axis.set_visible(False)
    return figure, axes.flat


def title_of(task):
    """The name of a task, in two lines where one is too long."""
    return textwrap.fill(TASKS[task], 23)


def finish(figure, axis, path):
    """Add the legend and write the file."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=2, frameon=False
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def plot_curves(results, path):
    """Validation losses over time, a plot for each task."""
    figure, axes = figure_of(len(results))
    for axis, (task, data) in zip(axes, results.items(), strict=False):
        ends, starts = [], []
        for rival in MAIN:
            runs = runs_of(data, "time", rival)
            if not runs:
                continue
            curve = mean_curve(runs)
            # In parts of AdamW's time: what a part takes is only known in
            # seconds of a step.
            whole = len(mean_curve(runs_of(data, "time", "AdamW")))
            part = ratio_in_time(data, rival) / whole
            x = np.arange(1, len(curve) + 1) * part
            # Who is that slow has one evaluation, which is no line.
            marker = "o" if len(curve) == 1 else ""
            style = {**STYLES[rival], "marker": marker}
            axis.plot(x, curve, label=rival, **style)
            ends.append(np.nanmin(curve))
            starts.append(curve[min(1, len(curve) - 1)])
        low, high = min(ends), max(np.median(starts), min(ends) * 1.05)
        axis.set_ylim(low - 0.05 * (high - low), high)
        axis.set_title(title_of(task))
        axis.set_xlim(0, 1.05)
    figure.supxlabel("time, AdamW's run is 1")
    figure.supylabel("validation loss")
    finish(figure, axes[0], path)


def mean_curve(runs):
    """The mean over seeds, as far as all of them go."""
    curves = [run["validation"] for run in runs]
    return np.mean([c[: min(map(len, curves))] for c in curves], axis=0)


def plot_rates(results, path):
    """Losses over learning rates, a plot for each task."""
    figure, axes = figure_of(len(results))
    for axis, (task, data) in zip(axes, results.items(), strict=False):
        found = {rival: rates_of(data, rival) for rival in MAIN}
        lowest = min(min(r.values()) for r in found.values() if r)
        for rival, rates in found.items():
            if rates:
                excess = [100 * (y / lowest - 1) for y in rates.values()]
                axis.plot(list(rates), excess, label=rival, **STYLES[rival])
        axis.axhline(5, color="#999999", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_ylim(-2, 50)
        axis.set_title(title_of(task))
    figure.supxlabel("learning rate")
    figure.supylabel("validation loss, % above the lowest")
    finish(figure, axes[0], path)


def plot_sensitivity(results, path):
    """How much worse a rate is than an optimizer's best, on the median task."""
    plt.rcParams.update(SETTINGS)
    figure, axis = plt.subplots(figsize=(WIDTH, 4), layout="constrained")
    for rival in MAIN:
        excess = {}
        for data in results.values():
            rates = rates_of(data, rival)
            if not rates:
                continue
            best = min(rates, key=rates.get)
            for rate, loss in rates.items():
                octave = round(math.log2(rate / best))
                excess.setdefault(octave, []).append(loss / rates[best] - 1)
        # Where most windows have ended, those that are left aren't the same.
        most = max(map(len, excess.values()), default=0)
        x = sorted(o for o, v in excess.items() if len(v) >= most / 2)
        y = [100 * statistics.median(excess[octave]) for octave in x]
        axis.plot(x, y, label=rival, **STYLES[rival])
    axis.axhline(5, color="#999999", linewidth=0.8)
    axis.set_ylim(-1, 40)
    axis.set_xlabel("learning rate, octaves from the optimizer's best")
    axis.set_ylabel("validation loss,\n% above its best")
    finish(figure, axis, path)


def plot_profiles(times, path):
    """Performance profiles, as AlgoPerf draws them."""
    plt.rcParams.update(SETTINGS)
    figure, axis = plt.subplots(figsize=(WIDTH, 4), layout="constrained")
    x = np.linspace(0.3, NEVER, 2000)
    for rival in MAIN:
        values = np.array([row[rival] for row in times.values()])
        shares = [100 * (values <= t).mean() for t in x]
        axis.plot(x, shares, label=rival, **STYLES[rival])
    axis.set_xlabel("time, as a multiple of AdamW's")
    axis.set_ylabel("% of tasks")
    finish(figure, axis, path)
