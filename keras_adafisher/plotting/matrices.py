"""Pictures of full Kronecker factors: disks, eigenvalues and heat maps."""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from keras_adafisher import analysis
from keras_adafisher.analysis.full_factors import check_kronecker_factors
from keras_adafisher.plotting.common import COLORS
from keras_adafisher.plotting.common import integer_ticks
from keras_adafisher.plotting.common import panels
from keras_adafisher.plotting.common import points
from keras_adafisher.plotting.common import scientific

# With more rows than this, disks and bars would hide each other.
MANY = 60

_RESOLUTION = (61, 241)


def plot_gershgorin(
    factor: ArrayLike, title: str = "", noise: float = 0.1, seed: int | None = 0
) -> Figure:
    """Gershgorin's disks of a factor, and its eigenvalues.

    The disks are drawn in the complex plane, with the eigenvalues, which are
    real, on the axis, and those of the factor with noise off the diagonal
    below. Of more than 60 rows, the colour says which share of the disks holds
    a point. The lower panel has the disks' intervals on the real axis, the
    largest centre first, next to the eigenvalues in their order.

    Args:
        factor: Array of shape `(n, n)`, symmetric.
        title: String.
        noise: Float, see `analysis.spectrum`. Defaults to `0.1`.
        seed: Int, see `analysis.spectrum`. Defaults to `0`.

    Returns:
        `matplotlib.figure.Figure`, with the share of the disks that don't
        contain 0 in its title.

    Raises:
        ValueError: `factor` is no finite symmetric matrix, or as
            `analysis.spectrum`.
    """
    spectrum = analysis.spectrum(factor, noise, seed)
    disks = analysis.gershgorin(factor)
    figure, (plane, intervals) = panels(2, 1, height=6.8)
    order = np.argsort(-disks.centres)
    centres, radii = disks.centres[order], disks.radii[order]
    if len(order) <= MANY:
        _draw_disks(plane, centres, radii)
    else:
        _draw_density(figure, plane, centres, radii)
    height = radii.max() or 1.0
    for values, level, color, label in (
        (spectrum.eigenvalues, 0.0, COLORS[1], "eigenvalues"),
        (spectrum.perturbed, -0.2, COLORS[2], f"with noise of {noise:g}"),
    ):
        plane.plot(
            values,
            np.full_like(values, level * height),
            "|",
            color=color,
            markersize=points(10),
            markeredgewidth=points(1.5 if len(order) <= MANY else 1),
            label=label,
        )
    plane.set(xlabel="real part", ylabel="imaginary part")
    plane.set_aspect("equal", adjustable="datalim")
    plane.legend(loc="upper right", fontsize="small")

    rows = np.arange(1, len(order) + 1)
    if len(order) <= MANY:
        intervals.errorbar(
            centres,
            rows,
            xerr=radii,
            fmt="|",
            color="black",
            ecolor=COLORS[5],
            elinewidth=points(max(1, min(4, 80 / len(order)))),
            label="centre ± radius",
        )
        style, noisy = {"linestyle": "", "marker": "x"}, {"marker": "+"}
    else:
        intervals.fill_betweenx(
            rows,
            centres - radii,
            centres + radii,
            color=COLORS[5],
            alpha=0.5,
            linewidth=0,
            label="centre ± radius",
        )
        intervals.plot(centres, rows, color="black", label="centre")
        style, noisy = {"linestyle": "-"}, {"linestyle": "--"}
    intervals.plot(
        spectrum.eigenvalues,
        rows,
        color=COLORS[1],
        label="eigenvalues, sorted",
        **style,
    )
    intervals.plot(
        spectrum.perturbed,
        rows,
        color=COLORS[2],
        label=f"with noise of {noise:g}, sorted",
        **{**style, **noisy},
    )
    intervals.axvline(0, color="gray", linewidth=points(0.8))
    intervals.invert_yaxis()
    integer_ticks(intervals.yaxis)
    intervals.set(xlabel="real part", ylabel="rank")
    # Below: the disks may reach into every corner.
    figure.legend(
        *intervals.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        fontsize="small",
    )
    for axis in (plane.xaxis, plane.yaxis, intervals.xaxis):
        axis.set_major_locator(MaxNLocator(6))
        axis.get_major_formatter().set_useMathText(True)
        axis.get_major_formatter().set_powerlimits((-2, 4))
    share = f"{100 * disks.dominated_share:.0f} % of the disks don't contain 0"
    figure.suptitle(f"{title}\n{share}" if title else share)
    return figure


def _draw_disks(axes, centres, radii):
    for centre, radius in zip(centres, radii, strict=True):
        axes.add_patch(
            Circle(
                (centre, 0),
                radius,
                facecolor=(*_rgb(COLORS[5]), max(0.05, 1 / len(centres))),
                edgecolor=(*_rgb(COLORS[0]), 0.5),
                linewidth=points(0.8),
            )
        )
    axes.plot(
        centres,
        np.zeros_like(centres),
        ".",
        color="black",
        markersize=points(5),
        label="centres",
    )
    axes.autoscale_view()


def _draw_density(figure, axes, centres, radii):
    """The share of the disks that hold each point of the plane."""
    largest = radii.max() or 1.0
    x = np.linspace(
        (centres - radii).min(), (centres + radii).max(), _RESOLUTION[1]
    )
    y = np.linspace(-largest, largest, _RESOLUTION[0])
    density = np.empty((len(y), len(x)))
    for row, height in enumerate(y):
        # A disk is an interval at each height, and intervals are counted by
        # their ends.
        reached = radii >= abs(height)
        half = np.sqrt(radii[reached] ** 2 - height**2)
        begun = np.sort(centres[reached] - half)
        ended = np.sort(centres[reached] + half)
        density[row] = np.searchsorted(begun, x, "right") - np.searchsorted(
            ended, x, "left"
        )
    image = axes.pcolormesh(
        x,
        y,
        100 * density / len(centres),
        cmap=LinearSegmentedColormap.from_list(
            "disks", ["white", COLORS[5], COLORS[0]]
        ),
        vmin=0,
        shading="gouraud",
        rasterized=True,
    )
    figure.colorbar(image, ax=axes, label="% of the disks")


def _rgb(color):
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


def plot_spectrum(
    factor: ArrayLike, noise: float = 0.1, seed: int | None = 0, title: str = ""
) -> Figure:
    """Eigenvalues of a factor, and of one with noise off the diagonal.

    Args:
        factor: Array of shape `(n, n)`, symmetric.
        noise: Float, see `analysis.spectrum`. Defaults to `0.1`.
        seed: Int, see `analysis.spectrum`. Defaults to `0`.
        title: String.

    Returns:
        `matplotlib.figure.Figure`, with the largest shift of an eigenvalue in
        its title.

    Raises:
        ValueError: See `analysis.spectrum`.
    """
    result = analysis.spectrum(factor, noise, seed)
    figure, (axes,) = panels(1, 1)
    ranks = np.arange(1, len(result.eigenvalues) + 1)
    has_markers = len(ranks) <= MANY
    axes.plot(
        ranks,
        result.eigenvalues,
        "o-" if has_markers else "-",
        color=COLORS[0],
        markersize=points(4),
        label="without noise",
    )
    axes.plot(
        ranks,
        result.perturbed,
        "x--" if has_markers else "--",
        color=COLORS[1],
        markersize=points(5),
        label=f"with noise of {noise:g} times the mean diagonal",
    )
    # The smallest ones may be zero or, with noise, negative. A power of ten,
    # so that its label stays away from that of 0.
    largest = max(result.eigenvalues[0], 1e-30)
    axes.set_yscale("symlog", linthresh=10 ** np.ceil(np.log10(largest) - 3))
    axes.axhline(0, color="gray", linewidth=points(0.8))
    shift = (
        f"noise shifts them by up to {100 * result.largest_shift:.1f} % "
        "of the largest"
    )
    axes.set(
        xlabel="rank",
        ylabel="eigenvalue",
        title=f"{title}\n{shift}" if title else shift,
    )
    integer_ticks(axes.xaxis)
    axes.legend(fontsize="small")
    return figure


def plot_factors(factors: analysis.KroneckerFactors) -> Figure:
    """Heat maps of a layer's two factors, and their Fourier spectra.

    Args:
        factors: `analysis.KroneckerFactors`.

    Returns:
        `matplotlib.figure.Figure` with `H` and `S` in the upper row, on a
        scale that is linear near 0 and logarithmic beyond, and the logarithm
        of their Fourier spectra's magnitude below.

    Raises:
        TypeError: `factors` is anything else.
    """
    check_kronecker_factors("factors", factors)
    figure, axes_of = panels(2, 2, height=7.8)
    matrices = (
        ("H", "inputs", factors.activation),
        ("S", "gradients at the outputs", factors.gradient),
    )
    for column, (name, of_what, matrix) in enumerate(matrices):
        above, below = axes_of[column], axes_of[2 + column]
        largest = float(np.max(np.abs(matrix))) or 1.0
        image = above.imshow(
            matrix,
            # Diverging, and as dark at both ends.
            cmap="PuOr",
            norm=SymLogNorm(1e-2 * largest, vmin=-largest, vmax=largest),
        )
        bar = figure.colorbar(
            image,
            ax=above,
            shrink=0.85,
            ticks=largest * np.array([-1, -0.1, 0, 0.1, 1]),
            label=f"entry, as a share of {scientific(largest)}",
        )
        bar.set_ticklabels(["−1", "−0.1", "0", "0.1", "1"])
        bar.minorticks_off()
        share = 100 * analysis.diagonal_energy(matrix)
        above.set(
            title=f"{name}, second moment of the {of_what}:\n"
            f"{share:.0f} % of its squared norm is on the diagonal",
            xlabel="input" if name == "H" else "output",
            ylabel="input" if name == "H" else "output",
        )
        size = len(matrix)
        first = -(size // 2) - 0.5
        spectrum = analysis.fourier_spectrum(matrix)
        image = below.imshow(
            spectrum,
            cmap="cividis",
            # What is below is rounding.
            vmin=max(spectrum.min(), -4),
            vmax=0,
            extent=(first, first + size, first + size, first),
        )
        bar = figure.colorbar(
            image,
            ax=below,
            shrink=0.85,
            label="magnitude, as a share of the largest",
        )
        ticks = np.arange(np.ceil(image.norm.vmin), 1)
        bar.set_ticks(ticks, labels=[f"{10.0**tick:g}" for tick in ticks])
        below.set(
            title=f"Fourier spectrum of {name}",
            xlabel="frequency",
            ylabel="frequency",
        )
        for axis in (above.xaxis, above.yaxis, below.xaxis, below.yaxis):
            integer_ticks(axis)
    figure.suptitle(factors.layer)
    return figure
