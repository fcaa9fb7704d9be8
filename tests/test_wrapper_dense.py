import keras
import layer_cases
import numpy as np
import pytest
import reference
from models import assert_same
from models import PLAIN
from models import product_loss
from models import to_numpy

import keras_adafisher

GAMMAS = {"gamma_1": 0.9, "gamma_2": 0.1, **PLAIN}


def train_once(model, x, r, **arguments):
    """One step with a loss for which `dL/dz` of a linear output is known."""
    optimizer = keras_adafisher.AdaFisher(damping=0.01, **GAMMAS, **arguments)
    model.compile(optimizer, loss=product_loss)
    model.train_on_batch(x, r)
    return optimizer


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_fisher_diagonal_of_a_linear_layer(shape, use_bias, epsilon, rng):
    layer = keras.layers.Dense(3, use_bias=use_bias)
    model = keras.Sequential([keras.Input(shape), layer])
    x = rng.normal(size=(5, *shape)).astype("float32")
    r = rng.normal(size=(5, *shape[:-1], 3)).astype("float32")
    optimizer = train_once(model, x, r, epsilon=epsilon)

    expected = reference.LinearFactors(4, 3, bias=use_bias)
    expected.update(
        reference.rows(x), reference.rows(r / r.size), 0.9, 0.1, epsilon
    )
    kernel, bias = expected.fisher(damping=0.01)
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.kernel)), kernel, rtol=1e-5
    )
    if use_bias:
        np.testing.assert_allclose(
            to_numpy(optimizer.preconditioner(layer.bias)), bias, rtol=1e-5
        )


def test_the_gradient_is_taken_before_the_activation(rng):
    layer = keras.layers.Dense(3, activation="sigmoid")
    model = keras.Sequential([keras.Input((4,)), layer])
    x = rng.normal(size=(5, 4)).astype("float32")
    r = rng.normal(size=(5, 3)).astype("float32")
    kernel, bias = layer.get_weights()
    optimizer = train_once(model, x, r)

    y = 1 / (1 + np.exp(-(x @ kernel + bias)))
    expected = reference.LinearFactors(4, 3, bias=True)
    expected.update(x, r / r.size * y * (1 - y), 0.9, 0.1)
    fisher, _ = expected.fisher(damping=0.01)
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.kernel)), fisher, rtol=1e-4
    )


def test_a_layer_that_is_called_twice_averages_its_calls(rng):
    layer = keras.layers.Dense(3)
    a, b = keras.Input((4,)), keras.Input((4,))
    model = keras.Model(
        [a, b], keras.layers.Concatenate()([layer(a), layer(b)])
    )
    x1, x2 = rng.normal(size=(2, 5, 4)).astype("float32")
    r = rng.normal(size=(5, 6)).astype("float32")
    optimizer = train_once(model, [x1, x2], r)

    s = r / r.size
    expected = reference.LinearFactors(4, 3, bias=True)
    expected.update(
        np.concatenate([x1, x2]),
        np.concatenate([s[:, :3], s[:, 3:]]),
        0.9,
        0.1,
    )
    fisher, _ = expected.fisher(damping=0.01)
    np.testing.assert_allclose(
        to_numpy(optimizer.preconditioner(layer.kernel)), fisher, rtol=1e-5
    )


@pytest.mark.parametrize(
    "activation", [None, "relu", "softmax", keras.layers.LeakyReLU()]
)
def test_outputs_are_those_of_the_plain_layer(activation, rng):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, activation=activation)]
    )
    x = rng.normal(size=(5, 4)).astype("float32")
    plain = model.predict(x, verbose=0)
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    layer_cases.let_wrappers_run(model)
    assert_same([model.predict(x, verbose=0)], [plain])


def test_the_wrapped_layer_has_its_own_weights_only(rng):
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    keras_adafisher.wrap(layer)
    kernel = rng.normal(size=(4, 3)).astype("float32")
    bias = rng.normal(size=3).astype("float32")
    layer.set_weights([kernel, bias])
    assert_same(layer.get_weights(), [kernel, bias])
    assert layer.count_params() == 15


def test_lora_leaves_only_the_bias_with_factors(rng):
    layer = keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), layer])
    layer.enable_lora(2)
    x = rng.normal(size=(5, 4)).astype("float32")
    r = rng.normal(size=(5, 3)).astype("float32")
    # `layer.kernel` is a sum with it.
    (kernel,) = layer.non_trainable_variables
    frozen = to_numpy(kernel)
    optimizer = train_once(model, x, r)
    updates = {
        row.parameter.split("/")[-1]: bool(row.factors)
        for row in keras_adafisher.coverage(model).rows
    }
    assert updates == {
        "bias": True,
        "lora_kernel_a": False,
        "lora_kernel_b": False,
    }
    optimizer.preconditioner(layer.bias)
    assert_same([to_numpy(kernel)], [frozen])
    assert np.any(to_numpy(layer.lora_kernel_b))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_statistics_are_float32_under_mixed_precision(policy, rng):
    layer = keras.layers.Dense(3, dtype=policy)
    model = keras.Sequential([keras.Input((4,)), layer])
    # The squares don't fit into float16.
    x = 300 * rng.normal(size=(5, 4)).astype("float32")
    r = rng.normal(size=(5, 3)).astype("float32")
    optimizer = train_once(model, x, r)
    expected = reference.LinearFactors(4, 3, bias=True)
    expected.update(x, r / r.size, 0.9, 0.1)
    fisher, _ = expected.fisher(damping=0.01)
    actual = to_numpy(optimizer.preconditioner(layer.kernel))
    np.testing.assert_allclose(actual, fisher, rtol=2e-2)
