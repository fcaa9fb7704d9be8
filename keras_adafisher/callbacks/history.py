"""Callbacks that record what an optimizer divides its momentum by."""

from collections.abc import Iterable
from typing import Any
from typing import Literal

import keras
import numpy as np
from keras import ops

from keras_adafisher.aliases import Path
from keras_adafisher.callbacks.records import Record
from keras_adafisher.callbacks.records import summarize
from keras_adafisher.callbacks.writers import check_path
from keras_adafisher.callbacks.writers import CSVFile
from keras_adafisher.callbacks.writers import TensorBoard
from keras_adafisher.integration.custom_loops import adafishers
from keras_adafisher.optimizer.arguments import is_integer


class DistributionHistory(keras.callbacks.Callback):
    """Base class of callbacks that record distributions over training.

    Subclasses override `start` and `distributions`.

    Args:
        every: `"epoch"`, or an integer: record every so many steps.
        csv_path: Path of a CSV file, or `None`.
        log_dir: Path of a TensorBoard directory, or `None`.

    Raises:
        ValueError: `every` is neither, or `csv_path` or `log_dir` no path.
        ImportError: There is a `log_dir`, but no TensorBoard.
    """

    def __init__(
        self,
        every: int | Literal["epoch"] = "epoch",
        csv_path: Path | None = None,
        log_dir: Path | None = None,
    ) -> None:
        super().__init__()
        if every != "epoch" and (not is_integer(every) or every < 1):
            raise ValueError(
                'Argument `every` must be "epoch" or an integer >= 1. '
                f"Received: every={every}"
            )
        check_path("csv_path", csv_path)
        check_path("log_dir", log_dir)
        self.every = every
        self.records: list[Record] = []
        # Keras otherwise waits for each step's result, for a callback that
        # might want to see it.
        self.async_safe = every == "epoch"
        self._file = None if csv_path is None else CSVFile(csv_path)
        self._board = None if log_dir is None else TensorBoard(log_dir)
        self._epoch = 0
        # Steps since the last record, and batches of the present epoch.
        self._steps = self._batches = 0

    def start(
        self, optimizer: keras.optimizers.Optimizer
    ) -> keras.optimizers.Optimizer:
        """Check the optimizer when training starts.

        Args:
            optimizer: `model.optimizer`.

        Returns:
            The optimizer that counts the updates.
        """
        raise NotImplementedError(
            f"{self.__class__.__name__} must override `start()`."
        )

    def distributions(
        self, optimizer: keras.optimizers.Optimizer
    ) -> Iterable[tuple[keras.Variable, str, np.ndarray]]:
        """What is to be recorded now.

        Args:
            optimizer: `model.optimizer`.

        Returns:
            Iterable of tuples: a variable, the name of a quantity, and a
            NumPy array.
        """
        raise NotImplementedError(
            f"{self.__class__.__name__} must override `distributions()`."
        )

    def select(
        self, parameter: keras.Variable | str, quantity: str
    ) -> list[Record]:
        """The records of one quantity of one parameter, in their order.

        Args:
            parameter: Variable, or its path.
            quantity: String.

        Returns:
            List of `Record`s.

        Raises:
            ValueError: There are none.
        """
        path = getattr(parameter, "path", parameter)
        wanted = str(path), str(quantity)
        found = [
            record
            for record in self.records
            if (record.parameter, record.quantity) == wanted
        ]
        if not found:
            known = sorted({(r.parameter, r.quantity) for r in self.records})
            raise ValueError(
                "There are no records of this parameter and quantity. "
                f"Received: parameter={path}, quantity={quantity}. "
                f"There are {known}"
            )
        return found

    def record(self) -> None:
        """Record the present distributions."""
        # On JAX, `self.model` brings the model's and the optimizer's variables
        # up to date, and training goes on from them.
        optimizer = self.model.optimizer
        step = self._step(optimizer)
        records = [
            summarize(values, self._epoch, step, variable.path, quantity)
            for variable, quantity, values in self.distributions(optimizer)
        ]
        self.records += records
        if self._file is not None:
            self._file.write(records)
        if self._board is not None:
            self._board.write(records)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        optimizer = self.model.optimizer
        step = self._step(optimizer)
        if self._file is not None:
            self._file.resume(step)
        if self.every != "epoch":
            # So that a run that was interrupted records at the same steps.
            self._steps = step % self.every

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._epoch = epoch
        self._batches = 0

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self.every == "epoch":
            return
        # With `steps_per_execution`, a call may stand for several steps.
        self._steps += batch + 1 - self._batches
        self._batches = batch + 1
        if self._steps >= self.every:
            self._steps %= self.every
            self.record()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self.every == "epoch":
            self.record()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._board is not None:
            self._board.close()

    def _step(self, optimizer):
        iterations = self.start(optimizer).iterations
        return int(ops.convert_to_numpy(iterations))


class FisherHistory(DistributionHistory):
    """Records how the Fisher diagonal is distributed while a model trains.

    ```python
    history = keras_adafisher.FisherHistory(csv_path="fisher.csv")
    model.fit(x, y, epochs=10, callbacks=[history])
    for record in history.select(model.layers[0].kernel, "fisher"):
        print(record.step, record.quantiles)
    ```

    For each parameter with Kronecker factors, there are records of these
    quantities:

    - `"fisher"`: the damped Fisher diagonal, `H * S + damping`, by which the
      momentum is divided.
    - `"effective_learning_rate"`: what the last update multiplied the momentum
      by, see `AdaFisher.effective_learning_rate`. Kernels that `AdaFisherMuon`
      orthogonalizes have none.
    - `"activation"` and `"gradient"`: the running factors `H` and `S`. For a
      bias, `H` is the factor of the input that is always 1. A weight that is
      used in two ways (a tied embedding) has `"activation_1"` and
      `"gradient_1"` too.

    Parameters that AdamW's rule updates have no Fisher diagonal and are left
    out.

    Quantiles and histograms are exact for parameters with up to 65,536
    scalars. Of larger ones, about as many are looked at, evenly spread over all
    rows and columns, and minimum and maximum are exact.

    Args:
        every: `"epoch"`, or an integer: record at the end of each epoch, or
            every so many steps. Defaults to `"epoch"`. With an integer, Keras
            waits for the result of each step.
        csv_path: Path of a CSV file to write to, with a row for each record:
            epoch, step, parameter, quantity, quantiles, and the histogram's
            counts, separated by spaces. Rows that are there already are kept,
            but those of steps that are still ahead when training starts are
            removed: so a run that goes on from a checkpoint goes on in its
            file, and a new run begins it anew. Defaults to `None`.
        log_dir: Directory of TensorBoard logs to write histograms to. Needs
            the package tensorboard. Defaults to `None`.

    Raises:
        ValueError: `every` is neither; `csv_path` or `log_dir` is no path;
            `csv_path` is a file that something else has written; or, when
            training starts, the model's optimizer is no `AdaFisher` and
            contains none.
        ImportError: There is a `log_dir`, but no TensorBoard.

    Attributes:
        records: List of all `Record`s.
    """

    def start(
        self, optimizer: keras.optimizers.Optimizer
    ) -> keras.optimizers.Optimizer:
        first = next(adafishers(optimizer), None)
        if first is None:
            raise ValueError(
                "`FisherHistory` records what `AdaFisher` divides by, so the "
                "model must be compiled with it. "
                f"Received: a model with optimizer={optimizer}"
            )
        return first

    def distributions(
        self, optimizer: keras.optimizers.Optimizer
    ) -> Iterable[tuple[keras.Variable, str, np.ndarray]]:
        for adafisher in adafishers(optimizer):
            for variable in adafisher.factored_variables:
                factors = adafisher.factors(variable)
                fisher = factors.fisher_diagonal + adafisher.damping
                yield variable, "fisher", _numpy(fisher)
                if not adafisher.orthogonalizes(variable):
                    rate = _numpy(adafisher.effective_learning_rate(variable))
                    yield variable, "effective_learning_rate", rate
                pairs = zip(
                    _as_tuple(factors.activation),
                    _as_tuple(factors.gradient),
                    strict=True,
                )
                for index, (h, s) in enumerate(pairs):
                    suffix = f"_{index}" if index else ""
                    yield variable, f"activation{suffix}", _numpy(h)
                    yield variable, f"gradient{suffix}", _numpy(s)


class SecondMomentHistory(DistributionHistory):
    """The same for Adam: records how its second moment is distributed.

    To be seen next to a `FisherHistory`. The quantities are
    `"second_moment"`, the running average of squared gradients with its bias
    corrected, and `"effective_learning_rate"`, what the last update multiplied
    the momentum by: the learning rate, corrected for that the momentum started
    at zero, divided by the square root of the second moment.

    Args:
        every, csv_path, log_dir: See `FisherHistory`.

    Raises:
        ValueError: As for `FisherHistory`, where the optimizer is no
            `keras.optimizers.Adam`.
        ImportError: There is a `log_dir`, but no TensorBoard.

    Attributes:
        records: List of all `Record`s.
    """

    def start(
        self, optimizer: keras.optimizers.Optimizer
    ) -> keras.optimizers.Optimizer:
        # Of `LossScaleOptimizer`.
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(inner, keras.optimizers.Adam):
            raise ValueError(
                "`SecondMomentHistory` records what `keras.optimizers.Adam` "
                "divides by, so the model must be compiled with it. "
                f"Received: a model with optimizer={optimizer}"
            )
        return inner

    def distributions(
        self, optimizer: keras.optimizers.Optimizer
    ) -> Iterable[tuple[keras.Variable, str, np.ndarray]]:
        adam = self.start(optimizer)
        step = int(ops.convert_to_numpy(adam.iterations))
        rate = float(ops.convert_to_numpy(adam.learning_rate))
        # Before the first update nothing has moved.
        rate *= min(step, 1)
        step = max(step, 1)
        correction = 1 - adam.beta_2**step
        rate *= correction**0.5 / (1 - adam.beta_1**step)
        pairs = zip(adam._trainable_variables, adam._velocities, strict=True)
        for variable, velocity in pairs:
            if velocity is None:
                continue
            moment = _numpy(velocity) / correction
            yield variable, "second_moment", moment
            root = np.sqrt(_numpy(velocity)) + adam.epsilon
            yield variable, "effective_learning_rate", rate / root


def _as_tuple(factors):
    """The factors of each way that a weight is used in."""
    return factors if isinstance(factors, tuple) else (factors,)


def _numpy(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))
