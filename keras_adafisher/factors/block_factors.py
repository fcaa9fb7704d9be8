"""The factors of one block, and the Fisher diagonal of one parameter."""

import math

from keras_adafisher import backend


class BlockFactors:
    """The running factors of one block.

    Args:
        probe: The block's `Probe`.

    Attributes:
        places: Dict from the name of a factor to where it begins in the vector
            of all, and its shape. The names are those of the parts of an
            answer, in their order: "one", the factor of the input that is
            always 1 (a block without a bias doesn't read it), "activation",
            "gradient", and "bias_gradient" if the bias has an `S` of its own.
        vector: The variable that has the factors of all blocks.
        is_estimated: Bool. Whether the last measurement was an estimate from
            the weight's gradient.
    """

    def __init__(self, probe):
        self.probe = probe
        self.block = probe.block
        # Equal for the blocks of one weight. Once all are made, `FactorStore`
        # puts them into `blocks_of_weight`.
        self.key = id(self.block.parameters[0])
        self.blocks_of_weight = [self]
        self.places = {}
        self.vector = None
        self.is_estimated = self.block.is_estimated
        self._views = {}

    def factor(self, name):
        """One of the running factors, a tensor. `None` if there is none."""
        if name not in self.places:
            return None
        start, shape = self.places[name]
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
    def one(self):
        """`H` of the bias, a scalar. `None` without a bias."""
        return None if self.block.bias is None else self.factor("one")

    @property
    def bias_gradient(self):
        """`S` of the bias. `None` without a bias."""
        if self.block.bias is None:
            return None
        has_own = "bias_gradient" in self.places
        return self.factor("bias_gradient" if has_own else "gradient")

    def values(self):
        """List of all running factors."""
        names = [n for n in self.places if n != "one" or self.one is not None]
        return [self.factor(name) for name in names]

    def terms(self):
        """List of tuples: what the block adds to Fisher diagonals.

        A parameter, a function for the diagonal, one for the two tensors whose
        product it is, `None` if it is none, and a bool, whether both can be
        called with `rows`.
        """
        block = self.block
        of_weight = of_bias = None
        if block.has_operands_of_weight:
            of_weight = self.operands_of_weight
        if block.has_operands_of_bias:
            of_bias = self.operands_of_bias
        terms = [
            (block.weight, self.fisher_of_weight, of_weight, block.takes_rows),
            (block.bias, self.fisher_of_bias, of_bias, False),
        ]
        return [term for term in terms if term[0] is not None]

    def pairs(self):
        """List of tuples: a parameter, and its `H` and `S`."""
        pairs = [
            (self.block.weight, (self.activation, self.gradient)),
            (self.block.bias, (self.one, self.bias_gradient)),
        ]
        return [pair for pair in pairs if pair[0] is not None]

    def fisher_of_weight(self, rows=None):
        return self.block.fisher_of_weight(*self._factors_of_weight(rows))

    def operands_of_weight(self, rows=None):
        return self.block.operands_of_weight(*self._factors_of_weight(rows))

    def fisher_of_bias(self):
        return self.block.fisher_of_bias(self.one, self.bias_gradient)

    def operands_of_bias(self):
        return self.block.operands_of_bias(self.one, self.bias_gradient)

    def _factors_of_weight(self, rows):
        factors = [self.activation, self.gradient]
        if rows is not None:
            rank = len(self.block.weight.shape)
            factors = [_rows_of(factor, rows, rank) for factor in factors]
        return factors

    def shapes(self):
        """Dict from the name of each factor to its shape."""
        block = self.block
        shapes = {
            "one": (),
            "activation": block.activation_shape,
            "gradient": block.gradient_shape,
        }
        if block.bias_gradient_shape is not None:
            shapes["bias_gradient"] = block.bias_gradient_shape
        return shapes

    def rows(self, normalization):
        """List of the names of the factors that make up each row."""
        one, activation, *others = self.shapes()
        takes_part = self.block.bias is not None and self.block.normalizes_one
        if takes_part and normalization.joins_bias_input:
            return [[one, activation], *([name] for name in others)]
        return [[name] for name in self.shapes()]


class FisherDiagonal:
    """The undamped Fisher diagonal of one parameter, computed when called.

    The sum over the blocks that it belongs to. It is false if there are none.

    Args:
        vector: The variable that has the factors of all blocks.

    Attributes:
        takes_rows: Bool, whether it can be called with `rows`.
        kept: On PyTorch, what `operands()` returned, and for which tensor.
    """

    def __init__(self, vector):
        self.vector = vector
        self._terms = []
        self._operands = []
        self.takes_rows = True
        self.kept = None

    def add(self, function, operands, takes_rows):
        """Add what a block has: see `BlockFactors.terms`."""
        self._terms.append(function)
        self._operands.append(operands)
        self.takes_rows = self.takes_rows and takes_rows

    def __bool__(self):
        return bool(self._terms)

    def __call__(self, rows=None):
        """A new tensor that broadcasts to the parameter's shape.

        Args:
            rows: Slice of the first axis, if `takes_rows`. Defaults to all.
        """
        first, *others = (
            term() if rows is None else term(rows) for term in self._terms
        )
        return sum(others, start=first)

    def operands(self, rows=None):
        """The two tensors whose product it is. `None` if it is none.

        Args:
            rows: See `__call__`.
        """
        if len(self._operands) > 1 or self._operands[0] is None:
            return None
        (operands,) = self._operands
        return operands() if rows is None else operands(rows)


def _part(vector, start, shape, variable):
    """Neighbouring entries of a vector, as a tensor of some shape."""
    entries = backend.part(vector, start, math.prod(shape))
    # Otherwise JAX' compiler splits the vector like what it is used with, and
    # sends the entries to where they belong at each step.
    entries = backend.keep_layout(entries, variable)
    return backend.reshape(entries, shape)


def _rows_of(factor, rows, rank):
    """The part of a factor that some rows of a parameter meet."""
    has_rows = len(factor.shape) == rank and factor.shape[0] > 1
    return factor[rows] if has_rows else factor
