"""The tables of docs/performance.md, and the goals that are met in them."""

from tools.report.pages import BACKENDS
from tools.report.pages import line
from tools.report.pages import table
from tools.report.performance.results import bandwidths
from tools.report.performance.results import is_clear
from tools.report.performance.results import memory_rows
from tools.report.performance.results import PEAK_GOAL
from tools.report.performance.results import points_of
from tools.report.performance.results import rows_of
from tools.report.performance.results import slope
from tools.report.performance.results import SLOPE_GOALS
from tools.report.performance.results import STATE_GOAL
from tools.report.performance.results import STEP_GOALS
from tools.report.performance.results import SWEEPS

STEP_TITLES = {
    "every 100/Adam": "A step with `factor_update_steps=100`, next to Adam's",
    "every 100/SGD": "A step with `factor_update_steps=100`, next to SGD's",
    "measuring/Adam": "A step with `factor_update_steps=1`, next to Adam's",
    "default/Adam": "A step with the default settings, next to Adam's",
    "first/Adam": "From `compile()` to the end of the first step, next to "
    "Adam's",
}
MILLISECONDS = (
    "SGD",
    "Adam",
    "AdaFisher, every 100",
    "AdaFisher, every step",
    "AdaFisher, default",
)
FIRST = ("Adam", "AdaFisher, every 100", "AdaFisher, default")


class Goals:
    """Counts, for each kind of goal, the rows that meet it."""

    def __init__(self):
        self.met = {}

    def cells(self, kind, value, goal):
        """The cells for a goal and for whether it is met."""
        is_met = value is not None and value <= goal
        self.met.setdefault(kind, []).append(is_met)
        return f"≤ {goal:.2f}", "yes" if is_met else "**no**"

    def summary(self):
        """The rows of the table of goals."""
        return "\n".join(
            line([kind, f"{sum(met)} of {len(met)}"])
            for kind, met in self.met.items()
        )


def machine_rows(data):
    """The rows of the table of machines, for one result of each backend."""
    return "\n".join(
        line(
            [
                BACKENDS[d["backend"]],
                *(d[key] for key in ("version", "keras", "device", "mode")),
            ]
        )
        for d in data
    )


def step_ratios(found, goals, key):
    """The ratios of step times of one kind."""
    rows = []
    for backend, label in BACKENDS.items():
        for model, row in rows_of(found, backend, "step_time").items():
            ratio = row[key]
            rows.append(
                [
                    label,
                    model,
                    f"{ratio['median']:.3f}",
                    f"{ratio['low']:.3f} to {ratio['high']:.3f}",
                    *goals.cells(
                        STEP_TITLES[key],
                        ratio["median"],
                        STEP_GOALS[key][backend],
                    ),
                ]
            )
    return table(["backend", "model", "ratio", "80 %", "goal", "met"], rows)


def milliseconds(found):
    """The times to read the ratios by."""
    head = (
        *("backend", "model", *MILLISECONDS),
        *("first step: Adam", "AdaFisher", "default"),
    )
    rows = []
    for backend, label in BACKENDS.items():
        for model, row in rows_of(found, backend, "step_time").items():
            times, first = row["milliseconds"], row["first_seconds"]
            rows.append(
                [
                    label,
                    model,
                    *(f"{times[column]:.1f}" for column in MILLISECONDS),
                    *(f"{1000 * first[name]:.0f}" for name in FIRST),
                ]
            )
    return table(head, rows)


def state(found, goals):
    """The bytes of the optimizers' states."""
    head = (
        *("backend", "model", "Adam", "AdaFisher", "ratio", "goal", "met"),
        "ratio with probes",
    )
    rows = [
        [
            label,
            name,
            _megabytes(row["Adam"]),
            _megabytes(row["AdaFisher, every 100"]),
            f"{row['ratio']:.4f}",
            *goals.cells("State", row["ratio"], STATE_GOAL),
            f"{row['ratio with probes']:.4f}",
        ]
        for label, name, row in memory_rows(found, "state: ")
    ]
    return table(head, rows)


def peak(found, goals):
    """The peaks of memory in a step that measures."""
    head = (
        *("backend", "model", "SGD", "Adam", "AdaFisher"),
        *("ratio to SGD", "goal", "met"),
    )
    rows = [
        [
            label,
            name,
            _megabytes(row["SGD"]),
            _megabytes(row["Adam"]),
            _megabytes(row["AdaFisher, every step"]),
            f"{row['ratio']:.3f}",
            *goals.cells("Peak of a step", row["ratio"], PEAK_GOAL),
        ]
        for label, name, row in memory_rows(found, "peak: ")
    ]
    return table(head, rows)


def scaling(found, goals):
    """How the extra time of a measuring step grows."""
    head = (
        *("backend", "extra time against", "slope", "points", "goal", "met"),
        *("largest size", "extra ms", "plain step, ms", "floors"),
    )
    rows = []
    for backend, bandwidth in bandwidths(found).items():
        for sweep, title in SWEEPS.items():
            points = points_of(found, backend, sweep)
            if not points:
                continue
            fit = slope(points)
            goal = SLOPE_GOALS[sweep]
            last = points[-1]
            rows.append(
                [
                    BACKENDS[backend],
                    title,
                    f"{fit[0]:.2f} ± {fit[1]:.2f}" if fit else "lost in noise",
                    f"{sum(map(is_clear, points))} of {len(points)}",
                    *(
                        goals.cells("Growth", fit[0], goal)
                        if fit
                        else (f"≤ {goal:.2f}", "can't tell")
                    ),
                    last["size"],
                    f"{1000 * last['extra']:.2f} ± {1000 * last['error']:.2f}",
                    f"{1000 * last['plain']:.1f}",
                    f"{last['extra'] * bandwidth / last['bytes']:.1f}"
                    if is_clear(last)
                    else "lost in noise",
                ]
            )
    return table(head, rows)


def _megabytes(count):
    return f"{count / 1e6:,.2f} MB"
