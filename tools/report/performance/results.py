"""What the benchmarks found, and what it is compared with."""

import json
import math

import numpy as np

from tools.report.pages import BACKENDS

BENCHMARKS = ("step_time", "memory", "scaling")

# What is compared, and the goal on each backend.
STEP_GOALS = {
    "every 100/Adam": dict.fromkeys(BACKENDS, 1.00),
    "every 100/SGD": dict.fromkeys(BACKENDS, 1.03),
    "measuring/Adam": {**dict.fromkeys(BACKENDS, 1.05), "torch": 1.10},
    "default/Adam": {**dict.fromkeys(BACKENDS, 1.05), "torch": 1.10},
    "first/Adam": dict.fromkeys(BACKENDS, 1.25),
}
STATE_GOAL, PEAK_GOAL = 0.52, 1.01
SWEEPS = {
    "width": "activations, as the layer gets wider",
    "batch": "activations, as the batch grows",
    "sequence": "activations, as the sequence gets longer",
    "image": "activations, as the image grows",
    "depth": "activations, as layers are added",
    "kernel": "area of the kernel",
}
# A line that is fitted to timings isn't exact: 0.15 on top of 1 and of 0.
SLOPE_GOALS = {**dict.fromkeys(SWEEPS, 1.15), "kernel": 0.15}


def load(folder):
    """From backend and benchmark to what `benchmarks/common.py` wrote."""
    return {
        backend: {
            name: json.loads(path.read_text())
            for name in BENCHMARKS
            if (path := folder / f"{name}-{backend}.json").exists()
        }
        for backend in BACKENDS
    }


def rows_of(found, backend, benchmark):
    """What a benchmark measured, a dict of rows."""
    return found[backend].get(benchmark, {"rows": {}})["rows"]


def memory_rows(found, kind):
    """Backend, model and row of what `memory.py` found of one kind."""
    for backend, label in BACKENDS.items():
        for name, row in rows_of(found, backend, "memory").items():
            if name.startswith(kind):
                yield label, name.removeprefix(kind), row


def bandwidths(found):
    """From backend to bytes per second, for those that were measured."""
    scaling = {b: rows_of(found, b, "scaling") for b in BACKENDS}
    return {
        backend: rows["bandwidth"]["bytes_per_second"]
        for backend, rows in scaling.items()
        if rows
    }


def points_of(found, backend, sweep):
    """The points of one sweep, from the smallest size on."""
    rows = rows_of(found, backend, "scaling").values()
    points = [row for row in rows if row.get("sweep") == sweep]
    return sorted(points, key=lambda point: point["size"])


def is_clear(point):
    """Whether a point stands out of the noise."""
    return point["extra"] > point["error"] > 0


def place(point):
    """A point's position on the horizontal axis."""
    if point["sweep"] == "kernel":
        return point["size"] ** 2
    return point["bytes"]


def slope(points):
    """Slope on logarithmic axes and its error, `None` if nothing is there."""
    points = [p for p in points if is_clear(p)]
    if len(points) < 3:
        return None
    x = np.log([place(p) for p in points])
    extra = np.array([p["extra"] for p in points])
    errors = np.array([p["error"] for p in points]) / extra / 2
    # No timing is right to better than a tenth.
    weights = 1 / np.maximum(errors, 0.1)
    (value, _), covariance = np.polyfit(
        x, np.log(extra), 1, w=weights, cov="unscaled"
    )
    return float(value), 2 * math.sqrt(covariance[0, 0])
