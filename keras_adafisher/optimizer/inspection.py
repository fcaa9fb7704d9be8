"""What can be seen of an optimizer: factors, preconditioners, step sizes."""

import typing
from collections.abc import Sequence

import keras
from keras import ops

from keras_adafisher.aliases import Tensor
from keras_adafisher.wrappers.block import Block


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
            pair
            for curvature in self._curvatures
            for parameter, pair in curvature.pairs()
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
        """What each entry of a parameter's momentum is multiplied by.

        The momentum is meant without the bias of its start at zero. What comes
        out for an entry is how far it moves, with `rms_decay` by at most the
        learning rate.

        Args:
            variable: A variable that the optimizer was built with.

        Returns:
            Float32 tensor of the variable's shape: the learning rate divided
            by `preconditioner(variable)` and, with `rms_decay`, by the root
            mean square of the preconditioned gradients. Before the first
            update there is none, and the learning rate is divided by
            `preconditioner(variable)` only.

        Raises:
            ValueError: As `factors`, or the parameter's steps are
                orthogonalized (`AdaFisherMuon`).
        """
        denominator = self.preconditioner(variable)
        index = self._index_of(variable)
        if self.orthogonalizes(variable):
            raise ValueError(
                "Argument `variable` must be a variable whose momentum is "
                "divided entry by entry. The steps of this one are "
                f"orthogonalized. Received: variable={variable.path}"
            )
        if self._mean_squares is not None:
            last = ops.maximum(self.iterations - 1, 0)
            roots = self._mean_squares.roots(last, self.adam_epsilon)
            root = self._mean_squares.of(roots, index)
            denominator = denominator * ops.where(self.iterations > 0, root, 1)
        return ops.cast(self.learning_rate, "float32") / denominator

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
