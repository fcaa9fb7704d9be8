"""AdaFisher for Keras 3: a second-order optimizer at first-order cost."""

from keras_adafisher.callbacks import FisherHistory
from keras_adafisher.integration import compile_hook as _compile_hook
from keras_adafisher.integration.coverage_report import coverage
from keras_adafisher.integration.custom_loops import decision_scope
from keras_adafisher.integration.custom_loops import set_decision_scope
from keras_adafisher.integration.custom_loops import training_step
from keras_adafisher.integration.wrapper_checks import check_wrapper
from keras_adafisher.integration.wrapping import unwrap
from keras_adafisher.integration.wrapping import wrap
from keras_adafisher.optimizer import AdaFisher
from keras_adafisher.optimizer import AdaFisherMuon
from keras_adafisher.optimizer import AdaFisherW
from keras_adafisher.optimizer import InverseSqrtDecay
from keras_adafisher.wrappers import LayerWrapper
from keras_adafisher.wrappers import register_wrapper

__version__ = "0.1.0"

__all__ = [
    "AdaFisher",
    "AdaFisherMuon",
    "AdaFisherW",
    "FisherHistory",
    "InverseSqrtDecay",
    "LayerWrapper",
    "check_wrapper",
    "coverage",
    "decision_scope",
    "register_wrapper",
    "set_decision_scope",
    "training_step",
    "unwrap",
    "wrap",
]

_compile_hook.install()
