"""Numerics and layouts, with the exceptions of the backend that runs.

`common` is what a backend without exceptions does, and lists the names. The
other files hold the exceptions of their backend, each with its reason. Only the
chosen backend's file is imported.
"""

from keras import backend as _keras_backend

from keras_adafisher.backend.common import *

if _keras_backend.backend() == "jax":
    from keras_adafisher.backend.jax import *
elif _keras_backend.backend() == "tensorflow":
    from keras_adafisher.backend.tensorflow import *
elif _keras_backend.backend() == "torch":
    from keras_adafisher.backend.torch import *
