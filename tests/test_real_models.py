"""Models that nobody here wrote: keras.applications and keras_hub.

Each trains for one step, and nearly all of its parameters have factors.
"""

import keras
import numpy as np
import pytest
from conftest import BACKEND
from models import factored
from models import pairs_of
from models import to_numpy

import keras_adafisher

try:
    import keras_hub
except ImportError:
    keras_hub = None

# For each family of keras.applications its smallest member and the smallest
# images it takes.
FAMILIES = {
    "ConvNeXtTiny": 32,
    "DenseNet121": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "InceptionResNetV2": 75,
    "InceptionV3": 75,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "NASNetMobile": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "VGG16": 32,
    "Xception": 71,
}
SLOW = {"InceptionResNetV2", "NASNetMobile"}
if BACKEND == "jax":
    # They compile for half a minute to two.
    SLOW |= {
        "DenseNet121",
        "EfficientNetB0",
        "EfficientNetV2B0",
        "InceptionV3",
        "MobileNetV2",
        "MobileNetV3Small",
        "ResNet50",
        "ResNet50V2",
        "Xception",
    }
if BACKEND == "tensorflow":
    # Eagerly, these take ten seconds or more.
    SLOW |= {
        "DenseNet121",
        "EfficientNetV2B0",
        "InceptionV3",
        "ResNet50V2",
        "Xception",
    }
CLASSES = 10


@pytest.fixture
def numpy_initializers(monkeypatch):
    """Random initial weights by NumPy: JAX compiles once for each shape."""
    rng = np.random.default_rng(0)

    def initialize(self, shape, dtype=None):
        fan_in = max(int(np.prod(shape[:-1])), 1)
        values = rng.normal(size=shape) / np.sqrt(fan_in)
        return keras.ops.convert_to_tensor(values, dtype=dtype or "float32")

    for initializer in (
        keras.initializers.RandomNormal,
        keras.initializers.TruncatedNormal,
        keras.initializers.VarianceScaling,
    ):
        monkeypatch.setattr(initializer, "__call__", initialize)


def train_once(model, x, y, loss, **compile_arguments):
    """One step; the loss is finite, and so are the weights, which moved.

    Returns:
        List of the paths of those that didn't.
    """
    parameters = list(model.trainable_variables)
    optimizer = keras_adafisher.AdaFisher()
    model.compile(optimizer=optimizer, loss=loss, **compile_arguments)
    # A step that creates variables is traced twice by TensorFlow.
    optimizer.build(model.trainable_variables)
    before = [np.array(to_numpy(variable)) for variable in parameters]
    loss = np.ravel(model.train_on_batch(x, y))[0]
    assert np.isfinite(loss)
    unmoved = []
    for variable, old in zip(parameters, before, strict=True):
        new = to_numpy(variable)
        assert np.all(np.isfinite(new)), variable.path
        if np.all(new == old):
            unmoved.append(variable.path)
    # Some get no gradient: a block that stochastic depth skipped, what only
    # leads to an output that a diffusion transformer's last block drops.
    assert len(unmoved) < 0.25 * len(parameters), unmoved
    return unmoved


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in FAMILIES
    ],
)
def test_applications(family, rng, numpy_initializers):
    if (family, BACKEND) == ("NASNetMobile", "torch"):
        pytest.skip("keras.applications refuses NASNetMobile under PyTorch")
    size = FAMILIES[family]
    model = getattr(keras.applications, family)(
        weights=None, input_shape=(size, size, 3), classes=CLASSES
    )
    assert keras_adafisher.coverage(model).factored_fraction >= 0.99
    train_once(
        model,
        rng.normal(size=(2, size, size, 3)).astype("float32"),
        rng.integers(0, CLASSES, size=2),
        loss="sparse_categorical_crossentropy",
        # TensorFlow takes a minute to trace what it runs in a second.
        run_eagerly=BACKEND == "tensorflow",
    )


# keras_hub: small, but with about the real ones' shares of embeddings,
# positions and blocks.

WORDS, LENGTH, WIDTH = 800, 12, 64


def token_inputs(rng):
    return {
        "token_ids": rng.integers(0, WORDS, size=(2, LENGTH)),
        "padding_mask": np.ones((2, LENGTH), "int32"),
    }


def causal_lm(task_class, backbone, rng):
    """A language model, its inputs, its labels and its loss."""
    model = task_class(backbone=backbone, preprocessor=None)
    x = token_inputs(rng)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, x, x["token_ids"], loss


def gpt2(rng):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=WORDS,
        num_layers=2,
        num_heads=2,
        hidden_dim=WIDTH,
        intermediate_dim=4 * WIDTH,
        max_sequence_length=2 * LENGTH,
    )
    return causal_lm(keras_hub.models.GPT2CausalLM, backbone, rng)


def llama(rng):
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=WORDS,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=WIDTH,
        intermediate_dim=3 * WIDTH,
    )
    return causal_lm(keras_hub.models.LlamaCausalLM, backbone, rng)


def gemma(rng):
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=2 * WORDS,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        hidden_dim=WIDTH,
        intermediate_dim=16 * WIDTH,
    )
    return causal_lm(keras_hub.models.GemmaCausalLM, backbone, rng)


def bert(rng):
    model = keras_hub.models.BertTextClassifier(
        backbone=keras_hub.models.BertBackbone(
            vocabulary_size=WORDS,
            num_layers=2,
            num_heads=2,
            hidden_dim=WIDTH,
            intermediate_dim=4 * WIDTH,
            max_sequence_length=2 * LENGTH,
        ),
        num_classes=CLASSES,
        preprocessor=None,
    )
    x = token_inputs(rng)
    x["segment_ids"] = rng.integers(0, 2, size=(2, LENGTH))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, x, rng.integers(0, CLASSES, size=2), loss


def vit(rng):
    model = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=WIDTH,
        mlp_dim=4 * WIDTH,
    )
    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    return model, x, rng.normal(size=(2, 17, WIDTH)), "mse"


def mmdit(rng):
    """The diffusion transformer of Stable Diffusion 3."""
    from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT

    model = MMDiT(
        patch_size=2,
        hidden_dim=WIDTH,
        num_layers=2,
        num_heads=2,
        position_size=16,
        latent_shape=(16, 16, 4),
        context_shape=(LENGTH, 3 * WIDTH),
        pooled_projection_shape=(WIDTH,),
        qk_norm="rms_norm",
    )
    x = {
        "latent": rng.normal(size=(2, 16, 16, 4)),
        "context": rng.normal(size=(2, LENGTH, 3 * WIDTH)),
        "pooled_projection": rng.normal(size=(2, WIDTH)),
        "timestep": rng.uniform(size=(2, 1)),
    }
    x = {name: value.astype("float32") for name, value in x.items()}
    return model, x, rng.normal(size=(2, 16, 16, 4)), "mse"


@pytest.mark.skipif(keras_hub is None, reason="keras_hub isn't installed")
@pytest.mark.parametrize("make_model", [gpt2, llama, gemma, bert, vit, mmdit])
def test_keras_hub(make_model, rng, numpy_initializers):
    model, x, y, loss = make_model(rng)
    assert keras_adafisher.coverage(model).factored_fraction >= 0.97
    # Without XLA, which takes TensorFlow several times as long to compile.
    arguments = {"jit_compile": False} if BACKEND == "tensorflow" else {}
    unmoved = train_once(model, x, y, loss, **arguments)
    for variable in factored(model):
        for _, gradient in pairs_of(model.optimizer, variable):
            # Running factors start at 1: each block has measured something.
            assert np.any(gradient != 1) or variable.path in unmoved
