"""Where `AdaFisher` meets what Keras calls between `apply` and `update_step`.

None of it is public, but what comes before it, `apply`, has gradients that
aren't clipped yet, and what comes after, `update_step`, one of them.
"""

import math

import keras
import numpy as np
from keras import backend as _keras_backend
from keras import ops

from keras_adafisher import backend
from keras_adafisher.factors.segments import Segments

# On JAX, parameters of up to so many entries are measured together.
_JOINED_SIZE = 1024


class UpdateMixin:
    """What `AdaFisher` overrides of `keras.optimizers.Optimizer`, on JAX."""

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._prepare_updates(grads, trainable_variables)
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    def _mean_squares_of_quotients(self, gradients, fishers):
        """Means of the squared entries of `gradient / (fisher + damping)`.

        Args:
            gradients: List of float tensors.
            fishers: List of the `FisherDiagonal`s of their parameters.

        Returns:
            Float32 vector.
        """
        # With few kernels, which are most of what compiling takes. One by one,
        # biases, scales and the like take about three for each size there is.
        sizes = np.array([math.prod(g.shape) for g in gradients])
        is_joined = sizes <= _JOINED_SIZE
        if keras.distribution.distribution() is not None:
            # Pieces of what is split over devices don't fit together.
            is_joined[:] = False
        apart = np.flatnonzero(~is_joined)
        # Those that are products of two factors first.
        joined = sorted(
            np.flatnonzero(is_joined),
            key=lambda place: fishers[place].factor_places is None,
        )
        found = []
        if joined:
            squares = self._squares_of_quotients(
                ops.concatenate(
                    [ops.reshape(gradients[place], (-1,)) for place in joined]
                ),
                _joined_fishers(
                    [fishers[place] for place in joined],
                    [gradients[place].shape for place in joined],
                ),
            )
            found.append(Segments(sizes[joined]).mean(squares))
        if len(apart):
            # A library computes sums. All are divided in one kernel.
            sums = [
                ops.sum(
                    self._squares_of_quotients(
                        gradients[place], fishers[place]()
                    )
                )
                for place in apart
            ]
            found.append(ops.stack(sums) / sizes[apart].astype("float32"))
        order = np.argsort([*joined, *apart])
        return backend.take(ops.concatenate(found), order)

    def _squares_of_quotients(self, gradient, diagonal):
        quotient = ops.divide(gradient, diagonal + self.damping)
        return ops.square(ops.cast(quotient, "float32"))


def _joined_fishers(fishers, shapes):
    """The entries of some Fisher diagonals in one vector.

    Args:
        fishers: List of `FisherDiagonal`s, those that have `factor_places`
            first.
        shapes: List of the shapes of their parameters.
    """
    # Factors that are multiplied as they are, are read and multiplied together:
    # one by one, each shape would take a kernel.
    indices = [[], []]
    others = []
    for fisher, shape in zip(fishers, shapes, strict=True):
        if fisher.factor_places is None:
            others.append(ops.reshape(ops.broadcast_to(fisher(), shape), (-1,)))
            continue
        for found, (start, own_shape) in zip(
            indices, fisher.factor_places, strict=True
        ):
            entries = start + np.arange(math.prod(own_shape))
            entries = np.broadcast_to(entries.reshape(own_shape), shape)
            found.append(entries.ravel())
    if len(others) == len(fishers):
        return ops.concatenate(others)
    vector = ops.convert_to_tensor(fishers[0].vector)
    first, second = (
        backend.take(vector, backend.constant(np.concatenate(found), "int32"))
        for found in indices
    )
    return ops.concatenate([ops.multiply(first, second), *others])


class TensorFlowUpdateMixin:
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

    def _mean_squares_of_quotients(self, gradients, fishers):
        quotients = [
            ops.divide(ops.convert_to_tensor(gradient), fisher() + self.damping)
            for gradient, fisher in zip(gradients, fishers, strict=True)
        ]
        return backend.stack(
            [
                backend.mean_square(q, tuple(range(len(q.shape))))
                for q in quotients
            ]
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
