"""Ways of optimizers: over a loss of two parameters, and through a network."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure

from keras_adafisher.aliases import Tensor
from keras_adafisher.analysis.losses import as_it_was
from keras_adafisher.analysis.losses import loss_evaluator
from keras_adafisher.integration.layers import layers_in
from keras_adafisher.plotting.common import check_count
from keras_adafisher.plotting.common import check_named
from keras_adafisher.plotting.common import check_numbers
from keras_adafisher.plotting.common import check_verbose
from keras_adafisher.plotting.surfaces import draw
from keras_adafisher.plotting.surfaces import extent
from keras_adafisher.plotting.surfaces import lowest_point
from keras_adafisher.plotting.surfaces import make_grid


def loss_surface_trajectories(
    function: Callable[[Tensor, Tensor], Tensor],
    optimizers: Mapping[str, keras.optimizers.Optimizer],
    start: Sequence[float],
    steps: int = 100,
    limits: Sequence[Sequence[float]] | None = None,
    resolution: int = 80,
    verbose: int = 1,
) -> Figure:
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
            the extent of the trajectories and of the optimum, if there is one
            near them, and a margin.
        resolution: Int, the points of the surface's grid per axis.
        verbose: 0 or 1, whether to show a progress bar. Defaults to `1`.

    Returns:
        `matplotlib.figure.Figure` with the surface in three dimensions, its
        contours, on which start, ends and optimum are marked, and the loss
        over the steps.

    Raises:
        ValueError: `function` can't be called, `start` isn't a pair,
            `optimizers` is empty, or `steps`, `limits`, `resolution` or
            `verbose` is out of its range.
    """
    if not callable(function):
        raise ValueError(
            "Argument `function` must be a callable `(x, y)`. "
            f"Received: function={function}"
        )
    check_numbers("start", start, (2,), "a pair of numbers")
    if limits is not None:
        what = "two pairs of numbers, each the lower one first, or `None`"
        check_numbers("limits", limits, (2, 2), what, is_ascending=True)
    check_count("steps", steps, 1)
    check_count("resolution", resolution, 2)
    check_verbose(verbose)
    check_named("optimizers", optimizers)

    def loss(_, z):
        return function(z[..., 0], z[..., 1])

    bar = keras.utils.Progbar(steps * len(optimizers), verbose=verbose)
    paths = {
        name: _walk(loss, optimizer, start, steps, bar)
        for name, optimizer in optimizers.items()
    }

    def surface(x, y):
        x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
        return ops.convert_to_numpy(function(x, y))

    if limits is None:
        optimum = lowest_point(surface, extent(paths.values(), margin=2.0))
        shown = (
            paths.values() if optimum is None else [*paths.values(), [optimum]]
        )
        limits = extent(shown, margin=0.15)
    else:
        optimum = lowest_point(surface, limits)
    grid = make_grid(limits, resolution)
    return draw(
        paths,
        losses={name: surface(*path.T) for name, path in paths.items()},
        grid=grid,
        values=surface(*grid),
        labels=("x", "y"),
        every="step",
        lowest=None
        if optimum is None
        else (optimum, surface(*np.asarray(optimum, "float32")), "optimum"),
    )


def _walk(loss, optimizer, start, steps, bar):
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
        bar.add(1)
    return np.stack(path)


def weight_trajectories(
    model: keras.Model,
    x: Any,
    y: Any,
    trajectories: Mapping[str, Sequence[Any]],
    loss: Any = None,
    resolution: int = 15,
    verbose: int = 1,
) -> Figure:
    """Ways of several optimizers through the weights of a real network.

    They are projected on the plane through the centre of all snapshots along
    their first two principal components, on which the loss is drawn too. Where
    a path lies above or below the plane the contours are not the loss at the
    path: the lower panel has that, and so have the lines in three dimensions.

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
        verbose: 0 or 1, whether to show a progress bar. Defaults to `1`.

    Returns:
        `matplotlib.figure.Figure`, as that of `loss_surface_trajectories`.

    Raises:
        TypeError: `model` is no model.
        ValueError: `trajectories` is empty, a snapshot doesn't fit the model,
            there are fewer than three different ones, there is no loss,
            `resolution` is less than 2, or `verbose` neither 0 nor 1.
    """
    layers_in("weight_trajectories", model, "model")
    check_count("resolution", resolution, 2)
    check_verbose(verbose)
    check_named("trajectories", trajectories)
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
    compute_loss = loss_evaluator(model, x, y, loss)
    trained = [
        w for w, trained in zip(weights, is_trained, strict=True) if trained
    ]
    bar = keras.utils.Progbar(len(everything) + resolution**2, verbose=verbose)

    def loss_at(point):
        with as_it_was(model):
            _assign(trained, point)
            value = float(ops.convert_to_numpy(compute_loss()))
        bar.add(1)
        return value

    paths = {name: (path - centre) @ plane.T for name, path in points.items()}
    grid = make_grid(extent(paths.values(), margin=0.15), resolution)
    before = [np.array(ops.convert_to_numpy(w)) for w in trained]
    try:
        losses = {
            name: np.array([loss_at(point) for point in path])
            for name, path in points.items()
        }
        flat = np.stack([axis.ravel() for axis in grid], axis=1)
        values = np.reshape(
            [loss_at(centre + pair @ plane) for pair in flat], grid[0].shape
        )
    finally:
        for variable, value in zip(trained, before, strict=True):
            variable.assign(value)
    return draw(
        paths,
        losses,
        grid,
        values,
        labels=[
            f"principal component {i + 1} ({share:.0f} % of the variance)"
            for i, share in enumerate(shares)
        ],
        every="snapshot",
        lowest=_lowest_on_grid(grid, values),
    )


def _lowest_on_grid(grid, values):
    """Where the grid's lowest value is, unless that is at its border."""
    row, column = np.unravel_index(
        np.argmin(np.where(np.isfinite(values), values, np.inf)), values.shape
    )
    for index, size in zip((row, column), values.shape, strict=True):
        if index in (0, size - 1):
            return None
    point = np.array([axis[row, column] for axis in grid])
    return point, values[row, column], "lowest on the plane"


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
