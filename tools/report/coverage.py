"""Write docs/coverage.md: what share of real models' parameters is factored.

    make docs-coverage

No weights are downloaded, and with PyTorch's "meta" device none are allocated
either: only shapes are needed. The configurations of keras_hub's models are
those of their presets.
"""

import math
import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import keras_hub

import keras_adafisher
from tools.report import pages

# The classes of `keras.applications` with their default arguments.
APPLICATIONS = (
    "ConvNeXtTiny",
    "ConvNeXtBase",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetB7",
    "EfficientNetV2B0",
    "EfficientNetV2L",
    "InceptionResNetV2",
    "InceptionV3",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "MobileNetV3Large",
    "ResNet50",
    "ResNet152",
    "ResNet50V2",
    "VGG16",
    "Xception",
)

# From a preset's name to the class and the arguments of its backbone.
BACKBONES = {
    "bert_base_en_uncased": (
        keras_hub.models.BertBackbone,
        dict(
            vocabulary_size=30522,
            num_layers=12,
            num_heads=12,
            hidden_dim=768,
            intermediate_dim=3072,
            max_sequence_length=512,
        ),
    ),
    "deberta_v3_base_en": (
        keras_hub.models.DebertaV3Backbone,
        dict(
            vocabulary_size=128100,
            num_layers=12,
            num_heads=12,
            hidden_dim=768,
            intermediate_dim=3072,
            max_sequence_length=512,
            bucket_size=256,
        ),
    ),
    "gpt2_base_en": (
        keras_hub.models.GPT2Backbone,
        dict(
            vocabulary_size=50257,
            num_layers=12,
            num_heads=12,
            hidden_dim=768,
            intermediate_dim=3072,
            max_sequence_length=1024,
        ),
    ),
    "t5_1.1_base": (
        keras_hub.models.T5Backbone,
        dict(
            vocabulary_size=32128,
            num_layers=12,
            num_heads=12,
            hidden_dim=768,
            intermediate_dim=2048,
            key_value_dim=64,
            activation="gelu",
            use_gated_activation=True,
            tie_embedding_weights=False,
        ),
    ),
    "whisper_base_en": (
        keras_hub.models.WhisperBackbone,
        dict(
            vocabulary_size=51864,
            num_layers=6,
            num_heads=8,
            hidden_dim=512,
            intermediate_dim=2048,
            max_encoder_sequence_length=3000,
            max_decoder_sequence_length=448,
        ),
    ),
    "llama3.2_1b": (
        keras_hub.models.Llama3Backbone,
        dict(
            vocabulary_size=128256,
            num_layers=16,
            num_query_heads=32,
            num_key_value_heads=8,
            hidden_dim=2048,
            intermediate_dim=8192,
            tie_word_embeddings=True,
        ),
    ),
    "mistral_7b_en": (
        keras_hub.models.MistralBackbone,
        dict(
            vocabulary_size=32000,
            num_layers=32,
            num_query_heads=32,
            num_key_value_heads=8,
            hidden_dim=4096,
            intermediate_dim=14336,
            sliding_window=4096,
        ),
    ),
    "mixtral_8_7b_en": (
        keras_hub.models.MixtralBackbone,
        dict(
            vocabulary_size=32000,
            num_layers=32,
            num_query_heads=32,
            num_key_value_heads=8,
            hidden_dim=4096,
            intermediate_dim=14336,
            num_experts=8,
            top_k=2,
        ),
    ),
    "gemma_2b_en": (
        keras_hub.models.GemmaBackbone,
        dict(
            vocabulary_size=256000,
            num_layers=18,
            num_query_heads=8,
            num_key_value_heads=1,
            head_dim=256,
            hidden_dim=2048,
            intermediate_dim=32768,
        ),
    ),
    "qwen2.5_0.5b_en": (
        keras_hub.models.QwenBackbone,
        dict(
            vocabulary_size=151936,
            num_layers=24,
            num_query_heads=14,
            num_key_value_heads=2,
            hidden_dim=896,
            intermediate_dim=4864,
            tie_word_embeddings=True,
        ),
    ),
    "rwkv7_g1a_0.1b_en": (
        keras_hub.models.RWKV7Backbone,
        dict(
            vocabulary_size=65536,
            num_layers=12,
            hidden_size=768,
            head_size=64,
            intermediate_dim=3072,
            gate_lora=128,
            mv_lora=32,
            aaa_lora=64,
            decay_lora=64,
        ),
    ),
    "vit_base_patch16_224_imagenet": (
        keras_hub.models.ViTBackbone,
        dict(
            image_shape=(224, 224, 3),
            patch_size=16,
            num_layers=12,
            num_heads=12,
            hidden_dim=768,
            mlp_dim=3072,
        ),
    ),
    "dinov2_base": (
        keras_hub.models.DINOV2Backbone,
        dict(
            patch_size=14,
            num_layers=12,
            hidden_dim=768,
            num_heads=12,
            intermediate_dim=3072,
            layer_scale_init_value=1.0,
            image_shape=(518, 518, 3),
            position_embedding_shape=(518, 518),
        ),
    ),
    "stable_diffusion_3_medium (diffusion transformer)": (
        keras_hub.src.models.stable_diffusion_3.mmdit.MMDiT,
        dict(
            patch_size=2,
            hidden_dim=1536,
            num_layers=24,
            num_heads=24,
            position_size=192,
            latent_shape=(64, 64, 16),
        ),
    ),
}


def table_row(name, model):
    """One line of the table, for a model that is built."""
    coverage = keras_adafisher.coverage(model)
    total = sum(row.count for row in coverage.rows)
    missing = [row for row in coverage.rows if not row.factors]
    largest = ""
    if missing:
        row = max(missing, key=lambda row: row.count)
        largest = f"`{row.parameter}` {row.shape}: {row.reason}"
    # Never 100% unless it is all of them.
    percent = math.floor(1e4 * coverage.factored_fraction) / 1e2
    return f"| {name} | {total:,} | {percent:.2f}% | {largest} |\n"


def table_rows(models):
    """The rows for pairs of a name and a function that builds the model."""
    lines = []
    for name, build in models:
        keras.utils.clear_session()
        with keras.device("meta"):
            lines.append(table_row(name, build()))
        print(lines[-1], end="", flush=True)
    return "".join(lines).rstrip("\n")


def main():
    """Write the page."""
    applications = [
        (
            name,
            lambda name=name: getattr(keras.applications, name)(weights=None),
        )
        for name in APPLICATIONS
    ]
    backbones = [
        (name, lambda cls=cls, config=config: cls(**config))
        for name, (cls, config) in BACKBONES.items()
    ]
    page = pages.fill(
        __file__,
        "coverage.md",
        keras=keras.__version__,
        keras_hub=keras_hub.__version__,
        applications=table_rows(applications),
        backbones=table_rows(backbones),
    )
    pages.write(pages.DOCS / "coverage.md", page)


if __name__ == "__main__":
    main()
