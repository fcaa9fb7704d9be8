"""Where `AdaFisher` meets what Keras calls between `apply` and `update_step`.

None of it is public, but what comes before it, `apply`, has gradients that
aren't clipped yet, and what comes after, `update_step`, one of them.
"""

from keras import backend as _keras_backend
from keras import ops

from keras_adafisher import backend


class _MeanSquares:
    def _mean_squares_of_quotients(self, gradients, fishers):
        """Means of the squared entries of `gradient / (fisher + damping)`.

        Args:
            gradients: List of float tensors.
            fishers: List of the `FisherDiagonal`s of their parameters.

        Returns:
            List of float32 scalars.
        """
        quotients = [
            ops.divide(ops.convert_to_tensor(gradient), fisher() + self.damping)
            for gradient, fisher in zip(gradients, fishers, strict=True)
        ]
        return [
            backend.mean_square(q, tuple(range(len(q.shape))))
            for q in quotients
        ]


class UpdateMixin(_MeanSquares):
    """What `AdaFisher` overrides of `keras.optimizers.Optimizer`."""

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._prepare_updates(grads, trainable_variables)
        super()._backend_update_step(grads, trainable_variables, learning_rate)


class TensorFlowUpdateMixin(_MeanSquares):
    """The same in replicas, whose gradients become one only later."""

    def _distributed_tf_update_step(
        self, distribution, grads_and_vars, learning_rate
    ):
        grads, variables = zip(*grads_and_vars, strict=True)
        # The same on each replica.
        grads = [distribution.experimental_local_results(g)[0] for g in grads]
        self._prepare_updates(grads, variables)
        super()._distributed_tf_update_step(
            distribution, grads_and_vars, learning_rate
        )


def _class_of_backend() -> type:
    if _keras_backend.backend() == "tensorflow":
        return TensorFlowUpdateMixin
    if _keras_backend.backend() == "torch":
        from keras_adafisher.optimizer.torch_update import TorchUpdateMixin

        return TorchUpdateMixin
    return UpdateMixin


# A class, since type checkers take no variable for a base.
class BackendUpdateMixin(_class_of_backend()):
    """That of the backend that runs."""
