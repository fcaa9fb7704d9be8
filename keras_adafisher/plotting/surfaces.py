"""Surfaces of a loss, and the ways over them, in two and three dimensions."""

import itertools
import math

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.colors import LogNorm
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal
from matplotlib.patheffects import Stroke
from matplotlib.ticker import FuncFormatter
from matplotlib.ticker import LogLocator
from matplotlib.ticker import MaxNLocator

from keras_adafisher.plotting.common import COLORS
from keras_adafisher.plotting.common import integer_ticks
from keras_adafisher.plotting.common import LINES
from keras_adafisher.plotting.common import MARKERS
from keras_adafisher.plotting.common import new_figure
from keras_adafisher.plotting.common import points

_LEVELS = 24


def extent(paths, margin):
    """The range of paths in both coordinates.

    Args:
        paths: Iterable of arrays of shape `(n, 2)`.
        margin: Float, how much wider it is at each end, relative to it.

    Returns:
        Array of shape `(2, 2)`: a row for each coordinate, the lower end first.
    """
    everything = np.concatenate([np.asarray(path) for path in paths])
    everything = everything[np.all(np.isfinite(everything), axis=1)]
    low, high = everything.min(axis=0), everything.max(axis=0)
    # Neither range is empty, nor so narrow that the picture deceives.
    size = np.maximum(high - low, 0.25 * (high - low).max() or 1.0)
    return np.stack([low - margin * size, high + margin * size], axis=1)


def make_grid(limits, resolution):
    """Two float32 arrays of shape `(resolution, resolution)`: x and y."""
    return np.meshgrid(
        *(np.linspace(*pair, resolution, dtype="float32") for pair in limits)
    )


def lowest_point(surface, limits, resolution=61, rounds=6):
    """Where a surface is lowest, found on finer and finer grids.

    Args:
        surface: Callable `(x, y)` of arrays.
        limits: Array of shape `(2, 2)`.
        resolution: Int, the points of each grid per axis.
        rounds: Int, the number of grids.

    Returns:
        Array of shape `(2,)`, or `None` if the surface is lowest at the border:
        it goes on downwards there, or is flat.
    """
    limits = np.asarray(limits, "float64")
    inside = limits
    for number in range(rounds):
        x, y = make_grid(inside, resolution)
        values = surface(x, y)
        if not np.any(np.isfinite(values)):
            return None
        at = np.argmin(np.where(np.isfinite(values), values, np.inf))
        point = np.array([x.flat[at], y.flat[at]], "float64")
        cell = (inside[:, 1] - inside[:, 0]) / (resolution - 1)
        if number == 0:
            to_border = np.minimum(point - limits[:, 0], limits[:, 1] - point)
            if np.any(to_border < cell / 2):
                return None
        inside = np.stack([point - 2 * cell, point + 2 * cell], axis=1)
    return point


def draw(paths, losses, grid, values, labels, every, lowest):
    """Draw ways over a surface.

    Args:
        paths: Dict from a name to an array of shape `(n, 2)`.
        losses: Dict from a name to an array of shape `(n,)`.
        grid: Two arrays of shape `(m, m)`, x and y.
        values: Array of shape `(m, m)`, the surface.
        labels: Pair of strings, for the axes.
        every: String, what the points of a path are.
        lowest: Triple of a point, the loss there and what it is called, or
            `None`.

    Returns:
        `matplotlib.figure.Figure`. Its first axes have the contours, the
        second ones the losses, the third ones the surface.
    """
    figure = new_figure(11, 6.6)
    layout = figure.add_gridspec(2, 2, height_ratios=(2.2, 1))
    plane = figure.add_subplot(layout[0, 1])
    curves = figure.add_subplot(layout[1, 1])
    space = figure.add_subplot(
        layout[:, 0], projection="3d", computed_zorder=False
    )
    finite = values[np.isfinite(values)]
    is_log = finite.min() > 0 and finite.max() > 20 * finite.min()
    levels = _levels(finite, is_log)
    norm = (LogNorm if is_log else Normalize)(levels[0], levels[-1])

    drawn = plane.contourf(*grid, values, levels, cmap=_light(), norm=norm)
    ticks = LogLocator(subs=(1, 3)) if is_log else MaxNLocator(6)
    figure.colorbar(
        drawn,
        ax=plane,
        label="loss",
        ticks=ticks,
        format=FuncFormatter(lambda value, _: f"{value:.3g}"),
    )
    heights = _draw_surface(space, grid, values, norm, is_log)

    styles = zip(
        paths,
        itertools.cycle(COLORS),
        itertools.cycle(LINES),
        itertools.cycle(MARKERS),
        strict=False,
    )
    for name, color, line, marker in styles:
        path = paths[name]
        style = {
            "color": color,
            "linestyle": line,
            "marker": marker,
            "markersize": points(4),
            "markevery": max(1, len(path) // 12),
            "label": name,
        }
        outline = [Stroke(linewidth=points(3.2), foreground="white"), Normal()]
        plane.plot(*path.T, path_effects=outline, **style)
        style["linewidth"] = points(1.5)
        plane.plot(*path[-1], **_mark(marker, 10, color))
        curves.plot(losses[name], **style)
        above = _inside(path, grid)
        space.plot(*path[above].T, heights(losses[name][above]), **style)
        if above[-1]:
            space.plot(
                *path[-1:].T,
                heights(losses[name][-1:]),
                **_mark(marker, 9, color),
            )
    first = next(iter(paths))
    spots = [(paths[first][0], losses[first][0], "start", "o", "white", 9)]
    if lowest is not None:
        spots.append((*lowest, "*", "#F0E442", 15))
    for point, loss, label, marker, color, size in spots:
        mark = _mark(marker, size, color, label=label)
        plane.plot(*point, **mark)
        if _inside(point[None], grid)[0]:
            space.plot(*point[:, None], heights(np.array([loss])), **mark)
    (x_low, x_high), (y_low, y_high) = ((a.min(), a.max()) for a in grid)
    plane.set(
        xlabel=labels[0],
        ylabel=labels[1],
        xlim=(x_low, x_high),
        ylim=(y_low, y_high),
    )
    entries, _ = plane.get_legend_handles_labels()
    # Each way has its own mark there.
    end = Line2D([], [], **_mark("o", 8, "gray", label="end"))
    figure.legend(
        handles=[*entries, end],
        loc="outside upper center",
        ncols=len(entries) + 1,
        fontsize="small",
    )
    space.set(xlabel=_short(labels[0]), ylabel=_short(labels[1]))
    curves.set(xlabel=every, ylabel="loss")
    integer_ticks(curves.xaxis)
    if all(np.all(loss > 0) for loss in losses.values()):
        curves.set_yscale("log")
    return figure


def _draw_surface(axes, grid, values, norm, is_log):
    """Draw a surface in three dimensions.

    Returns:
        Callable from an array of losses to the array of their heights.
    """

    def heights(losses):
        return np.log10(losses) if is_log else np.asarray(losses)

    x, y, z = (_refined(array) for array in (*grid, heights(values)))
    axes.plot_surface(
        x,
        y,
        z,
        facecolors=_light()(norm(10**z if is_log else z)),
        rcount=len(z),
        ccount=len(z),
        linewidth=0,
        antialiased=False,
        shade=False,
        rasterized=True,
    )
    # From above, so that valleys and the ways in them are seen.
    axes.view_init(elev=42, azim=-60)
    axes.set_zlabel("loss", labelpad=points(8))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_major_locator(MaxNLocator(5))
    if is_log:
        ticks = LogLocator(subs=(1, 3)).tick_values(norm.vmin, norm.vmax)
        ticks = ticks[(ticks >= norm.vmin) & (ticks <= norm.vmax)]
        axes.set_zticks(np.log10(ticks), labels=[f"{tick:g}" for tick in ticks])
    axes.set_box_aspect(None, zoom=0.85)
    return heights


def _refined(array, least=64):
    """A coarse grid's values between its points, by linear interpolation."""
    size = len(array)
    if size >= least:
        return array
    finer = np.linspace(0, size - 1, (size - 1) * math.ceil(least / size) + 1)
    for _ in range(2):
        array = np.stack(
            [np.interp(finer, np.arange(size), row) for row in array]
        ).T
    return array


def _inside(path, grid):
    """Which points of a path lie on the grid."""
    is_inside = np.ones(len(path), bool)
    for values, axis in zip(path.T, grid, strict=True):
        is_inside &= (values >= axis.min()) & (values <= axis.max())
    return is_inside


def _mark(marker, size, color, **options):
    return {
        "marker": marker,
        "markersize": points(size),
        "markerfacecolor": color,
        "markeredgecolor": "black",
        "linestyle": "",
        **options,
    }


def _levels(finite, is_log):
    low, high = finite.min(), finite.max()
    if low == high:
        return np.array([low - 0.5, low + 0.5])
    space = np.geomspace if is_log else np.linspace
    return space(low, high, _LEVELS)


def _light():
    """Colours of a surface that lines of all colours stand out from."""
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 1, 256))
    colors[:, :3] = 0.45 * colors[:, :3] + 0.55
    return ListedColormap(colors)


def _short(label):
    """A label without what is in brackets: a small axis has no room."""
    return label.partition(" (")[0]
