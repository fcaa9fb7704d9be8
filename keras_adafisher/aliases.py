"""Names for what the public functions take and return.

Keras has no type annotations: what is one of its classes, a checker takes for
anything.
"""

import pathlib
from collections.abc import Callable
from typing import Any
from typing import Literal
from typing import TypeAlias

import keras

# A tensor of the backend, also a symbolic one, and what becomes one.
Tensor: TypeAlias = Any

Shape: TypeAlias = tuple[int, ...]

LearningRate: TypeAlias = (
    float | keras.optimizers.schedules.LearningRateSchedule | Callable[[], Any]
)

Normalization: TypeAlias = Literal["mean", "min_max"]

Path: TypeAlias = str | pathlib.PurePath
