"""Which parameters of a model have Kronecker factors, and why others don't."""

import collections
import dataclasses
import io
import math

import keras
from keras import ops

from keras_adafisher.aliases import Shape
from keras_adafisher.integration.custom_loops import adafishers
from keras_adafisher.integration.layers import layers_in
from keras_adafisher.integration.wrapping import make_wrapper
from keras_adafisher.wrappers import wrapper_of


@dataclasses.dataclass(frozen=True)
class ParameterCoverage:
    """How one trainable parameter is updated.

    Attributes:
        layer: The path of the layer that owns it.
        parameter: The parameter's path.
        shape: Its shape.
        factors: Text that names the factors and their shapes, and says if
            they are estimated from the gradient, since the layer can't be
            measured or wasn't called in training. Empty if the parameter
            takes AdamW's rule.
        reason: Why there are no factors. Empty if there are.
        source: What the factors come from, by what happened in training so
            far: "measured", "estimated" from the gradient, or "not yet". Empty
            if the parameter takes AdamW's rule.
        direction: Along what its steps go: "diagonal", along the momentum
            divided by the Fisher diagonal; with `AdaFisherMuon`
            "orthogonalized" or "orthogonalized, root kept" for most kernels;
            "AdamW" without factors.
    """

    layer: str
    parameter: str
    shape: Shape
    factors: str
    reason: str
    source: str = ""
    direction: str = "AdamW"

    @property
    def count(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


class Coverage:
    """What `coverage` returns. Its text is a table.

    Attributes:
        rows: List of `ParameterCoverage`, one for each trainable parameter.
    """

    def __init__(self, name: str, rows: list[ParameterCoverage]) -> None:
        self.name = name
        self.rows = rows

    @property
    def factored_fraction(self) -> float:
        """The share of scalars that have factors, 0 to 1."""
        total = sum(row.count for row in self.rows)
        factored = sum(row.count for row in self.rows if row.factors)
        return factored / total if total else 0.0

    def __str__(self) -> str:
        import rich.console
        import rich.table

        table = rich.table.Table(show_lines=False)
        table.add_column("Parameter", overflow="fold")
        table.add_column("Shape")
        table.add_column("Param #", justify="right")
        table.add_column("Update", overflow="fold")
        for row in self.rows:
            table.add_row(
                row.parameter,
                str(row.shape),
                f"{row.count:,}",
                _update_of(row),
            )
        text = io.StringIO()
        console = rich.console.Console(
            file=text, width=100, markup=False, highlight=False
        )
        console.print(f'Coverage of model "{self.name}"')
        console.print(table)
        console.print(
            f"Kronecker factors for {100 * self.factored_fraction:.2f}% of "
            f"{sum(row.count for row in self.rows):,} trainable parameters"
        )
        return text.getvalue()

    __repr__ = __str__


def coverage(target: keras.Model | keras.layers.Layer) -> Coverage:
    """Tell for each trainable parameter of a model how AdaFisher updates it.

    The model needn't be wrapped, but built. If it is compiled with one of this
    package's optimizers, that one's way is told, else that of `AdaFisher`.

    ```python
    print(keras_adafisher.coverage(model))
    assert keras_adafisher.coverage(model).factored_fraction > 0.99
    ```

    Args:
        target: `keras.Model` or `keras.layers.Layer`.

    Returns:
        A `Coverage`.

    Raises:
        TypeError: `target` is neither.
        ValueError: `target` isn't built.
    """
    layers = layers_in("coverage", target)
    if not target.built:
        raise ValueError(
            f"Model '{target.name}' has not yet been built. Build it first "
            "by calling `build()` or by calling the model on a batch of data."
        )
    # From the outside to the inside: the innermost layer owns a variable.
    owners = {}
    factors = {}
    sources = {}
    reasons = {}
    # Dict from the id of a weight to a list of its blocks, the layer of each
    # and the optimizers that are built for it.
    uses = collections.defaultdict(list)
    for layer in layers:
        for variable in layer.variables:
            owners[id(variable)] = layer
        if not layer.built:
            continue
        wrapper, reason = wrapper_of(layer), ""
        if wrapper is None:
            wrapper, reason = make_wrapper(layer)
        reasons[id(layer)] = reason
        if wrapper is None:
            continue
        probes = wrapper.probes or [None] * len(wrapper.blocks)
        for block, probe in zip(wrapper.blocks, probes, strict=True):
            source, note = _source_of(block, probe)
            if block.weight is not None:
                built = [] if probe is None else list(probe.optimizers)
                uses[id(block.weight)].append((block, layer, built))
            for variable, text in _describe(block, note):
                # A weight that is used in two ways has two blocks.
                known = factors.get(id(variable))
                factors[id(variable)] = f"{known} + {text}" if known else text
                sources.setdefault(id(variable), source)

    compiled = list(adafishers(getattr(target, "optimizer", None)))
    rows = []
    for variable in target.trainable_variables:
        # Keras' mark for what its gradient replaces, such as the scales of
        # float8. No optimizer takes a step along it.
        if variable.overwrite_with_gradient:
            continue
        layer = owners[id(variable)]
        text = factors.get(id(variable), "")
        reason = reasons.get(id(layer)) or f"no factors for {variable.name}"
        direction = "diagonal" if text else "AdamW"
        if id(variable) in uses:
            direction = _direction_of(variable, uses[id(variable)], compiled)
        rows.append(
            ParameterCoverage(
                layer=layer.path or layer.name,
                parameter=variable.path,
                shape=tuple(variable.shape),
                factors=text,
                reason="" if text else reason,
                source=sources.get(id(variable), ""),
                direction=direction,
            )
        )
    return Coverage(target.name, rows)


def _direction_of(weight, uses, compiled):
    blocks, layers, built = zip(*uses, strict=True)
    # One that is compiled will be built; among several, who knows for what.
    candidates = built[0] or (compiled if len(compiled) == 1 else [])
    if not candidates:
        return "diagonal"
    return candidates[0].direction_of(weight, blocks, layers[0])


def _update_of(row):
    if not row.factors:
        return f"AdamW: {row.reason}"
    if row.direction == "diagonal":
        return row.factors
    return f"{row.factors}, {row.direction}"


def _source_of(block, probe):
    """What the factors of a block come from, and what to say of it."""
    records = [
        optimizer.records_of(probe)
        for optimizer in (() if probe is None else probe.optimizers)
        # One that has made no step yet has nothing to say.
        if ops.convert_to_numpy(optimizer.iterations) > 0
    ]
    taken = sum(record[0] for record in records)
    is_estimated = block.is_estimated or any(record[2] for record in records)
    note = ", estimated from the gradient" if is_estimated else ""
    if not taken:
        return "not yet", f"{note}, nothing so far" if records else note
    return "estimated" if is_estimated else "measured", note


def _describe(block, note):
    gradient = f"S {block.gradient_shape}{note}"
    if block.weight is not None:
        yield block.weight, f"H {block.activation_shape} x {gradient}"
    if block.bias is not None:
        yield block.bias, f"H of 1 x {gradient}"
