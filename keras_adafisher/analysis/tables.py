"""Tables of what `kronecker_factors` returned."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from keras_adafisher.analysis.full_factors import check_kronecker_factors
from keras_adafisher.analysis.full_factors import KroneckerFactors
from keras_adafisher.analysis.matrices import diagonal_energy
from keras_adafisher.analysis.matrices import gershgorin


def diagonal_energy_table(
    factors: KroneckerFactors | Iterable[KroneckerFactors],
) -> Any:
    """A table of how diagonal the factors of some layers are.

    ```python
    factors = analysis.kronecker_factors(model, x, y)
    rich.console.Console().print(analysis.diagonal_energy_table(factors))
    ```

    Args:
        factors: List of `KroneckerFactors`.

    Returns:
        `rich.table.Table` with a row for each: the size of `H` and of `S`, the
        share of the squared norm that is on the diagonal (`diagonal_energy`),
        and the share of rows in which the diagonal outweighs the rest
        (`GershgorinDisks.dominated_share`).

    Raises:
        TypeError: `factors` is anything else.
    """
    import rich.table

    several: Any = factors
    several = list(several) if np.iterable(several) else [several]
    for item in several:
        check_kronecker_factors("factors", item)
    table = rich.table.Table()
    table.add_column("Weight", overflow="fold")
    for name in ("H", "S"):
        table.add_column(f"{name}\nsize", justify="right")
        table.add_column(f"{name}, energy\non diagonal", justify="right")
        table.add_column(f"{name}, rows\ndominated", justify="right")
    for item in several:
        cells = [item.parameters[0]]
        for factor in (item.activation, item.gradient):
            cells += [
                str(len(factor)),
                f"{100 * diagonal_energy(factor):.1f} %",
                f"{100 * gershgorin(factor).dominated_share:.1f} %",
            ]
        table.add_row(*cells)
    return table
