"""LoRA, quantization and freezing, before and after a model is wrapped."""

import keras
import numpy as np
import pytest
from layer_cases import JIT_COMPILE
from models import assert_close
from models import assert_same
from models import PLAIN
from models import probes_in
from models import product_loss
from models import to_numpy
from models import weights

import keras_adafisher
from keras_adafisher.wrappers import DenseBlock

LAYERS = {
    "Dense": (lambda: keras.layers.Dense(3), (4,)),
    "EinsumDense": (
        lambda: keras.layers.EinsumDense("ab,bc->ac", 3, bias_axes="c"),
        (4,),
    ),
    "Embedding": (lambda: keras.layers.Embedding(5, 3), (4,)),
    "Conv2D": (lambda: keras.layers.Conv2D(3, 2), (3, 3, 2)),
}


def compiled(model):
    optimizer = keras_adafisher.AdaFisher(
        learning_rate=0.1, damping=0.1, factor_update_steps=1, **PLAIN
    )
    model.compile(optimizer, loss=product_loss, jit_compile=JIT_COMPILE)
    return model


def make_model(name):
    make_layer, shape = LAYERS[name]
    layer = make_layer()
    dtype = "int32" if name == "Embedding" else "float32"
    model = keras.Sequential(
        [
            keras.Input(shape, dtype=dtype),
            layer,
            keras.layers.Flatten(),
            keras.layers.Dense(2, name="head"),
        ]
    )
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, size=(8, *shape)).astype(dtype)
    y = rng.normal(size=(8, 2)).astype("float32")
    return layer, model, x, y


def fit(model, x, y):
    model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)


def kernel_of(layer):
    """What LoRA has frozen: the layer's `kernel` is a sum with it."""
    (kernel,) = layer.non_trainable_variables
    return kernel


def probed_parameters(model):
    return {
        id(parameter)
        for probe in probes_in(model)
        for parameter in probe.block.parameters
    }


@pytest.mark.parametrize("name", LAYERS)
def test_lora_may_be_enabled_after_wrapping(name, tmp_path):
    """The model trains on as if its first `compile` had come after that."""
    layer, model, x, y = make_model(name)
    fit(compiled(model), x, y)
    layer.enable_lora(2)
    values = weights(model)
    frozen = to_numpy(kernel_of(layer))

    late_layer, late, _, _ = make_model(name)
    late_layer.enable_lora(2)
    late.set_weights(values)
    for each in (model, late):
        fit(compiled(each), x, y)
    assert_close(weights(model), weights(late), 1e-6)

    assert_same([to_numpy(kernel_of(layer))], [frozen])
    changed = [
        not np.array_equal(w, old)
        for w, old in zip(weights(model), values, strict=True)
    ]
    assert changed == [v.trainable for v in model.weights]
    assert probed_parameters(model) == {
        id(v)
        for v in model.trainable_variables
        if v.path.endswith("bias") or v is model.layers[-1].kernel
    }
    rows = keras_adafisher.coverage(model).rows
    assert [
        row.parameter.split("/")[-1] for row in rows if not row.factors
    ] == [v.name for v in model.trainable_variables if "lora" in v.name]

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"product_loss": product_loss}
    )
    expected = model.predict(x, verbose=0)
    assert_close([loaded.predict(x, verbose=0)], [expected], 1e-5)
    fit(loaded, x, y)

    keras_adafisher.unwrap(model)
    assert [id(v) for v in model.trainable_variables] == [
        id(v) for v in model.trainable_weights
    ]
    assert_same([model.predict(x, verbose=0)], [expected])


@pytest.mark.parametrize("name", ["Dense", "EinsumDense", "Embedding"])
def test_a_wrapped_model_is_quantized_as_a_plain_one(name):
    layer, model, x, y = make_model(name)
    _, plain, _, _ = make_model(name)
    fit(compiled(model), x, y)
    plain.set_weights(model.get_weights())
    for each in (model, plain):
        each.quantize("int8", filters=lambda layer: layer.name != "head")
    assert layer.quantization_mode == "int8"
    assert_same(weights(model), weights(plain))
    # The plain model's `predict` isn't compiled by XLA.
    outputs = [each.predict(x, verbose=0) for each in (model, plain)]
    assert_close(outputs[:1], outputs[1:], 1e-6)

    # What is left to train, trains.
    before = weights(model)
    fit(compiled(model), x, y)
    assert probed_parameters(model) == {id(v) for v in model.layers[-1].weights}
    changed = [
        not np.array_equal(w, old)
        for w, old in zip(weights(model), before, strict=True)
    ]
    assert changed == [v.trainable for v in model.weights]


def backbone_and_head():
    backbone = keras.Sequential(
        [
            keras.Input((4,)),
            # A bias would have no gradient but rounding errors.
            keras.layers.Dense(4, use_bias=False),
            keras.layers.BatchNormalization(),
        ]
    )
    head = keras.layers.Dense(2)
    return backbone, keras.Sequential([keras.Input((4,)), backbone, head])


@pytest.mark.parametrize("is_wrapped_before", [True, False])
def test_a_backbone_is_frozen_and_thawed(is_wrapped_before, rng):
    x = rng.normal(size=(8, 4)).astype("float32")
    y = rng.normal(size=(8, 2)).astype("float32")
    backbone, model = backbone_and_head()
    head = model.layers[-1]
    if is_wrapped_before:
        fit(compiled(model), x, y)
    before = weights(backbone)
    backbone.trainable = False
    fit(compiled(model), x, y)
    assert_same(weights(backbone), before)
    assert probed_parameters(model) == {id(v) for v in head.weights}

    backbone.trainable = True
    values = weights(model)
    fit(compiled(model), x, y)
    _, fresh = backbone_and_head()
    fresh.set_weights(values)
    fit(compiled(fresh), x, y)
    assert_close(weights(model), weights(fresh), 1e-6)
    changed = [
        not np.array_equal(w, old)
        for w, old in zip(weights(model), values, strict=True)
    ]
    assert all(changed)


def test_a_frozen_layer_measures_nothing(rng, monkeypatch):
    """Not even where the gradient passes through it, to layers below."""
    measured = set()
    statistic = DenseBlock.gradient_statistic

    def noted(self, s):
        measured.add(self.weight.path)
        return statistic(self, s)

    monkeypatch.setattr(DenseBlock, "gradient_statistic", noted)
    below, frozen = keras.layers.Dense(3), keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((4,)), below, frozen])
    frozen.trainable = False
    x = rng.normal(size=(4, 4)).astype("float32")
    y = rng.normal(size=(4, 2)).astype("float32")
    compiled(model).train_on_batch(x, y)
    assert measured == {below.kernel.path}
    frozen.trainable = True
    compiled(model).train_on_batch(x, y)
    assert measured == {below.kernel.path, frozen.kernel.path}
