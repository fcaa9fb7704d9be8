"""Kronecker-factored blocks: one for each linear map inside a layer.

A block answers what has to be known about a map `z = W h + b` to factor its
Fisher information: the shapes of the two factors, how they are measured from
`h` and from `s = dL/dz`, how a measurement is normalized, and how the factors
make up the Fisher diagonal of the weight and of the bias.
"""

from keras import ops

from keras_adafisher import factors


class Block:
    """One map `z = W h + b` with Kronecker factors `H` and `S`.

    Subclasses set `activation_shape` and `gradient_shape` and override
    `activation_statistic` and `gradient_statistic`.

    Args:
        weight: `keras.Variable`, `W`. `None` if the map has none.
        bias: `keras.Variable`, `b`. `None` if the map has none.

    Attributes:
        activation_shape: Shape of `H`.
        gradient_shape: Shape of `S`.
        bias_gradient_shape: Shape of the bias' own `S`. `None` if the bias
            shares the weight's, as it does in most layers.
    """

    activation_shape = ()
    gradient_shape = ()
    bias_gradient_shape = None

    def __init__(self, weight, bias=None):
        self.weight = weight
        self.bias = bias

    @property
    def parameters(self):
        """The variables that this block factors."""
        return [v for v in (self.weight, self.bias) if v is not None]

    @property
    def gradient_statistic_shape(self):
        """Shape of what `gradient_statistic` returns."""
        return self.gradient_shape

    def activation_statistic(self, h):
        """Mean of `h²` over batch and positions, per input coordinate.

        Args:
            h: The activations that enter the map.

        Returns:
            Float32 tensor of shape `activation_shape`.
        """
        raise NotImplementedError(
            f"{self.__class__.__name__} must override `activation_statistic()`."
        )

    def gradient_statistic(self, s):
        """Mean of `s²` over batch and positions, per output coordinate.

        Args:
            s: The gradient of the loss at the map's output.

        Returns:
            Float32 tensor of shape `gradient_statistic_shape`.
        """
        raise NotImplementedError(
            f"{self.__class__.__name__} must override `gradient_statistic()`."
        )

    def split_gradient(self, statistic):
        """Get `S`, and the bias' own `S`, from what was measured.

        Args:
            statistic: Tensor of shape `gradient_statistic_shape`.

        Returns:
            A tensor of shape `gradient_shape`, and one of shape
            `bias_gradient_shape` or `None`.
        """
        return statistic, None

    def normalize_activation(self, statistic, epsilon):
        """Normalize a measured `H` and the entry 1 that belongs to the bias.

        Args:
            statistic: Tensor of shape `activation_shape`.
            epsilon: Float, see `factors.min_max`.

        Returns:
            A tensor like `statistic` and a scalar tensor.
        """
        if self.bias is None:
            return factors.min_max(statistic, epsilon), ops.ones(())
        return factors.min_max_with_one(statistic, epsilon)

    def fisher_of_weight(self, activation, gradient):
        """The Fisher diagonal of the weight, undamped.

        Args:
            activation: Tensor of shape `activation_shape`, the running `H`.
            gradient: Tensor of shape `gradient_shape`, the running `S`.

        Returns:
            Tensor that broadcasts to the weight's shape.
        """
        return activation * gradient

    def fisher_of_bias(self, one, gradient):
        """The Fisher diagonal of the bias, undamped.

        Args:
            one: Scalar tensor, the running factor of the input that is 1.
            gradient: The running `S`, of shape `bias_gradient_shape` if the
                bias has its own, else of shape `gradient_shape`.

        Returns:
            Tensor that broadcasts to the bias' shape.
        """
        return one * gradient
