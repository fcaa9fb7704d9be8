"""Write docs/performance_gpu.md from what `benchmarks/gpu.py` found.

    make bench-gpu

runs that and then this. `--results` and `--output` are folders. The page is
written anew, from the files of the results alone. It needs no package, so that
a machine that is there for its GPU can make it.
"""

import argparse
import json
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
BACKENDS = {"jax": "JAX", "torch": "PyTorch"}
MODELS = {
    "gpt": ("GPT", "12 blocks, 768 wide, 16 × 512 tokens, `mixed_bfloat16`"),
    "vit": ("ViT-S/16", "64 images of 224², `mixed_bfloat16`"),
    "resnet50": ("ResNet50", "64 images of 160², float32"),
    "resnet": ("small ResNet", "15 convolutions, 128 images of 32², float32"),
}
DEFAULT = "AdaFisher, default"
EVERY_100, EVERY_STEP = "AdaFisher, every 100", "AdaFisher, every step"
OPTIMIZERS = ("SGD", "Muon", DEFAULT, EVERY_100, EVERY_STEP)

# What is to be at most how much, by backend. The keys are those of `ratios_of`.
GOALS = {
    "jax": {
        DEFAULT: 1.02,
        EVERY_100: 1.01,
        EVERY_STEP: 1.15,
        "peak": 1.01,
        "first": 2.2,
    },
    "torch": {DEFAULT: 1.03, EVERY_STEP: 1.25},
}
GOAL_TITLES = {
    DEFAULT: "A step with the default settings, next to Adam's",
    EVERY_100: "A step with `factor_update_steps=100`, next to Adam's",
    EVERY_STEP: "A step with `factor_update_steps=1`, next to Adam's",
    "peak": "Peak memory with the default settings, next to SGD's",
    "first": "The first step with the default settings, next to Adam's",
}

INTRODUCTION = """\
# Performance on a GPU

AdaFisher next to Keras' Adam, SGD with momentum and Muon, on one GPU. Written
by `make bench-gpu` (`benchmarks/gpu.py` and `tools/report/performance_gpu.py`),
which takes less than eight minutes and replaces all of this page.
[Performance](performance.md) has the figures of a CPU, for more models.

| backend | version | Keras | keras-adafisher | device | date |
|---|---|---|---|---|---|
{machines}

{notes}| model | size |
|---|---|
{models}

## Which goals are met

| backend | goal | at most | models that meet it |
|---|---|---|---|
{summary}
"""

HOW = """\
## How to measure it again

On a machine with one GPU, and JAX and PyTorch that see it:

    make bench-gpu

With an interpreter that has them and Keras already, `make bench-gpu
GPU_PYTHON=python3`. The first lines of `benchmarks/gpu.py` say which wheels to
carry to a machine without a network. `make bench-gpu-tiny` tries all of it on a
CPU, in a tiny form.
"""

STEP_TEXT = """\
## Time of a step

What `fit` calls for each batch, with the batch on the device already. The
programs of all models compile side by side, then take turns with the GPU. A
round has ten steps with each optimizer, in a random order, and what counts is
the ratio to Adam's ten of the same round: medians, and in parentheses the range
that 80 % of the rounds are in. With the default settings one step in ten
measures the factors. With `factor_update_steps=100` (every 100), steps that
measure are left out, and a hundredth of what one costs is added. Keras' Muon
has its own rule for matrices only, and Adam's for all else: convolutions, for
instance.
"""

FIRST_TEXT = """\
## First step

Seconds from `compile()` to the compiled program (JAX) or to the end of the
first step (PyTorch, which compiles nothing). Processes of other models compile
at the same time, so the last column has the ratio of what processors worked,
too. SGD's is the first of its process, and on JAX tunes the kernels that the
others then use. In a process of its own, Adam or AdaFisher does that itself,
for about as long: their ratio is less there.
"""

PEAK_TEXT = """\
## Peak memory

In MB: weights, state and what a step makes in between. JAX: the compiled
program's own analysis. PyTorch: what the allocator gave out at most in ten
steps; with the default settings, one of them measures.
"""

PROGRAM_TEXT = """\
## The program that JAX compiles

Conditionals in the compiled step, and its instructions. A conditional is a wait
for the host, and a wall for fusion. Instructions are those of all branches, of
which a step runs one.
"""

PROTOTYPE_TEXT = """\
## Prototypes

Step time over Adam's, of programs that were written to find out what costs and
what would help. **None of these figures is the package's.**
"""


def load(folder):
    """From backend to what was measured, for those that were."""
    return {
        backend: json.loads(path.read_text(encoding="utf-8"))
        for backend in BACKENDS
        if (path := folder / f"gpu-{backend}.json").exists()
    }


def programs_of(row, kind):
    """From optimizer to one kind of figure, where there is one."""
    return {
        optimizer: facts[kind]
        for optimizer, facts in row.get("programs", {}).items()
        if facts.get(kind) is not None
    }


def quotient(figures, name, base):
    """A ratio, `None` if a part of it wasn't measured."""
    known = name in figures and base in figures
    return figures[name] / figures[base] if known else None


def ratios_of(row):
    """What goals are about, of one model."""
    ratios = {
        optimizer: ratio["median"]
        for optimizer, ratio in row.get("over Adam", {}).items()
    }
    ratios["first"] = quotient(
        programs_of(row, "first_seconds"), DEFAULT, "Adam"
    )
    ratios["peak"] = quotient(programs_of(row, "peak_bytes"), DEFAULT, "SGD")
    return ratios


def is_met(backend, key, ratio):
    """Whether a goal is met, `None` if there is none or no figure for it.

    What counts is the figure with the digits that the page shows.
    """
    goal = GOALS[backend].get(key)
    if goal is None or ratio is None:
        return None
    return round(ratio, 3) <= goal


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


def table(head, rows):
    """A table in Markdown, or nothing if it would have no rows."""
    lines = [line(row) for row in rows]
    if not lines:
        return ""
    return "\n".join([line(head), "|" + "---|" * len(head), *lines, ""])


def line(cells):
    """One row of a table."""
    return f"| {' | '.join(cells)} |"


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
                        for optimizer in ("SGD", "Adam", DEFAULT)
                    ),
                    judged(backend, "first", ratios_of(row)["first"]),
                    number(quotient(worked, DEFAULT, "Adam"), ".2f"),
                ]
            )
    return table(
        [
            *("model", "SGD, s", "Adam, s", "AdaFisher, default, s"),
            titled(backend, "first", "default over Adam"),
            "processors, default over Adam",
        ],
        rows,
    )


def peaks(backend, data):
    """The table of peak memory."""
    columns = ("SGD", "Adam", "Muon", DEFAULT, EVERY_STEP)
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
                ]
            )
    return table(
        [
            *("model", *columns),
            titled(backend, "peak", "default over SGD"),
            "every step over SGD",
        ],
        rows,
    )


def programs(data):
    """The table of conditionals and instructions."""
    columns = (DEFAULT, EVERY_100, EVERY_STEP)
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


def prototypes(found):
    """The section about programs that aren't in the package, if there are."""
    text = ""
    for backend, data in found.items():
        text += table(
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
    return f"{PROTOTYPE_TEXT}\n{text}" if text else None


def section(text, tables):
    """A section with a table for each backend that has one."""
    parts = [
        f"### {BACKENDS[backend]}\n\n{rows}"
        for backend, rows in tables.items()
        if rows
    ]
    return "\n".join([text, *(parts or ["Not measured.\n"])])


def notes(found):
    """What is to be known of the figures, a paragraph each."""
    for backend, data in found.items():
        if data["level"] != "gpu":
            yield (
                f"**{BACKENDS[backend]}: a trial with tiny models on a CPU. "
                "No claims.**"
            )
        yield from data.get("notes", [])
        if data.get("late"):
            names = ", ".join(data["late"])
            yield (
                f"{BACKENDS[backend]}: these still compiled when the first "
                f"took its turn, so times may be disturbed: {names}."
            )


def page(found):
    """The page, from what `load` returned."""
    machines = [
        line(
            [
                BACKENDS[backend],
                *(
                    data.get(key) or "not noted"
                    for key in ("version", "keras", "package", "device", "date")
                ),
            ]
        )
        for backend, data in found.items()
    ]
    parts = [
        INTRODUCTION.format(
            machines="\n".join(machines),
            notes="".join(f"{note}\n\n" for note in notes(found)),
            models="\n".join(map(line, MODELS.values())),
            summary="\n".join(map(line, summary(found))),
        )
    ]
    for text, make in (
        (STEP_TEXT, step_times),
        (FIRST_TEXT, first_steps),
        (PEAK_TEXT, peaks),
    ):
        tables = {
            backend: make(backend, data) for backend, data in found.items()
        }
        parts.append(section(text, tables))
    if "jax" in found:
        parts.append(section(PROGRAM_TEXT, {"jax": programs(found["jax"])}))
    parts += [prototypes(found), HOW]
    return "\n".join(part for part in parts if part)


def main():
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=ROOT / "benchmarks" / "results" / "gpu",
    )
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    found = load(arguments.results)
    if not found:
        parser.error(
            f"{arguments.results} has no gpu-jax.json or gpu-torch.json"
        )
    path = arguments.output / "performance_gpu.md"
    path.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
