"""What is drawn, read back from the figures."""

import sys

import keras
import matplotlib
import numpy as np
import pytest
from keras import ops
from models import cross_entropy
from models import data
from models import mlp
from models import PLAIN
from models import to_numpy

import keras_adafisher
from keras_adafisher import analysis
from keras_adafisher.callbacks import Record

plotting = pytest.importorskip("keras_adafisher.plotting")
matrices = pytest.importorskip("keras_adafisher.plotting.matrices")

MATRIX = np.array([[5.0, 1, -1], [1, 3, 0.5], [-1, 0.5, 2]])


def history_of(cls, quantity, low):
    """Three records at the steps 10, 20 and 40."""
    history = cls()
    for step in (10, 20, 40):
        quantiles = low + step * np.array([0.0, 0.1, 0.2, 0.5, 0.7, 0.9, 1.0])
        counts = np.arange(30)
        history.records.append(
            Record(0, step, "dense/kernel", quantity, quantiles, counts)
        )
    return history


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


@pytest.mark.once
def test_histograms_of_adafisher_next_to_those_of_adam():
    figure = plotting.plot_histograms(
        history_of(keras_adafisher.FisherHistory, "fisher", 1.0),
        history_of(
            keras_adafisher.callbacks.SecondMomentHistory, "second_moment", 0.0
        ),
        parameter="dense/kernel",
    )
    fisher, moment = figure.axes
    assert fisher.get_yscale() == moment.get_yscale() == "log"
    assert fisher.get_ylabel() == "Fisher diagonal"
    assert fisher.get_title() == "AdaFisher: Fisher diagonal"
    assert moment.get_ylabel() == "second moment"
    assert moment.get_title() == "Adam: second moment"
    assert figure.get_suptitle() == "dense/kernel"
    for axes, low in ((fisher, 1.0), (moment, 0.0)):
        drawn = lines(axes)
        assert list(drawn) == ["95 %", "50 %", "5 %"]
        for label, share in (("95 %", 0.9), ("50 %", 0.5), ("5 %", 0.1)):
            steps, values = drawn[label].get_data()
            np.testing.assert_array_equal(steps, [10, 20, 40])
            np.testing.assert_allclose(values, low + share * np.array(steps))
        # Not by their colours only.
        assert len({line.get_linestyle() for line in drawn.values()}) == 3
        columns = axes.collections
        assert len(columns) == 3
        np.testing.assert_allclose(
            np.ravel(columns[1].get_array()), np.sqrt(np.arange(30) / 29)
        )
        corners = columns[1].get_coordinates()
        np.testing.assert_allclose(corners[0, :, 0], [15, 30])
        # Zeros are in the lowest bin, which is as wide as the next one.
        first = low or 2e-9
        edges = np.geomspace(first, low + 20, 31)
        if not low:
            edges[0] = edges[1] ** 2 / edges[2]
        np.testing.assert_allclose(corners[:, 0, 1], edges)
    # Labels that are plain numbers, and more than one of them.
    assert {"2", "5", "10", "20"} <= set(tick_labels(fisher.yaxis))


def tick_labels(axis):
    axis.figure.draw_without_rendering()
    return [label.get_text() for label in axis.get_majorticklabels()]


@pytest.mark.once
def test_histograms_of_values_below_zero_have_a_linear_axis():
    history = history_of(keras_adafisher.FisherHistory, "mine", -5.0)
    figure = plotting.plot_histograms(
        history, parameter="dense/kernel", quantity="mine"
    )
    (axes,) = figure.axes
    assert axes.get_yscale() == "linear"
    assert axes.get_title() == "AdaFisher: mine"
    corners = axes.collections[1].get_coordinates()
    np.testing.assert_allclose(corners[:, 0, 1], np.linspace(-5, 15, 31))


@pytest.mark.once
def test_bars_at_some_moments():
    figure = plotting.plot_bars(
        history_of(keras_adafisher.FisherHistory, "fisher", 1.0),
        history_of(
            keras_adafisher.callbacks.SecondMomentHistory, "second_moment", 0.0
        ),
        parameter="dense/kernel",
        moments=2,
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "AdaFisher, step 10",
        "AdaFisher, step 40",
        "Adam, step 10",
        "Adam, step 40",
    ]
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["Fisher diagonal"] * 2 + ["second moment"] * 2
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    for axes, low, step in zip(
        figure.axes, (1.0, 1.0, 0.0, 0.0), (10, 40, 10, 40), strict=True
    ):
        heights = [bar.get_height() for bar in axes.patches]
        np.testing.assert_allclose(heights, 100 * np.arange(30) / 435)
        np.testing.assert_allclose(
            lines(axes)["median"].get_xdata(), low + 0.5 * step
        )
        right = axes.patches[-1].get_x() + axes.patches[-1].get_width()
        np.testing.assert_allclose(right, low + step)
        # As wide as each other on the logarithmic axis.
        ratios = [1 + bar.get_width() / bar.get_x() for bar in axes.patches]
        np.testing.assert_allclose(ratios, ratios[0])
    # All of a row on the same axes.
    first, last = figure.axes[:2]
    assert first.get_xlim() == last.get_xlim() == (1, 41)
    assert first.get_ylim() == last.get_ylim()


@pytest.mark.once
def test_as_many_bar_charts_as_there_are_records():
    history = history_of(keras_adafisher.FisherHistory, "fisher", 1.0)
    figure = plotting.plot_bars(history, parameter="dense/kernel", moments=9)
    assert len(figure.axes) == 3


@pytest.mark.once
def test_records_of_a_training_that_diverged_are_left_out():
    history = history_of(keras_adafisher.FisherHistory, "fisher", 1.0)
    nothing = Record(
        0, 50, "dense/kernel", "fisher", np.full(7, np.nan), np.zeros(30, int)
    )
    history.records.append(nothing)
    figure = plotting.plot_histograms(history, parameter="dense/kernel")
    assert len(figure.axes[0].collections) == 3
    history.records[:] = [nothing]
    with pytest.raises(ValueError, match="records with finite values"):
        plotting.plot_histograms(history, parameter="dense/kernel")


@pytest.mark.once
def test_histograms_need_records():
    history = keras_adafisher.FisherHistory()
    with pytest.raises(ValueError, match="no records of this parameter"):
        plotting.plot_histograms(history, parameter="dense/kernel")
    with pytest.raises(ValueError, match="at least one history"):
        plotting.plot_histograms(parameter="dense/kernel")
    with pytest.raises(ValueError, match="no records of this parameter"):
        plotting.plot_bars(history, parameter="dense/kernel")
    with pytest.raises(ValueError, match="`plot_bars` needs at least one"):
        plotting.plot_bars(parameter="dense/kernel")


@pytest.mark.once
def test_gershgorin_plot():
    figure = plotting.plot_gershgorin(MATRIX, "layer", noise=0.2, seed=3)
    plane, intervals = figure.axes
    disks = sorted((c.center[0], c.radius) for c in plane.patches)
    assert disks == [(2, 1.5), (3, 1.5), (5, 2)]
    eigenvalues = np.linalg.eigvalsh(MATRIX)[::-1]
    drawn = lines(plane)["eigenvalues"].get_xdata()
    np.testing.assert_allclose(drawn, eigenvalues)
    noisy = analysis.spectrum(MATRIX, 0.2, 3).perturbed
    drawn = lines(plane)["with noise of 0.2"].get_xdata()
    np.testing.assert_allclose(drawn, noisy)
    drawn = lines(intervals)["eigenvalues, sorted"]
    np.testing.assert_allclose(drawn.get_xdata(), eigenvalues)
    drawn = lines(intervals)["with noise of 0.2, sorted"]
    np.testing.assert_allclose(drawn.get_xdata(), noisy)
    (bars,) = intervals.collections[0:1]
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert ends == [[3, 7], [1.5, 4.5], [0.5, 3.5]]
    assert figure.get_suptitle() == "layer\n100 % of the disks don't contain 0"


@pytest.mark.once
@pytest.mark.parametrize("rows", [400, 2000])
def test_gershgorin_plot_of_many_rows(rows):
    """No disk is drawn by itself, and the eigenvalues are lines."""
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(rows // 4, rows)) + 0.2
    figure = plotting.plot_gershgorin(samples.T @ samples / len(samples))
    plane, intervals, bar = figure.axes
    assert not plane.patches
    (image,) = plane.collections
    density = np.asarray(image.get_array()).reshape(61, 241)
    assert bar.get_ylabel() == "% of the disks"
    # All disks hold their centres, which are close to each other.
    assert density.max() > 99
    # The widest one reaches to the ends.
    assert 0 <= density.min() < 1
    drawn = lines(intervals)["eigenvalues, sorted"]
    assert drawn.get_linestyle() == "-"
    assert len(drawn.get_xdata()) == rows
    assert figure.get_suptitle() == "0 % of the disks don't contain 0"


@pytest.mark.once
def test_the_density_is_the_share_of_the_disks_that_hold_a_point():
    size = matrices.MANY + 1
    figure = plotting.plot_gershgorin(
        np.diag(np.arange(1.0, size + 1)) + 0.1 * (1 - np.eye(size))
    )
    centres, radius = np.arange(1.0, size + 1), 0.1 * (size - 1)
    (image,) = figure.axes[0].collections
    density = np.asarray(image.get_array()).reshape(61, 241)
    x = np.linspace(1 - radius, size + radius, 241)
    y = np.linspace(-radius, radius, 61)
    for row, column in ((30, 120), (30, 3), (7, 100), (50, 200)):
        distances = np.hypot(x[column] - centres, y[row])
        np.testing.assert_allclose(
            density[row, column], 100 * np.mean(distances <= radius)
        )


@pytest.mark.once
def test_spectrum_plot():
    figure = plotting.plot_spectrum(MATRIX, noise=0.2, seed=3)
    result = analysis.spectrum(MATRIX, 0.2, 3)
    without, with_noise, _ = figure.axes[0].lines
    np.testing.assert_allclose(without.get_ydata(), result.eigenvalues)
    np.testing.assert_allclose(with_noise.get_ydata(), result.perturbed)
    assert "0.2 times" in with_noise.get_label()
    assert without.get_linestyle() != with_noise.get_linestyle()


@pytest.mark.once
def test_heat_maps_of_factors():
    factors = analysis.KroneckerFactors(
        "dense", ("dense/kernel",), MATRIX, np.eye(4), None
    )
    figure = plotting.plot_factors(factors)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    expected = [
        MATRIX,
        np.eye(4),
        analysis.fourier_spectrum(MATRIX),
        analysis.fourier_spectrum(np.eye(4)),
    ]
    for image, matrix in zip(images, expected, strict=True):
        np.testing.assert_allclose(image.get_array(), matrix)
    assert (images[0].norm.vmin, images[0].norm.vmax) == (-5, 5)
    # Zero in the middle of a pixel.
    assert images[2].get_extent() == [-1.5, 1.5, 1.5, -1.5]
    h, s, h_below, s_below = figure.axes[:4]
    assert s.get_title() == (
        "S, second moment of the gradients at the outputs:\n"
        "100 % of its squared norm is on the diagonal"
    )
    assert (h.get_xlabel(), s.get_ylabel()) == ("input", "output")
    assert h_below.get_xlabel() == s_below.get_ylabel() == "frequency"
    bars = [axes for axes in figure.axes if not axes.images]
    assert bars[0].get_ylabel() == "entry, as a share of 5"
    assert tick_labels(bars[0].yaxis) == ["−1", "−0.1", "0", "0.1", "1"]
    for axes in (h, s, h_below, s_below):
        for axis in (axes.xaxis, axes.yaxis):
            assert all(
                label.lstrip("−").isdigit() for label in tick_labels(axis)
            )


@pytest.mark.once
def test_large_and_small_entries_are_powers_of_ten():
    factors = analysis.KroneckerFactors(
        "dense", ("dense/kernel",), 3.21e-8 * np.eye(3), 4e5 * np.eye(4), None
    )
    figure = plotting.plot_factors(factors)
    labels = [axes.get_ylabel() for axes in figure.axes if not axes.images]
    assert labels[0] == r"entry, as a share of $3.2 \cdot 10^{-8}$"
    assert labels[2] == r"entry, as a share of $4.0 \cdot 10^{5}$"


def bowl(x, y):
    return x**2 / 10 + y**2


def test_trajectories_on_a_surface():
    """SGD and AdaFisher by hand, from the formulas."""
    figure = plotting.loss_surface_trajectories(
        bowl,
        {
            "SGD": keras.optimizers.SGD(0.1),
            "AdaFisher": keras_adafisher.AdaFisher(
                0.1,
                beta=0.0,
                damping=0.5,
                gamma_1=0.5,
                gamma_2=0.5,
                factor_update_steps=1,
                **PLAIN,
            ),
        },
        start=(-4.0, 2.0),
        steps=4,
        resolution=5,
    )
    plane, curves = figure.axes[:2]
    sgd, adafisher = [[np.array([-4.0, 2.0])] for _ in range(2)]
    one, factor = 1.0, np.ones(2)
    for _ in range(4):
        x, y = sgd[-1]
        sgd.append(sgd[-1] - 0.1 * np.array([x / 5, 2 * y]))
        x, y = adafisher[-1]
        gradient = np.array([x / 5, 2 * y])
        # The input 1 is the largest, the other one is 0.
        one = 0.5 * one + 0.5
        square = gradient**2
        normalized = (square - square.min()) / (square.max() - square.min())
        factor = 0.5 * factor + 0.5 * normalized
        fisher = one * factor + 0.5
        adafisher.append(adafisher[-1] - 0.1 * gradient / fisher)
    for name, path in (("SGD", sgd), ("AdaFisher", adafisher)):
        path = np.stack(path)
        drawn = lines(plane)[name].get_xydata()
        np.testing.assert_allclose(drawn, path, rtol=1e-5)
        np.testing.assert_allclose(
            lines(curves)[name].get_ydata(), bowl(*path.T), rtol=1e-5
        )
    np.testing.assert_array_equal(lines(plane)["start"].get_xydata(), [[-4, 2]])
    styles = [(li.get_linestyle(), li.get_marker()) for li in curves.lines]
    assert len(set(styles)) == 2
    assert all(
        label.lstrip("−").isdigit() for label in tick_labels(curves.xaxis)
    )


@pytest.mark.once
def test_start_ends_and_optimum_are_marked():
    figure = plotting.loss_surface_trajectories(
        lambda x, y: (x - 1) ** 2 / 10 + (y + 2) ** 2 + 0.1,
        {
            "SGD": keras.optimizers.SGD(0.1),
            "Adam": keras.optimizers.Adam(0.1),
        },
        start=(-4.0, 2.0),
        steps=25,
        resolution=30,
    )
    plane, _, space = figure.axes[:3]
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["SGD", "Adam", "start", "optimum", "end"]
    for axes in (plane, space):
        drawn = lines(axes)
        assert {"SGD", "Adam", "start", "optimum"} <= set(drawn)
        point = drawn["optimum"].get_xydata()[0]
        if axes is space:
            point = np.ravel(drawn["optimum"].get_data_3d())[:2]
        np.testing.assert_allclose(point, [1, -2], atol=1e-2)
    # In view, although no way comes near it.
    assert plane.get_xlim()[0] < -4 < 1 < plane.get_xlim()[1]
    assert plane.get_ylim()[0] < -2 < 2 < plane.get_ylim()[1]
    ends = [
        line.get_xydata()[0]
        for line in plane.lines
        if line.get_markeredgecolor() == "black"
        and line.get_label().startswith("_")
    ]
    paths = [lines(plane)[name].get_xydata()[-1] for name in ("SGD", "Adam")]
    np.testing.assert_array_equal(ends, paths)


@pytest.mark.once
def test_a_surface_that_goes_on_downwards_has_no_optimum():
    figure = plotting.loss_surface_trajectories(
        lambda x, y: x + y**2,
        {"SGD": keras.optimizers.SGD(0.1)},
        start=(0.0, 1.0),
        steps=2,
        resolution=5,
    )
    assert "optimum" not in lines(figure.axes[0])


@pytest.mark.once
def test_the_surface_in_three_dimensions():
    """On the scale of the losses, from positions to heights."""
    figure = plotting.loss_surface_trajectories(
        lambda x, y: x**2 + y**2 + 0.01,
        {"SGD": keras.optimizers.SGD(0.1)},
        start=(3.0, 4.0),
        steps=2,
        resolution=20,
    )
    space = figure.axes[2]
    assert space.name == "3d"
    labels = space.get_xlabel(), space.get_ylabel(), space.get_zlabel()
    assert labels == ("x", "y", "loss")
    x, y, z = lines(space)["SGD"].get_data_3d()
    np.testing.assert_allclose(z, np.log10(x**2 + y**2 + 0.01), rtol=1e-5)
    shown = {label.get_text() for label in space.get_zticklabels()}
    assert {"0.1", "1", "10"} <= shown


@pytest.mark.once
def test_progress_is_shown(capsys):
    arguments = (bowl, {"SGD": keras.optimizers.SGD(0.1)}, (1.0, 1.0))
    plotting.loss_surface_trajectories(*arguments, steps=3, resolution=3)
    assert "3/3" in capsys.readouterr().out
    arguments = (bowl, {"SGD": keras.optimizers.SGD(0.1)}, (1.0, 1.0))
    plotting.loss_surface_trajectories(
        *arguments, steps=3, resolution=3, verbose=0
    )
    assert "3/3" not in capsys.readouterr().out


@pytest.mark.once
def test_figures_of_a_paper(tmp_path):
    with plotting.paper_style():
        figure = plotting.plot_spectrum(MATRIX)
        figure.savefig(tmp_path / "narrow.svg")
        assert matplotlib.rcParams["font.size"] == 7
    assert figure.get_figwidth() == 3.35
    assert matplotlib.rcParams["font.size"] == 10
    with plotting.paper_style(columns=2):
        assert plotting.plot_spectrum(MATRIX).get_figwidth() == 6.95
    assert plotting.plot_spectrum(MATRIX).get_figwidth() > 5
    # Text stays text.
    assert ">eigenvalue</text>" in (tmp_path / "narrow.svg").read_text()


def test_limits_of_a_surface():
    def function(x, y):
        return ops.sin(x) + y

    figure = plotting.loss_surface_trajectories(
        function,
        {"SGD": keras.optimizers.SGD(0.1)},
        start=(0.0, 0.0),
        steps=1,
        limits=((-1, 2), (-3, 4)),
        resolution=4,
    )
    plane = figure.axes[0]
    assert plane.get_xlim() == (-1, 2)
    assert plane.get_ylim() == (-3, 4)
    grid = np.meshgrid(np.linspace(-1, 2, 4), np.linspace(-3, 4, 4))
    surface = np.sin(grid[0]) + grid[1]
    levels = plane.collections[0].levels[[0, -1]]
    np.testing.assert_allclose(levels, [surface.min(), surface.max()], 1e-5)


@pytest.mark.parametrize("loss", [None, cross_entropy()])
def test_trajectories_of_weights(loss, capsys):
    """On a known plane: both paths are made of two directions."""
    model = mlp()
    model.compile("sgd", loss=cross_entropy())
    x, y = data()
    start = model.get_weights()
    rng = np.random.default_rng(0)
    first, second = [
        [rng.normal(size=w.shape) * scale for w in start]
        for scale in (1.0, 0.5)
    ]

    def at(a, b):
        return [
            w + a * d + b * e
            for w, d, e in zip(start, first, second, strict=True)
        ]

    trajectories = {
        "Adam": [at(0, 0), at(1, 0), at(2, 0.5)],
        "AdaFisher": [at(0, 0), at(1, 1), at(2, 2)],
    }
    figure = plotting.weight_trajectories(
        model, x, y, trajectories, loss=loss, resolution=4
    )
    # Of all snapshots, and of the grid.
    assert "22/22" in capsys.readouterr().out
    for array, before in zip(model.get_weights(), start, strict=True):
        np.testing.assert_array_equal(array, before)

    plane, curves = figure.axes[:2]
    for name, snapshots in trajectories.items():
        # Distances are kept: nothing is off the plane.
        flat = [np.concatenate([np.ravel(w) for w in s]) for s in snapshots]
        drawn = lines(plane)[name].get_xydata()
        for i in range(3):
            np.testing.assert_allclose(
                np.linalg.norm(drawn[i] - drawn[0]),
                np.linalg.norm(flat[i] - flat[0]),
                rtol=1e-5,
                atol=1e-6,
            )
        losses = []
        for snapshot in snapshots:
            model.set_weights(snapshot)
            losses.append(float(to_numpy(cross_entropy()(y, model(x)))))
        np.testing.assert_allclose(
            lines(curves)[name].get_ydata(), losses, rtol=1e-5
        )
    drawn = np.concatenate(
        [lines(plane)[name].get_xydata() for name in trajectories]
    )
    shares = 100 * drawn.var(axis=0) / drawn.var(axis=0).sum()
    assert tick_labels(curves.xaxis)
    assert all(
        label.lstrip("−").isdigit() for label in tick_labels(curves.xaxis)
    )
    labels = plane.get_xlabel(), plane.get_ylabel()
    assert labels == tuple(
        f"principal component {i + 1} ({share:.0f} % of the variance)"
        for i, share in enumerate(shares)
    )


def test_what_trajectories_cannot_use():
    model = mlp()
    model.compile("sgd", loss=cross_entropy())
    x, y = data()
    weights = model.get_weights()
    with pytest.raises(ValueError, match=r"must be a dict .*trajectories=\[\]"):
        plotting.weight_trajectories(model, x, y, [])
    with pytest.raises(ValueError, match=r"arrays of shapes \[\(6, 5\)"):
        plotting.weight_trajectories(model, x, y, {"a": [weights[:2]]})
    with pytest.raises(ValueError, match=r"at least three .* 2 snapshots"):
        plotting.weight_trajectories(model, x, y, {"a": [weights, weights]})
    with pytest.raises(ValueError, match=r"`start` must .* start=\(1, 2, 3\)"):
        plotting.loss_surface_trajectories(bowl, {}, (1, 2, 3))
    with pytest.raises(ValueError, match=r"`optimizers` must be a dict .*\{\}"):
        plotting.loss_surface_trajectories(bowl, {}, (1, 2))


@pytest.mark.once
def test_no_window_and_no_global_state():
    before = set(sys.modules)
    plotting.plot_spectrum(MATRIX)
    assert "matplotlib.pyplot" not in set(sys.modules) - before


@pytest.mark.once
def test_without_matplotlib(monkeypatch):
    monkeypatch.delitem(sys.modules, "keras_adafisher.plotting")
    monkeypatch.delattr(keras_adafisher, "plotting")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install keras-adafisher\[plot"):
        from keras_adafisher import plotting as _  # noqa: F401
