"""Which weights are orthogonalized as which matrices, and what it costs."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops
from models import to_numpy

import keras_adafisher
from keras_adafisher import wrappers
from keras_adafisher.optimizer import orthogonal
from keras_adafisher.wrappers import MatrixView


def variable(*shape):
    return keras.Variable(
        np.arange(np.prod(shape), dtype="float32").reshape(shape)
    )


def einsum(equation, *shape):
    return wrappers.EinsumBlock(variable(*shape), None, equation, shape)


def convolution(*shape, channels, groups=1):
    rank = len(shape) - 2
    ones = (1,) * rank
    return wrappers.ConvBlock(
        variable(*shape),
        None,
        channels,
        shape[-1],
        shape[:-2],
        ones,
        ones,
        "valid",
        "channels_last",
        groups,
    )


def transposed(*shape):
    ones = (1,) * (len(shape) - 2)
    return wrappers.ConvTransposeBlock(
        variable(*shape), None, ones, ones, ones, "channels_last"
    )


# The entry of map, input and output numbers, written out for each kind.
VIEWS = {
    "dense": (
        lambda: wrappers.DenseBlock(variable(3, 4), None, 3, 4),
        (1, 3, 4),
        lambda w, e, i, o: w[i, o],
    ),
    "one output": (
        lambda: wrappers.DenseBlock(variable(3, 1), None, 3, 1),
        (1, 3, 1),
        lambda w, e, i, o: w[i, o],
    ),
    "queries": (
        lambda: einsum("abc,cde->abde", 3, 2, 5),
        (1, 3, 10),
        lambda w, e, i, o: w[i, o // 5, o % 5],
    ),
    "attention's output": (
        lambda: einsum("abcd,cde->abe", 2, 3, 5),
        (1, 6, 5),
        lambda w, e, i, o: w[i // 3, i % 3, o],
    ),
    "outputs before inputs": (
        lambda: einsum("ab,cb->ac", 4, 3),
        (1, 3, 4),
        lambda w, e, i, o: w[o, i],
    ),
    "experts of an einsum": (
        lambda: einsum("aeb,ebc->aec", 2, 3, 4),
        (2, 3, 4),
        lambda w, e, i, o: w[e, i, o],
    ),
    "experts": (
        lambda: wrappers.ExpertsBlock(variable(2, 3, 4)),
        (2, 3, 4),
        lambda w, e, i, o: w[e, i, o],
    ),
    "1D convolution": (
        lambda: convolution(2, 3, 4, channels=3),
        (1, 6, 4),
        lambda w, e, i, o: w[i // 3, i % 3, o],
    ),
    "3D convolution": (
        lambda: convolution(2, 1, 2, 3, 4, channels=3),
        (1, 12, 4),
        lambda w, e, i, o: w[i // 6, 0, i // 3 % 2, i % 3, o],
    ),
    "grouped convolution": (
        lambda: convolution(2, 2, 3, 8, channels=6, groups=2),
        (2, 12, 4),
        lambda w, e, i, o: w[i // 6, i // 3 % 2, i % 3, 4 * e + o],
    ),
    "transposed convolution": (
        lambda: transposed(2, 4, 3),
        (1, 6, 4),
        lambda w, e, i, o: w[i // 3, o, i % 3],
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_weight_as_matrices(name):
    make, size, entry = VIEWS[name]
    block = make()
    view = block.matrix_view()
    assert view.size == size
    weight = to_numpy(block.weight)
    found = to_numpy(view.split(ops.convert_to_tensor(weight)))
    for place in itertools.product(*map(range, size)):
        assert found[place] == entry(weight, *place)
    back = view.join(ops.convert_to_tensor(found), weight.shape)
    np.testing.assert_array_equal(to_numpy(back), weight)


@pytest.mark.parametrize("name", VIEWS)
def test_factors_as_rows_and_columns(name):
    """`H x S` of the matrices is the Fisher diagonal of the weight."""
    block = VIEWS[name][0]()
    view = block.matrix_view()
    rng = np.random.default_rng(0)
    h, s = (
        ops.convert_to_tensor(rng.uniform(size=shape), "float32")
        for shape in (block.activation_shape, block.gradient_shape)
    )
    fisher = ops.broadcast_to(block.fisher_of_weight(h, s), block.weight.shape)
    rows, columns = map(to_numpy, view.split_factors(h, s))
    np.testing.assert_allclose(
        rows[:, :, None] * columns[:, None, :],
        to_numpy(view.split(fisher)),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: wrappers.EmbeddingBlock(variable(5, 3), 5, 3),
        lambda: wrappers.ReverseEmbeddingBlock(variable(5, 3), 3, 5),
        lambda: wrappers.ScaleBlock(variable(3), None, (1,), (3,)),
        # Of each input its own output.
        lambda: einsum("ab,b->ab", 3),
        # Nothing but outputs: the inputs are summed over.
        lambda: einsum("ab,c->ac", 3),
        lambda: wrappers.GradientBlock(variable(3, 4), (3, 1), (4,)),
    ],
)
def test_weights_that_are_no_matrices(make):
    assert make().matrix_view() is None


@pytest.mark.parametrize(
    "inputs, outputs, positions, costs_little",
    [
        # For each entry 4 m + 30 m² / n operations, against half of 6 * 64 for
        # each position.
        (784, 256, 1, False),
        (48, 192, 32, True),
        (768, 3072, 1024, True),
        (128, 10, 1, True),
    ],
)
def test_what_orthogonalization_costs(inputs, outputs, positions, costs_little):
    view = MatrixView((inputs, outputs), (0,), (1,))
    assert orthogonal.costs_little(view, positions) is costs_little


@pytest.mark.parametrize(
    "layer, shape, positions",
    [
        (keras.layers.Dense(3), (None, 4), 1),
        (keras.layers.Dense(3), (None, 7, 4), 7),
        # A length that varies counts as 256, and sides of images as 64 each.
        (keras.layers.Dense(3), (None, None, 4), 256),
        (keras.layers.Conv2D(3, 2), (None, None, None, 4), 4096),
        (keras.layers.Conv2D(3, 2, strides=2), (None, 8, 6, 4), 12),
        (keras.layers.EinsumDense("abc,cde->abde", (9, 2, 3)), (None, 9, 4), 9),
        # The length isn't in what the layer is told of its outputs.
        (
            keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3)),
            (None, 9, 4),
            9,
        ),
        (
            keras.layers.EinsumDense("abcd,cde->abe", (None, 5)),
            (None, None, 2, 3),
            256,
        ),
        # A cell runs once for each step of a sequence.
        (keras.layers.LSTMCell(3), (None, 4), 64),
    ],
)
def test_how_often_a_layer_uses_its_kernel(layer, shape, positions):
    layer.build(shape)
    keras_adafisher.wrap(layer)
    block = wrappers.wrapper_of(layer).blocks[0]
    assert orthogonal.positions_of(block, layer) == positions


@pytest.mark.parametrize("length", [128, None])
def test_attention_keeps_no_roots_where_its_length_is_known_or_usual(length):
    """As little as the dense layers of a transformer do."""
    inputs = keras.Input((length, 384))
    attention = keras.layers.MultiHeadAttention(6, 64)
    model = keras.Model(inputs, attention(inputs, inputs))
    model.compile(keras_adafisher.AdaFisherMuon(), loss="mse")
    directions = {
        row.direction
        for row in keras_adafisher.coverage(model).rows
        if row.parameter.endswith("kernel")
    }
    assert directions == {"orthogonalized"}


def test_a_layer_with_several_outputs():
    class Two(keras.layers.Dense):
        def call(self, inputs):
            return super().call(inputs), inputs

        def compute_output_shape(self, shape):
            return super().compute_output_shape(shape), shape

    layer = Two(3)
    layer.build((None, 4))
    block = wrappers.DenseBlock(layer.kernel, None, 4, 3)
    assert orthogonal.positions_of(block, layer) == 1
