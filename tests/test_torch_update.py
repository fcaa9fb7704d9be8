"""The multi-tensor update of PyTorch against `update_step`, the rule."""

import contextlib

import keras
import numpy as np
import pytest
import torch
from keras import ops
from models import assert_close
from models import product_loss
from models import weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import keras_adafisher
from keras_adafisher.optimizer import torch_diagonals
from keras_adafisher.optimizer import torch_update


class OneByOne(keras_adafisher.AdaFisher):
    """Takes Keras' way through `update_step`, since it has one of its own."""

    calls = 0

    def update_step(self, gradient, variable, learning_rate):
        self.calls += 1
        super().update_step(gradient, variable, learning_rate)


class Scale(keras.layers.Layer):
    """Has a weight without factors."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), name="scale")

    def call(self, x):
        return x * (1 + ops.cast(self.scale, x.dtype))


def mixed_model(low):
    """Layers of several kinds and dtypes; `low`: also 16 bits."""
    ids = keras.Input((16,), dtype="int32")
    x = keras.layers.Embedding(7, 4)(ids)
    x = keras.layers.Reshape((4, 4, 4))(x)
    # Without a bias: batch normalization takes away what it adds, and its
    # gradient would be nothing but rounding errors.
    x = keras.layers.Conv2D(6, 2, groups=2, use_bias=False)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(5, activation="tanh")(x)
    x = keras.layers.Dense(5, use_bias=False, trainable=False)(x)
    x = Scale()(x)
    x = keras.layers.Dense(4, dtype="float64")(x)
    if low:
        x = keras.layers.Dense(4, dtype="bfloat16")(x)
        x = keras.layers.Dense(3, dtype="float16")(x)
    x = keras.layers.Dense(3)(x)
    return keras.Model(ids, x)


def train(optimizer, low=False, steps=5):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    model = mixed_model(low)
    model.compile(optimizer, loss=product_loss)
    for _ in range(steps):
        ids = rng.integers(0, 7, size=(8, 16))
        y = rng.normal(size=(8, 3)).astype("float32")
        model.train_on_batch(ids, y)
    return model


CASES = {
    "default": {},
    "measure": {"factor_update_steps": 1},
    "no momentum": {"beta": 0.0},
    "decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 1e-3},
    "clipvalue": {"clipvalue": 1e-2},
    "global": {"global_clipnorm": 1e-3},
    "ema": {"use_ema": True, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "loss scale": {"loss_scale_factor": 8.0},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.CosineDecay(1e-3, 9)
    },
    "callable": {"learning_rate": lambda: 2e-3},
    "zero": {"learning_rate": 0.0, "adam_epsilon": 1e-3},
}


@pytest.mark.parametrize("is_elsewhere", [False, True])
@pytest.mark.parametrize(
    ("case", "low", "tolerance"),
    [
        *((case, False, 1e-5) for case in CASES),
        # `update_step` rounds between operations, the lists' ones don't.
        ("default", True, 4e-2),
        ("measure", True, 4e-2),
    ],
)
def test_all_together_are_as_one_by_one(
    case, low, tolerance, is_elsewhere, monkeypatch
):
    if is_elsewhere:
        # A learning rate that would have to be waited for.
        monkeypatch.setattr(torch_update, "_can_be_read", lambda rate: False)
        monkeypatch.setattr(torch_diagonals, "_SLOW_ADDCMUL", {})
    reference = OneByOne(**CASES[case])
    expected = train(reference, low)
    assert reference.calls > 0
    actual = train(keras_adafisher.AdaFisher(**CASES[case]), low)
    pairs = [
        *zip(actual.weights, expected.weights, strict=True),
        *zip(
            actual.optimizer.variables,
            expected.optimizer.variables,
            strict=True,
        ),
    ]
    for a, b in pairs:
        assert a.dtype == b.dtype
        a, b = (v.value.detach().double().numpy() for v in (a, b))
        assert_close([a], [b], tolerance)


@pytest.mark.parametrize("limit", [1, 10, 10**9])
def test_any_cut_into_batches_gives_the_same(limit, monkeypatch):
    expected = weights(train(keras_adafisher.AdaFisher()))
    monkeypatch.setattr(torch_update, "_BATCH_SIZE", {"cpu": limit})
    # Small limits also cut single variables.
    actual = weights(train(keras_adafisher.AdaFisher()))
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("step", [2, 3])
def test_nothing_as_large_as_a_large_variable_is_made(step, monkeypatch):
    """Neither at a step that measures nor at one that doesn't."""
    model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(32)])
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
    variables = model.trainable_variables
    optimizer.build(variables)
    monkeypatch.setattr(torch_update, "_BATCH_SIZE", {"cpu": 64})
    largest = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            # Views and what works in place take no memory.
            if not op.is_view and not op._schema.is_mutable:
                for leaf in tree_leaves(result):
                    # The vector of factors has 65 entries, the kernel 1024.
                    if isinstance(leaf, torch.Tensor) and leaf.numel() > 99:
                        largest.append(op.name())
            return result

    for now in range(step + 1):
        model.zero_grad()
        torch.sum(model(torch.ones(1, 32))).backward()
        count = Count() if now == step else contextlib.nullcontext()
        with torch.no_grad(), count:
            optimizer.apply([v.value.grad for v in variables], variables)
    assert not largest


def test_stateless_calls_leave_their_arguments_alone():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher(gradient_accumulation_steps=2)
    variables = model.trainable_variables
    optimizer.build(variables)
    values = [v.value.detach().clone() for v in variables]
    state = [v.value.detach().clone() for v in optimizer.variables]
    copies = [t.clone() for t in (*values, *state)]
    with torch.no_grad():
        grads = [torch.ones_like(v) for v in values]
        new_values, new_state = values, state
        for _ in range(2):
            new_values, new_state = optimizer.stateless_apply(
                new_state, grads, new_values
            )
    assert all(map(torch.equal, copies, (*values, *state)))
    assert not torch.equal(new_values[0], values[0])


@pytest.mark.parametrize("kind", ["double", "half"])
def test_a_model_that_pytorch_has_cast(kind):
    """What an optimizer keeps has the dtype that Keras knows of."""
    x = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    ends = []
    for cast in (None, kind):
        for make in (
            keras_adafisher.AdaFisher,
            keras_adafisher.AdaFisher.as_published,
            keras_adafisher.AdaFisherMuon,
        ):
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [
                    keras.Input((6,)),
                    keras.layers.Dense(5, activation="relu"),
                    keras.layers.LayerNormalization(),
                    keras.layers.Dense(2),
                ]
            )
            if cast:
                getattr(model, cast)()
            model.compile(make(learning_rate=0.01), loss="mse")
            model.fit(x, x[:, :2], batch_size=4, epochs=3, verbose=0)
            ends.append([w.astype("float32") for w in model.get_weights()])
    for before, after in zip(ends[:3], ends[3:], strict=True):
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(new, old, atol=2e-2)
