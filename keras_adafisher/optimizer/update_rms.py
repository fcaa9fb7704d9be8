"""How large a parameter's steps are: a running mean square for each.

A step along `m / F`, with the Fisher diagonal `F`, is as large as the gradients
happen to be. AdaFisher's default rule divides it by the root of

    v <- decay * v + (1 - decay) * mean over all entries of (g / F)²

and bounds each entry of the quotient by 1, as Sophia does (Liu et al., 2023,
arXiv 2305.14342, Section 2.2). So `v` needn't be as new as the gradient: it is
measured when the Kronecker factors are, which spares the other steps a pass
over all gradients. A gradient that has grown since then moves no entry by more
than the learning rate. The combination is ours. (`AdaFisherMuon` has the mean
over ids of a batch for the table of an embedding.)
"""

from keras import ops

from keras_adafisher import backend
from keras_adafisher.optimizer import update_rule


def are_measured(update, interval, within=1):
    """Whether there is a measurement at an update, or shortly before.

    At each of the first `interval` updates, and then at one in so many.

    Args:
        update: Integer, a number or a tensor. The first update is 0.
        interval: Integer, `factor_update_steps`.
        within: Integer, how many updates count, this one included.

    Returns:
        Bool or boolean tensor.
    """
    if interval <= within:
        return True
    return (update < interval) | (update % interval < within)


class UpdateRMS:
    """The running mean squares of all parameters that have factors.

    They are measured at each of the first `factor_update_steps` updates, when
    gradients change fastest, and then at one in so many. Until the next one, a
    measurement stands for the updates in between too: the average is over
    updates, not over measurements.

    Args:
        indices: List of the parameters' numbers in the optimizer.
        settings: What has the attributes `rms_decay`, the decay rate of the
            average, and `factor_update_steps`: the `AdaFisher`. They are read
            where they are used, since they may be changed.
        add_variable: Callable `(shape, initializer, name)`.

    Attributes:
        variable: The vector of them, one entry for each parameter.
        places: Dict from a parameter's number to that of its entry.
    """

    def __init__(self, indices, settings, add_variable):
        self.places = {index: place for place, index in enumerate(indices)}
        self._settings = settings
        self.variable = add_variable(
            shape=(len(indices),),
            initializer=backend.initializer(0.0),
            name="mean_squares",
        )

    @property
    def _decay(self):
        return self._settings.rms_decay

    @property
    def _interval(self):
        return self._settings.factor_update_steps

    def averaged(self, squares, indices, update):
        """The running averages, a measurement included.

        Args:
            squares: Vector of the mean squares of those parameters that have a
                gradient.
            indices: List of these parameters' numbers.
            update: See `are_measured`.

        Returns:
            The new vector. A mean square that isn't finite leaves the average
            as it was: it is one number for all entries, and one batch
            shouldn't spoil them.
        """
        old = ops.convert_to_tensor(self.variable)
        new = squares
        numbers = {index: n for n, index in enumerate(indices)}
        has_gradient = [index in numbers for index in self.places]
        if indices != list(self.places):
            order = [numbers.get(i, 0) for i in self.places]
            new = backend.take(new, backend.constant(order, "int32"))
        weight = _where(
            update < self._interval,
            1 - self._decay,
            1 - self._decay**self._interval,
        )
        average = old + (new - old) * weight
        is_usable = ops.isfinite(new)
        if not all(has_gradient):
            is_usable = ops.logical_and(
                is_usable, backend.constant(has_gradient, "bool")
            )
        return ops.where(is_usable, average, old)

    def roots(self, update, epsilon, scale=1):
        """What the steps of an update are divided by.

        Args:
            update: See `are_measured`.
            epsilon: Float, added to the square roots.
            scale: Number or scalar tensor, divides them too. Defaults to 1.

        Returns:
            Float32 vector, the roots of the averages, corrected for that these
            started at zero.
        """
        # What the measurements so far stand for.
        updates = _where(
            update < self._interval,
            update + 1,
            # With the remainder that says whether there is one.
            update - update % self._interval + self._interval,
        )
        weight = 1 - self._decay ** update_rule.past_the_largest(updates)
        root = ops.sqrt(ops.convert_to_tensor(self.variable))
        return (root + epsilon) / (scale * weight**0.5)

    def of(self, vector, index):
        """The entry of one parameter in a vector like `variable`.

        Args:
            vector: The vector, or what `backend.entries` makes of it.
            index: The parameter's number.
        """
        return backend.entry(vector, self.places[index])


def _where(condition, x1, x2):
    """One of two numbers, in single precision unless they are Python's.

    PyTorch counts updates in Python's numbers.
    """
    if isinstance(condition, bool):
        return x1 if condition else x2
    return ops.cast(ops.where(condition, x1, x2), "float32")
