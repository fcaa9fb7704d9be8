"""Where a callback writes its records: a CSV file, TensorBoard's logs."""

import csv
import pathlib
import time

from keras_adafisher.callbacks.records import QUANTILES

_COLUMNS = [
    "epoch",
    "step",
    "parameter",
    "quantity",
    *[f"q{quantile:g}" for quantile in QUANTILES],
    "counts",
]


class CSVFile:
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


class TensorBoard:
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


def check_path(name, value):
    """Raise a `ValueError` if an argument is neither a path nor `None`."""
    if value is not None and not isinstance(value, (str, pathlib.PurePath)):
        raise ValueError(
            f"Argument `{name}` must be a path, a string or a `pathlib.Path`. "
            f"Received: {name}={value}"
        )


def _row(record):
    return [
        record.epoch,
        record.step,
        record.parameter,
        record.quantity,
        *[f"{quantile:.9g}" for quantile in record.quantiles],
        " ".join(map(str, record.counts)),
    ]
