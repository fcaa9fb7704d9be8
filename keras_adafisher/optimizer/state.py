"""Loading the state of an optimizer: all of it or nothing."""

from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any


class AtomicState:
    """The part of `AdaFisher` that loads its variables."""

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Set the state of this optimizer object: all of it or nothing.

        Args:
            store: Dict from the number of each variable, a string, to its
                value. If it has another number of entries than the optimizer
                has variables, Keras warns and loads nothing.

        Raises:
            ValueError: A value is missing or has another shape.
        """
        names = list(store.keys())
        if len(names) == len(self.variables):
            # Keras finds out one by one, when the first ones are loaded. (Its
            # stores have a `get` that means something else.)
            needed = map(str, range(len(names)))
            self._check_state(
                [store[n] if n in names else None for n in needed]
            )
        super().load_own_variables(store)

    def set_weights(self, weights: Iterable[Any]) -> None:
        """Set the weights of the optimizer: all of them or none.

        Args:
            weights: List of arrays, one for each of `variables`.

        Raises:
            ValueError: The optimizer isn't built, or the number of arrays or
                a shape is wrong.
        """
        weights = list(weights)
        if self.built:
            if len(weights) != len(self.variables):
                raise ValueError(
                    "Argument `weights` of `set_weights` must have one array "
                    f"for each of the optimizer's {len(self.variables)} "
                    f"variables. Received: {len(weights)} arrays"
                )
            self._check_state(weights)
        super().set_weights(weights)

    def _check_state(self, values):
        """Raise a `ValueError` if not all values fit their variables."""
        for variable, value in zip(self.variables, values, strict=True):
            # A number is no array.
            shape = tuple(value.shape) if hasattr(value, "shape") else None
            if shape != tuple(variable.shape):
                raise ValueError(
                    f"The state of optimizer '{self.name}' doesn't fit, and "
                    f"nothing of it was loaded: variable '{variable.path}' "
                    f"has shape {tuple(variable.shape)}. Received: "
                    f"{'no array' if shape is None else f'shape {shape}'}. "
                    "Load it with the model and the optimizer's arguments "
                    "that it was saved with, or load the model alone, for "
                    "instance by `load_model(path, compile=False)`."
                )
