"""Averages of the weights, `use_ema=True`."""

from collections.abc import Sequence

import keras
from keras import ops

from keras_adafisher import backend

# The share of the steps so far that an average covers, with
# `ema_momentum="auto"`.
AVERAGED_SHARE = 0.1


class Averaging:
    """The part of `AdaFisher` that keeps averages of the weights."""

    # Keras reads one momentum for all steps from an attribute, and has no
    # public name for what can be overridden.
    def _update_model_variables_moving_average(self, trainable_variables):
        if self.ema_momentum != "auto":
            super()._update_model_variables_moving_average(trainable_variables)
            return
        share = self._share_of_new_weights()
        for variable, average in zip(
            trainable_variables,
            self._model_variables_moving_average,
            # Behind the weights are probes, which have no averages.
            strict=False,
        ):
            if average is not None:
                weight = (
                    share
                    if isinstance(share, float)
                    else ops.cast(share, average.dtype)
                )
                average.assign(
                    backend.lerp(
                        ops.convert_to_tensor(average),
                        ops.convert_to_tensor(variable),
                        weight,
                    )
                )

    def _share_of_new_weights(self):
        """How much the newest weights count in the averages.

        The first weights replace what an average begins with. Those that come
        `n` steps later count `1 / (1 + AVERAGED_SHARE * n)`. So in the end the
        weights of step `k` count about as much as a power of `k`, and the last
        tenth of the steps most: Shamir and Zhang, "Stochastic
        Gradient Descent for Non-smooth Optimization" (arXiv 1212.1824), section
        4; Karras et al., "Analyzing and Improving the Training Dynamics of
        Diffusion Models" (arXiv 2312.02696), section 3.1.

        Returns:
            Float or scalar tensor.
        """
        step = backend.step_number(self._iterations)
        if self.ema_overwrite_frequency:
            # Weights that are overwritten begin anew. Keras counts updates.
            step = step % (
                self.ema_overwrite_frequency
                * (self.gradient_accumulation_steps or 1)
            )
        if not isinstance(step, int):
            # Else it would become Keras' `floatx`, which may be float16.
            step = ops.cast(step, "float32")
        return 1 / (1 + AVERAGED_SHARE * step)

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        """Set the final value of model's trainable variables.

        `fit` calls it at its end.

        Args:
            var_list: list of model variables.
        """
        super().finalize_variable_values(var_list)
        if self.use_ema:
            # Keras has just assigned each average to its variable.
            for variable in var_list:
                backend.unshare(variable)
