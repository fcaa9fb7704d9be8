"""AdaFisher for Keras 3: a second-order optimizer at first-order cost."""

from keras_adafisher import hooks as _hooks
from keras_adafisher.callbacks import FisherHistory
from keras_adafisher.coverage import coverage
from keras_adafisher.custom_loops import decision_scope
from keras_adafisher.custom_loops import set_decision_scope
from keras_adafisher.custom_loops import training_step
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
    "decision_scope",
    "register_wrapper",
    "set_decision_scope",
    "training_step",
    "unwrap",
    "wrap",
]

_hooks.install()
