"""What the benchmarks share: settings, results on disk, optimizers.

Each benchmark runs in a process of its own per backend, and writes a JSON file
as soon as it has a row: a run that was interrupted goes on where it stopped.
tools/report/performance/ makes the page from the files.
"""

import argparse
import json
import os
import pathlib
import platform

ROOT = pathlib.Path(__file__).parents[1]
LEVELS = ("full", "quick", "tiny")
# One thread: two cores that are shared with other work would make threads wait
# for each other. Has to be set before a backend is imported.
THREADS = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "NPROC": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
for _name, _value in THREADS.items():
    os.environ.setdefault(_name, _value)

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_adafisher  # noqa: E402


def published(**arguments):
    """An AdaFisher as published, but for some arguments."""
    return keras_adafisher.AdaFisher.as_published(**arguments)


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(1e-3, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(1e-4),
    "AdaFisher, every 100": lambda: published(learning_rate=1e-6),
    "AdaFisher, every step": lambda: published(
        learning_rate=1e-6, factor_update_steps=1
    ),
    "AdaFisher, default": lambda: keras_adafisher.AdaFisher(1e-6),
}


class Results:
    """The rows of one benchmark on one backend, kept in a file.

    Args:
        name: String, the benchmark's.
        arguments: What `parse_arguments` returned.
    """

    def __init__(self, name, arguments):
        backend = keras.backend.backend()
        self._path = arguments.results / f"{name}-{backend}.json"
        self.data = {"level": arguments.level, **machine(), "rows": {}}
        if self._path.exists() and not arguments.fresh:
            found = json.loads(self._path.read_text())
            if found["level"] == arguments.level:
                self.data["rows"] = found["rows"]

    def add(self, name, measure):
        """Add a row, unless the file has it already.

        Args:
            name: String, the row's name.
            measure: Callable that returns a dict for JSON.
        """
        rows = self.data["rows"]
        if name not in rows:
            rows[name] = measure()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Never half a file.
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.data, separators=(",", ":")))
            temporary.replace(self._path)
        print(f"{self._path.stem}: {name}: {rows[name]}", flush=True)


def parse_arguments(description, tasks=()):
    """Read the command line.

    Args:
        description: String, for `--help`.
        tasks: Names that `--tasks` can choose from, if there are any.

    Returns:
        The namespace of arguments.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--level", choices=LEVELS, default="full")
    parser.add_argument("--fresh", action="store_true", help="start over")
    parser.add_argument("--results", type=pathlib.Path)
    if tasks:
        parser.add_argument("--tasks", nargs="+", choices=tasks)
        parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.results is None:
        arguments.results = ROOT / "benchmarks" / "results" / arguments.level
    return arguments


def machine():
    """Where the figures come from."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        version = jax.__version__
        device = jax.devices()[0].device_kind
        mode = "`jax.jit`, Keras' default"
    elif backend == "tensorflow":
        import tensorflow as tf

        version = tf.__version__
        gpus = tf.config.list_physical_devices("GPU")
        details = tf.config.experimental.get_device_details
        device = details(gpus[0])["device_name"] if gpus else "cpu"
        mode = '`jit_compile="auto"`, Keras\' default: '
        mode += "XLA" if gpus else "a graph without XLA, for want of a GPU"
    else:
        import torch

        version = torch.__version__
        has_gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if has_gpu else "cpu"
        mode = "eager, Keras' default"
    if device == "cpu":
        device = f"{_cpu_name()}, {os.cpu_count()} cores"
    return {
        "backend": backend,
        "version": version,
        "keras": keras.__version__,
        "device": device,
        "mode": mode,
        "environment": {name: os.environ.get(name) for name in THREADS},
        "load": os.getloadavg()[0],
    }


def spread(values):
    """The median, and the 10th and 90th percentile."""
    low, middle, high = map(float, np.quantile(values, [0.1, 0.5, 0.9]))
    return {"median": middle, "low": low, "high": high}


def _cpu_name():
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [row for row in text.splitlines() if row.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor()
