"""All code that knows which backend runs, and why it must.

`common` is what a backend without exceptions does. The other files hold the
exceptions of their backend, each with its reason. Only the chosen backend's
file is imported.
"""

from keras import backend as _keras_backend

from keras_adafisher.backend.common import answer_of
from keras_adafisher.backend.common import ANSWER_SCALE
from keras_adafisher.backend.common import at_least_zero
from keras_adafisher.backend.common import check_same_strategy
from keras_adafisher.backend.common import clear_answer
from keras_adafisher.backend.common import cond
from keras_adafisher.backend.common import constant
from keras_adafisher.backend.common import count_ids
from keras_adafisher.backend.common import creation_scope
from keras_adafisher.backend.common import differentiate
from keras_adafisher.backend.common import entry
from keras_adafisher.backend.common import evaluator
from keras_adafisher.backend.common import has_accelerator
from keras_adafisher.backend.common import HOW_TO_MEASURE
from keras_adafisher.backend.common import in_replica
from keras_adafisher.backend.common import is_traced
from keras_adafisher.backend.common import join_answers
from keras_adafisher.backend.common import keep_layout
from keras_adafisher.backend.common import keep_layout_of
from keras_adafisher.backend.common import keep_random_state
from keras_adafisher.backend.common import make_probe_tensor
from keras_adafisher.backend.common import mean_square
from keras_adafisher.backend.common import mean_squares_of_quotients
from keras_adafisher.backend.common import one
from keras_adafisher.backend.common import part
from keras_adafisher.backend.common import pointwise_conv
from keras_adafisher.backend.common import precise_matmul
from keras_adafisher.backend.common import request_outside_of_steps
from keras_adafisher.backend.common import reshape
from keras_adafisher.backend.common import run_step
from keras_adafisher.backend.common import stack
from keras_adafisher.backend.common import step_number
from keras_adafisher.backend.common import sum_min_max
from keras_adafisher.backend.common import sum_over_replicas
from keras_adafisher.backend.common import take
from keras_adafisher.backend.common import tap
from keras_adafisher.backend.common import Updater
from keras_adafisher.backend.common import view
from keras_adafisher.backend.common import whole_layout
from keras_adafisher.backend.common import window_mean

if _keras_backend.backend() == "jax":
    from keras_adafisher.backend.jax import differentiate
    from keras_adafisher.backend.jax import entry
    from keras_adafisher.backend.jax import evaluator
    from keras_adafisher.backend.jax import has_accelerator
    from keras_adafisher.backend.jax import is_traced
    from keras_adafisher.backend.jax import keep_layout
    from keras_adafisher.backend.jax import keep_layout_of
    from keras_adafisher.backend.jax import part
    from keras_adafisher.backend.jax import precise_matmul
    from keras_adafisher.backend.jax import run_step
    from keras_adafisher.backend.jax import sum_min_max
    from keras_adafisher.backend.jax import take
    from keras_adafisher.backend.jax import tap
    from keras_adafisher.backend.jax import whole_layout
    from keras_adafisher.backend.jax import window_mean
elif _keras_backend.backend() == "tensorflow":
    from keras_adafisher.backend.tensorflow import check_same_strategy
    from keras_adafisher.backend.tensorflow import creation_scope
    from keras_adafisher.backend.tensorflow import differentiate
    from keras_adafisher.backend.tensorflow import has_accelerator
    from keras_adafisher.backend.tensorflow import in_replica
    from keras_adafisher.backend.tensorflow import is_traced
    from keras_adafisher.backend.tensorflow import mean_square
    from keras_adafisher.backend.tensorflow import pointwise_conv
    from keras_adafisher.backend.tensorflow import run_step
    from keras_adafisher.backend.tensorflow import step_number
    from keras_adafisher.backend.tensorflow import sum_over_replicas
    from keras_adafisher.backend.tensorflow import tap
    from keras_adafisher.backend.tensorflow import Updater
elif _keras_backend.backend() == "torch":
    from keras_adafisher.backend.torch import answer_of
    from keras_adafisher.backend.torch import ANSWER_SCALE
    from keras_adafisher.backend.torch import clear_answer
    from keras_adafisher.backend.torch import cond
    from keras_adafisher.backend.torch import constant
    from keras_adafisher.backend.torch import count_ids
    from keras_adafisher.backend.torch import differentiate
    from keras_adafisher.backend.torch import HOW_TO_MEASURE
    from keras_adafisher.backend.torch import join_answers
    from keras_adafisher.backend.torch import keep_random_state
    from keras_adafisher.backend.torch import make_probe_tensor
    from keras_adafisher.backend.torch import mean_square
    from keras_adafisher.backend.torch import one
    from keras_adafisher.backend.torch import precise_matmul
    from keras_adafisher.backend.torch import request_outside_of_steps
    from keras_adafisher.backend.torch import reshape
    from keras_adafisher.backend.torch import stack
    from keras_adafisher.backend.torch import step_number
    from keras_adafisher.backend.torch import sum_over_replicas
    from keras_adafisher.backend.torch import take
    from keras_adafisher.backend.torch import tap
    from keras_adafisher.backend.torch import view
    from keras_adafisher.backend.torch import window_mean
    from keras_adafisher.backend.torch_update import mean_squares_of_quotients
    from keras_adafisher.backend.torch_update import Updater

__all__ = [
    "ANSWER_SCALE",
    "HOW_TO_MEASURE",
    "Updater",
    "answer_of",
    "at_least_zero",
    "check_same_strategy",
    "clear_answer",
    "cond",
    "constant",
    "count_ids",
    "creation_scope",
    "differentiate",
    "entry",
    "evaluator",
    "has_accelerator",
    "in_replica",
    "is_traced",
    "join_answers",
    "keep_layout",
    "keep_layout_of",
    "keep_random_state",
    "make_probe_tensor",
    "mean_square",
    "mean_squares_of_quotients",
    "one",
    "part",
    "pointwise_conv",
    "precise_matmul",
    "request_outside_of_steps",
    "reshape",
    "run_step",
    "stack",
    "step_number",
    "sum_min_max",
    "sum_over_replicas",
    "take",
    "tap",
    "view",
    "whole_layout",
    "window_mean",
]
