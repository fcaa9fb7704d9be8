"""AdaFisher: momentum divided by a Kronecker-factored Fisher diagonal.

The update of a weight, in one line:

    theta -= learning_rate * m / (H * S + damping)

`H` and `S` belong to the weight's layer. They come from the probes of its
wrapper, as gradients, in `apply`, and live here as optimizer variables.

This file has the arguments. What happens in a step is in `updates.py`, the
equations are in `update_rule.py`.
"""

import types
from typing import Any
from typing import Literal
from typing import Self

import keras

from keras_adafisher.aliases import LearningRate
from keras_adafisher.aliases import Normalization
from keras_adafisher.optimizer import arguments
from keras_adafisher.optimizer.averaging import Averaging
from keras_adafisher.optimizer.inspection import Inspection
from keras_adafisher.optimizer.measuring import Measuring
from keras_adafisher.optimizer.orthogonalizing import Orthogonalizing
from keras_adafisher.optimizer.schedules import InverseSqrtDecay
from keras_adafisher.optimizer.state import AtomicState
from keras_adafisher.optimizer.update_mixin import BackendUpdateMixin
from keras_adafisher.optimizer.updates import Updates


@keras.saving.register_keras_serializable(package="keras_adafisher")
class AdaFisher(
    Updates,
    Orthogonalizing,
    Measuring,
    Averaging,
    Inspection,
    AtomicState,
    BackendUpdateMixin,
    arguments.Hyperparameters,
    keras.optimizers.Optimizer,
):
    r"""Optimizer that implements the AdaFisher algorithm.

    AdaFisher is a second-order method. Where Adam divides the momentum by the
    square root of a running average of squared gradients, AdaFisher divides
    it by a diagonal approximation of the Fisher information:

        theta <- theta - learning_rate * m / (H * S + damping)

    `H` and `S` are running averages of two small vectors per layer, the mean
    square of the layer's inputs and the mean square of the gradients at its
    pre-activations, each normalized. There is no square root of a matrix or of
    a parameter's entries, and one momentum slot per parameter where Adam has
    two.

    The vectors are measured by wrappers around the layers.
    `model.compile(optimizer=AdaFisher())` wraps the model; in a custom
    training loop, call `keras_adafisher.wrap(model)` first.

    Parameters that no wrapper factors (`keras_adafisher.coverage(model)`
    lists them) are updated by AdamW's rule with the same `learning_rate`,
    `weight_decay` and first moment, Nesterov's or not.

    As published, the size of a step follows that of the gradient. By default,
    each parameter's step is divided by one more number, the root mean square
    over all entries of what its gradients, divided by `H * S + damping`, were
    lately (`rms_decay`), and no entry moves by more than the learning rate. So
    a step is about as large as Adam's, learning rates that suit Adam suit
    AdaFisher, and the scale of the loss doesn't matter.

    `AdaFisher.as_published()` is the update as published, with the settings of
    the authors' code.

    References:
        - [Martins Gomes et al., ICLR 2025](https://arxiv.org/abs/2405.16397)

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule` instance, or
            a callable that takes no arguments and returns the actual value to
            use. The learning rate. Defaults to `0.003`.
        beta: A float in [0, 1). The exponential decay rate of the momentum.
            Defaults to `0.9`.
        damping: A positive float, added to the Fisher diagonal. With
            `normalization="mean"` the diagonal is 1 on average. Defaults to
            `1.0`.
        gamma_1: A float in [0, 1). The share of the running factors that a
            new measurement replaces. Defaults to `0.2`.
        gamma_2: A float in [0, 1). The weight of a new measurement in the
            running factors. Defaults to `0.2`.
        factor_update_steps: A positive integer. The factors are measured
            every so many steps, the first step included. So are the mean
            squares of `rms_decay`, and at each of the first so many steps.
            Defaults to `10`.
        epsilon: A non-negative float, added to what a measurement is divided
            by to normalize it. Defaults to `0.0`, for which the normalization
            doesn't depend on the scale of the loss. The authors' code uses
            `1e-6`.
        normalization: "mean" or "min_max". What a measurement of `H` or `S`
            is divided by, so that layers compare: the mean of its entries, or
            their range after the smallest is taken off, as published, which
            puts them between 0 and 1. Defaults to `"mean"`.
        nesterov: Bool. Whether to apply Nesterov momentum. Defaults to `True`.
        rms_decay: A float in [0, 1) or `None`. The decay rate, per step, of
            the mean square over all entries of a parameter's gradient divided
            by `H * S + damping`. The parameter's steps are divided by its
            root, and their entries are bounded by the learning rate. `None`
            leaves both out, as published. One more number per parameter.
            Ours; the scale of a block is Adam-mini's (arXiv 2406.16793), the
            bound is Sophia's (arXiv 2305.14342). Defaults to `0.99`.
        adam_beta_2: A float in [0, 1). The decay rate of the second moment of
            parameters without factors. Defaults to `0.999`.
        adam_epsilon: A non-negative float, added to the square roots of that
            second moment and of the mean square of `rms_decay`. Defaults to
            `1e-7`.
        name: String. The name to use for momentum accumulator weights created
            by the optimizer. Defaults to "adafisher", and then
            "adafisher_1" and so on.
        weight_decay: Float. If set, weight decay is applied, decoupled from
            the gradient. (To add `weight_decay * theta` to the gradient, give
            layers a `kernel_regularizer=keras.regularizers.L2(weight_decay /
            2)`.)
        clipnorm: Float. If set, the gradient of each weight is individually
            clipped so that its norm is no higher than this value.
        clipvalue: Float. If set, the gradient of each weight is clipped to be
            no higher than this value.
        global_clipnorm: Float. If set, the gradient of all weights is clipped
            so that their global norm is no higher than this value.
        use_ema: Boolean, defaults to `False`. If `True`, exponential moving
            average (EMA) is applied, as in all Keras optimizers.
        ema_momentum: Float, or `"auto"` for an average over about a tenth of
            the steps so far, however many there will be. Defaults to 0.99, an
            average over about 100 steps. Only used if `use_ema=True`.
        ema_overwrite_frequency: Int or None, defaults to None. Only used if
            `use_ema=True`.
        loss_scale_factor: Float or `None`. If a float, the scale factor will
            be multiplied the loss before computing gradients, and the inverse
            of the scale factor will be multiplied by the gradients before
            updating variables.
        gradient_accumulation_steps: Int or `None`. If an int, model &
            optimizer variables will not be updated at every step; instead
            they will be updated every `gradient_accumulation_steps` steps,
            using the average value of the gradients since the last update.
            The factors are then measured on all steps that make up an update.

    Raises:
        ValueError: An argument is out of its range, when it is given or when
            the attribute of its name is assigned to, or there is no such
            argument.
        TypeError: `learning_rate` is a model or its parameters.
    """

    PUBLISHED = types.MappingProxyType(
        {
            "learning_rate": 1e-3,
            "damping": 1e-3,
            "gamma_1": 0.92,
            "gamma_2": 0.008,
            "factor_update_steps": 100,
            "epsilon": 1e-6,
            "normalization": "min_max",
            "nesterov": False,
            "rms_decay": None,
        }
    )

    def __init__(
        self,
        learning_rate: LearningRate = 0.003,
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
        weight_decay: float | None = None,
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
        arguments.check_names(kwargs, type(self))
        arguments.check_learning_rate(learning_rate)
        # All of them before Keras makes variables. What is assigned to them
        # later is checked by the same rules.
        for what, value in {
            "beta": beta,
            "damping": damping,
            "gamma_1": gamma_1,
            "gamma_2": gamma_2,
            "factor_update_steps": factor_update_steps,
            "epsilon": epsilon,
            "normalization": normalization,
            "nesterov": nesterov,
            "rms_decay": rms_decay,
            "adam_beta_2": adam_beta_2,
            "adam_epsilon": adam_epsilon,
            "weight_decay": weight_decay,
            "clipnorm": clipnorm,
            "clipvalue": clipvalue,
            "global_clipnorm": global_clipnorm,
            "ema_momentum": ema_momentum,
            "loss_scale_factor": loss_scale_factor,
            "gradient_accumulation_steps": gradient_accumulation_steps,
        }.items():
            arguments.check(what, value)
        if name is None:
            # As Keras names all optimizers. On its own it would begin with
            # "ada_fisher".
            name = self.__class__.__name__.lower()
            number = keras.backend.get_uid(name)
            name = name if number == 1 else f"{name}_{number - 1}"
        super().__init__(
            learning_rate=learning_rate,
            name=name,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            # Keras compares it with numbers.
            ema_momentum=0.99 if ema_momentum == "auto" else ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            **kwargs,
        )
        # Whether it has warned that nothing is measured, that most of it is
        # dropped, that kernels have no gradient, and that lists take turns.
        self._has_warned = False
        self._has_warned_of_dropped = False
        self._has_warned_of_missing = False
        self._has_warned_of_trained = False
        self._has_warned_of_turns = False
        # Sets of the numbers of parameters that it is applied to.
        self._applied_to = ()
        # A reference to the scale of the loss.
        self._loss_scale = lambda: None
        self.ema_momentum = ema_momentum
        self.beta = beta
        self.damping = damping
        self.gamma_1 = gamma_1
        self.gamma_2 = gamma_2
        self.factor_update_steps = factor_update_steps
        self.epsilon = epsilon
        self.normalization = normalization
        self.nesterov = nesterov
        self.rms_decay = rms_decay
        self.adam_beta_2 = adam_beta_2
        self.adam_epsilon = adam_epsilon

    @classmethod
    def as_published(cls, **overrides: Any) -> Self:
        """The method of the paper, with the settings of the authors' code.

        Args:
            **overrides: Arguments of the constructor, in place of `PUBLISHED`
                and the defaults.

        Returns:
            The optimizer, with `learning_rate=0.001`, `damping=0.001`,
            `gamma_1=0.92`, `gamma_2=0.008`, `factor_update_steps=100`,
            `epsilon=1e-6`, `normalization="min_max"`, `nesterov=False` and
            `rms_decay=None`.

        Raises:
            ValueError: As the constructor.
        """
        return cls(**{**cls.PUBLISHED, **overrides})

    @classmethod
    def anytime(
        cls, learning_rate: float, decay_steps: float = 100, **overrides: Any
    ) -> Self:
        """The optimizer for training that may stop at any time.

        The learning rate falls in proportion to one over the square root of the
        number of steps (`InverseSqrtDecay`), and the weights are averaged over
        about a tenth of the steps so far. Nobody has to know how many there
        will be: at any time, the averages are about as good as the weights that
        a cosine schedule ending at that step would leave.

        `fit` leaves the averages in the model at its end, and another `fit`
        begins with them. `keras.callbacks.SwapEMAWeights()` has them evaluated
        during training. Averages have the dtype of the weights, and those of
        half precision are too coarse for long training: take a `mixed_...`
        policy, whose weights are float32.

        Args:
            learning_rate: A float >= 0, that of the first step. About as much
                as for a cosine schedule: for `AdaFisherMuon` begin with 0.04,
                for the others with 0.005.
            decay_steps: A number > 0, see `InverseSqrtDecay`. Defaults to
                `100`.
            **overrides: Arguments of the constructor.

        Returns:
            The optimizer, with
            `learning_rate=InverseSqrtDecay(learning_rate, decay_steps)`,
            `use_ema=True` and `ema_momentum="auto"`.

        Raises:
            ValueError: As the constructors.
            TypeError: As the constructor.

        References:
            - [Meterez et al., 2026](https://arxiv.org/abs/2602.03702)
        """
        arguments.check_learning_rate(learning_rate)
        arguments.not_negative().checked("learning_rate", learning_rate)
        schedule = InverseSqrtDecay(learning_rate, decay_steps)
        averages = {"use_ema": True, "ema_momentum": "auto"}
        return cls(schedule, **{**averages, **overrides})

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "beta": self.beta,
                "damping": self.damping,
                "gamma_1": self.gamma_1,
                "gamma_2": self.gamma_2,
                "factor_update_steps": self.factor_update_steps,
                "epsilon": self.epsilon,
                "normalization": self.normalization,
                "nesterov": self.nesterov,
                "rms_decay": self.rms_decay,
                "adam_beta_2": self.adam_beta_2,
                "adam_epsilon": self.adam_epsilon,
            }
        )
        return config


def register(optimizer_class):
    """Let `keras.optimizers.get` find a class by its name.

    It looks names up as they are written.

    Args:
        optimizer_class: The class.
    """
    name = optimizer_class.__name__
    for known in (name, name.lower()):
        keras.saving.get_custom_objects()[known] = optimizer_class


register(AdaFisher)
