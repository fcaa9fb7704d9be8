"""Look at the curvature: full Kronecker factors, and how diagonal they are.

    from keras_adafisher import analysis

AdaFisher keeps the diagonals of two matrices per layer, `H`, the second moment
of the layer's input, and `S`, that of the gradient at its pre-activation. The
functions here compute the whole matrices, for one batch, and the numbers by
which the paper judges what is lost without the rest (Martins Gomes et al.,
ICLR 2025, arXiv 2405.16397, Section 3.1 and Appendix A). Nothing of this runs
in training. All results are NumPy arrays; `keras_adafisher.plotting` draws
them.
"""

import contextlib
import dataclasses
import inspect
import math
import numbers

import keras
import numpy as np
from keras import ops

from keras_adafisher import backend
from keras_adafisher.probe import ANSWER_SCALE
from keras_adafisher.steps import Step
from keras_adafisher.wrap import layers_in
from keras_adafisher.wrap import make_wrapper
from keras_adafisher.wrap import without_wrappers
from keras_adafisher.wrappers import Block
from keras_adafisher.wrappers import ConvBlock
from keras_adafisher.wrappers import ConvTransposeBlock
from keras_adafisher.wrappers import DenseBlock
from keras_adafisher.wrappers import EinsumBlock
from keras_adafisher.wrappers import EmbeddingBlock
from keras_adafisher.wrappers import ReverseEmbeddingBlock

# A float32 matrix with so many rows and columns takes 1 GiB.
LARGEST_FACTOR = 16_384

_SMALLEST_RATIO = 1e-16


@dataclasses.dataclass(frozen=True)
class KroneckerFactors:
    """The Kronecker factors of one linear map, for one batch.

    Attributes:
        layer: String, the layer's path.
        parameters: Tuple of strings, the paths of the map's weight and bias,
            as far as it has them.
        activation: Float32 array of shape `(inputs, inputs)`, `H`: the mean of
            `h hᵀ` over all rows, which are the positions of all examples. The
            input coordinates are in the order of the weight's axes. If the
            map has a bias, `h` has one more entry at its end, the 1.
        gradient: Float32 array of shape `(outputs, outputs)`, `S`: the mean of
            `s sᵀ` over all rows, where `s` is the gradient of the loss at the
            map's output.
        bias_index: Int, the index of the 1 in `activation`, or `None`.
    """

    layer: str
    parameters: tuple
    activation: np.ndarray
    gradient: np.ndarray
    bias_index: int | None


@dataclasses.dataclass(frozen=True)
class GershgorinDisks:
    """The disks that hold the eigenvalues of a matrix.

    Attributes:
        centres: Float64 array of shape `(n,)`, the diagonal.
        radii: Float64 array of shape `(n,)`: for each row, the sum of the
            absolute values off the diagonal.
    """

    centres: np.ndarray
    radii: np.ndarray

    @property
    def dominated_share(self):
        """Share of the disks that don't contain 0: of the rows in which the
        diagonal outweighs all other entries together.
        """
        return float(np.mean(np.abs(self.centres) > self.radii))


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a factor, and those of a perturbed one.

    Attributes:
        eigenvalues: Float64 array of shape `(n,)`, the largest first.
        perturbed: The same with noise off the diagonal.
        noise: Float, the size of the noise.
    """

    eigenvalues: np.ndarray
    perturbed: np.ndarray
    noise: float

    @property
    def largest_shift(self):
        """The largest change of an eigenvalue, relative to the largest one."""
        shift = np.max(np.abs(self.perturbed - self.eigenvalues))
        largest = np.max(np.abs(self.eigenvalues))
        return float(shift / largest) if largest else 0.0


def kronecker_factors(model, x, y, layers=None, loss=None):
    """Compute the full Kronecker factors of some layers for one batch.

    ```python
    for factors in analysis.kronecker_factors(model, x[:256], y[:256]):
        print(factors.layer, factors.activation.shape, factors.gradient.shape)
    ```

    The model runs once forward and backward, in training mode. Its diagonals
    are therefore what AdaFisher measures at a training step on this batch. A
    layer that is called several times gets the mean over its calls. Dense and
    einsum layers (so also the projections of attention layers), convolutions
    without groups and their transposes, and embeddings have full factors. The
    model needn't be compiled with AdaFisher, nor be wrapped, and is left as it
    was: batch normalizations' moving averages, metrics and the state of
    dropout are set back. Only layers that draw from Keras' global random seed
    leave a trace.

    Under mixed precision, note that the loss isn't scaled here: in float16
    small gradients may vanish.

    Args:
        model: `keras.Model`, built.
        x: The batch, as the model takes it: an array or tensor, or a list or
            dict of them.
        y: The labels, as the loss takes them: the same.
        layers: `keras.layers.Layer` of the model, or a layer's path or name,
            or a list of those. A layer stands for all layers inside it.
            Defaults to all layers that have full factors.
        loss: Loss function that takes `y` and the model's output, a
            `keras.losses.Loss` or the name of one. Its mean is differentiated.
            Defaults to what the model was compiled with, `add_loss` and
            regularizers included.

    Returns:
        List of `KroneckerFactors`, in the order of the model's layers.

    Raises:
        TypeError: `model` is no model.
        ValueError: The model isn't built; there is neither a `loss` nor one
            that the model was compiled with; `layers` names a layer that the
            model doesn't have, that has no full factors, or that isn't called
            for this `x`.
    """
    everything = layers_in("kronecker_factors", model, "model")
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' has not yet been built. Build it first "
            "by calling `build()` or by calling the model on a batch of data."
        )
    compute_loss = _loss_function(model, loss)
    chosen = _chosen_layers(everything, layers)
    with as_it_was(model), without_wrappers(model):
        wrappers = _full_wrappers(chosen)
        attached = []
        try:
            for wrapper in wrappers:
                wrapper.attach()
                attached.append(wrapper)
            probes = _in_order(model, wrappers)
            # All that is attached here measures.
            with Step([], "measure"):
                answers = backend.differentiate(
                    compute_loss,
                    _tensors_of(x, y),
                    probes,
                    _all_variables(model),
                )
        finally:
            for wrapper in attached:
                wrapper.detach()

    paths = {
        id(probe): wrapper.host.path or wrapper.host.name
        for wrapper in wrappers
        for probe in wrapper.probes
    }
    results = []
    for probe, answer in zip(probes, answers, strict=True):
        path = paths[id(probe)]
        calls = 0
        if answer is not None:
            answer = ops.convert_to_numpy(answer) / ANSWER_SCALE
            calls, *sums = probe.split(answer)
        if calls:
            results.append(_result(path, probe.block, sums, calls))
        elif layers is not None:
            raise ValueError(
                f"Layer '{path}' isn't called by the model for this batch, or "
                "its output doesn't change the loss. Leave it out. "
                f"Received: layers={layers}"
            )
    return results


def gershgorin(factor):
    """Gershgorin's disks of a square matrix.

    Each eigenvalue lies in one of them: the diagonal gives the centres, the
    sums of the other absolute values of a row its radius. If the radii are
    small, the diagonal says where the eigenvalues are. arXiv 2405.16397,
    Section 3.1.

    Args:
        factor: Array of shape `(n, n)`.

    Returns:
        `GershgorinDisks`.

    Raises:
        ValueError: `factor` is no finite square matrix.
    """
    factor = _matrix(factor)
    centres = np.diag(factor).copy()
    radii = np.sum(np.abs(factor - np.diag(centres)), axis=1)
    return GershgorinDisks(centres, radii)


def spectrum(factor, noise=0.0, seed=None):
    """Eigenvalues of a symmetric matrix, with and without noise.

    If symmetric Gaussian noise off the diagonal hardly moves the eigenvalues,
    what is there hardly matters. arXiv 2405.16397, Section 3.1.

    Args:
        factor: Array of shape `(n, n)`, symmetric.
        noise: Float >= 0. The standard deviation of what is added to each pair
            of entries off the diagonal, in units of the mean of the diagonal:
            `S` shrinks with the batch size, and no absolute size fits both
            factors. Defaults to `0.0`.
        seed: Int or `None`, for `numpy.random.default_rng`. Defaults to
            `None`, another noise at each call.

    Returns:
        `Spectrum`.

    Raises:
        ValueError: `factor` is no finite symmetric matrix, `noise` is
            negative, or `seed` is no seed.
    """
    factor = _symmetric(factor)
    if (
        not isinstance(noise, numbers.Real)
        or isinstance(noise, bool)
        or not 0 <= noise < float("inf")
    ):
        raise ValueError(
            f"Argument `noise` must be a float >= 0. Received: noise={noise}"
        )
    try:
        rng = np.random.default_rng(seed)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Argument `seed` must be an integer >= 0 or `None`. "
            f"Received: seed={seed}"
        ) from error
    perturbation = rng.normal(size=factor.shape)
    perturbation = np.triu(perturbation, 1)
    perturbation += perturbation.T
    scale = noise * np.mean(np.diag(factor))
    return Spectrum(
        np.linalg.eigvalsh(factor)[::-1],
        np.linalg.eigvalsh(factor + scale * perturbation)[::-1],
        float(noise),
    )


def diagonal_energy(factor):
    """The share of a matrix' squared Frobenius norm that the diagonal has.

    1 for a diagonal matrix, `1 / n` for one whose entries are all equal.

    Args:
        factor: Array of shape `(n, n)`.

    Returns:
        Float from 0 to 1, and `nan` for a matrix of zeros.

    Raises:
        ValueError: `factor` is no finite square matrix.
    """
    factor = _matrix(factor)
    # Scaled, since squares of small numbers underflow.
    largest = np.max(np.abs(factor))
    if largest == 0:
        return float("nan")
    squares = np.square(factor / largest)
    return float(np.trace(squares) / np.sum(squares))


def diagonal_energy_table(factors):
    """A table of how diagonal the factors of some layers are.

    ```python
    factors = analysis.kronecker_factors(model, x, y)
    rich.console.Console().print(analysis.diagonal_energy_table(factors))
    ```

    Args:
        factors: List of `KroneckerFactors`.

    Returns:
        `rich.table.Table` with a row for each: the size of `H` and of `S`, the
        share of the squared norm that is on the diagonal (`diagonal_energy`),
        and the share of rows in which the diagonal outweighs the rest
        (`GershgorinDisks.dominated_share`).

    Raises:
        TypeError: `factors` is anything else.
    """
    import rich.table

    factors = list(factors) if np.iterable(factors) else [factors]
    for one in factors:
        check_kronecker_factors("factors", one)
    table = rich.table.Table()
    table.add_column("Weight", overflow="fold")
    for name in ("H", "S"):
        table.add_column(f"{name}\nsize", justify="right")
        table.add_column(f"{name}, energy\non diagonal", justify="right")
        table.add_column(f"{name}, rows\ndominated", justify="right")
    for one in factors:
        cells = [one.parameters[0]]
        for factor in (one.activation, one.gradient):
            cells += [
                str(len(factor)),
                f"{100 * diagonal_energy(factor):.1f} %",
                f"{100 * gershgorin(factor).dominated_share:.1f} %",
            ]
        table.add_row(*cells)
    return table


def fourier_spectrum(factor):
    """The magnitude of a matrix' 2-D Fourier transform, on a log scale.

    A diagonal matrix has a constant magnitude along one diagonal direction:
    the sharper that line, the more of the matrix is near its diagonal. arXiv
    2405.16397, Appendix A.

    Args:
        factor: Array of shape `(n, n)`.

    Returns:
        Float64 array of shape `(n, n)`: the decimal logarithm of the
        magnitude, relative to the largest, so 0 at most, and -16 at least.
        The frequency zero is at `[n // 2, n // 2]`.

    Raises:
        ValueError: `factor` is no finite square matrix.
    """
    magnitude = np.abs(np.fft.fftshift(np.fft.fft2(_matrix(factor))))
    largest = magnitude.max()
    if largest:
        magnitude = magnitude / largest
    return np.log10(np.maximum(magnitude, _SMALLEST_RATIO))


class _FullBlock(Block):
    """A block whose statistics are whole matrices.

    Args:
        block: The `Block` of which they have the diagonals.
        rows_of_activation: Callable that makes `(rows, inputs)` of `h`.
        rows_of_gradient: Callable that makes `(rows, outputs)` of `s`.
    """

    def __init__(self, block, rows_of_activation, rows_of_gradient):
        super().__init__(block.weight, block.bias)
        self.rows_of_activation = rows_of_activation
        self.rows_of_gradient = rows_of_gradient
        # A bias with an `S` of its own isn't the weight of a further input.
        self.has_one = block.bias is not None and (
            block.bias_gradient_shape is None
        )
        inputs = math.prod(block.activation_shape)
        outputs = math.prod(block.gradient_shape)
        self.activation_shape = (inputs + self.has_one,) * 2
        self.gradient_shape = (outputs,) * 2

    def activation_statistic(self, h):
        rows = ops.cast(self.rows_of_activation(h), "float32")
        if self.has_one:
            rows = ops.pad(rows, [(0, 0), (0, 1)], constant_values=1)
        return _second_moment(rows)

    def gradient_statistic(self, s):
        return _second_moment(ops.cast(self.rows_of_gradient(s), "float32"))


class _FullEmbeddingBlock(_FullBlock):
    """One-hot rows, whose second moment is the diagonal of frequencies."""

    def __init__(self, block):
        super().__init__(block, None, _last_axis)
        self.frequencies = block.activation_statistic

    def activation_statistic(self, h):
        return ops.diag(ops.reshape(self.frequencies(h), (-1,)))


def _second_moment(rows):
    return ops.matmul(ops.transpose(rows), rows) / ops.cast(
        ops.shape(rows)[0], "float32"
    )


def _last_axis(x):
    """Rows of all axes but the last."""
    return ops.reshape(x, (-1, x.shape[-1]))


def _full_patches(block, patches):
    """The `_FullBlock` of a convolution of either direction.

    Args:
        block: The `Block`.
        patches: Callable that makes the patches of float32 images whose
            channels are last: not every device convolves others.
    """

    def channels_last(x):
        return ops.moveaxis(x, 1, -1) if block.channels_first else x

    def rows_of_activation(h):
        return _last_axis(patches(channels_last(ops.cast(h, "float32"))))

    def rows_of_gradient(s):
        return _last_axis(channels_last(s))

    return _FullBlock(block, rows_of_activation, rows_of_gradient)


def _full_dense(block, layer):
    return _FullBlock(block, _last_axis, _last_axis)


def _full_conv(block, layer):
    if block.groups > 1:
        raise _NoFullFactors("it has groups, each with factors of its own")
    size = math.prod(block.activation_shape)
    # A convolution with the unit vectors for filters returns the patches.
    kernel = np.eye(size, dtype="float32")
    kernel = kernel.reshape((*block.activation_shape[:-1], size))

    def patches(h):
        padding = block.padding
        if padding == "causal":
            reach = (block.kernel_size[0] - 1) * block.dilation_rate[0]
            h, padding = ops.pad(h, [(0, 0), (reach, 0), (0, 0)]), "valid"
        return ops.conv(
            h,
            kernel,
            strides=block.strides,
            padding=padding,
            data_format="channels_last",
            dilation_rate=block.dilation_rate,
        )

    return _full_patches(block, patches)


def _full_conv_transpose(block, layer):
    size = math.prod(block.activation_shape)
    *taps, _, channels = block.activation_shape
    # What each kernel tap reads, in the same way: filter `(i, c)` takes
    # channel `c` through tap `i`.
    kernel = np.eye(size, dtype="float32")
    kernel = kernel.reshape((*taps, channels, size)).swapaxes(-1, -2)

    def patches(h):
        return ops.conv_transpose(
            h,
            kernel,
            strides=block.strides,
            padding=layer.padding,
            output_padding=layer.output_padding,
            data_format="channels_last",
            dilation_rate=block.dilation_rate,
        )

    return _full_patches(block, patches)


def _full_einsum(block, layer):
    shared = set(block.kernel_h_labels) & set(block.kernel_s_labels)
    if shared:
        raise _NoFullFactors(
            f"the axis '{shared.pop()}' of its kernel is one of input and "
            "output, with a linear map for each position"
        )

    def rows(x, labels, kept):
        """Rows with the labels of the kernel, in its order."""
        rank = len(x.shape)
        first = rank - len(labels) if block.is_left_elided else 0
        last = [first + labels.index(label) for label in kept]
        size = math.prod(x.shape[axis] for axis in last)
        others = [axis for axis in range(rank) if axis not in last]
        return ops.reshape(ops.transpose(x, [*others, *last]), (-1, size))

    def rows_of_activation(h):
        if block.reduction is not None:
            h = ops.einsum(block.reduction, ops.cast(h, "float32"))
        return rows(h, block.input_labels, block.kernel_h_labels)

    def rows_of_gradient(s):
        return rows(s, block.output_labels, block.kernel_s_labels)

    return _FullBlock(block, rows_of_activation, rows_of_gradient)


def _full_embedding(block, layer):
    return _FullEmbeddingBlock(block)


_FULL = {
    DenseBlock: _full_dense,
    ReverseEmbeddingBlock: _full_dense,
    ConvBlock: _full_conv,
    ConvTransposeBlock: _full_conv_transpose,
    EinsumBlock: _full_einsum,
    EmbeddingBlock: _full_embedding,
}


class _NoFullFactors(Exception):
    """Says why a block or a layer has none."""


def _full_block(block, layer):
    """The `_FullBlock` of a block. Raises `_NoFullFactors`."""
    if block.is_estimated:
        raise _NoFullFactors(
            "its activations can't be seen, and AdaFisher estimates its "
            "factors from gradients"
        )
    # Not of subclasses, which may compute something else.
    make = _FULL.get(type(block))
    if make is None:
        raise _NoFullFactors(
            f"the Fisher information of a {type(block).__name__} is no "
            "Kronecker product of two matrices"
        )
    full = make(block, layer)
    size = max(*full.activation_shape, *full.gradient_shape)
    if size > LARGEST_FACTOR:
        raise _NoFullFactors(
            f"one of them would have {size:,} rows, more than "
            f"`analysis.LARGEST_FACTOR` = {LARGEST_FACTOR:,}"
        )
    return full


def _full_wrapper(layer):
    """A wrapper that measures full factors. Raises `_NoFullFactors`."""
    if not layer.built:
        raise _NoFullFactors("it isn't built")
    wrapper, reason = make_wrapper(layer)
    if wrapper is None:
        raise _NoFullFactors(reason)
    blocks, reasons = [], []
    for block in wrapper.blocks:
        try:
            blocks.append(_full_block(block, layer))
        except _NoFullFactors as error:
            reasons.append(str(error))
            # Without parameters, it isn't measured.
            blocks.append(Block(None))
    if len(reasons) == len(blocks):
        raise _NoFullFactors(reasons[0])
    wrapper.measure(blocks)
    return wrapper


def _full_wrappers(chosen):
    """The wrappers for what was chosen.

    Args:
        chosen: List of pairs of a list of layers, and of the layer that they
            are in and that has to have factors, or `None`.
    """
    wrappers = {}
    for inside, required in chosen:
        reasons = []
        for layer in inside:
            if id(layer) in wrappers:
                continue
            try:
                wrappers[id(layer)] = _full_wrapper(layer)
            except _NoFullFactors as error:
                reasons.append(str(error))
        if required is not None and len(reasons) == len(inside):
            raise ValueError(
                f"Layer '{required.path or required.name}' has no full "
                f"Kronecker factors: {reasons[0]}. Leave it out of `layers`. "
                "With `layers=None`, all layers that have them are taken."
            )
    return list(wrappers.values())


def _chosen_layers(everything, layers):
    """What `_full_wrappers` takes, for the argument `layers`."""
    if layers is None:
        return [(everything, None)]
    is_one = isinstance(layers, (str, keras.layers.Layer))
    if is_one or not np.iterable(layers):
        layers = [layers]
    chosen = []
    for choice in layers:
        if isinstance(choice, str):
            found = [
                layer
                for layer in everything
                if choice in (layer.path, layer.name)
            ]
        else:
            found = [layer for layer in everything if layer is choice]
        if not found:
            names = ", ".join(f"'{la.path or la.name}'" for la in everything)
            raise ValueError(
                "Argument `layers` must hold layers of the model, their paths "
                f"or names. Received: layers={layers}. The model has {names}"
            )
        chosen += [
            (layers_in("kronecker_factors", layer), layer) for layer in found
        ]
    return chosen


def loss_evaluator(model, x, y, loss):
    """A function without arguments that computes the loss in training mode.

    Args:
        model, x, y, loss: See `kronecker_factors`.
    """
    return backend.evaluator(
        _loss_function(model, loss), _tensors_of(x, y), _all_variables(model)
    )


def _loss_function(model, loss):
    """The loss in training mode, as a function of a batch.

    Args:
        model: `keras.Model`.
        loss: See `kronecker_factors`.

    Returns:
        Callable `(x, y)`.
    """
    if loss is not None:
        loss = keras.losses.get(loss)
    elif not getattr(model, "compiled", False):
        raise ValueError(
            "Argument `loss` must be given for a model that isn't compiled. "
            f"Received: loss=None, and a model '{model.name}' without "
            "`compile()`"
        )
    # As in `fit`: not every `call` takes `training`.
    parameters = inspect.signature(model.call).parameters
    arguments = {"training": True} if "training" in parameters else {}

    def compute_loss(x, y):
        y_pred = model(x, **arguments)
        if loss is None:
            return model.compute_loss(x=x, y=y, y_pred=y_pred)
        return ops.mean(loss(y, y_pred))

    return compute_loss


def _tensors_of(*data):
    """Nested arrays as nested tensors."""
    return keras.tree.map_structure(ops.convert_to_tensor, data)


def _all_variables(model):
    return [*model.variables, *getattr(model, "metrics_variables", [])]


@contextlib.contextmanager
def as_it_was(model):
    """Context after which all that a forward pass changes is set back."""
    variables = [
        *model.non_trainable_variables,
        *getattr(model, "metrics_variables", []),
    ]
    values = [np.array(ops.convert_to_numpy(v)) for v in variables]
    try:
        with backend.keep_random_state():
            yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def _in_order(model, wrappers):
    """The probes of wrappers, in the order of the model's weights."""
    order = {id(v): index for index, v in enumerate(model.weights)}
    return sorted(
        (probe for wrapper in wrappers for probe in wrapper.probes),
        key=lambda probe: order[id(probe.block.parameters[0])],
    )


def _result(path, block, sums, calls):
    activation, gradient = (total / np.float32(calls) for total in sums)
    return KroneckerFactors(
        layer=path,
        parameters=tuple(v.path for v in block.parameters),
        activation=activation,
        gradient=gradient,
        bias_index=len(activation) - 1 if block.has_one else None,
    )


def check_kronecker_factors(argument, value):
    """Raise a `TypeError` if an argument is no `KroneckerFactors`."""
    if not isinstance(value, KroneckerFactors):
        raise TypeError(
            f"Argument `{argument}` must be what `kronecker_factors` returned, "
            f"`KroneckerFactors`. Received: {value} (of type {type(value)})"
        )


def _matrix(factor):
    try:
        matrix = np.asarray(factor, "float64")
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Argument `factor` must be a matrix of numbers. "
            f"Received: factor={factor}"
        ) from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            "Argument `factor` must be a square matrix: `activation` or "
            "`gradient` of what `kronecker_factors` returns. "
            f"Received: factor of shape {np.shape(factor)}"
        )
    if not matrix.size or not np.all(np.isfinite(matrix)):
        raise ValueError(
            "Argument `factor` must have entries, and all of them finite. "
            f"Received: factor={factor}"
        )
    return matrix


def _symmetric(factor):
    matrix = _matrix(factor)
    if np.max(np.abs(matrix - matrix.T)) > 1e-4 * np.max(np.abs(matrix)):
        raise ValueError(
            "Argument `factor` must be a symmetric matrix. "
            f"Received: factor={factor}"
        )
    return (matrix + matrix.T) / 2
