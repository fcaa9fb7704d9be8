"""Full factors against their definition, and matrices with known answers."""

import io

import keras
import numpy as np
import pytest
import rich.console
from layer_cases import skip_if_plain_layer_fails
from models import assert_same
from models import cross_entropy
from models import data
from models import mlp
from models import PLAIN
from models import probes_in
from models import product_loss
from models import state
from models import to_numpy
from models import train
from models import trained
from reference import min_max
from reference import patches
from reference import rows

import keras_adafisher
from keras_adafisher import analysis

RTOL = 2e-5


def second_moment(x, one=False):
    """Mean of the outer products of some rows, by a loop."""
    x = np.asarray(x, "float64")
    if one:
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return sum(np.outer(row, row) for row in x) / len(x)


def assert_factor(actual, expected):
    assert actual.dtype == "float32"
    np.testing.assert_allclose(
        actual, expected, rtol=RTOL, atol=RTOL * np.abs(expected).max()
    )


def known_gradient(model, x, rng):
    """Labels for `product_loss`, and its gradient at the model's output."""
    y = rng.normal(size=np.shape(to_numpy(model(x)))).astype("float32")
    return y, y.astype("float64") / y.size


def factors_of_layer(layer, x, rng):
    """The factors of a model of one layer, and `s` at its output."""
    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, layer(inputs))
    y, s = known_gradient(model, x, rng)
    (factors,) = analysis.kronecker_factors(model, x, y, loss=product_loss)
    return factors, s


def test_dense_layers_of_a_network(rng):
    model = mlp()
    x, _ = data(examples=7)
    y, s = known_gradient(model, x, rng)
    first, second = analysis.kronecker_factors(model, x, y, loss=product_loss)

    kernel, bias, out_kernel, _ = model.get_weights()
    hidden = np.tanh(x @ kernel + bias)
    assert_factor(first.activation, second_moment(x, one=True))
    assert_factor(
        first.gradient, second_moment(s @ out_kernel.T * (1 - hidden**2))
    )
    assert_factor(second.activation, second_moment(hidden, one=True))
    assert_factor(second.gradient, second_moment(s))
    assert (first.bias_index, second.bias_index) == (6, 5)
    layer = model.layers[0]
    assert first.layer == layer.path
    assert first.parameters == (layer.kernel.path, layer.bias.path)


def test_dense_layer_on_sequences_without_bias(rng):
    x = rng.normal(size=(3, 4, 5)).astype("float32")
    layer = keras.layers.Dense(2, use_bias=False)
    factors, s = factors_of_layer(layer, x, rng)
    assert_factor(factors.activation, second_moment(rows(x)))
    assert_factor(factors.gradient, second_moment(rows(s)))
    assert factors.bias_index is None
    assert factors.parameters == (layer.kernel.path,)


@pytest.mark.parametrize(
    ("layer_class", "spatial", "arguments"),
    [
        ("Conv1D", (7,), {"kernel_size": 3, "padding": "same", "strides": 2}),
        (
            "Conv1D",
            (7,),
            {"kernel_size": 2, "padding": "causal", "dilation_rate": 2},
        ),
        ("Conv2D", (5, 4), {"kernel_size": (3, 2), "padding": "same"}),
        ("Conv2D", (5, 6), {"kernel_size": 2, "dilation_rate": 2}),
        ("Conv3D", (3, 4, 2), {"kernel_size": 2, "strides": (1, 2, 1)}),
    ],
)
def test_convolution(layer_class, spatial, arguments, rng):
    x = rng.normal(size=(2, *spatial, 2)).astype("float32")
    layer = getattr(keras.layers, layer_class)(3, **arguments)
    factors, s = factors_of_layer(layer, x, rng)
    h = patches(
        x, layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding
    )
    assert_factor(factors.activation, second_moment(rows_of(h), one=True))
    assert_factor(factors.gradient, second_moment(rows(s)))
    assert factors.bias_index == len(factors.activation) - 1


def rows_of(x):
    """All axes but the first, flattened."""
    return x.reshape(len(x), -1)


def test_convolution_of_channels_first_images(rng):
    x = rng.normal(size=(2, 3, 5, 5)).astype("float32")
    layer = keras.layers.Conv2D(4, 2, data_format="channels_first")
    skip_if_plain_layer_fails(lambda: layer, x)
    factors, s = factors_of_layer(layer, x, rng)
    h = patches(np.moveaxis(x, 1, -1), (2, 2), (1, 1), (1, 1), "valid")
    assert_factor(factors.activation, second_moment(rows_of(h), one=True))
    assert_factor(factors.gradient, second_moment(rows(np.moveaxis(s, 1, -1))))


def test_transposed_convolution(rng):
    """Tap `i` carries input `q` to output `2 q + i`."""
    x = rng.normal(size=(2, 4, 3)).astype("float32")
    layer = keras.layers.Conv1DTranspose(2, 3, strides=2)
    factors, s = factors_of_layer(layer, x, rng)
    assert s.shape == (2, 9, 2)
    h = np.zeros((2, 9, 3, 3))
    for q in range(4):
        for tap in range(3):
            h[:, 2 * q + tap, tap] = x[:, q]
    assert_factor(factors.activation, second_moment(h.reshape(-1, 9), one=True))
    assert_factor(factors.gradient, second_moment(rows(s)))


def test_attention_projections(rng):
    """Coordinates are in the order of the kernel's axes."""
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    layer = keras.layers.EinsumDense(
        "abc,cde->adbe", output_shape=(2, None, 5), bias_axes="de"
    )
    factors, s = factors_of_layer(layer, x, rng)
    assert_factor(factors.activation, second_moment(rows(x), one=True))
    s = np.swapaxes(s, 1, 2).reshape(-1, 10)
    assert_factor(factors.gradient, second_moment(s))
    assert factors.bias_index == 4

    x = rng.normal(size=(2, 3, 4, 5)).astype("float32")
    layer = keras.layers.EinsumDense("abcd,dce->abe", output_shape=(None, 6))
    factors, s = factors_of_layer(layer, x, rng)
    h = np.swapaxes(x, 2, 3).reshape(-1, 20)
    assert_factor(factors.activation, second_moment(h))
    assert_factor(factors.gradient, second_moment(rows(s)))


def test_bias_with_axes_that_the_kernel_lacks(rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    layer = keras.layers.EinsumDense(
        "abc,cd->abd", output_shape=(3, 5), bias_axes="bd"
    )
    factors, _ = factors_of_layer(layer, x, rng)
    assert_factor(factors.activation, second_moment(rows(x)))
    assert factors.bias_index is None


def test_embedding(rng):
    ids = np.array([[0, 2, 2], [4, 2, 0]])
    inputs = keras.Input((3,), dtype="int32")
    layer = keras.layers.Embedding(5, 4)
    model = keras.Model(inputs, layer(inputs))
    y, s = known_gradient(model, ids, rng)
    (factors,) = analysis.kronecker_factors(model, ids, y, loss=product_loss)
    assert_factor(factors.activation, second_moment(np.eye(5)[ids.ravel()]))
    assert_factor(factors.gradient, second_moment(rows(s)))


def small_network():
    """Layers of several kinds, with all that a forward pass changes."""
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(9, 4),
            keras.layers.Conv1D(4, 3, strides=2, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


def small_batch(rng):
    return rng.integers(0, 9, size=(8, 6)), rng.integers(0, 3, size=8)


def test_diagonals_are_what_adafisher_measures(rng):
    x, y = small_batch(rng)
    model = small_network()
    optimizer = keras_adafisher.AdaFisher(
        gamma_1=0.9, gamma_2=0.05, factor_update_steps=1, **PLAIN
    )
    model.compile(optimizer, loss=cross_entropy())
    factors = analysis.kronecker_factors(model, x, y)
    model.train_on_batch(x, y)

    blocks = [probe.block for probe in probes_in(model)]
    weights = {
        block.weight.path: block.weight
        for block in blocks
        if not isinstance(block, keras_adafisher.wrappers.ScaleBlock)
    }
    assert {f.parameters[0] for f in factors} == set(weights)
    assert len(factors) == 3
    for one in factors:
        running = optimizer.factors(weights[one.parameters[0]])
        activation = 0.1 + 0.05 * min_max(np.diag(one.activation))
        np.testing.assert_allclose(
            to_numpy(running.activation).ravel(),
            activation[: one.bias_index],
            rtol=1e-3,
            err_msg=one.layer,
        )
        np.testing.assert_allclose(
            to_numpy(running.gradient).ravel(),
            0.1 + 0.05 * min_max(np.diag(one.gradient)),
            rtol=1e-3,
            atol=1e-4,
            err_msg=one.layer,
        )


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_model_is_left_as_it_was(is_wrapped, rng):
    """Training goes on bit for bit as if nothing had happened."""
    x, y = small_batch(rng)

    def final_state(with_analysis):
        keras.utils.set_random_seed(3)
        model = small_network()
        if is_wrapped:
            optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
        else:
            optimizer = keras.optimizers.Adam()
        model.compile(optimizer, loss=cross_entropy(), metrics=["accuracy"])
        logs = [model.train_on_batch(x, y, return_dict=True)]
        if with_analysis:
            names = [v.path for v in model.trainable_variables]
            metrics = [to_numpy(v) for v in model.metrics_variables]
            calls = [layer.call for layer in model.layers]
            assert analysis.kronecker_factors(model, x, y)
            assert [v.path for v in model.trainable_variables] == names
            assert bool(probes_in(model)) is is_wrapped
            assert_same([to_numpy(v) for v in model.metrics_variables], metrics)
            if not is_wrapped:
                assert [layer.call for layer in model.layers] == calls
        for _ in range(2):
            logs.append(model.train_on_batch(x, y, return_dict=True))
        return state(model), logs

    (actual, actual_logs), (expected, expected_logs) = (
        final_state(with_analysis) for with_analysis in (True, False)
    )
    assert_same(actual, expected)
    assert actual_logs == expected_logs


def test_model_is_left_as_it_was_after_an_error(rng):
    model = trained(keras_adafisher.AdaFisher(factor_update_steps=1))
    probes = probes_in(model)
    with pytest.raises(Exception):  # noqa: B017  Each backend has its own.
        analysis.kronecker_factors(model, np.ones((2, 99)), np.zeros(2))
    assert {id(p) for p in probes_in(model)} == {id(p) for p in probes}
    train(model, range(2))


class Subclassed(keras.Model):
    """Layers in attributes and in a nested model. One is called twice."""

    def __init__(self):
        super().__init__()
        self.inner = keras.Sequential(
            [keras.layers.Dense(4, name="a"), keras.layers.Dense(4, name="b")],
            name="inner",
        )
        self.twice = keras.layers.Dense(4, name="twice")
        self.unused = keras.layers.Dense(4, name="unused")
        self.unused.build((None, 4))

    def call(self, x):
        return self.twice(self.twice(self.inner(x)))


def test_subclassed_models_and_choice_of_layers(rng):
    model = Subclassed()
    x = rng.normal(size=(5, 3)).astype("float32")
    y, s = known_gradient(model, x, rng)

    def names(layers):
        factors = analysis.kronecker_factors(
            model, x, y, layers=layers, loss=product_loss
        )
        return [f.layer.rsplit("/")[-1] for f in factors]

    assert names(None) == ["a", "b", "twice"]
    assert names("inner") == ["a", "b"]
    assert names(["twice", model.inner.layers[0]]) == ["a", "twice"]
    assert names(model.twice.path) == ["twice"]
    with pytest.raises(ValueError, match=r"Received: layers=.'nope'.*twice"):
        names(["nope"])
    with pytest.raises(ValueError, match="unused' isn't called by the model"):
        names(["unused"])

    (twice,) = analysis.kronecker_factors(
        model, x, y, layers="twice", loss=product_loss
    )
    h = to_numpy(model.inner(x))
    kernel, bias = model.twice.get_weights()
    inputs = np.concatenate([h, h @ kernel + bias])
    assert_factor(twice.activation, second_moment(inputs, one=True))
    gradients = np.concatenate([s, s @ kernel.T])
    assert_factor(twice.gradient, second_moment(gradients))


def test_frozen_layers_and_models_whose_call_takes_no_training(rng):
    model = mlp()
    model.trainable = False
    x, y = data(examples=4)
    factors = analysis.kronecker_factors(model, x, y, loss=cross_entropy())
    assert len(factors) == 2
    assert not model.trainable_variables


def test_regularizers_of_activations_are_part_of_the_compiled_loss(rng):
    inputs = keras.Input((3,))
    dense = keras.layers.Dense(2, activity_regularizer="l2")
    model = keras.Model(inputs, dense(inputs))
    model.compile("sgd", loss=product_loss)
    x = rng.normal(size=(4, 3)).astype("float32")
    y, s = known_gradient(model, x, rng)
    (factors,) = analysis.kronecker_factors(model, x, y)
    # Keras divides the penalty, 0.01 times the sum of squares, by the batch.
    s = s + 0.02 * to_numpy(model(x)) / 4
    assert_factor(factors.gradient, second_moment(s))


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (lambda: keras.layers.ReLU(), (3,), "no wrapper for ReLU"),
        (lambda: keras.layers.BatchNormalization(), (3,), "ScaleBlock"),
        (lambda: keras.layers.DepthwiseConv1D(2), (4, 3), "DepthwiseConvBlock"),
        (lambda: keras.layers.Conv1D(4, 2, groups=2), (4, 2), "it has groups"),
        (
            lambda: keras.layers.EinsumDense("abc,bcd->abd", (3, 2)),
            (3, 4),
            "the axis 'b' of its kernel",
        ),
    ],
)
def test_layers_without_full_factors(layer, shape, reason):
    layer = layer()
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    x = np.ones((2, *shape), "float32")
    y = to_numpy(model(x))
    with pytest.raises(
        ValueError,
        match=f"Layer '{layer.name}' has no full .*{reason}.*Leave it out",
    ):
        analysis.kronecker_factors(model, x, y, layers=layer, loss=product_loss)
    assert analysis.kronecker_factors(model, x, y, loss=product_loss) == []


def test_recurrent_layers_and_matrices_that_are_too_large(monkeypatch):
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, keras.layers.LSTM(2, name="lstm")(inputs))
    x = np.ones((2, 4, 3), "float32")
    with pytest.raises(ValueError, match="estimates its factors"):
        analysis.kronecker_factors(
            model, x, x[:, 0, :2], layers="lstm_cell", loss="mse"
        )
    monkeypatch.setattr(analysis, "LARGEST_FACTOR", 6)
    model = mlp()
    model.compile("sgd", loss=cross_entropy())
    with pytest.raises(ValueError, match="would have 7 rows"):
        analysis.kronecker_factors(model, *data(), layers=model.layers[0])


def test_what_kronecker_factors_cannot_use():
    x, y = data()
    with pytest.raises(TypeError, match="`model` of `kronecker_factors`"):
        analysis.kronecker_factors("model", x, y)
    with pytest.raises(ValueError, match="not yet been built"):
        analysis.kronecker_factors(Subclassed(), x, y)
    with pytest.raises(ValueError, match=r"`loss` must be given .* loss=None"):
        analysis.kronecker_factors(mlp(), x, y)


@pytest.mark.once
def test_gershgorin_disks():
    disks = analysis.gershgorin([[5.0, 1, -1], [2, 3, 2], [0, -4, 9]])
    np.testing.assert_array_equal(disks.centres, [5, 3, 9])
    np.testing.assert_array_equal(disks.radii, [2, 4, 4])
    assert disks.dominated_share == pytest.approx(2 / 3)


@pytest.mark.once
def test_spectrum_with_and_without_noise():
    matrix = np.array([[2.0, 1, 0], [1, 2, 0], [0, 0, 5]])
    spectrum = analysis.spectrum(matrix)
    np.testing.assert_allclose(spectrum.eigenvalues, [5, 3, 1])
    np.testing.assert_allclose(spectrum.perturbed, [5, 3, 1])
    assert spectrum.largest_shift < 1e-12

    # The mean of the diagonal is 3.
    spectrum = analysis.spectrum(matrix, noise=0.1, seed=7)
    noise = np.triu(np.random.default_rng(7).normal(size=(3, 3)), 1)
    expected = np.linalg.eigvalsh(matrix + 0.3 * (noise + noise.T))[::-1]
    np.testing.assert_allclose(spectrum.perturbed, expected)
    np.testing.assert_allclose(spectrum.eigenvalues, [5, 3, 1])
    shift = np.abs(expected - [5, 3, 1]).max()
    assert spectrum.largest_shift == pytest.approx(shift / 5)
    # The noise is symmetric and leaves the diagonal alone.
    assert spectrum.perturbed.sum() == pytest.approx(9)


@pytest.mark.once
def test_diagonal_energy():
    assert analysis.diagonal_energy(np.eye(4)) == 1
    assert analysis.diagonal_energy(np.full((5, 5), 1e-30)) == pytest.approx(
        1 / 5
    )
    # 1 + 4 on the diagonal of 1 + 4 + 25 + 100.
    assert analysis.diagonal_energy([[1, 5], [10, -2]]) == pytest.approx(
        5 / 130
    )
    assert np.isnan(analysis.diagonal_energy(np.zeros((2, 2))))


@pytest.mark.once
def test_table_of_diagonal_energies(rng):
    factors = analysis.KroneckerFactors(
        "dense", ("dense/kernel",), np.eye(3), np.ones((4, 4)), None
    )
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(analysis.diagonal_energy_table([factors]))
    cells = [
        cell.strip()
        for line in console.file.getvalue().splitlines()
        if "dense/kernel" in line
        for cell in line.split("│")[1:-1]
    ]
    assert cells == [
        "dense/kernel", "3", "100.0 %", "100.0 %", "4", "25.0 %", "0.0 %"
    ]  # fmt: skip


@pytest.mark.once
def test_fourier_spectrum():
    """A diagonal becomes an anti-diagonal line, equal entries one point."""
    line = analysis.fourier_spectrum(np.eye(4))
    np.testing.assert_allclose(np.diag(np.roll(line, -1, axis=0)[::-1]), 0)
    assert np.sum(line > -1) == 4
    point = analysis.fourier_spectrum(np.ones((5, 5)))
    assert point[2, 2] == 0
    assert np.sum(point > -10) == 1
    wave = np.cos(np.arange(8) * 2 * np.pi / 8) + 0.5
    wave = analysis.fourier_spectrum(np.outer(wave, np.ones(8)))
    # Amplitude 1/2 at the frequencies ±1, 1/2 at 0.
    np.testing.assert_allclose(wave[[3, 4, 5], 4], 0, atol=1e-9)
    np.testing.assert_array_equal(
        analysis.fourier_spectrum(np.zeros((2, 2))), np.full((2, 2), -16)
    )


@pytest.mark.once
@pytest.mark.parametrize(
    "function",
    [
        analysis.gershgorin,
        analysis.spectrum,
        analysis.diagonal_energy,
        analysis.fourier_spectrum,
    ],
)
def test_what_is_no_matrix(function):
    with pytest.raises(ValueError, match=r"`factor` .*square.*shape \(2, 3\)"):
        function(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"`factor` .* finite. Received: fac"):
        function([[1.0, np.nan], [0.0, 1.0]])


@pytest.mark.once
def test_arguments_of_spectrum():
    with pytest.raises(ValueError, match="`factor` must be a symmetric"):
        analysis.spectrum([[1.0, 2.0], [0.0, 1.0]])
    for noise in (-0.1, float("inf"), "much", True):
        with pytest.raises(ValueError, match=f"`noise` .*: noise={noise}"):
            analysis.spectrum(np.eye(2), noise=noise)
