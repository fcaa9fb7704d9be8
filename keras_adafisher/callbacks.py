"""Callbacks that record what an optimizer divides its momentum by."""

import collections
import csv
import dataclasses
import math
import pathlib
import time

import keras
import numpy as np
from keras import ops

from keras_adafisher.arguments import is_integer
from keras_adafisher.custom_loops import adafishers

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 30

# Of parameters with more scalars, about as many are looked at: sorting all of
# them would take longer than a training step.
SAMPLE = 2**16

_COLUMNS = [
    "epoch",
    "step",
    "parameter",
    "quantity",
    *[f"q{quantile:g}" for quantile in QUANTILES],
    "counts",
]


@dataclasses.dataclass(frozen=True)
class Record:
    """How one quantity of one parameter was distributed at one time.

    Attributes:
        epoch: Int, the epoch's number, from 0.
        step: Int, the number of the optimizer's updates until then.
        parameter: String, the parameter's path.
        quantity: String.
        quantiles: Float64 array of shape `(7,)`: the minimum, the quantiles
            at 5, 25, 50, 75 and 95 %, and the maximum.
        counts: Int array of shape `(30,)`, the histogram.
    """

    epoch: int
    step: int
    parameter: str
    quantity: str
    quantiles: np.ndarray
    counts: np.ndarray

    @property
    def edges(self):
        """Float64 array of shape `(31,)`, the edges of the histogram's bins.

        Where no value is negative, the edges have the same ratios: they divide
        the range from the minimum to the maximum evenly on a logarithmic
        scale. A bin that would lie below 1e-10 times the maximum reaches to
        the minimum. Where there are negative values, the bins are as wide as
        each other. If there is only one value, they reach from 1/2 below to
        1/2 above it.
        """
        return _edges(*self.quantiles[[0, -1]])


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

    def __init__(self, every="epoch", csv_path=None, log_dir=None):
        super().__init__()
        if every != "epoch" and (not is_integer(every) or every < 1):
            raise ValueError(
                'Argument `every` must be "epoch" or an integer >= 1. '
                f"Received: every={every}"
            )
        _check_path("csv_path", csv_path)
        _check_path("log_dir", log_dir)
        self.every = every
        self.records = []
        # Keras otherwise waits for each step's result, for a callback that
        # might want to see it.
        self.async_safe = every == "epoch"
        self._file = None if csv_path is None else _CSVFile(csv_path)
        self._board = None if log_dir is None else _TensorBoard(log_dir)
        self._epoch = 0
        # Steps since the last record, and batches of the present epoch.
        self._steps = self._batches = 0

    def start(self, optimizer):
        """Check the optimizer when training starts.

        Args:
            optimizer: `model.optimizer`.

        Returns:
            The optimizer that counts the updates.
        """
        raise NotImplementedError(
            f"{self.__class__.__name__} must override `start()`."
        )

    def distributions(self, optimizer):
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

    def select(self, parameter, quantity):
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

    def record(self):
        """Record the present distributions."""
        # On JAX, `self.model` brings the model's and the optimizer's variables
        # up to date, and training goes on from them.
        optimizer = self.model.optimizer
        step = self._step(optimizer)
        records = [
            _summarize(values, self._epoch, step, variable.path, quantity)
            for variable, quantity, values in self.distributions(optimizer)
        ]
        self.records += records
        if self._file is not None:
            self._file.write(records)
        if self._board is not None:
            self._board.write(records)

    def on_train_begin(self, logs=None):
        optimizer = self.model.optimizer
        step = self._step(optimizer)
        if self._file is not None:
            self._file.resume(step)
        if self.every != "epoch":
            # So that a run that was interrupted records at the same steps.
            self._steps = step % self.every

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._batches = 0

    def on_train_batch_end(self, batch, logs=None):
        if self.every == "epoch":
            return
        # With `steps_per_execution`, a call may stand for several steps.
        self._steps += batch + 1 - self._batches
        self._batches = batch + 1
        if self._steps >= self.every:
            self._steps %= self.every
            self.record()

    def on_epoch_end(self, epoch, logs=None):
        if self.every == "epoch":
            self.record()

    def on_train_end(self, logs=None):
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
    - `"effective_learning_rate"`: what the momentum is multiplied by, the
      learning rate divided by that and, with `rms_decay`, by the root mean
      square of the steps.
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

    def start(self, optimizer):
        first = next(adafishers(optimizer), None)
        if first is None:
            raise ValueError(
                "`FisherHistory` records what `AdaFisher` divides by, so the "
                "model must be compiled with it. "
                f"Received: a model with optimizer={optimizer}"
            )
        return first

    def distributions(self, optimizer):
        for adafisher in adafishers(optimizer):
            for variable, factors in _factors(adafisher):
                fisher = _numpy(adafisher.fisher_diagonal(variable))
                yield variable, "fisher", fisher
                rate = _numpy(adafisher.effective_learning_rate(variable))
                yield variable, "effective_learning_rate", rate
                for index, pair in enumerate(factors):
                    suffix = f"_{index}" if index else ""
                    yield variable, f"activation{suffix}", _numpy(pair[0])
                    yield variable, f"gradient{suffix}", _numpy(pair[1])


class SecondMomentHistory(DistributionHistory):
    """The same for Adam: records how its second moment is distributed.

    To be seen next to a `FisherHistory`. The quantities are
    `"second_moment"`, the running average of squared gradients with its bias
    corrected, and `"effective_learning_rate"`, the learning rate divided by
    its square root.

    Args:
        every, csv_path, log_dir: See `FisherHistory`.

    Raises:
        ValueError: As for `FisherHistory`, where the optimizer is no
            `keras.optimizers.Adam`.
        ImportError: There is a `log_dir`, but no TensorBoard.

    Attributes:
        records: List of all `Record`s.
    """

    def start(self, optimizer):
        # Of `LossScaleOptimizer`.
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(inner, keras.optimizers.Adam):
            raise ValueError(
                "`SecondMomentHistory` records what `keras.optimizers.Adam` "
                "divides by, so the model must be compiled with it. "
                f"Received: a model with optimizer={optimizer}"
            )
        return inner

    def distributions(self, optimizer):
        adam = self.start(optimizer)
        step = int(ops.convert_to_numpy(adam.iterations))
        rate = float(ops.convert_to_numpy(adam.learning_rate))
        correction = 1 - adam.beta_2 ** max(step, 1)
        pairs = zip(adam._trainable_variables, adam._velocities, strict=True)
        for variable, velocity in pairs:
            if velocity is None:
                continue
            moment = _numpy(velocity) / correction
            yield variable, "second_moment", moment
            root = np.sqrt(moment) + adam.epsilon
            yield variable, "effective_learning_rate", rate / root


class _CSVFile:
    """Records in a file that interrupted runs go on with."""

    def __init__(self, path):
        self.path = pathlib.Path(path)

    def resume(self, step):
        """Keep the rows of a run's past.

        Args:
            step: Int. Rows of later steps are removed.
        """
        kept = [row for row in self._rows() if int(row[1]) <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In one go: there is always a whole file.
        new = self.path.with_name(f"{self.path.name}.new")
        with new.open("w", newline="") as file:
            csv.writer(file).writerows([_COLUMNS, *kept])
        new.replace(self.path)

    def write(self, records):
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(map(_row, records))

    def _rows(self):
        if not self.path.exists() or not self.path.stat().st_size:
            return []
        # What has no end was cut off while it was written.
        with self.path.open(newline="", errors="replace") as file:
            lines = [line for line in file if line.endswith("\n")]
        header, *rows = csv.reader(lines or [""])
        if header != _COLUMNS:
            raise ValueError(
                "Argument `csv_path` must be a file that this callback has "
                "written, or a new one. "
                f"Received: csv_path={self.path}, with the columns {header}"
            )
        return rows


class _TensorBoard:
    """Histograms as TensorBoard reads them."""

    def __init__(self, log_dir):
        try:
            # Not `tf.summary`: TensorBoard does without TensorFlow.
            from tensorboard.compat.proto import event_pb2
            from tensorboard.compat.proto import summary_pb2
            from tensorboard.summary.writer import event_file_writer
        except ImportError as error:
            raise ImportError(
                "Argument `log_dir` needs TensorBoard: `pip install "
                f"tensorboard`. Received: log_dir={log_dir}"
            ) from error
        self._event = event_pb2.Event
        self._summary = summary_pb2
        self._make_writer = event_file_writer.EventFileWriter
        self._log_dir = str(log_dir)
        self._writer = None

    def write(self, records):
        if self._writer is None:
            self._writer = self._make_writer(self._log_dir)
        for record in records:
            edges = record.edges
            middles = (edges[:-1] + edges[1:]) / 2
            histogram = self._summary.HistogramProto(
                min=record.quantiles[0],
                max=record.quantiles[-1],
                num=record.counts.sum(),
                sum=record.counts @ middles,
                sum_squares=record.counts @ middles**2,
                bucket_limit=edges[1:],
                bucket=record.counts,
            )
            value = self._summary.Summary.Value(
                tag=f"{record.quantity}/{record.parameter}", histo=histogram
            )
            self._writer.add_event(
                self._event(
                    wall_time=time.time(),
                    step=record.step,
                    summary=self._summary.Summary(value=[value]),
                )
            )
        self._writer.flush()

    def close(self):
        # Training may go on: with another file of the same directory.
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _check_path(name, value):
    if value is not None and not isinstance(value, (str, pathlib.PurePath)):
        raise ValueError(
            f"Argument `{name}` must be a path, a string or a `pathlib.Path`. "
            f"Received: {name}={value}"
        )


def _factors(optimizer):
    """The variables that an AdaFisher has factors for.

    Returns:
        List of pairs: a variable, and the pairs of its running factors.
    """
    pairs = collections.defaultdict(list)
    for curvature in optimizer._curvatures:
        weight, bias = curvature.block.weight, curvature.block.bias
        pairs[id(weight)].append((curvature.activation, curvature.gradient))
        pairs[id(bias)].append((curvature.one, curvature.bias_gradient))
    variables = zip(
        optimizer._trainable_variables, optimizer._fishers, strict=True
    )
    return [(v, pairs[id(v)]) for v, fisher in variables if fisher]


def _numpy(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def _summarize(values, epoch, step, parameter, quantity):
    values = np.ravel(values)
    if values.size > SAMPLE:
        # No divisor of the size, so that it reaches all rows and columns.
        stride = math.ceil(values.size / SAMPLE)
        while math.gcd(stride, values.size) > 1:
            stride += 1
        extremes = np.min(values), np.max(values)
        values = np.append(values[::stride], extremes)
    values = values.astype("float64")
    if np.all(np.isfinite(values)):
        quantiles = np.quantile(values, QUANTILES)
        counts, _ = np.histogram(values, _edges(*quantiles[[0, -1]]))
    else:
        # Training has diverged.
        quantiles = np.full(len(QUANTILES), np.nan)
        counts = np.zeros(BINS, "int64")
    return Record(epoch, step, parameter, quantity, quantiles, counts)


def _edges(lowest, highest):
    """Edges of the bins between the smallest and the largest value."""
    if lowest < 0 or lowest == highest:
        return np.histogram_bin_edges([lowest, highest], BINS)
    edges = np.geomspace(max(lowest, 1e-10 * highest), highest, BINS + 1)
    # Exactly, and down to 0 if there are zeros.
    edges[0], edges[-1] = lowest, highest
    return edges


def _row(record):
    return [
        record.epoch,
        record.step,
        record.parameter,
        record.quantity,
        *[f"{quantile:.9g}" for quantile in record.quantiles],
        " ".join(map(str, record.counts)),
    ]
