"""What is drawn, read back from the figures."""

import sys

import keras
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


def test_histograms_of_adafisher_next_to_those_of_adam():
    figure = plotting.plot_histograms(
        history_of(keras_adafisher.FisherHistory, "fisher", 1.0),
        history_of(
            keras_adafisher.callbacks.SecondMomentHistory, "second_moment", 0.0
        ),
        parameter="dense/kernel",
    )
    fisher, moment = figure.axes
    assert (fisher.get_yscale(), moment.get_yscale()) == ("log", "linear")
    assert fisher.get_ylabel() == "Fisher diagonal of AdaFisher"
    assert moment.get_ylabel() == "second moment of Adam"
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
        np.testing.assert_allclose(
            corners[:, 0, 1], np.linspace(low, low + 20, 31)
        )


def test_histograms_need_records():
    history = keras_adafisher.FisherHistory()
    with pytest.raises(ValueError, match="no records of this parameter"):
        plotting.plot_histograms(history, parameter="dense/kernel")
    with pytest.raises(ValueError, match="at least one history"):
        plotting.plot_histograms(parameter="dense/kernel")


def test_gershgorin_plot():
    figure = plotting.plot_gershgorin(MATRIX, "layer")
    plane, intervals = figure.axes
    disks = sorted((c.center[0], c.radius) for c in plane.patches)
    assert disks == [(2, 1.5), (3, 1.5), (5, 2)]
    eigenvalues = np.linalg.eigvalsh(MATRIX)[::-1]
    drawn = lines(plane)["eigenvalues"].get_xdata()
    np.testing.assert_allclose(drawn, eigenvalues)
    drawn = lines(intervals)["eigenvalues, sorted"]
    np.testing.assert_allclose(drawn.get_xdata(), eigenvalues)
    (bars,) = intervals.collections[0:1]
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert ends == [[3, 7], [1.5, 4.5], [0.5, 3.5]]
    assert intervals.get_xlabel() == "100 % of the disks don't contain 0"
    assert figure.get_suptitle() == "layer"


def test_spectrum_plot():
    figure = plotting.plot_spectrum(MATRIX, noise=0.2, seed=3)
    result = analysis.spectrum(MATRIX, 0.2, 3)
    without, with_noise = figure.axes[0].lines
    np.testing.assert_allclose(without.get_ydata(), result.eigenvalues)
    np.testing.assert_allclose(with_noise.get_ydata(), result.perturbed)
    assert "0.2 times" in with_noise.get_label()
    assert without.get_linestyle() != with_noise.get_linestyle()


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
    assert figure.axes[1].get_title().startswith("S: 100 % of the energy")


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
def test_trajectories_of_weights(loss):
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


def test_no_window_and_no_global_state():
    before = set(sys.modules)
    plotting.plot_spectrum(MATRIX)
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_without_matplotlib(monkeypatch):
    monkeypatch.delitem(sys.modules, "keras_adafisher.plotting")
    monkeypatch.delattr(keras_adafisher, "plotting")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install keras-adafisher\[plot"):
        from keras_adafisher import plotting as _  # noqa: F401
