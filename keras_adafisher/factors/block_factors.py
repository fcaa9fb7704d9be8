"""The factors of one block, and the Fisher diagonal of one parameter."""

import functools
import math

import keras

from keras_adafisher import backend


class BlockFactors:
    """The running factors of one block.

    Args:
        probe: The block's `Probe`.
        vector: The variable that has the factors of all blocks.
        places: Dict from the name of a factor to where it begins in the vector,
            and its shape. The names are those of the parts of an answer, in
            their order: "bias_input", the factor of the input that is always 1
            (a block without a bias doesn't read it), "activation", "gradient",
            and "bias_gradient" if the bias has an `S` of its own.

    Attributes:
        key: What is equal for the blocks of one weight.
        is_estimated: Bool. Whether the last measurement was an estimate from
            the weight's gradient.
        held: Dict from a factor's name to its entries, while the vector isn't
            to be read for each: see `FactorStore.hold`.
    """

    def __init__(self, probe, vector, places):
        self.probe = probe
        self.block = probe.block
        self.vector = vector
        self.places = places
        self.key = id(self.block.parameters[0])
        self.is_estimated = self.block.is_estimated
        self.held = {}
        self._views = {}

    def factor(self, name):
        """One of the running factors, a tensor. `None` if there is none."""
        if name not in self.places:
            return None
        start, shape = self.places[name]
        if name in self.held:
            return backend.reshape(self.held[name], shape)
        return backend.view(
            self.vector,
            lambda vector: _part(vector, start, shape, self.vector),
            self._views,
            name,
        )

    @property
    def activation(self):
        """`H` of the weight."""
        return self.factor("activation")

    @property
    def gradient(self):
        """`S` of the weight."""
        return self.factor("gradient")

    @property
    def bias_input(self):
        """`H` of the bias, a scalar. `None` without a bias."""
        return None if self.block.bias is None else self.factor("bias_input")

    @property
    def bias_gradient(self):
        """`S` of the bias. `None` without a bias."""
        if self.block.bias is None:
            return None
        return self.factor(self._name_of_bias_gradient)

    @property
    def _name_of_bias_gradient(self):
        has_own = "bias_gradient" in self.places
        return "bias_gradient" if has_own else "gradient"

    def of_matrices(self, view):
        """The weight's factors, for each of its matrices.

        Args:
            view: The weight's `MatrixView`.

        Returns:
            Those of the matrices' rows, and those of their columns: two tensors
            of shape `(maps, entries)`.
        """

        def split(_=None):
            return view.split_factors(self.activation, self.gradient)

        if self.held:
            return split()
        return backend.view(self.vector, split, self._views, "of matrices")

    def terms(self):
        """List of tuples: what the block adds to Fisher diagonals.

        A parameter, a function for the diagonal, one for the two tensors whose
        product it is, `None` if it is none, a bool, whether both can be called
        with `cut`, and a function for `FisherDiagonal.factor_places`.
        """
        block = self.block
        of_weight = of_bias = None
        if block.has_operands_of_weight:
            of_weight = self.operands_of_weight
        if block.has_operands_of_bias:
            of_bias = self.operands_of_bias
        places_of_weight = functools.partial(
            self._places_of_operands,
            block.operands_of_weight,
            "activation",
            "gradient",
        )
        places_of_bias = functools.partial(
            self._places_of_operands,
            block.operands_of_bias,
            "bias_input",
            self._name_of_bias_gradient,
        )
        terms = [
            (
                block.weight,
                self.fisher_of_weight,
                of_weight,
                block.takes_slices,
                places_of_weight,
            ),
            (block.bias, self.fisher_of_bias, of_bias, False, places_of_bias),
        ]
        return [term for term in terms if term[0] is not None]

    def _places_of_operands(self, operands_of, *names):
        """The places of two factors, if a method returns them as they are."""
        places = [self.places[name] for name in names]
        factors = [keras.KerasTensor(shape, "float32") for _, shape in places]
        operands = operands_of(*factors)
        is_same = all(x is y for x, y in zip(operands, factors, strict=True))
        return places if is_same else None

    def pair_of(self, parameter):
        """`H` and `S` of the block's weight or of its bias."""
        if parameter is self.block.weight:
            return self.activation, self.gradient
        return self.bias_input, self.bias_gradient

    def fisher_of_weight(self, cut=None):
        return self.block.fisher_of_weight(*self._factors_of_weight(cut))

    def operands_of_weight(self, cut=None):
        return self.block.operands_of_weight(*self._factors_of_weight(cut))

    def fisher_of_bias(self):
        return self.block.fisher_of_bias(self.bias_input, self.bias_gradient)

    def operands_of_bias(self):
        return self.block.operands_of_bias(self.bias_input, self.bias_gradient)

    def _factors_of_weight(self, cut):
        factors = [self.activation, self.gradient]
        if cut is not None:
            rank = len(self.block.weight.shape)
            factors = [_cut_out(factor, cut, rank) for factor in factors]
        return factors


def factor_shapes(block):
    """Dict from the name of each factor of a block to its shape."""
    shapes = {
        "bias_input": (),
        "activation": block.activation_shape,
        "gradient": block.gradient_shape,
    }
    if block.bias_gradient_shape is not None:
        shapes["bias_gradient"] = block.bias_gradient_shape
    return shapes


def names_of_segments(block, normalization):
    """Which of a block's factors are normalized together.

    Args:
        block: `Block`.
        normalization: `Normalization`.

    Returns:
        List of lists of names, those of each segment.
    """
    bias_input, activation, *others = factor_shapes(block)
    takes_part = block.bias is not None and block.normalizes_bias_input
    if takes_part and normalization.joins_bias_input:
        return [[bias_input, activation], *([name] for name in others)]
    return [[bias_input], [activation], *([name] for name in others)]


class FisherDiagonal:
    """The undamped Fisher diagonal of one parameter, computed when called.

    The sum over the blocks that it belongs to. It is false if there are none.

    Args:
        vector: The variable that has the factors of all blocks.

    Attributes:
        factors_of_weight: List of the `BlockFactors` that the parameter is the
            weight of, so that its gradient may have to estimate them.
        takes_slices: Bool, whether it can be called with `cut`.
        kept: On PyTorch, what `operands()` returned, and for which tensor.
    """

    def __init__(self, vector):
        self.vector = vector
        self._terms = []
        self._operands = self._places = None
        self.factors_of_weight = []
        self.takes_slices = True
        self.kept = None

    def add(self, function, operands, takes_slices, places):
        """Add what a block has: see `BlockFactors.terms`."""
        # Those of the only term. A sum has none.
        self._operands = None if self._terms else operands
        self._places = places
        self._terms.append(function)
        self.takes_slices = self.takes_slices and takes_slices

    def __bool__(self):
        return bool(self._terms)

    def __call__(self, cut=None):
        """A new tensor that broadcasts to the parameter's shape.

        Args:
            cut: Slice of the first axis, if `takes_slices`. Defaults to all.
        """
        first, *others = (
            term() if cut is None else term(cut) for term in self._terms
        )
        return sum(others, start=first)

    @functools.cached_property
    def factor_places(self):
        """Where each of `operands()` begins in the vector, and its shape.

        Two pairs. `None` if the operands aren't there as they are. Read on JAX
        only.
        """
        return None if self._operands is None else self._places()

    def operands(self, cut=None):
        """The two tensors whose product it is. `None` if it is none.

        Args:
            cut: See `__call__`.
        """
        if self._operands is None:
            return None
        return self._operands() if cut is None else self._operands(cut)


def _part(vector, start, shape, variable):
    """Neighbouring entries of a vector, as a tensor of some shape."""
    entries = backend.part(vector, start, math.prod(shape))
    # Otherwise JAX' compiler splits the vector like what it is used with, and
    # sends the entries to where they belong at each step.
    entries = backend.constrain_layout(entries, variable)
    return backend.reshape(entries, shape)


def _cut_out(factor, cut, rank):
    """The part of a factor that a slice of a parameter meets."""
    has_axis = len(factor.shape) == rank and factor.shape[0] > 1
    return factor[cut] if has_axis else factor
