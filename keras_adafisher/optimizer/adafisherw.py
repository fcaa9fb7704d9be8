"""AdaFisherW: AdaFisher with decoupled weight decay."""

from typing import Any
from typing import Literal

import keras

from keras_adafisher.aliases import LearningRate
from keras_adafisher.aliases import Normalization
from keras_adafisher.optimizer import arguments
from keras_adafisher.optimizer.adafisher import AdaFisher
from keras_adafisher.optimizer.adafisher import register


@keras.saving.register_keras_serializable(package="keras_adafisher")
class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay.

    `AdaFisher` with another default:

        theta <- theta - learning_rate * (clip(m / F / rms(g / F), -1, 1)
                                          + weight_decay * theta)

    where `F = H * S + damping`. With `rms_decay=None`, as published, the
    first term is `m / F`.

    References:
        - [Martins Gomes et al., ICLR 2025](https://arxiv.org/abs/2405.16397)

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule` instance, or
            a callable that takes no arguments and returns the actual value to
            use. The learning rate. Defaults to `0.003`.
        weight_decay: Float. What weights are multiplied by, times the learning
            rate, and made smaller by, at each step. The second argument, as in
            `keras.optimizers.AdamW`. Defaults to `0.1`.

    All other arguments are those of `keras_adafisher.AdaFisher`, in its order.
    """

    def __init__(
        self,
        learning_rate: LearningRate = 0.003,
        weight_decay: float | None = 0.1,
        beta: float = 0.9,
        damping: float = 1.0,
        gamma_1: float = 0.2,
        gamma_2: float = 0.2,
        factor_update_steps: int = 10,
        epsilon: float = 0.0,
        normalization: Normalization = "mean",
        nesterov: bool = True,
        rms_decay: float | None = 0.99,
        adam_beta_2: float = 0.999,
        adam_epsilon: float = 1e-7,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float | Literal["auto"] = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        arguments.check("weight_decay", weight_decay, is_optional=False)
        super().__init__(
            learning_rate=learning_rate,
            beta=beta,
            damping=damping,
            gamma_1=gamma_1,
            gamma_2=gamma_2,
            factor_update_steps=factor_update_steps,
            epsilon=epsilon,
            normalization=normalization,
            nesterov=nesterov,
            rms_decay=rms_decay,
            adam_beta_2=adam_beta_2,
            adam_epsilon=adam_epsilon,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )


register(AdaFisherW)
