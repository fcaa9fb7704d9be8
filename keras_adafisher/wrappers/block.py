"""Kronecker-factored blocks: one for each linear map inside a layer.

A block answers what has to be known about a map `z = W h + b` to factor its
Fisher information: the shapes of the two factors, how they are measured from
`h` and from `s = dL/dz`, how a measurement is normalized, and how the factors
make up the Fisher diagonal of the weight and of the bias.
"""

from collections.abc import Iterable

import keras

from keras_adafisher.aliases import Shape
from keras_adafisher.aliases import Tensor
from keras_adafisher.statistics import rank_one_factors
from keras_adafisher.wrappers.matrix_view import MatrixView


class Block:
    """One map `z = W h + b` with Kronecker factors `H` and `S`.

    Subclasses set `activation_shape` and `gradient_shape` and override
    `activation_statistic` and `gradient_statistic`.

    Args:
        weight: `keras.Variable`, `W`. `None` if the map has none.
        bias: `keras.Variable`, `b`. `None` if the map has none.

    Raises:
        TypeError: `weight` or `bias` is something else.

    Attributes:
        activation_shape: Shape of `H`.
        gradient_shape: Shape of `S`.
        bias_gradient_shape: Shape of the bias' own `S`. `None` if the bias
            shares the weight's, as it does in most layers.
        is_estimated: Bool. Whether the factors come from the gradient of the
            weight, not from a tap: see `GradientBlock`.
        normalizes_bias_input: Bool. Whether the entry 1 that `H` has for the
            bias takes part in the normalization, as in a dense map. It is 1
            after it otherwise.
        epsilon_scale: Number. Multiplies `AdaFisher`'s `epsilon`, for blocks
            whose `H` the authors' code divides by it.
    """

    activation_shape: Shape = ()
    gradient_shape: Shape = ()
    bias_gradient_shape: Shape | None = None
    is_estimated: bool = False
    normalizes_bias_input: bool = True
    epsilon_scale: float = 1

    def __init__(
        self, weight: keras.Variable | None, bias: keras.Variable | None = None
    ) -> None:
        for name, variable in (("weight", weight), ("bias", bias)):
            if variable is not None and not isinstance(
                variable, keras.Variable
            ):
                raise TypeError(
                    f"Argument `{name}` of `{self.__class__.__name__}` must be "
                    "a `keras.Variable` or `None`. "
                    f"Received: {name}={variable} (of type {type(variable)})"
                )
        self.weight = weight
        self.bias = bias

    @property
    def parameters(self) -> list[keras.Variable]:
        """The variables that this block factors."""
        return [v for v in (self.weight, self.bias) if v is not None]

    @property
    def takes_slices(self) -> bool:
        """Whether `fisher_of_weight` takes slices of the factors too.

        They are those that belong to a slice of the weight's first axis. Then
        large weights are updated in parts, and take less memory.
        """
        cls = type(self)
        has_own = cls.operands_of_weight is not Block.operands_of_weight
        return self.has_operands_of_weight and not has_own

    @property
    def has_operands_of_weight(self) -> bool:
        """Whether `fisher_of_weight` is the product of two tensors."""
        return type(self).fisher_of_weight is Block.fisher_of_weight

    @property
    def has_operands_of_bias(self) -> bool:
        """Whether `fisher_of_bias` is the product of two tensors."""
        return type(self).fisher_of_bias is Block.fisher_of_bias

    def matrix_view(self) -> MatrixView | None:
        """How the weight is a matrix, or several: inputs by outputs.

        `AdaFisherMuon` orthogonalizes the steps of such weights.

        Returns:
            A `MatrixView`, or `None` for weights that are none, such as those
            of embeddings and normalizations.
        """
        return None

    def activation_statistic(self, h: Tensor) -> Tensor:
        """Mean of `h²` over batch and positions, per input coordinate.

        Args:
            h: The activations that enter the map.

        Returns:
            Float32 tensor with the entries of `activation_shape` in their
            order. Its axes don't matter.
        """
        raise NotImplementedError(
            f"{self.__class__.__name__} must override `activation_statistic()`."
        )

    def gradient_statistic(self, s: Tensor) -> Tensor:
        """Mean of `s²` over batch and positions, per output coordinate.

        Args:
            s: The gradient of the loss at the map's output.

        Returns:
            Float32 tensor with the entries of `gradient_shape` in their order
            or, with an override of `split_gradient`, of any that this takes.
        """
        raise NotImplementedError(
            f"{self.__class__.__name__} must override `gradient_statistic()`."
        )

    def split_gradient(self, statistic: Tensor) -> tuple[Tensor, Tensor | None]:
        """Get `S`, and the bias' own `S`, from what was measured.

        Args:
            statistic: What `gradient_statistic` returned.

        Returns:
            A tensor with the entries of `gradient_shape`, and one with those
            of `bias_gradient_shape` or `None`.
        """
        return statistic, None

    def estimate_from_gradient(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate `H` and `S` from the gradient of the weight alone.

        For where nothing can be measured: see `GradientBlock`.

        Args:
            gradient: Tensor of the weight's shape.

        Returns:
            Float32 tensors of shapes `activation_shape` and `gradient_shape`,
            each up to a factor that the normalization removes.
        """
        return rank_one_factors(
            gradient, self.activation_shape, self.gradient_shape
        )

    def fisher_of_weight(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """The Fisher diagonal of the weight, undamped.

        Args:
            activation: Tensor of shape `activation_shape`, the running `H`.
            gradient: Tensor of shape `gradient_shape`, the running `S`.

        Returns:
            A new tensor that broadcasts to the weight's shape. The caller may
            overwrite it.
        """
        activation, gradient = self.operands_of_weight(activation, gradient)
        return activation * gradient

    def operands_of_weight(
        self, activation: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two tensors whose product `fisher_of_weight` is.

        On PyTorch, those of all blocks are multiplied together.

        Args:
            activation, gradient: See `fisher_of_weight`.
        """
        return activation, gradient

    def fisher_of_bias(self, bias_input: Tensor, gradient: Tensor) -> Tensor:
        """The Fisher diagonal of the bias, undamped.

        Args:
            bias_input: Scalar tensor, the running factor of the input that is
                always 1.
            gradient: The running `S`, of shape `bias_gradient_shape` if the
                bias has its own, else of shape `gradient_shape`.

        Returns:
            A new tensor that broadcasts to the bias' shape. The caller may
            overwrite it.
        """
        bias_input, gradient = self.operands_of_bias(bias_input, gradient)
        return bias_input * gradient

    def operands_of_bias(
        self, bias_input: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two tensors whose product `fisher_of_bias` is.

        Args:
            bias_input, gradient: See `fisher_of_bias`.
        """
        return bias_input, gradient


class GradientBlock(Block):
    """A map whose factors are estimated from its weight's gradient.

    For maps that no tap can reach: those of a recurrent layer, which run in one
    fused kernel on most devices, or those of a layer whose code can't be taken
    apart.

    For one example, the weight's gradient is `g = h sᵀ`. The mean of `g²` over
    the outputs is `H` times a constant, its mean over the inputs is `S` times a
    constant, and the normalization removes the constants: the estimate is
    exact. For the sum over many independent examples, `g²` has the expectation
    `H ⊗ S` times their number as far as `h²` and `s²` are independent and `g`
    has mean zero: the estimate is `H` and `S` plus noise. Where the mean of `g`
    outweighs its noise, as in full batches, it tends to the rank-one factors of
    that mean's square instead. Ours; the fit is Adafactor's.

    An axis that both factors have, one of experts for instance, holds one map
    for each of its positions, and each gets a fit of its own.

    A layer that has a wrapper but isn't called, since other code reads its
    kernel, is estimated in the same way, whatever its blocks are.

    Args:
        weight: Variable.
        activation_shape: Shape of `H`, which broadcasts to the weight's.
        gradient_shape: Shape of `S`, which broadcasts to the weight's.
        bias: Variable, or `None`. It takes `S`, and 1 for `H`.
        view: `MatrixView` of the weight. Defaults to `None`: see
            `Block.matrix_view`.
    """

    is_estimated = True

    def __init__(
        self,
        weight: keras.Variable | None,
        activation_shape: Iterable[int],
        gradient_shape: Iterable[int],
        bias: keras.Variable | None = None,
        view: MatrixView | None = None,
    ) -> None:
        super().__init__(weight, bias)
        self.activation_shape = tuple(activation_shape)
        self.gradient_shape = tuple(gradient_shape)
        self._view = view

    def matrix_view(self) -> MatrixView | None:
        return self._view
