"""What `gpu.py` compares: four models of the sizes that people train.

Their tiny forms have about the same kinds of layers, to try the programs on a
CPU.
"""

import keras
from models import gpt
from models import mobilenet
from models import resnet
from models import vit
from models import with_images

from keras_adafisher import AdaFisher
from keras_adafisher import AdaFisherMuon


def resnet50(image, batch):
    """Keras' own ResNet50, for 1000 classes."""
    model = keras.applications.ResNet50(
        weights=None,
        input_shape=(image, image, 3),
        classifier_activation=None,
    )
    return with_images(model, batch)


# The function, its sizes, and the policy of its layers' dtypes.
MODELS = {
    "gpt": (
        gpt,
        {
            "size": 768,
            "depth": 12,
            "heads": 12,
            "batch": 16,
            "sequence": 512,
            "vocabulary": 16384,
        },
        "mixed_bfloat16",
    ),
    "vit": (
        vit,
        {
            "size": 384,
            "depth": 12,
            "heads": 6,
            "batch": 64,
            "image": 224,
            "patch": 16,
            "classes": 1000,
        },
        "mixed_bfloat16",
    ),
    "resnet50": (resnet50, {"image": 160, "batch": 64}, "float32"),
    # 15 convolutions.
    "resnet": (
        resnet,
        {"size": 32, "blocks": 2, "batch": 128, "image": 32},
        "float32",
    ),
}

TINY = {
    "gpt": (
        gpt,
        {"size": 8, "depth": 1, "batch": 2, "sequence": 4, "vocabulary": 16},
        "mixed_bfloat16",
    ),
    "vit": (
        vit,
        {"size": 8, "depth": 1, "batch": 2, "image": 8},
        "mixed_bfloat16",
    ),
    # ResNet50 comes in one size only.
    "resnet50": (
        mobilenet,
        {"size": 2, "batch": 2, "image": 8, "depth": 1},
        "float32",
    ),
    "resnet": (resnet, {"size": 2, "batch": 2, "image": 8}, "float32"),
}

# Learning rates at which nothing grows, however long it trains on one batch.
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(1e-4, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(1e-5),
    "AdaFisher, default": lambda: AdaFisher(1e-6),
    "AdaFisherMuon": lambda: AdaFisherMuon(1e-6),
    "Muon": lambda: keras.optimizers.Muon(1e-5),
    "AdaFisher, every step": lambda: AdaFisher(1e-6, factor_update_steps=1),
}


def make_task(name, tiny):
    """A model and a batch, always with the same weights and data."""
    function, sizes, policy = (TINY if tiny else MODELS)[name]
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    return function(**sizes)
