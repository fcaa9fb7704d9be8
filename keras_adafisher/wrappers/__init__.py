"""One file per layer family. Importing the package fills the registry."""

from keras_adafisher.wrappers import conv
from keras_adafisher.wrappers import dense
from keras_adafisher.wrappers import normalization
from keras_adafisher.wrappers.base import LayerWrapper
from keras_adafisher.wrappers.base import wrapper_of
from keras_adafisher.wrappers.registry import find_wrapper
from keras_adafisher.wrappers.registry import register_wrapper

__all__ = [
    "LayerWrapper",
    "conv",
    "dense",
    "find_wrapper",
    "normalization",
    "register_wrapper",
    "wrapper_of",
]
