"""What Keras promises of its optimizers, of Adam and of AdaFisher alike."""

import pickle

import keras
import numpy as np
import pytest
from keras import ops
from models import assert_same
from models import cross_entropy
from models import data
from models import mlp
from models import PLAIN
from models import state
from models import to_numpy
from models import train
from models import trained
from models import weights

import keras_adafisher

BACKEND = keras.backend.backend()

# Some tests update variables that belong to no layer.
pytestmark = pytest.mark.filterwarnings(
    "ignore:AdaFisher found Kronecker factors for none"
)


@pytest.fixture(params=["Adam", "AdaFisher"])
def make(request):
    """The class of an optimizer."""
    if request.param == "Adam":
        return keras.optimizers.Adam
    return keras_adafisher.AdaFisher


def bare_variable():
    return keras.Variable([[1.0, 2.0], [3.0, 4.0]])


def test_variables_of_no_layer_are_trained(make):
    v = bare_variable()
    optimizer = make(learning_rate=0.5)
    for steps in range(1, 4):
        optimizer.apply_gradients([(ops.ones((2, 2)), v)])
        assert optimizer.iterations == steps
        # Adam's rule: with a constant gradient, the learning rate per step.
        expected = np.array([[1, 2], [3, 4]]) - 0.5 * steps
        np.testing.assert_allclose(to_numpy(v), expected, atol=1e-4)


def test_gradients_that_are_missing(make):
    v, other = bare_variable(), bare_variable()
    with pytest.raises(ValueError, match="No gradients provided for any"):
        make().apply_gradients([(None, v)])
    optimizer = make()
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply_gradients([(None, v), (ops.ones((2, 2)), other)])
    np.testing.assert_array_equal(to_numpy(v), [[1, 2], [3, 4]])
    assert np.all(to_numpy(other) < [[1, 2], [3, 4]])


def test_a_layer_that_the_loss_does_not_reach_stays(make):
    """Its gradients are `None` on TensorFlow and PyTorch, zeros on JAX."""
    inputs = keras.Input((6,))
    used = keras.layers.Dense(3)
    unused = keras.layers.Dense(3)
    model = keras.Model(inputs, [used(inputs), unused(inputs)])
    model.compile(make(), loss=[cross_entropy(), None])
    before = weights(model)
    x, y = data(examples=8)
    model.train_on_batch(x, [y, y])
    np.testing.assert_array_equal(weights(model)[2], before[2])
    assert not np.array_equal(weights(model)[0], before[0])


def test_a_callable_learning_rate(make):
    v = bare_variable()
    optimizer = make(learning_rate=lambda: 0.25)
    optimizer.apply_gradients([(ops.ones((2, 2)), v)])
    np.testing.assert_allclose(
        to_numpy(v), np.array([[0.75, 1.75], [2.75, 3.75]]), atol=1e-5
    )


def test_a_schedule_takes_the_place_of_the_learning_rates_variable(make):
    optimizer = make(learning_rate=1e-3)
    count = len(optimizer.variables)
    optimizer.learning_rate = keras.optimizers.schedules.PolynomialDecay(0.1, 4)
    assert len(optimizer.variables) == count - 1


def test_names_are_numbered(make):
    first, second = make(), make()
    base = {"Adam": "adam", "AdaFisher": "adafisher"}[make.__name__]
    assert first.name.startswith(base) and second.name.startswith(base)
    assert first.name != second.name
    assert make(name="mine").name == "mine"
    config = keras.optimizers.serialize(second)
    assert keras.optimizers.deserialize(config).name == second.name


def test_an_optimizer_is_pickled(make):
    optimizer = make(learning_rate=0.25, clipnorm=1.0)
    copy = pickle.loads(pickle.dumps(optimizer))
    assert copy.get_config() == optimizer.get_config()


def test_weights_of_an_optimizer_pass_to_another(make):
    model = trained(make())
    other = make()
    values = [to_numpy(v) for v in model.optimizer.variables]
    with pytest.raises(ValueError, match="You are calling `set_weights"):
        other.set_weights(values)
    other.build(model.trainable_variables)
    other.set_weights(values)
    assert_same([to_numpy(v) for v in other.variables], values)


@pytest.mark.parametrize("steps", [None, 2])
def test_a_variable_that_is_overwritten_by_its_gradient(make, steps):
    """As the scales of float8 layers are."""
    scale, v = bare_variable(), bare_variable()
    scale.overwrite_with_gradient = True
    optimizer = make(learning_rate=0.5, gradient_accumulation_steps=steps)
    for value in (1.0, 2.0)[: steps or 1]:
        gradient = ops.full((2, 2), value)
        optimizer.apply_gradients([(gradient, scale), (gradient, v)])
    # The largest of those that are accumulated.
    np.testing.assert_allclose(to_numpy(scale), np.full((2, 2), steps or 1.0))
    np.testing.assert_allclose(to_numpy(v), [[0.5, 1.5], [2.5, 3.5]], atol=1e-5)


def float8_mlp():
    model = mlp()
    model.quantize("float8", filters=lambda each: each.count_params() > 0)
    return model


def test_float8(make):
    x, _ = data(examples=32)
    y = x[:, :3]
    model = float8_mlp()
    model.compile(make(learning_rate=1e-3), loss="mse")
    losses = model.fit(x, y, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    # Keras' own: dynamic scales have left their initial 1.
    scales = [v for v in model.variables if v.name == "kernel_scale"]
    assert len(scales) == 2 and all(to_numpy(v) != 1 for v in scales)


def test_kernels_in_float8_have_factors():
    model = float8_mlp()
    optimizer = keras_adafisher.AdaFisher(
        gamma_1=0.9, gamma_2=0.9, damping=1e-3, **PLAIN
    )
    model.compile(optimizer, loss=cross_entropy())
    train(model, [0])
    for layer in model.layers:
        fisher = to_numpy(optimizer.preconditioner(layer.kernel))
        assert len(np.unique(fisher)) > 2
    assert {row.parameter for row in keras_adafisher.coverage(model).rows} >= {
        layer.kernel.path for layer in model.layers
    }
    # Scales and their histories aren't what an optimizer steps along.
    assert keras_adafisher.coverage(model).factored_fraction == 1.0


def test_state_trees_pass_between_wrapped_and_plain_models(make):
    model = trained(make())
    tree = model.get_state_tree(value_format="numpy_array")
    assert "adafisher" not in str(tree["trainable_variables"])
    target = mlp()
    target.build((None, 6))
    for old, new in zip(target.layers, model.layers, strict=True):
        old.name = new.name
    before = state(model)
    train(model, [3, 4])
    assert not np.array_equal(weights(model)[0], before[0])
    model.set_state_tree(tree)
    assert_same(state(model), before)


@pytest.mark.parametrize("back_to", [1, 2])
def test_a_state_tree_rolls_training_back(make, back_to):
    """Also if the step that follows measures and the last one doesn't."""
    extra = {}
    if make is keras_adafisher.AdaFisher:
        extra = {"factor_update_steps": 2}
    model = trained(make(**extra), steps=back_to)
    tree = model.get_state_tree(value_format="numpy_array")
    train(model, [5, 6])
    expected = state(model)
    train(model, [7] if back_to == 1 else [7, 8, 9])
    model.set_state_tree(tree)
    train(model, [5, 6])
    assert_same(state(model), expected)


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="JAX and PyTorch have no `tf.train`"
)
@pytest.mark.parametrize("steps", [2, 3])
def test_tf_train_checkpoint_rolls_training_back(make, steps, tmp_path):
    import tensorflow as tf

    extra = {}
    if make is keras_adafisher.AdaFisher:
        extra = {"factor_update_steps": 2}
    model = trained(make(**extra), steps=steps)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    path = checkpoint.save(tmp_path / "checkpoint")
    train(model, [5, 6, 7])
    expected = state(model)
    checkpoint.restore(path)
    train(model, [5, 6, 7])
    assert_same(state(model), expected)


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="JAX and PyTorch have no `tf.Variable`"
)
def test_tf_variables_are_trained_next_to_those_of_keras(make):
    import tensorflow as tf

    v, tf_v = bare_variable(), tf.Variable([[1.0, 2.0], [3.0, 4.0]])
    optimizer = make(learning_rate=1.0)
    ones = tf.ones((2, 2))
    optimizer.apply_gradients([(ones, v), (ones, tf_v)])
    np.testing.assert_allclose(tf_v, [[0, 1], [2, 3]], atol=1e-5)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply_gradients([(ones, v), (None, tf_v)])
    assert optimizer.iterations == 2


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="JAX and PyTorch have no `tf.IndexedSlices`"
)
def test_sparse_gradients_are_dense_ones_with_zeros(make):
    import tensorflow as tf

    results = []
    for sparse in (False, True):
        v = bare_variable()
        optimizer = make(learning_rate=0.5)
        for _ in range(3):
            gradient = tf.IndexedSlices([[1.0, 2.0]], [1], dense_shape=(2, 2))
            if not sparse:
                gradient = tf.convert_to_tensor(gradient)
            optimizer.apply_gradients([(gradient, v)])
        results.append(to_numpy(v))
    np.testing.assert_allclose(*results, atol=1e-6)


def test_models_are_made_again_from_their_compile_config(make):
    model = trained(make(learning_rate=0.25))
    copy = keras.models.model_from_json(model.to_json())
    copy.compile_from_config(model.get_compile_config())
    assert isinstance(copy.optimizer, make)
    assert copy.optimizer.get_config() == model.optimizer.get_config()
    train(copy, [0])
    if make is keras_adafisher.AdaFisher:
        assert all(row.factors for row in keras_adafisher.coverage(copy).rows)
