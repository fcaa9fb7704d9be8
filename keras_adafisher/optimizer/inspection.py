"""What can be seen of an optimizer: factors, preconditioners, step sizes."""

import typing
from collections.abc import Sequence

import keras
from keras import ops

from keras_adafisher.aliases import Tensor
from keras_adafisher.optimizer import update_rule
from keras_adafisher.wrappers.block import Block

# Of float32.
_SMALLEST_NORMAL = 1.1754944e-38


class KroneckerFactors(typing.NamedTuple):
    """What `AdaFisher.factors` returns.

    Attributes:
        activation: Float32 tensor, `H`: the normalized mean square of the
            layer's inputs. The scalar 1, about, for a bias. For a weight that
            is used in several ways, such as tied embeddings, a tuple with that
            of each.
        gradient: Float32 tensor, `S`: the normalized mean square of the
            gradients at the layer's pre-activations. A tuple as `activation`.
        fisher_diagonal: Float32 tensor of the parameter's shape, `H * S`,
            summed over the ways that the weight is used in.
    """

    activation: Tensor
    gradient: Tensor
    fisher_diagonal: Tensor


class Inspection:
    """The part of `AdaFisher` that shows what it has."""

    @property
    def factored_variables(self) -> list[keras.Variable]:
        """The variables that the optimizer has Kronecker factors for.

        In the order in which it was built with them; none before that.
        """
        if not self.built:
            return []
        return [
            variable
            for variable, fisher in zip(
                self._trainable_variables, self._fishers, strict=True
            )
            if fisher
        ]

    def factors(self, variable: keras.Variable) -> KroneckerFactors:
        """The running Kronecker factors of a parameter.

        ```python
        h, s, fisher = optimizer.factors(layer.kernel)
        ```

        Args:
            variable: A variable that the optimizer was built with.

        Returns:
            `KroneckerFactors`: `H`, `S` and the undamped Fisher diagonal.

        Raises:
            ValueError: The optimizer doesn't know the variable, or updates it
                by AdamW's rule.
        """
        index = self._factored_index(variable)
        found = [
            factors.pair_of(parameter)
            for factors in self._store.block_factors
            for parameter in factors.block.parameters
            if self._index_of(parameter) == index
        ]
        activations, gradients = zip(*found, strict=True)
        if len(found) == 1:
            (activations,), (gradients,) = activations, gradients
        return KroneckerFactors(
            activations, gradients, self.fisher_diagonal(variable)
        )

    def fisher_diagonal(self, variable: keras.Variable) -> Tensor:
        """The Fisher diagonal of a parameter, undamped.

        Args:
            variable: A variable that the optimizer was built with.

        Returns:
            Float32 tensor of the variable's shape, `H * S`.

        Raises:
            ValueError: As `factors`.
        """
        index = self._factored_index(variable)
        return ops.broadcast_to(self._fishers[index](), variable.shape)

    def preconditioner(self, variable: keras.Variable) -> Tensor:
        """What a parameter's momentum is divided by.

        Args:
            variable: A variable that the optimizer was built with.

        Returns:
            Float32 tensor of the variable's shape, `H * S + damping`.

        Raises:
            ValueError: As `factors`.
        """
        index = self._factored_index(variable)
        return ops.broadcast_to(self._fisher(index), variable.shape)

    def _factored_index(self, variable):
        """The number of a parameter with factors, or a `ValueError`."""
        if not self.built:
            raise ValueError(
                f"Optimizer '{self.name}' has no Kronecker factors yet. Train "
                "a step first, or build it: "
                "`optimizer.build(model.trainable_variables)`."
            )
        index = self._index_of(variable)
        if index is None or not self._fishers[index]:
            name = getattr(variable, "path", variable)
            raise ValueError(
                "Argument `variable` must be a variable that the optimizer "
                "has Kronecker factors for. "
                "`keras_adafisher.coverage(model)` lists them. "
                f"Received: variable={name}"
            )
        return index

    def effective_learning_rate(self, variable: keras.Variable) -> Tensor:
        """What the last update multiplied each entry of the momentum by.

        So what an entry moved by, without weight decay, is this times its
        momentum. With Nesterov's momentum, of which the optimizer doesn't keep
        what an update used, the bound of `rms_decay` is taken to be that of the
        momentum that it keeps. The learning rate is the present one: with a
        schedule, that of the update that comes next.

        Args:
            variable: A variable that the optimizer was built with.

        Returns:
            Float32 tensor of the variable's shape: the learning rate, corrected
            for that the momentum started at zero, divided by
            `preconditioner(variable)` and, with `rms_decay`, by the root mean
            square of the preconditioned gradients, but so that no entry moved
            by more than the learning rate. Before the first update, zeros.

        Raises:
            ValueError: As `factors`, or the parameter's steps are
                orthogonalized (`AdaFisherMuon`).
        """
        index = self._factored_index(variable)
        if self.orthogonalizes(variable):
            raise ValueError(
                "Argument `variable` must be a variable whose momentum is "
                "divided entry by entry. The steps of this one are "
                f"orthogonalized. Received: variable={variable.path}"
            )
        updates = ops.convert_to_tensor(self.iterations)
        lr = ops.cast(self._own_learning_rate(self.learning_rate), "float32")
        step = update_rule.past_the_largest(ops.cast(updates, "float32"))
        correction = update_rule.momentum_correction(
            self.beta, step, self.nesterov
        )
        rate = lr * correction
        if self._mean_squares is not None:
            roots = self._mean_squares.roots(updates - 1, self.adam_epsilon)
            rate = rate / self._mean_squares.of(roots, index)
        found = rate / self.preconditioner(variable)
        if self._mean_squares is not None:
            momentum = ops.cast(self._momentums[index], "float32")
            # As large as the momentum that the update used.
            momentum = momentum * (
                update_rule.momentum_correction(self.beta, step, False)
                / correction
            )
            # An entry without momentum hasn't moved, by whatever it was
            # multiplied.
            bound = lr / ops.maximum(ops.abs(momentum), _SMALLEST_NORMAL)
            found = ops.minimum(found, bound)
        return ops.where(updates == 0, ops.zeros_like(found), found)

    def orthogonalizes(self, variable: keras.Variable) -> bool:
        """Whether the steps of a parameter are orthogonalized.

        Args:
            variable: A variable that the optimizer was built with.

        Returns:
            Bool: `True` for most kernels of `AdaFisherMuon`, which have no
            `effective_learning_rate`.

        Raises:
            ValueError: As `factors`.
        """
        index = self._factored_index(variable)
        return self._orthogonal is not None and index in (
            self._orthogonal.kernels
        )

    def direction_of(
        self,
        weight: keras.Variable,
        blocks: Sequence[Block],
        layer: keras.layers.Layer,
    ) -> str:
        """Along what the steps of a weight with factors go.

        Args:
            weight: Variable.
            blocks: List of the `Block`s that it belongs to.
            layer: The layer that it belongs to.

        Returns:
            String: "diagonal", along the momentum divided by the Fisher
            diagonal. `AdaFisherMuon` has others.
        """
        return "diagonal"
