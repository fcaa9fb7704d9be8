"""Pictures of what callbacks recorded while a model trained."""

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_adafisher.callbacks import DistributionHistory
from keras_adafisher.callbacks import QUANTILES
from keras_adafisher.callbacks import SecondMomentHistory
from keras_adafisher.plotting.common import check_count
from keras_adafisher.plotting.common import COLORS
from keras_adafisher.plotting.common import integer_ticks
from keras_adafisher.plotting.common import log_axis
from keras_adafisher.plotting.common import new_figure
from keras_adafisher.plotting.common import panels
from keras_adafisher.plotting.common import points

_LABELS = {
    "fisher": "Fisher diagonal",
    "second_moment": "second moment",
    "effective_learning_rate": "effective learning rate",
    "activation": "running factor H",
    "gradient": "running factor S",
}


def plot_histograms(
    *histories: DistributionHistory,
    parameter: keras.Variable | str,
    quantity: str | None = None,
) -> Figure:
    """Histograms of one parameter over training, side by side.

    ```python
    figure = plotting.plot_histograms(
        fisher_history, adam_history, parameter=model.layers[0].kernel
    )
    ```

    Darker is more: each column is the histogram of one record, relative to
    its highest bin. The lines are the quantiles at 5, 50 and 95 %. Where no
    value is negative, bins and axis are logarithmic.

    Args:
        *histories: `keras_adafisher.FisherHistory` or
            `keras_adafisher.callbacks.SecondMomentHistory`, one panel for
            each.
        parameter: Variable, or its path.
        quantity: String. Defaults to `"fisher"` or, for a
            `SecondMomentHistory`, `"second_moment"`.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        TypeError: A history is none.
        ValueError: A history has no such records with finite values, or there
            is no history.
    """
    _check_histories("plot_histograms", histories)
    figure, axes_of = panels(1, len(histories))
    for history, axes in zip(histories, axes_of, strict=True):
        label, records = _records(history, parameter, quantity)
        steps = [record.step for record in records]
        edges = [_drawn_edges(record) for record in records]
        for record, bins, left, right in zip(
            records, edges, *_column_edges(steps), strict=True
        ):
            largest = max(record.counts.max(), 1)
            axes.pcolormesh(
                [left, right],
                bins,
                # Gray: the lines carry the colours.
                np.sqrt(record.counts[:, None] / largest),
                cmap="Greys",
                vmin=0,
                vmax=1.3,
                rasterized=True,
            )
        for share, line, color in (
            (0.95, "--", COLORS[1]),
            (0.5, "-", COLORS[0]),
            (0.05, ":", COLORS[2]),
        ):
            axes.plot(
                steps,
                [r.quantiles[QUANTILES.index(share)] for r in records],
                linestyle=line,
                color=color,
                linewidth=points(1.8),
                label=f"{100 * share:g} %",
            )
        _limit(axes.yaxis, edges)
        integer_ticks(axes.xaxis)
        axes.set(
            xlabel="step",
            ylabel=label,
            title=f"{_optimizer_of(history)}: {label}",
        )
        axes.legend(title="quantiles", fontsize="small")
    figure.suptitle(getattr(parameter, "path", parameter))
    return figure


def plot_bars(
    *histories: DistributionHistory,
    parameter: keras.Variable | str,
    quantity: str | None = None,
    moments: int = 3,
) -> Figure:
    """Bar charts of one parameter's histogram at some moments of training.

    ```python
    figure = plotting.plot_bars(
        fisher_history, adam_history, parameter=model.layers[0].kernel
    )
    ```

    One row for each history, one column for each moment, from the first record
    to the last. The panels of a row have the same axes, so that what moves is
    seen. The dashed line is the median.

    Args:
        *histories: See `plot_histograms`.
        parameter: Variable, or its path.
        quantity: String. See `plot_histograms`.
        moments: Int, how many of the records are drawn. Defaults to `3`.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        TypeError: A history is none.
        ValueError: As `plot_histograms`, or `moments` is no positive integer.
    """
    check_count("moments", moments, 1)
    _check_histories("plot_bars", histories)
    chosen = []
    for history in histories:
        label, records = _records(history, parameter, quantity)
        indices = np.linspace(0, len(records) - 1, min(moments, len(records)))
        chosen.append((label, [records[round(index)] for index in indices]))
    columns = max(len(records) for _, records in chosen)
    figure = new_figure(3.1 * columns + 0.8, 2.5 * len(histories) + 0.5)
    grid = figure.subplots(
        len(histories), columns, squeeze=False, sharex="row", sharey="row"
    )
    for row, (history, (label, records)) in enumerate(
        zip(histories, chosen, strict=True)
    ):
        is_adam = isinstance(history, SecondMomentHistory)
        edges = [_drawn_edges(record) for record in records]
        for axes, record, bins in zip(grid[row], records, edges, strict=False):
            axes.bar(
                bins[:-1],
                100 * record.counts / max(record.counts.sum(), 1),
                width=np.diff(bins),
                align="edge",
                color=COLORS[is_adam],
                edgecolor="white",
                linewidth=points(0.3),
            )
            median = record.quantiles[QUANTILES.index(0.5)]
            axes.axvline(
                median,
                color="black",
                linestyle="--",
                linewidth=points(1.2),
                label="median",
            )
            axes.set(
                title=f"{_optimizer_of(history)}, step {record.step}",
                xlabel=label,
            )
        _limit(grid[row][0].xaxis, edges)
        grid[row][0].set_ylabel("entries, %")
        grid[row][0].legend(fontsize="small")
        for axes in grid[row][len(records) :]:
            axes.set_axis_off()
    figure.suptitle(getattr(parameter, "path", parameter))
    return figure


def _check_histories(function, histories):
    if not histories:
        raise ValueError(
            f"`{function}` needs at least one history. Received: none"
        )
    for history in histories:
        if not isinstance(history, DistributionHistory):
            raise TypeError(
                "Arguments `histories` must be `FisherHistory` or "
                "`SecondMomentHistory` callbacks. "
                f"Received: {history} (of type {type(history)})"
            )


def _optimizer_of(history):
    is_adam = isinstance(history, SecondMomentHistory)
    return "Adam" if is_adam else "AdaFisher"


def _records(history, parameter, quantity):
    """What an axis says, and the records to draw.

    Those of a training that has diverged have nothing to draw.
    """
    if quantity is None:
        is_adam = isinstance(history, SecondMomentHistory)
        quantity = "second_moment" if is_adam else "fisher"
    records = history.select(parameter, quantity)
    finite = [r for r in records if np.all(np.isfinite(r.quantiles))]
    if not finite:
        raise ValueError(
            "Arguments `histories` must have records with finite values. "
            f"Received: {len(records)} records of {quantity}, none of which is"
        )
    return _LABELS.get(quantity, quantity), finite


def _drawn_edges(record):
    """Edges of a record's bins, where a logarithmic axis can show them.

    The bin that begins at 0 gets the width of the next one.
    """
    edges = record.edges.copy()
    if edges[0] == 0 and edges[1] > 0:
        edges[0] = edges[1] ** 2 / edges[2]
    return edges


def _limit(axis, edges):
    """Let an axis show all edges, on a logarithmic scale if it can."""
    low, high = min(e[0] for e in edges), max(e[-1] for e in edges)
    if low > 0:
        log_axis(axis, low, high)
    if low < high:
        axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})


def _column_edges(steps):
    """Left and right edges of columns that are centred at steps."""
    steps = np.asarray(steps, "float64")
    if len(steps) < 2:
        return steps - 0.5, steps + 0.5
    middles = (steps[1:] + steps[:-1]) / 2
    left = np.concatenate([[2 * steps[0] - middles[0]], middles])
    right = np.concatenate([middles, [2 * steps[-1] - middles[-1]]])
    return left, right
