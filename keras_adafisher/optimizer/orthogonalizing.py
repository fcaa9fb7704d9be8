"""The steps of kernels that are orthogonalized, in an update."""

import functools
import warnings

from keras_adafisher import backend
from keras_adafisher.optimizer.measuring import values_in_branch


class Orthogonalizing:
    """The part of `AdaFisher` that finds orthogonalized steps.

    For `AdaFisherMuon`. `AdaFisher` has none, and asks for nothing here.
    """

    def _make_orthogonal_steps(self, variables, add_variable):
        """Make what orthogonalizes steps, for subclasses that do.

        Args:
            variables: List of all variables.
            add_variable: `Optimizer.add_variable`, for statistics.

        Returns:
            `OrthogonalSteps` or, as here, `None`.
        """
        return None

    def _own_learning_rate(self, learning_rate):
        """The learning rate of parameters that take AdaFisher's own step.

        Args:
            learning_rate: Float or scalar tensor, that of all others.
        """
        return learning_rate

    def _weighted(self, index, gradient):
        """A gradient, as it counts for how large its parameter's steps are.

        Args:
            index: The parameter's number.
            gradient: Tensor.
        """
        return gradient

    def _find_directions(self, gradients, update):
        """Orthogonalize momentums, and make roots anew if it is time.

        Args:
            gradients: Dict from the numbers of parameters that are
                orthogonalized to their gradients, of those that have one.
            update: The number of this update.

        Returns:
            `_Update.directions`.
        """
        orthogonal = self._orthogonal
        moves = orthogonal.moves_at(update)
        if moves is not True:
            self._warn_of_missing_momentums(gradients)
        if moves is False:
            return dict.fromkeys(gradients)
        makes_roots = orthogonal.makes_roots_at(update)

        def directions(values_if):
            return orthogonal.directions(
                gradients,
                lambda indices: self._momentums_of_steps(
                    indices, [gradients[index] for index in indices]
                ),
                functools.partial(values_if, makes_roots),
            )

        if moves is True:
            # Roots are made anew at the steps that measure.
            found, roots = directions(self._values_if)
            if self._is_never(makes_roots):
                return found
        else:
            found, roots = backend.cond(
                moves,
                lambda: directions(values_in_branch),
                lambda: orthogonal.resting(gradients),
            )
        for variable, root in zip(orthogonal.roots, roots, strict=True):
            self.assign(variable, root)
        return found

    def _warn_of_missing_momentums(self, gradients):
        """Warn once of kernels that move less often than they should."""
        missing = [
            kernel.variable.path
            for index, kernel in self._orthogonal.kernels.items()
            if index not in gradients
        ]
        if not missing or self._has_warned_of_missing:
            return
        self._has_warned_of_missing = True
        warnings.warn(
            f"{', '.join(missing)} had no gradient in an update. With "
            f"`kernel_update_steps={self.kernel_update_steps}`, kernels move "
            "at one update in so many, and one that has no gradient in it "
            "stays. If these have gradients in other updates, as heads that "
            "are trained in turn, use `kernel_update_steps=1`.",
            stacklevel=2,
        )
