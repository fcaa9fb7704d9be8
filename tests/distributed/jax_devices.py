"""JAX on eight devices of one process, next to one device.

Run by `test_distributed_jax.py`. Prints lines of JSON.
"""

import json
import os
import pathlib
import re
import sys
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # For less time in the compiler. It leaves the collectives alone.
    " --xla_backend_optimization_level=0"
)
os.environ["NPROC"] = "64"  # See `examples/distributed/jax_data_parallel.py`.
sys.path.insert(
    0, str(pathlib.Path(__file__).parents[2] / "examples" / "distributed")
)

import collectives
import common
import jax_model_parallel
import keras
import numpy as np
from keras import layers

import keras_adafisher

BATCH = 16


def sgd(**kwargs):
    return keras.optimizers.SGD(1e-3, momentum=0.9, **kwargs)


def adafisher(**kwargs):
    # Named, so that the paths of its variables don't count optimizers.
    return keras_adafisher.AdaFisher(
        1e-5, factor_update_steps=2, name="adafisher", **kwargs
    )


def compiled(distribution, make_model, optimizer):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = make_model()
    model.compile(optimizer(), loss=common.make_loss())
    return model


def fit(distribution, make_model, optimizer, x, y, epochs=1):
    model = compiled(distribution, make_model, optimizer)
    model.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)
    return model


def difference(one, other):
    return common.difference(
        common.state(one, one.optimizer).values(),
        common.state(other, other.optimizer).values(),
    )


def splits(model):
    """The mesh axes of the variables that are split, by the path's end."""
    variables = [*model.variables, *model.optimizer.variables]
    found = {v.path: v.value.sharding.spec for v in variables}
    # Only the first model of a process is named "sequential".
    return {
        re.sub(r"sequential_\d+", "sequential", path): list(spec)
        for path, spec in found.items()
        if any(spec)
    }


def extra(ours, other):
    """What AdaFisher adds to the collectives of another optimizer."""
    difference = dict(ours["outside"])
    for key, number in other["outside"].items():
        difference[key] = difference.get(key, 0) - number
    transferred = difference.pop("bytes") + ours["inside"]["bytes"]
    inside = {k: n for k, n in ours["inside"].items() if k != "bytes"}
    return {
        "extra_collectives_measuring": sum(inside.values())
        + sum(difference.values()),
        "extra_collectives_other": sum(map(abs, difference.values())),
        "extra_bytes": transferred,
        "inside": inside,
    }


def digits():
    """The network of the examples: a convolution, dense layers, a norm."""
    images, labels = common.load_digits()
    x, y = images[: 7 * BATCH], labels[: 7 * BATCH]
    one = fit(None, common.make_model, adafisher, x, y)
    for distribution in (
        keras.distribution.DataParallel(),
        jax_model_parallel.make_distribution(),
    ):
        several = fit(distribution, common.make_model, adafisher, x, y)
        other = compiled(distribution, common.make_model, sgd)
        counts = [
            collectives.count(model, x[:BATCH], y[:BATCH])
            for model in (several, other)
        ]
        keras_adafisher.set_decision_scope("step")
        once = fit(distribution, common.make_model, adafisher, x, y)
        plain, measuring = (
            collectives.count(once, x[:BATCH], y[:BATCH], branch)["outside"]
            for branch in (0, 1)
        )
        keras_adafisher.set_decision_scope("auto")
        yield {
            "name": type(distribution).__name__,
            "difference_of_scopes": difference(once, several),
            "extra_of_a_plain_step": dict(plain - counts[1]["outside"]),
            "extra_of_a_measuring_step": dict(measuring - counts[1]["outside"]),
            "splits": splits(several),
            "engine": type(distribution).__name__,
            "devices": distribution.device_mesh.devices.size,
            "difference": difference(several, one),
            "gradient_bytes": 4 * one.count_params(),
            **extra(*counts),
        }


def transformer():
    """Other layers, with a bias that is split otherwise than its kernel."""
    tokens = keras.Input((8,), dtype="int32")
    h = layers.Embedding(32, 16, name="embedding")(tokens)
    # The gradient of a key's bias is 0 but for rounding.
    attention = layers.MultiHeadAttention(4, 4, use_bias=False, name="mha")
    h = h + attention(h, h)
    h = layers.LayerNormalization(name="norm")(h)
    h = layers.Dense(32, activation="relu", name="up")(h)
    h = layers.EinsumDense(
        "btc,cdk->btdk", (None, 4, 4), bias_axes="k", name="einsum"
    )(h)
    h = layers.Reshape((8 * 16,))(h)
    return keras.Model(tokens, layers.Dense(8, name="out")(h))


def transformer_layouts():
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    # These match the probes of their layers too, which have other shapes.
    layouts["embedding/embeddings|embedding/adafisher.*"] = ("model", None)
    layouts["up/kernel|up/adafisher/.*"] = (None, "model")
    layouts["mha.*(query|key|value).*"] = (None, "model", None)
    layouts["mha/attention_output/kernel"] = ("model", None, None)
    layouts["einsum/kernel"] = ("batch", "model", None)
    layouts["out/bias"] = ("model",)
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )


def more_layers():
    """With gradient accumulation: answers are then added on every step."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 32, (8 * BATCH, 8)).astype("int32")
    y = rng.integers(0, 8, 8 * BATCH).astype("int32")

    def ours():
        return adafisher(gradient_accumulation_steps=2)

    def theirs():
        return sgd(gradient_accumulation_steps=2)

    one = fit(None, transformer, ours, x, y)
    several = fit(transformer_layouts(), transformer, ours, x, y)
    other = compiled(transformer_layouts(), transformer, theirs)
    counts = [
        collectives.count(model, x[:BATCH], y[:BATCH])
        for model in (several, other)
    ]
    return {
        "difference": difference(several, one),
        "splits": splits(several),
        **extra(*counts),
    }


def orthogonalized(interval):
    """Kernels that are split, one of them along two axes, and kept roots."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 32, (4 * BATCH, 8)).astype("int32")
    y = rng.integers(0, 8, 4 * BATCH).astype("int32")

    def ours():
        return keras_adafisher.AdaFisherMuon(
            1e-4,
            factor_update_steps=2,
            keep_roots=True,
            kernel_update_steps=interval,
            name="muon",
        )

    one = fit(None, transformer, ours, x, y)
    found = {}
    for distribution in (
        keras.distribution.DataParallel(),
        transformer_layouts(),
    ):
        several = fit(distribution, transformer, ours, x, y)
        name = type(distribution).__name__
        found[f"difference_{name}"] = difference(several, one)
    split = splits(several)
    found["splits"] = [path for path in split if "einsum" in path]
    return found


class Late(keras.Model):
    """A model whose layers are built by Keras while it traces `call`."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(16, activation="relu", name="hidden")
        self.logits = layers.Dense(16, name="logits")

    def call(self, inputs):
        return self.logits(self.hidden(inputs))


def late():
    """Variables that are initialized after their layer was wrapped."""
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*hidden/kernel|.*hidden/adafisher.*"] = (None, "model")
    layouts[".*hidden/bias"] = ("model",)
    distribution = keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch"
    )
    images, labels = common.load_digits()
    x, y = images[: 2 * BATCH].reshape(-1, 64), labels[: 2 * BATCH]
    model = fit(distribution, Late, adafisher, x, y)
    one = fit(None, Late, adafisher, x, y)
    return {"difference": difference(model, one), "splits": splits(model)}


def saving():
    """Training that is interrupted, saved, loaded and resumed."""
    distribution = jax_model_parallel.make_distribution()
    images, labels = common.load_digits()
    x, y = images[: 3 * BATCH], labels[: 3 * BATCH]
    whole = fit(distribution, common.make_model, adafisher, x, y, epochs=2)
    half = fit(distribution, common.make_model, adafisher, x, y)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.keras"
        half.save(file)
        resumed = keras.models.load_model(file)
        # Paths in a loaded model lack the model's name.
        is_split = [*splits(resumed).values()] == [*splits(half).values()]
        resumed.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        keras.distribution.set_distribution(None)
        alone = keras.models.load_model(file)
    alone.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    return {
        "difference_resumed": difference(resumed, whole),
        "difference_resumed_on_one_device": difference(alone, whole),
        "is_split": is_split,
    }


def main():
    for result in digits():
        print(json.dumps(result))
    print(json.dumps({"name": "more layers", **more_layers()}))
    print(json.dumps({"name": "orthogonalized", **orthogonalized(1)}))
    print(json.dumps({"name": "resting", **orthogonalized(2)}))
    print(json.dumps({"name": "late", **late()}))
    print(json.dumps({"name": "saving", **saving()}))


if __name__ == "__main__":
    main()
