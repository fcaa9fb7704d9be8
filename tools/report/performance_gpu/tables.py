"""The tables of docs/performance_gpu.md."""

from tools.report import pages
from tools.report.performance_gpu.results import BACKENDS
from tools.report.performance_gpu.results import DEFAULT
from tools.report.performance_gpu.results import EVERY_100
from tools.report.performance_gpu.results import EVERY_STEP
from tools.report.performance_gpu.results import GOALS
from tools.report.performance_gpu.results import is_met
from tools.report.performance_gpu.results import MODELS
from tools.report.performance_gpu.results import MUON
from tools.report.performance_gpu.results import OPTIMIZERS
from tools.report.performance_gpu.results import programs_of
from tools.report.performance_gpu.results import quotient
from tools.report.performance_gpu.results import ratios_of

GOAL_TITLES = {
    DEFAULT: "A step with the default settings, next to Adam's",
    EVERY_100: "A step with `factor_update_steps=100`, next to Adam's",
    EVERY_STEP: "A step with `factor_update_steps=1`, next to Adam's",
    "peak": "Peak memory with the default settings, next to SGD's",
    "first": "The first step with the default settings, next to Adam's",
    MUON: "A step of AdaFisherMuon, next to Adam's",
    "peak of Muon": "Peak memory of AdaFisherMuon, next to Adam's",
    "first of Muon": "The first step of AdaFisherMuon, next to Adam's",
}


def table(head, rows):
    """A table in Markdown, or nothing if it would have no rows."""
    rows = list(rows)
    return pages.table(head, rows) if rows else ""


def number(value, form):
    """A number, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def judged(backend, key, ratio, form=".3f", spread=""):
    """A ratio, and whether its goal is met."""
    answer = {True: ", yes", False: ", **no**", None: ""}
    return number(ratio, form) + spread + answer[is_met(backend, key, ratio)]


def titled(backend, key, title):
    """A column's title, with the goal if there is one."""
    goal = GOALS[backend].get(key)
    return title if goal is None else f"{title} (≤ {goal:.2f})"


def summary(found):
    """The rows of the table of goals."""
    for backend, goals in GOALS.items():
        rows = found.get(backend, {"rows": {}})["rows"].values()
        for key, goal in goals.items():
            met = [
                is_met(backend, key, ratios_of(row).get(key)) for row in rows
            ]
            met = [answer for answer in met if answer is not None]
            yield (
                BACKENDS[backend],
                GOAL_TITLES[key],
                f"{goal:.2f}",
                f"{sum(met)} of {len(met)}" if met else "not measured",
            )


def step_times(backend, data):
    """The table of step times."""

    def cells(row):
        for optimizer in OPTIMIZERS:
            ratio = row["over Adam"].get(optimizer, {})
            # What was noted without its spread has two digits.
            form, spread = ".2f", ""
            if "low" in ratio:
                form = ".3f"
                spread = f" ({ratio['low']:.3f} to {ratio['high']:.3f})"
            yield judged(backend, optimizer, ratio.get("median"), form, spread)

    return table(
        [
            "model",
            "Adam, ms",
            *(titled(backend, name, name) for name in OPTIMIZERS),
            "rounds",
        ],
        [
            [
                MODELS[model][0],
                number(row.get("milliseconds", {}).get("Adam"), ".3g"),
                *cells(row),
                number(row.get("rounds"), "d"),
            ]
            for model, row in data["rows"].items()
        ],
    )


def first_steps(backend, data):
    """The table of first steps."""
    rows = []
    for model, row in data["rows"].items():
        seconds = programs_of(row, "first_seconds")
        worked = programs_of(row, "first_processor_seconds")
        if seconds:
            rows.append(
                [
                    MODELS[model][0],
                    *(
                        number(seconds.get(optimizer), ".2f")
                        for optimizer in ("Adam", DEFAULT, MUON)
                    ),
                    judged(backend, "first", ratios_of(row)["first"]),
                    number(quotient(worked, DEFAULT, "Adam"), ".2f"),
                    judged(
                        backend,
                        "first of Muon",
                        ratios_of(row)["first of Muon"],
                    ),
                    number(quotient(worked, MUON, "Adam"), ".2f"),
                ]
            )
    return table(
        [
            *("model", "Adam, s", "AdaFisher, default, s", "AdaFisherMuon, s"),
            titled(backend, "first", "default over Adam"),
            "processors, default over Adam",
            titled(backend, "first of Muon", "AdaFisherMuon over Adam"),
            "processors, AdaFisherMuon over Adam",
        ],
        rows,
    )


def peaks(backend, data):
    """The table of peak memory."""
    columns = ("SGD", "Adam", "Muon", DEFAULT, EVERY_STEP, MUON)
    rows = []
    for model, row in data["rows"].items():
        found = programs_of(row, "peak_bytes")
        if found:
            rows.append(
                [
                    MODELS[model][0],
                    *(
                        f"{found[name] / 1e6:,.2f}" if name in found else "–"
                        for name in columns
                    ),
                    judged(backend, "peak", ratios_of(row)["peak"]),
                    number(quotient(found, EVERY_STEP, "SGD"), ".3f"),
                    judged(
                        backend, "peak of Muon", ratios_of(row)["peak of Muon"]
                    ),
                ]
            )
    return table(
        [
            *("model", *columns),
            titled(backend, "peak", "default over SGD"),
            "every step over SGD",
            titled(backend, "peak of Muon", "AdaFisherMuon over Adam"),
        ],
        rows,
    )


def programs(data):
    """The table of conditionals and instructions."""
    columns = (DEFAULT, EVERY_STEP, MUON)
    rows = []
    for model, row in data["rows"].items():
        conditionals = programs_of(row, "conditionals")
        instructions = programs_of(row, "instructions")
        if conditionals:
            rows.append(
                [
                    MODELS[model][0],
                    *(number(conditionals.get(name), "d") for name in columns),
                    *(
                        number(instructions.get(name), ",d")
                        for name in ("Adam", *columns)
                    ),
                    number(quotient(instructions, DEFAULT, "Adam"), ".2f"),
                ]
            )
    return table(
        [
            "model",
            *(f"conditionals: {name}" for name in columns),
            *(f"instructions: {name}" for name in ("Adam", *columns)),
            "default over Adam",
        ],
        rows,
    )


def kernels(data):
    """The table of kernels in programs that were compiled without a GPU."""
    columns = (DEFAULT, MUON)
    rows = []
    for model, row in data["rows"].items():
        counts = {name: facts["kernels"] for name, facts in row.items()}
        plain = {name: least for name, (least, _) in counts.items()}
        rows.append(
            [
                MODELS[model][0],
                *(number(plain[name], ",d") for name in ("SGD", "Adam")),
                *(
                    number(count, ",d")
                    for name in columns
                    for count in counts[name]
                ),
                number(plain[EVERY_STEP], ",d"),
                number(plain["Muon"], ",d"),
                f"{quotient(plain, DEFAULT, 'Adam'):.2f}",
                f"{quotient(plain, MUON, 'Adam'):.2f}",
            ]
        )
    return table(
        [
            *("model", "SGD", "Adam"),
            *(
                f"{name}, {kind}"
                for name in columns
                for kind in ("most steps", "one that measures")
            ),
            *(EVERY_STEP, "Muon"),
            "default over Adam, most steps",
            "AdaFisherMuon over Adam, most steps",
        ],
        rows,
    )


def compiling(data):
    """The table of their memory, and of what compiling takes."""
    rows = []
    for model, row in data["rows"].items():
        peaks = {name: facts["peak_bytes"] for name, facts in row.items()}
        worked = {
            name: facts["processor_seconds"] for name, facts in row.items()
        }
        rows.append(
            [
                MODELS[model][0],
                f"{peaks['SGD'] / 1e6:,.0f}",
                judged("jax", "peak", quotient(peaks, DEFAULT, "SGD")),
                f"{quotient(peaks, EVERY_STEP, 'SGD'):.3f}",
                judged("jax", "peak of Muon", quotient(peaks, MUON, "Adam")),
                number(worked["Adam"], ".1f"),
                f"{quotient(worked, DEFAULT, 'Adam'):.2f}",
                f"{quotient(worked, EVERY_STEP, 'Adam'):.2f}",
                f"{quotient(worked, MUON, 'Adam'):.2f}",
            ]
        )
    return table(
        [
            *("model", "peak of SGD, MB"),
            titled("jax", "peak", "default over SGD"),
            "every step over SGD",
            titled("jax", "peak of Muon", "AdaFisherMuon over Adam"),
            *("compiling Adam, processor seconds", "default over Adam"),
            *("every step over Adam", "AdaFisherMuon over Adam"),
        ],
        rows,
    )


def prototypes(found):
    """The tables of programs that aren't in the package."""
    return [
        table(
            [BACKENDS[backend], *(title for title, _ in MODELS.values())],
            [
                [
                    prototype["what"],
                    *(
                        number(prototype["over Adam"].get(model), "g")
                        for model in MODELS
                    ),
                ]
                for prototype in data.get("prototypes", [])
            ],
        )
        for backend, data in found.items()
    ]
