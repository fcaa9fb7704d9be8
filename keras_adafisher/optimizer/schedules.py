"""A learning rate for training whose length nobody knows."""

from typing import Any

import keras
from keras import ops

from keras_adafisher.aliases import Tensor
from keras_adafisher.optimizer import arguments
from keras_adafisher.optimizer import update_rule


@keras.saving.register_keras_serializable(package="keras_adafisher")
class InverseSqrtDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A `LearningRateSchedule` that uses an inverse square root decay schedule.

    Together with averages of the weights (`use_ema=True, ema_momentum="auto"`)
    it takes the place of a schedule that has to know when training ends.
    `AdaFisher.anytime` sets both.

    It is computed as:

        def decayed_learning_rate(step):
            return initial_learning_rate / sqrt(1 + step / decay_steps)

    Args:
        initial_learning_rate: A float >= 0. The learning rate of the first
            step.
        decay_steps: A number > 0. After three times as many steps the learning
            rate is half of the initial one. Keras counts batches: with
            `gradient_accumulation_steps=n`, give `n` times as many. Defaults to
            `100`.
        name: String. Optional name of the operation. Defaults to
            `"InverseSqrtDecay"`.

    Returns:
        A 1-arg callable learning rate schedule that takes the current optimizer
        step and outputs the decayed learning rate, a scalar tensor of float32.

    Raises:
        ValueError: An argument is out of its range.

    References:
        - [Meterez et al., 2026](https://arxiv.org/abs/2602.03702), on
            schedules with averages that need no end
    """

    def __init__(
        self,
        initial_learning_rate: float,
        decay_steps: float = 100,
        name: str = "InverseSqrtDecay",
    ) -> None:
        super().__init__()
        self.initial_learning_rate = arguments.not_negative(kind=float).checked(
            "initial_learning_rate", initial_learning_rate
        )
        self.decay_steps = arguments.positive(kind=float).checked(
            "decay_steps", decay_steps
        )
        self.name = name

    def __call__(self, step: Tensor) -> Tensor:
        with keras.name_scope(self.name):
            # In half precision, there would be no number above 65,504.
            step = ops.cast(step, "float32")
            before = update_rule.past_the_largest(step + 1) - 1
            return self.initial_learning_rate * ops.rsqrt(
                1 + before / self.decay_steps
            )

    def get_config(self) -> dict[str, Any]:
        return {
            "initial_learning_rate": self.initial_learning_rate,
            "decay_steps": self.decay_steps,
            "name": self.name,
        }
