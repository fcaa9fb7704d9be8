"""EinsumDense: factors by label, against explicit loops over the labels."""

import itertools

import keras
import layer_cases
import numpy as np
import pytest
from layer_cases import DAMPING
from layer_cases import running
from models import to_numpy
from reference import min_max

import keras_adafisher
from keras_adafisher.wrappers import wrapper_of

# Equation, input shape with batch, output shape, bias axes.
CASES = {
    "dense": ("ab,bc->ac", (5, 3), (4,), "c"),
    "no_bias": ("abc,cd->abd", (2, 3, 4), (3, 5), None),
    "left_ellipsis": ("...x,xy->...y", (2, 3, 4), (5,), "y"),
    "left_ellipsis_without_axes": ("...ax,xy->...ay", (2, 3), (5,), None),
    "right_ellipsis": ("abc...,cd->abd...", (2, 3, 4, 2), (3, 5), "d"),
    "query": ("abc,cde->abde", (2, 3, 4), (3, 2, 5), "de"),
    "output": ("abcd,cde->abe", (2, 3, 2, 4), (3, 5), "e"),
    "kernel_order": ("btd,ndh->btnh", (2, 3, 4), (3, 2, 5), "nh"),
    "kernel_order_of_outputs": ("abc,cde->abed", (2, 3, 4), (3, 5, 2), "de"),
    "expert_axis": ("bec,ecd->bed", (4, 3, 2), (3, 5), "ed"),
    "summed_label": ("abc,cd->ad", (3, 4, 2), (5,), "d"),
    "summed_label_ellipsis": ("...bc,cd->...d", (3, 4, 2), (5,), "d"),
    "only_outputs": ("ab,c->abc", (3, 4), (4, 2), None),
    "only_inputs": ("abc,c->ab", (3, 4, 2), (4,), None),
    "diagonal": ("ab,b->ab", (3, 4), (4,), "b"),
    "bias_of_positions": ("abc,cd->abd", (2, 3, 4), (3, 5), "b"),
    "bias_of_positions_too": ("abc,cd->abd", (2, 3, 4), (3, 5), "bd"),
    "bias_subset": ("abc,cde->abde", (2, 3, 4), (3, 2, 5), "d"),
    "bias_other_subset": ("abc,cde->abde", (2, 3, 4), (3, 2, 5), "e"),
    "bias_order": ("abc,cde->abde", (2, 3, 4), (3, 2, 5), "ed"),
}


def expand(equation, rank):
    """The three label strings, with digits for the axes of an ellipsis."""
    inputs, rest = equation.split(",")
    kernel, outputs = rest.split("->")
    digits = "0123456789"[: rank - len(inputs.replace("...", ""))]
    return (
        inputs.replace("...", digits),
        kernel,
        outputs.replace("...", digits),
    )


def brute_force(equation, h, s, kernel_shape, bias_axes):
    """Fisher diagonals, entry by entry.

    `H` of a kernel entry: the mean, over all other labels of the output, of
    the squared factor that multiplies this entry. `S`: the mean of `s²` over
    all output entries that have its labels.
    """
    inputs, kernel, outputs = expand(equation, h.ndim)
    sizes = dict(zip(inputs, h.shape, strict=True))
    sizes.update(zip(outputs, s.shape, strict=True))
    row_labels = [la for la in outputs if la not in kernel]
    only_h = [la for la in inputs if la not in kernel + outputs]

    def grid(labels):
        for index in itertools.product(*(range(sizes[la]) for la in labels)):
            yield dict(zip(labels, index, strict=True))

    h_values, s_values = np.zeros(kernel_shape), np.zeros(kernel_shape)
    for entry in grid(kernel):
        h_squares, s_squares = [], []
        for row in grid(row_labels):
            total = 0.0
            for summed in grid(only_h):
                at = {**entry, **row, **summed}
                total += h[tuple(at[la] for la in inputs)]
            h_squares.append(total**2)
            at = {**entry, **row}
            s_squares.append(s[tuple(at[la] for la in outputs)] ** 2)
        index = tuple(entry[la] for la in kernel)
        h_values[index] = np.mean(h_squares)
        s_values[index] = np.mean(s_squares)

    # `H` and `S` are constant along the labels that they lack, so the
    # extremes over all entries are those of the vectors.
    if bias_axes is None:
        return running(min_max(h_values)) * running(min_max(s_values)), None
    low, high = min(h_values.min(), 1.0), max(h_values.max(), 1.0)
    weight = running((h_values - low) / (high - low))
    weight = weight * running(min_max(s_values))
    one = running((1.0 - low) / (high - low))
    axes = tuple(i for i, la in enumerate(outputs) if la not in bias_axes)
    bias_s = np.mean(np.square(s), axis=axes, keepdims=True)
    return weight, one * running(min_max(bias_s))


def make_layer(case, **kwargs):
    equation, _, output_shape, bias_axes = CASES[case]
    return keras.layers.EinsumDense(
        equation, output_shape=output_shape, bias_axes=bias_axes, **kwargs
    )


@pytest.mark.parametrize("case", CASES)
def test_fisher_diagonal_follows_the_labels(case, rng):
    equation, input_shape, _, bias_axes = CASES[case]
    x = rng.normal(size=input_shape).astype("float32")
    layer = make_layer(case)
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    weight, bias = brute_force(
        equation, x.astype("float64"), s, tuple(layer.kernel.shape), bias_axes
    )
    layer_cases.assert_fisher(model, layer.kernel, weight + DAMPING)
    if bias is not None:
        bias = bias.reshape(layer.bias.shape)
        layer_cases.assert_fisher(model, layer.bias, bias + DAMPING)


def wrapped_block(case):
    layer = make_layer(case)
    layer(np.zeros(CASES[case][1], "float32"))
    keras_adafisher.wrap(layer)
    (block,) = wrapper_of(layer).blocks
    return layer, block


def test_factors_have_the_axes_of_the_kernel():
    shapes = {}
    for case in CASES:
        layer, block = wrapped_block(case)
        shapes[case] = (block.activation_shape, block.gradient_shape)
        for shape in shapes[case]:
            assert len(shape) == len(layer.kernel.shape)
    assert shapes["query"] == ((4, 1, 1), (1, 2, 5))
    assert shapes["kernel_order"] == ((1, 4, 1), (2, 1, 5))
    assert shapes["expert_axis"] == ((3, 2, 1), (3, 1, 5))


def test_only_a_bias_with_other_labels_has_a_gradient_factor_of_its_own():
    blocks = {case: wrapped_block(case)[1] for case in CASES}
    assert {
        case
        for case, block in blocks.items()
        if block.bias_gradient_shape is not None
    } == {
        "bias_of_positions",
        "bias_of_positions_too",
        "bias_subset",
        "bias_other_subset",
    }


@pytest.mark.parametrize("case", ["query", "summed_label", "bias_of_positions"])
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_wrapping_changes_neither_outputs_nor_gradients(case, activation, rng):
    x = rng.normal(size=CASES[case][1]).astype("float32")
    layer_cases.assert_wrapping_changes_nothing(
        lambda: make_layer(case, activation=activation), x
    )


def test_gradients_are_those_before_the_activation(rng):
    x = rng.normal(size=(4, 3)).astype("float32")
    layer = keras.layers.EinsumDense(
        "ab,bc->ac", output_shape=2, bias_axes="c", activation="tanh"
    )
    model = layer_cases.model_of(layer, x)
    y = to_numpy(model(x)).astype("float64")
    s = layer_cases.train_once(model, x, rng) * (1 - y**2)
    weight, bias = layer_cases.linear_fisher(x, s, bias=True)
    layer_cases.assert_fisher(model, layer.kernel, weight)
    layer_cases.assert_fisher(model, layer.bias, bias)


@pytest.mark.parametrize("case", ["query", "summed_label", "bias_subset"])
def test_statistics_are_float32_in_half_precision(case, rng):
    x = rng.normal(size=CASES[case][1]).astype("float32")
    layer_cases.assert_trains_in_half_precision(
        lambda **kwargs: make_layer(case, **kwargs), x
    )


def test_two_calls_are_averaged(rng):
    x = rng.normal(size=(4, 3, 2)).astype("float32")
    layer = make_layer("summed_label")
    inputs = keras.Input((3, 2))
    outputs = keras.layers.Concatenate()([layer(inputs), layer(2.0 * inputs)])
    model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=layer_cases.make_optimizer(), loss=layer_cases.product_loss
    )
    s = layer_cases.train_once(model, x, rng)
    rows = x.sum(axis=1)
    weight, bias = layer_cases.linear_fisher(
        np.concatenate([rows, 2.0 * rows]),
        np.concatenate([s[:, :5], s[:, 5:]]),
        bias=True,
    )
    layer_cases.assert_fisher(model, layer.kernel, weight)
    layer_cases.assert_fisher(model, layer.bias, bias)


def test_lora_leaves_factors_to_the_bias(rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    layer = make_layer("query", lora_rank=2)
    model = layer_cases.model_of(layer, x)
    layer_cases.train_once(model, x, rng)
    layer_cases.fisher_of(model, layer.bias)
    factored = {
        row.parameter: bool(row.factors)
        for row in keras_adafisher.coverage(model).rows
    }
    names = {path.split("/")[-1]: value for path, value in factored.items()}
    assert names == {
        "bias": True,
        "lora_kernel_a": False,
        "lora_kernel_b": False,
    }


@pytest.mark.parametrize(
    "make_attention",
    [
        lambda: keras.layers.MultiHeadAttention(num_heads=2, key_dim=3),
        lambda: keras.layers.GroupQueryAttention(
            head_dim=3, num_query_heads=4, num_key_value_heads=2
        ),
    ],
    ids=["MultiHeadAttention", "GroupQueryAttention"],
)
def test_attention_is_factored_as_a_whole(make_attention, rng):
    x = rng.normal(size=(2, 4, 5)).astype("float32")
    attention = make_attention()
    inputs = keras.Input((4, 5))
    model = keras.Model(inputs, attention(inputs, inputs))
    expected = to_numpy(model(x))
    model.compile(
        optimizer=layer_cases.make_optimizer(), loss=layer_cases.product_loss
    )
    assert keras_adafisher.coverage(model).factored_fraction == 1.0
    np.testing.assert_array_equal(to_numpy(model(x)), expected)

    before = attention.get_weights()
    layer_cases.train_once(model, x, rng)
    for variable, old in zip(attention.weights, before, strict=True):
        fisher = layer_cases.fisher_of(model, variable)
        # Not the 1 that every factor starts with.
        assert fisher.max() < 0.5
        if "key/bias" not in variable.path:
            # Softmax doesn't see a constant in the keys.
            assert not np.array_equal(to_numpy(variable), old)


def test_attention_measures_each_projection(rng):
    """The value projection and the output projection, by hand."""
    x = rng.normal(size=(2, 4, 5)).astype("float32")
    attention = keras.layers.MultiHeadAttention(num_heads=2, key_dim=3)
    inputs = keras.Input((4, 5))
    model = keras.Model(inputs, attention(inputs, inputs))
    model.compile(
        optimizer=layer_cases.make_optimizer(),
        loss=layer_cases.product_loss,
        jit_compile=layer_cases.JIT_COMPILE,
    )
    query, query_bias, key, key_bias, value, value_bias, output, _ = (
        np.asarray(w, "float64") for w in attention.get_weights()
    )
    s = layer_cases.train_once(model, x, rng)

    def project(kernel, bias):
        return np.einsum("abc,cde->abde", x, kernel) + bias

    scores = np.einsum(
        "aqhd,akhd->ahqk", project(query, query_bias), project(key, key_bias)
    ) / np.sqrt(3)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    values = np.einsum("ahqk,akhd->aqhd", weights, project(value, value_bias))
    weight, bias = layer_cases.linear_fisher(
        values.reshape(8, 2, 3), s.reshape(8, 5), bias=True
    )
    layer_cases.assert_fisher(model, attention.output_dense.kernel, weight)
    layer_cases.assert_fisher(model, attention.output_dense.bias, bias)

    s_values = np.einsum("aqo,hdo->aqhd", s, output)
    s_values = np.einsum("ahqk,aqhd->akhd", weights, s_values)
    weight, bias = layer_cases.linear_fisher(
        x.reshape(8, 5), s_values.reshape(8, 2, 3), bias=True
    )
    layer_cases.assert_fisher(model, attention.value_dense.kernel, weight)
    layer_cases.assert_fisher(model, attention.value_dense.bias, bias)
