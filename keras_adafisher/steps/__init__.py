"""Training steps: where layers have taps, and lists have probes.

`step.py` says what a step is. How a function is run as one differs between
backends: `run` is from the file of the backend's name.
"""

from keras import backend as _keras_backend

from keras_adafisher.steps.step import AppliedAgain
from keras_adafisher.steps.step import current
from keras_adafisher.steps.step import may_measure
from keras_adafisher.steps.step import mode
from keras_adafisher.steps.step import request_of
from keras_adafisher.steps.step import run
from keras_adafisher.steps.step import Step

if _keras_backend.backend() == "jax":
    from keras_adafisher.steps.jax import run
elif _keras_backend.backend() == "tensorflow":
    from keras_adafisher.steps.tensorflow import run

__all__ = [
    "AppliedAgain",
    "Step",
    "current",
    "may_measure",
    "mode",
    "request_of",
    "run",
]
