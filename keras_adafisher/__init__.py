"""AdaFisher for Keras 3: a second-order optimizer at first-order cost."""

from keras_adafisher import compile_hook as _compile_hook
from keras_adafisher.callbacks import FisherHistory
from keras_adafisher.coverage import coverage
from keras_adafisher.optimizer import AdaFisher
from keras_adafisher.optimizer import AdaFisherW
from keras_adafisher.wrap import unwrap
from keras_adafisher.wrap import wrap
from keras_adafisher.wrappers import LayerWrapper
from keras_adafisher.wrappers import register_wrapper

__version__ = "0.1.0"

__all__ = [
    "AdaFisher",
    "AdaFisherW",
    "FisherHistory",
    "LayerWrapper",
    "coverage",
    "register_wrapper",
    "unwrap",
    "wrap",
]

_compile_hook.install()
