"""Pictures of the curvature and of the ways that optimizers take.

    from keras_adafisher import plotting

Needs matplotlib: `pip install keras-adafisher[plot]`. Each function returns a
`matplotlib.figure.Figure` that no window shows; `figure.savefig("name.png")`
saves it, and a notebook draws it. Colours are those of Okabe and Ito, which
colour-blind readers can tell apart; lines differ in style too, for print.
"""

import itertools

import keras
import numpy as np
from keras import ops

import keras_adafisher
from keras_adafisher import analysis
from keras_adafisher.arguments import is_integer
from keras_adafisher.callbacks import DistributionHistory
from keras_adafisher.callbacks import QUANTILES
from keras_adafisher.wrap import plain_layers

try:
    import matplotlib
    from matplotlib.colors import BoundaryNorm
    from matplotlib.colors import ListedColormap
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(
        "`keras_adafisher.plotting` needs matplotlib: "
        "`pip install keras-adafisher[plot]`."
    ) from error

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")

_LABELS = {
    "fisher": "Fisher diagonal of AdaFisher",
    "second_moment": "second moment of Adam",
    "effective_learning_rate": "effective learning rate",
    "activation": "running factor H",
    "gradient": "running factor S",
}


def plot_histograms(*histories, parameter, quantity=None):
    """Histograms of one parameter over training, side by side.

    ```python
    figure = plotting.plot_histograms(
        fisher_history, adam_history, parameter=model.layers[0].kernel
    )
    ```

    Darker is more: each column is the histogram of one record, relative to
    its highest bin. The lines are the quantiles at 5, 50 and 95 %. The scale
    is logarithmic where all values are positive.

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
        ValueError: A history has no such records, or there is no history.
    """
    if not histories:
        raise ValueError(
            "`plot_histograms` needs at least one history. Received: none"
        )
    for history in histories:
        if not isinstance(history, DistributionHistory):
            raise TypeError(
                "Arguments `histories` must be `FisherHistory` or "
                "`SecondMomentHistory` callbacks. "
                f"Received: {history} (of type {type(history)})"
            )
    figure, panels = _panels(1, len(histories))
    for history, axes in zip(histories, panels, strict=True):
        name = quantity
        if name is None:
            is_adam = isinstance(
                history, keras_adafisher.callbacks.SecondMomentHistory
            )
            name = "second_moment" if is_adam else "fisher"
        records = history.select(parameter, name)
        steps = [record.step for record in records]
        quantiles = np.stack([record.quantiles for record in records])
        is_log = bool(np.all(quantiles[:, 0] > 0))
        for record, left, right in zip(
            records, *_column_edges(steps), strict=True
        ):
            largest = max(record.counts.max(), 1)
            axes.pcolormesh(
                [left, right],
                record.edges,
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
                quantiles[:, QUANTILES.index(share)],
                linestyle=line,
                color=color,
                linewidth=1.8,
                label=f"{100 * share:g} %",
            )
        if is_log:
            axes.set_yscale("log")
        low, high = quantiles[:, 0].min(), quantiles[:, -1].max()
        if low < high:
            axes.set_ylim(low, high)
        axes.set(
            xlabel="step",
            ylabel=_LABELS.get(name, name),
            title=type(history).__name__,
        )
        axes.legend(title="quantiles", fontsize="small")
    figure.suptitle(getattr(parameter, "path", parameter))
    return figure


def plot_gershgorin(factor, title=""):
    """Gershgorin's disks of a factor, and its eigenvalues.

    The disks are drawn in the complex plane, with the eigenvalues, which are
    real, on the axis. Below, the disks' intervals on the real axis, one row
    for each, the largest centre first.

    Args:
        factor: Array of shape `(n, n)`, symmetric.
        title: String.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: `factor` is no finite symmetric matrix.
    """
    eigenvalues = analysis.spectrum(factor).eigenvalues
    disks = analysis.gershgorin(factor)
    figure, (plane, intervals) = _panels(2, 1, height=6)
    order = np.argsort(-disks.centres)
    for index in order:
        plane.add_patch(
            Circle(
                (disks.centres[index], 0),
                disks.radii[index],
                facecolor=COLORS[5],
                edgecolor=COLORS[0],
                alpha=max(0.05, 1 / len(order)),
            )
        )
    plane.plot(
        eigenvalues,
        np.zeros_like(eigenvalues),
        "x",
        color=COLORS[1],
        label="eigenvalues",
    )
    plane.plot(
        disks.centres,
        np.zeros_like(disks.centres),
        "|",
        color="black",
        label="centres",
    )
    plane.autoscale_view()
    plane.set_aspect("equal", adjustable="datalim")
    plane.set(xlabel="real part", ylabel="imaginary part")
    plane.legend(loc="upper right")

    rows = np.arange(len(order))
    intervals.errorbar(
        disks.centres[order],
        rows,
        xerr=disks.radii[order],
        fmt="|",
        color="black",
        ecolor=COLORS[0],
        elinewidth=max(0.5, min(3, 60 / len(order))),
        label="centre ± radius",
    )
    intervals.plot(
        eigenvalues, rows, "x", color=COLORS[1], label="eigenvalues, sorted"
    )
    intervals.axvline(0, color="gray", linewidth=0.8)
    intervals.invert_yaxis()
    intervals.yaxis.set_major_locator(MaxNLocator(integer=True))
    share = 100 * disks.dominated_share
    intervals.set(
        xlabel=f"{share:.0f} % of the disks don't contain 0", ylabel="row"
    )
    intervals.legend(loc="lower right")
    figure.suptitle(title or "Gershgorin disks")
    return figure


def plot_spectrum(factor, noise=0.1, seed=0, title=""):
    """Eigenvalues of a factor, and of one with noise off the diagonal.

    Args:
        factor: Array of shape `(n, n)`, symmetric.
        noise: Float, see `analysis.spectrum`. Defaults to `0.1`.
        seed: Int, see `analysis.spectrum`. Defaults to `0`.
        title: String.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: See `analysis.spectrum`.
    """
    result = analysis.spectrum(factor, noise, seed)
    figure, (axes,) = _panels(1, 1)
    ranks = np.arange(1, len(result.eigenvalues) + 1)
    axes.plot(
        ranks,
        result.eigenvalues,
        "o-",
        color=COLORS[0],
        markersize=4,
        label="without noise",
    )
    axes.plot(
        ranks,
        result.perturbed,
        "x--",
        color=COLORS[1],
        markersize=5,
        label=f"with noise of {noise:g} times the mean of the diagonal",
    )
    # The smallest ones may be zero or, with noise, negative. A power of ten,
    # so that its label stays away from that of 0.
    largest = max(result.eigenvalues[0], 1e-30)
    axes.set_yscale("symlog", linthresh=10 ** np.ceil(np.log10(largest) - 3))
    axes.set(
        xlabel="rank",
        ylabel="eigenvalue",
        title=title
        or f"largest shift: {100 * result.largest_shift:.1f} % of the largest",
    )
    axes.legend()
    return figure


def plot_factors(factors):
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
    analysis.check_kronecker_factors("factors", factors)
    figure, panels = _panels(2, 2, height=7.5)
    matrices = {"H": factors.activation, "S": factors.gradient}
    for column, (name, matrix) in enumerate(matrices.items()):
        largest = float(np.max(np.abs(matrix))) or 1.0
        image = panels[column].imshow(
            matrix,
            # Diverging, and as dark at both ends.
            cmap="PuOr",
            norm=SymLogNorm(1e-2 * largest, vmin=-largest, vmax=largest),
        )
        ticks = largest * np.array([-1, -0.1, 0, 0.1, 1])
        figure.colorbar(
            image, ax=panels[column], shrink=0.85, ticks=ticks, format="%.1e"
        )
        share = 100 * analysis.diagonal_energy(matrix)
        panels[column].set_title(
            f"{name}: {share:.0f} % of the energy\nis on the diagonal"
        )
        spectrum = analysis.fourier_spectrum(matrix)
        below = panels[2 + column]
        size = len(matrix)
        first = -(size // 2) - 0.5
        image = below.imshow(
            spectrum,
            cmap="cividis",
            # What is below is rounding.
            vmin=max(spectrum.min(), -4),
            vmax=0,
            extent=(first, first + size, first + size, first),
        )
        figure.colorbar(image, ax=below, shrink=0.85)
        below.set_title(f"Fourier spectrum of {name},\nlog10 of the magnitude")
    figure.suptitle(factors.layer)
    return figure


def loss_surface_trajectories(
    function, optimizers, start, steps=100, limits=None, resolution=80
):
    """Ways of several optimizers over a loss of two parameters.

    ```python
    def function(x, y):
        return x**2 / 10 + y**2

    figure = plotting.loss_surface_trajectories(
        function,
        {
            "Adam": keras.optimizers.Adam(0.1),
            "AdaFisher": keras_adafisher.AdaFisher(0.1, damping=0.1),
        },
        start=(-4.0, 2.0),
    )
    ```

    AdaFisher's factors belong to a layer. The two parameters are therefore
    posed as the bias of a dense layer of two outputs whose input is zero. Then
    the activation factor of the bias is that of the input 1, and the gradient
    factor is the squared gradient of the two parameters, normalized: the
    steeper direction has the larger Fisher diagonal. (If they were the two
    weights of a dense layer, one of its factors would be a single number,
    which Min–Max normalization, if chosen, maps to zero: the Fisher diagonal
    would be the damping.)

    Args:
        function: Callable `(x, y)` of `keras.ops` or of arithmetic, which
            works elementwise on tensors.
        optimizers: Dict from a name to a `keras.optimizers.Optimizer` that
            isn't built.
        start: Pair of floats.
        steps: Int. Defaults to `100`.
        limits: Pairs of floats `((x_min, x_max), (y_min, y_max))`. Defaults to
            the trajectories' extent and a margin.
        resolution: Int, the points of the surface's grid per axis.

    Returns:
        `matplotlib.figure.Figure` with the surface's contours and, below, the
        loss over the steps.

    Raises:
        ValueError: `function` can't be called, `start` isn't a pair,
            `optimizers` is empty, or `steps`, `limits` or `resolution` is out
            of its range.
    """
    if not callable(function):
        raise ValueError(
            "Argument `function` must be a callable `(x, y)`. "
            f"Received: function={function}"
        )
    _check_numbers("start", start, (2,), "a pair of numbers")
    if limits is not None:
        what = "two pairs of numbers, each the lower one first, or `None`"
        _check_numbers("limits", limits, (2, 2), what, is_ascending=True)
    _check_count("steps", steps, 1)
    _check_count("resolution", resolution, 2)
    _check_named("optimizers", optimizers)

    def loss(_, z):
        return function(z[..., 0], z[..., 1])

    paths = {
        name: _walk(loss, optimizer, start, steps)
        for name, optimizer in optimizers.items()
    }

    def surface(x, y):
        x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
        return ops.convert_to_numpy(function(x, y))

    losses = {name: surface(*path.T) for name, path in paths.items()}
    return _draw_trajectories(
        paths, losses, surface, ("x", "y"), limits, resolution, "step"
    )


def weight_trajectories(model, x, y, trajectories, loss=None, resolution=15):
    """Ways of several optimizers through the weights of a real network.

    They are projected on the plane through the centre of all snapshots along
    their first two principal components, on which the loss is drawn too. Where
    a path lies above or below the plane the contours are not the loss at the
    path: the lower panel has that.

    ```python
    snapshots = [model.get_weights()]
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: snapshots.append(model.get_weights())
    )
    model.fit(x, y, epochs=10, callbacks=[record])
    figure = plotting.weight_trajectories(
        model, x[:256], y[:256], {"AdaFisher": snapshots}
    )
    ```

    The loss is that of training mode: batch normalizations use the batch's
    own statistics. The model is left as it was.

    Args:
        model: `keras.Model`, built.
        x: Inputs to compute the loss with.
        y: Labels to compute the loss with.
        trajectories: Dict from a name to a list of snapshots, each what
            `model.get_weights()` returned.
        loss: See `analysis.kronecker_factors`. Defaults to the model's own.
        resolution: Int, the points of the surface's grid per axis: the model
            runs as often, squared. Defaults to `15`.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        TypeError: `model` is no model.
        ValueError: `trajectories` is empty, a snapshot doesn't fit the model,
            there are fewer than three different ones, there is no loss, or
            `resolution` is less than 2.
    """
    plain_layers("weight_trajectories", model, "model")
    _check_count("resolution", resolution, 2)
    _check_named("trajectories", trajectories)
    for name, snapshots in trajectories.items():
        if not isinstance(snapshots, (list, tuple)) or not snapshots:
            raise ValueError(
                "Argument `trajectories` must have a list of snapshots for "
                f"each name. Received: {snapshots} for {name}"
            )
    weights = model.weights
    is_trained = [weight.trainable for weight in weights]
    points = {
        name: np.stack([_flat(s, weights, is_trained) for s in snapshots])
        for name, snapshots in trajectories.items()
    }
    everything = np.concatenate(list(points.values()))
    centre = everything.mean(axis=0)
    _, scales, directions = np.linalg.svd(
        everything - centre, full_matrices=False
    )
    if len(scales) < 3 or scales[1] <= 1e-7 * scales[0]:
        raise ValueError(
            "Argument `trajectories` must have at least three snapshots that "
            "don't lie on a line. "
            f"Received: {len(everything)} snapshots of {list(trajectories)}"
        )
    plane = directions[:2]
    shares = 100 * scales[:2] ** 2 / np.sum(scales**2)
    compute_loss = analysis.loss_evaluator(model, x, y, loss)
    trained = [
        w for w, trained in zip(weights, is_trained, strict=True) if trained
    ]

    def loss_at(point):
        with analysis.as_it_was(model):
            _assign(trained, point)
            return float(ops.convert_to_numpy(compute_loss()))

    before = [np.array(ops.convert_to_numpy(w)) for w in trained]
    try:
        losses = {
            name: np.array([loss_at(point) for point in path])
            for name, path in points.items()
        }

        def surface(first, second):
            flat = np.stack([first.ravel(), second.ravel()], axis=1)
            values = [loss_at(centre + pair @ plane) for pair in flat]
            return np.reshape(values, first.shape)

        return _draw_trajectories(
            {name: (path - centre) @ plane.T for name, path in points.items()},
            losses,
            surface,
            [
                f"principal component {i + 1} ({share:.0f} % of the variance)"
                for i, share in enumerate(shares)
            ],
            None,
            resolution,
            "snapshot",
        )
    finally:
        for variable, value in zip(trained, before, strict=True):
            variable.assign(value)


def _panels(rows, columns, height=4.2):
    figure = Figure(
        figsize=(4.6 * columns + 1, height), layout="constrained", dpi=100
    )
    panels = figure.subplots(rows, columns, squeeze=False)
    return figure, list(panels.ravel())


def _column_edges(steps):
    """Left and right edges of columns that are centred at steps."""
    steps = np.asarray(steps, "float64")
    if len(steps) == 1:
        return steps - 0.5, steps + 0.5
    middles = (steps[1:] + steps[:-1]) / 2
    left = np.concatenate([[2 * steps[0] - middles[0]], middles])
    right = np.concatenate([middles, [2 * steps[-1] - middles[-1]]])
    return left, right


def _check_named(argument, value):
    if not isinstance(value, dict) or not value:
        raise ValueError(
            f"Argument `{argument}` must be a dict with an entry for each "
            f"line to draw. Received: {argument}={value}"
        )


def _check_count(argument, value, least):
    if not is_integer(value) or value < least:
        raise ValueError(
            f"Argument `{argument}` must be an integer >= {least}. "
            f"Received: {argument}={value}"
        )


def _check_numbers(argument, value, shape, what, is_ascending=False):
    try:
        array = np.asarray(value, "float64")
    except (TypeError, ValueError):
        array = np.array(np.nan)
    is_right = array.shape == shape and np.all(np.isfinite(array))
    if not is_right or (is_ascending and np.any(np.diff(array) <= 0)):
        raise ValueError(
            f"Argument `{argument}` must be {what}. "
            f"Received: {argument}={value}"
        )


def _walk(loss, optimizer, start, steps):
    """The points that an optimizer visits, of shape `(steps + 1, 2)`."""
    inputs = keras.Input((1,))
    layer = keras.layers.Dense(2)
    model = keras.Model(inputs, layer(inputs))
    layer.bias.assign(np.asarray(start, "float32"))
    model.compile(optimizer, loss=loss, jit_compile=False)
    zero = np.zeros((1, 1), "float32")
    path = [np.array(start, "float64")]
    for _ in range(steps):
        model.train_on_batch(zero, zero)
        path.append(np.array(layer.get_weights()[1], "float64"))
    return np.stack(path)


def _flat(snapshot, weights, is_trained):
    shapes = [tuple(weight.shape) for weight in weights]
    is_list = isinstance(snapshot, (list, tuple))
    got = [np.shape(array) for array in snapshot] if is_list else snapshot
    if got != shapes:
        raise ValueError(
            "Argument `trajectories` must hold what `model.get_weights()` "
            f"returned, arrays of shapes {shapes}. Received: {got}"
        )
    return np.concatenate(
        [
            np.ravel(array).astype("float64")
            for array, trained in zip(snapshot, is_trained, strict=True)
            if trained
        ]
    )


def _assign(variables, point):
    start = 0
    for variable in variables:
        size = int(np.prod(variable.shape))
        value = np.reshape(point[start : start + size], variable.shape)
        variable.assign(value.astype("float32"))
        start += size


def _draw_trajectories(
    paths, losses, surface, labels, limits, resolution, every
):
    figure = Figure(figsize=(6.4, 7.6), layout="constrained", dpi=100)
    plane, curves = figure.subplots(2, 1, height_ratios=(2.4, 1))
    if limits is None:
        points = np.concatenate(list(paths.values()))
        points = points[np.all(np.isfinite(points), axis=1)]
        low, high = points.min(axis=0), points.max(axis=0)
        margin = 0.15 * np.maximum(high - low, 1e-3 * (high - low).max())
        limits = np.stack([low - margin, high + margin], axis=1)
    grid = np.meshgrid(
        *(np.linspace(*pair, resolution, dtype="float32") for pair in limits)
    )
    values = surface(*grid)
    levels = _levels(values)
    # Light enough for lines of all colours.
    grays = ListedColormap(matplotlib.colormaps["Greys_r"](np.linspace(0.5, 1)))
    drawn = plane.contourf(
        *grid, values, levels, cmap=grays, norm=BoundaryNorm(levels, grays.N)
    )
    figure.colorbar(drawn, ax=plane, label="loss", format="%.3g")
    styles = zip(
        paths,
        itertools.cycle(COLORS),
        itertools.cycle(_LINES),
        itertools.cycle(_MARKERS),
        strict=False,
    )
    for name, color, line, marker in styles:
        path = paths[name]
        style = {
            "color": color,
            "linestyle": line,
            "marker": marker,
            "markersize": 4,
            "markevery": max(1, len(path) // 12),
        }
        plane.plot(*path.T, label=name, **style)
        plane.plot(*path[-1], marker, color=color, markersize=9)
        curves.plot(losses[name], label=name, **style)
    first = next(iter(paths.values()))[0]
    plane.plot(*first, "*", color="black", markersize=12, label="start")
    plane.set(
        xlabel=labels[0],
        ylabel=labels[1],
        xlim=limits[0],
        ylim=limits[1],
    )
    plane.legend(fontsize="small")
    curves.set(xlabel=every, ylabel="loss")
    if all(np.all(values > 0) for values in losses.values()):
        curves.set_yscale("log")
    return figure


def _levels(values):
    """Contour levels that have as much area between each two of them."""
    finite = values[np.isfinite(values)]
    levels = np.unique(np.quantile(finite, np.linspace(0, 1, 16)))
    if len(levels) < 2:
        return np.array([levels[0] - 0.5, levels[0] + 0.5])
    return levels
