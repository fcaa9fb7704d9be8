"""Embedding and ReversibleEmbedding, against dense maps of one-hot rows."""

import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from layer_cases import DAMPING
from layer_cases import running
from models import own_variable
from models import pairs_of
from models import product_loss
from models import running_factors
from models import to_numpy
from reference import min_max

import keras_adafisher
from keras_adafisher.wrappers import EmbeddingBlock

IDS = np.array([[0, 1, 1, 4], [1, 4, 6, 1]], "int32")
WORDS, SIZE = 7, 3


def one_hot(ids, words=WORDS):
    return np.eye(words)[np.asarray(ids).astype(int).ravel()]


def make_embedding(**kwargs):
    return keras.layers.Embedding(WORDS, SIZE, **kwargs)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "float32"])
def test_fisher_diagonal_is_that_of_one_hot_rows(dtype, rng):
    x = IDS.astype(dtype)
    layer = make_embedding()
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    weight, _ = layer_cases.linear_fisher(one_hot(x), s.reshape(-1, SIZE))
    layer_cases.assert_fisher(model, layer.embeddings, weight)


def test_the_most_frequent_id_gets_1_and_an_absent_one_0(rng):
    layer = make_embedding()
    model = layer_cases.model_of(layer, IDS)
    layer_cases.train_once(model, IDS, rng)
    factors = model.optimizer.factors(layer.embeddings)
    # Of 8 ids, four are 1, two are 4, one is 0 and one is 6.
    expected = running(np.array([1, 4, 0, 0, 2, 0, 1]) / 4)
    np.testing.assert_allclose(
        to_numpy(factors.activation)[:, 0], expected, rtol=1e-6
    )


def test_only_rows_that_occur_move(rng):
    layer = make_embedding()
    model = layer_cases.model_of(layer, IDS)
    before = layer.get_weights()[0]
    s = layer_cases.train_once(model, IDS, rng)
    gradient = one_hot(IDS).T @ s.reshape(-1, SIZE)
    fisher = layer_cases.fisher_of(model, layer.embeddings)
    # The first step: the bias-corrected momentum is the gradient.
    np.testing.assert_allclose(
        layer.get_weights()[0], before - 1e-3 * gradient / fisher, rtol=1e-5
    )


@pytest.mark.parametrize(
    "ids", [[-1, 2, 2, 0], [7, 2, 2, 0], [-8, 2, 2, 0], [100, 2, 2, 0]]
)
def test_ids_out_of_range_count_as_rows_of_no_id(ids):
    block = EmbeddingBlock(None, WORDS, SIZE)
    measured = to_numpy(block.activation_statistic(np.array(ids)))
    expected = np.zeros(WORDS)
    expected[0], expected[2] = 1 / 4, 2 / 4
    if ids[0] == -1:
        # As in Python, and in `keras.ops.take`.
        expected[6] = 1 / 4
    np.testing.assert_array_equal(measured[:, 0], expected)


def test_negative_ids_count_from_the_end(rng):
    x = np.array([[-1, 2], [2, -7]], "int32")
    layer = make_embedding()
    model = layer_cases.model_of(layer, x)
    s = layer_cases.train_once(model, x, rng)
    weight, _ = layer_cases.linear_fisher(
        one_hot(x % WORDS), s.reshape(-1, SIZE)
    )
    layer_cases.assert_fisher(model, layer.embeddings, weight)


def test_masked_ids_count_and_the_mask_arrives(rng):
    layer = make_embedding(mask_zero=True)
    inputs = keras.Input((4,), dtype="int32")
    pooled = keras.layers.GlobalAveragePooling1D()(layer(inputs))
    model = keras.Model(inputs, pooled)
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    s = layer_cases.train_once(model, IDS, rng)
    # The average leaves the one masked position out.
    mask = IDS != 0
    s = s[:, None, :] * (mask / mask.sum(axis=1, keepdims=True))[..., None]
    weight, _ = layer_cases.linear_fisher(one_hot(IDS), s.reshape(-1, SIZE))
    layer_cases.assert_fisher(model, layer.embeddings, weight)


def test_two_calls_are_averaged(rng):
    layer = make_embedding()
    inputs = keras.Input((2,), dtype="int32")
    outputs = ops.concatenate([layer(inputs), layer(inputs + 1)], axis=1)
    model = keras.Model(inputs, outputs)
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    x = np.array([[0, 2], [2, 5], [2, 2]], "int32")
    s = layer_cases.train_once(model, x, rng)
    rows = np.concatenate([one_hot(x), one_hot(x + 1)])
    weight, _ = layer_cases.linear_fisher(rows, s.reshape(-1, SIZE))
    layer_cases.assert_fisher(model, layer.embeddings, weight)


def test_wrapping_changes_neither_outputs_nor_gradients():
    layer_cases.assert_wrapping_changes_nothing(make_embedding, IDS)


def test_statistics_are_float32_in_half_precision():
    layer_cases.assert_trains_in_half_precision(make_embedding, IDS)


def test_with_lora_no_factors_are_left(rng):
    layer = make_embedding(lora_rank=2)
    dense = keras.layers.Dense(2)
    inputs = keras.Input((4,), dtype="int32")
    model = keras.Model(inputs, dense(layer(inputs)))
    model.compile(optimizer=layer_cases.make_optimizer(), loss=product_loss)
    layer_cases.train_once(model, IDS, rng)
    rows = keras_adafisher.coverage(model).rows
    assert {row.parameter.split("/")[-1] for row in rows if row.factors} == {
        "kernel",
        "bias",
    }


# ReversibleEmbedding


def reversible_model(layer, hidden_scale=1.0):
    """Embeds ids and then maps the embeddings back to logits."""
    inputs = keras.Input((4,), dtype="int32")
    hidden = layer(inputs)
    logits = layer(hidden_scale * hidden, reverse=True)
    model = keras.Model(inputs, logits)
    model.compile(
        optimizer=layer_cases.make_optimizer(),
        loss=product_loss,
        jit_compile=layer_cases.JIT_COMPILE,
    )
    return model


def reversible_rows(layer, s):
    """`h` and `s` of both directions, as rows."""
    embeddings, *reverse = (np.asarray(w) for w in layer.get_weights())
    kernel = reverse[0] if reverse else embeddings.T
    h_rows = one_hot(IDS)
    hidden = h_rows @ embeddings
    s_logits = s.reshape(-1, WORDS)
    return h_rows, s_logits @ kernel.T, hidden, s_logits


def test_a_tied_embedding_has_the_sum_of_two_products(rng):
    layer = keras.layers.ReversibleEmbedding(WORDS, SIZE)
    model = reversible_model(layer)
    initial = layer.get_weights()
    s = layer_cases.train_once(model, IDS, rng)
    layer.set_weights(initial)
    h, s_hidden, hidden, s_logits = reversible_rows(layer, s)
    forward, _ = layer_cases.linear_fisher(h, s_hidden)
    backward, _ = layer_cases.linear_fisher(hidden, s_logits)
    layer_cases.assert_fisher(
        model, layer.embeddings, forward + backward.T - DAMPING
    )
    (row,) = keras_adafisher.coverage(model).rows
    assert row.factors == "H (7, 1) x S (3,) + H (1, 3) x S (7, 1)"


@pytest.mark.parametrize("reverse", [False, True])
def test_a_tied_embedding_may_be_used_in_one_direction_only(reverse, rng):
    layer = keras.layers.ReversibleEmbedding(WORDS, SIZE)
    x = rng.normal(size=(4, SIZE)).astype("float32") if reverse else IDS
    model = layer_cases.model_of(layer, x, reverse=reverse)
    s = layer_cases.train_once(model, x, rng)
    if reverse:
        used = layer_cases.linear_fisher(x, s)[0].T
    else:
        used, _ = layer_cases.linear_fisher(one_hot(x), s.reshape(-1, SIZE))
    # The factors of the other direction have measured zeros.
    layer_cases.assert_fisher(model, layer.embeddings, used + running(0.0) ** 2)


def test_an_untied_embedding_has_a_kernel_for_the_way_back(rng):
    layer = keras.layers.ReversibleEmbedding(WORDS, SIZE, tie_weights=False)
    model = reversible_model(layer)
    initial = layer.get_weights()
    s = layer_cases.train_once(model, IDS, rng)
    layer.set_weights(initial)
    h, s_hidden, hidden, s_logits = reversible_rows(layer, s)
    forward, _ = layer_cases.linear_fisher(h, s_hidden)
    backward, _ = layer_cases.linear_fisher(hidden, s_logits)
    layer_cases.assert_fisher(model, layer.embeddings, forward)
    layer_cases.assert_fisher(model, layer.reverse_embeddings, backward)


def test_lora_leaves_factors_to_an_untied_way_back(rng):
    layer = keras.layers.ReversibleEmbedding(WORDS, SIZE, tie_weights=False)
    layer.build()
    layer.enable_lora(2)
    model = reversible_model(layer)
    hidden = to_numpy(layer(IDS)).reshape(-1, SIZE)
    s = layer_cases.train_once(model, IDS, rng)
    backward, _ = layer_cases.linear_fisher(hidden, s.reshape(-1, WORDS))
    layer_cases.assert_fisher(model, layer.reverse_embeddings, backward)


def test_logits_are_measured_before_their_soft_cap(rng):
    layer = keras.layers.ReversibleEmbedding(
        WORDS, SIZE, logit_soft_cap=0.05, tie_weights=False
    )
    model = reversible_model(layer)
    hidden = to_numpy(layer(IDS)).reshape(-1, SIZE)
    capped = to_numpy(model(IDS)).astype("float64")
    s = layer_cases.train_once(model, IDS, rng) * (1 - (capped / 0.05) ** 2)
    backward, _ = layer_cases.linear_fisher(hidden, s.reshape(-1, WORDS))
    layer_cases.assert_fisher(
        model, layer.reverse_embeddings, backward, rtol=1e-4
    )


# One direction only, so the weight of the other has no gradient.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("logit_soft_cap", [None, 0.1])
def test_wrapping_a_reversible_embedding_changes_nothing(
    tie_weights, logit_soft_cap, rng
):
    def make_layer():
        return keras.layers.ReversibleEmbedding(
            WORDS,
            SIZE,
            tie_weights=tie_weights,
            logit_soft_cap=logit_soft_cap,
        )

    layer_cases.assert_wrapping_changes_nothing(make_layer, IDS)
    hidden = rng.normal(size=(2, 4, SIZE)).astype("float32")
    layer_cases.assert_wrapping_changes_nothing(
        make_layer, hidden, reverse=True
    )


def test_a_reversible_embedding_hands_its_mask_on():
    layer = keras.layers.ReversibleEmbedding(WORDS, SIZE, mask_zero=True)
    pool = keras.layers.GlobalAveragePooling1D()
    expected = to_numpy(pool(layer(IDS)))
    keras_adafisher.wrap(layer)
    np.testing.assert_array_equal(to_numpy(pool(layer(IDS))), expected)
    embedded = to_numpy(layer(IDS))
    np.testing.assert_allclose(
        expected[0], embedded[0, 1:].mean(axis=0), rtol=1e-5
    )


def test_a_reversible_embedding_in_half_precision():
    layer = keras.layers.ReversibleEmbedding(
        WORDS, SIZE, reverse_dtype="float32", dtype="mixed_float16"
    )
    model = reversible_model(layer)
    model.train_on_batch(IDS, np.ones((2, 4, WORDS), "float32"))
    assert own_variable(model.optimizer, "factors").dtype == "float32"
    # Of the way there and of the way back.
    assert len(pairs_of(model.optimizer, layer.embeddings)) == 2
    for values in running_factors(model.optimizer, [layer.embeddings]):
        assert np.all(values <= running(1.0) + 1e-6)
        assert min_max(values).max() <= 1.0
