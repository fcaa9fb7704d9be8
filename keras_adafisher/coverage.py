"""Which parameters of a model have Kronecker factors, and why others don't."""

import dataclasses
import io
import math

from keras_adafisher.wrap import layers_in
from keras_adafisher.wrap import make_wrapper
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
    """

    layer: str
    parameter: str
    shape: tuple
    factors: str
    reason: str
    source: str = ""

    @property
    def count(self):
        """Number of scalars."""
        return math.prod(self.shape)


class Coverage:
    """What `coverage` returns. Its text is a table.

    Attributes:
        rows: List of `ParameterCoverage`, one for each trainable parameter.
    """

    def __init__(self, name, rows):
        self.name = name
        self.rows = rows

    @property
    def factored_fraction(self):
        """The share of scalars that have factors, 0 to 1."""
        total = sum(row.count for row in self.rows)
        factored = sum(row.count for row in self.rows if row.factors)
        return factored / total if total else 0.0

    def __str__(self):
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
                row.factors or f"AdamW: {row.reason}",
            )
        console = rich.console.Console(
            file=io.StringIO(), width=100, markup=False, highlight=False
        )
        console.print(f'Coverage of model "{self.name}"')
        console.print(table)
        console.print(
            f"Kronecker factors for {100 * self.factored_fraction:.2f}% of "
            f"{sum(row.count for row in self.rows):,} trainable parameters"
        )
        return console.file.getvalue()

    __repr__ = __str__


def coverage(target):
    """Tell for each trainable parameter of a model how AdaFisher updates it.

    The model needn't be wrapped, but built.

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
            for variable, text in _describe(block, note):
                # A weight that is used in two ways has two blocks.
                known = factors.get(id(variable))
                factors[id(variable)] = f"{known} + {text}" if known else text
                sources.setdefault(id(variable), source)

    rows = []
    for variable in target.trainable_variables:
        # Keras' mark for what its gradient replaces, such as the scales of
        # float8. No optimizer takes a step along it.
        if variable.overwrite_with_gradient:
            continue
        layer = owners[id(variable)]
        text = factors.get(id(variable), "")
        reason = reasons.get(id(layer)) or f"no factors for {variable.name}"
        rows.append(
            ParameterCoverage(
                layer=layer.path or layer.name,
                parameter=variable.path,
                shape=tuple(variable.shape),
                factors=text,
                reason="" if text else reason,
                source=sources.get(id(variable), ""),
            )
        )
    return Coverage(target.name, rows)


def _source_of(block, probe):
    """What the factors of a block come from, and what to say of it."""
    records = [
        optimizer.records_of(probe)
        for optimizer in (() if probe is None else probe.optimizers)
        # One that has made no step yet has nothing to say.
        if int(optimizer.iterations) > 0
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
