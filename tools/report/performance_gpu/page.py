"""What docs/performance_gpu.md consists of."""

from tools.report import pages
from tools.report.performance_gpu import tables
from tools.report.performance_gpu.results import BACKENDS
from tools.report.performance_gpu.results import MODELS


def by_backend(tables):
    """A table for each backend that has one."""
    parts = [
        f"### {BACKENDS[backend]}\n\n{rows}"
        for backend, rows in tables.items()
        if rows
    ]
    return "\n\n".join(parts or ["Not measured."])


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
                f"{BACKENDS[backend]}: these weren't ready yet when the first "
                f"took its turn, so times may be disturbed: {names}."
            )


def sections(found, compiled):
    """What not every run has: JAX' programs, and prototypes."""
    if compiled:
        yield pages.fill(
            __file__,
            "compiled.md",
            kernels=tables.kernels(compiled),
            compiling=tables.compiling(compiled),
            **{key: compiled[key] for key in ("device", "version", "date")},
        )
    if "jax" in found:
        rows = {"jax": tables.programs(found["jax"])}
        yield pages.fill(__file__, "program.md", programs=by_backend(rows))
    prototypes = "\n\n".join(filter(None, tables.prototypes(found)))
    if prototypes:
        yield pages.fill(__file__, "prototypes.md", prototypes=prototypes)


def kernels_of(backend, data):
    """Whether XLA tried out kernels. PyTorch doesn't compile any."""
    if backend != "jax":
        return "–"
    return "tuned" if data.get("tunes") else "not tuned"


def page(found, compiled=None):
    """The page, from what `load` and `load_compiled` returned."""
    keys = ("version", "keras", "package", "device", "date")
    machines = [
        [
            BACKENDS[backend],
            *(data.get(key) or "not noted" for key in keys),
            kernels_of(backend, data),
        ]
        for backend, data in found.items()
    ]

    def each(make):
        return by_backend({b: make(b, data) for b, data in found.items()})

    return pages.fill(
        __file__,
        machines="\n".join(map(pages.line, machines)),
        notes="".join(f"{note}\n\n" for note in notes(found)),
        models="\n".join(map(pages.line, MODELS.values())),
        summary="\n".join(map(pages.line, tables.summary(found))),
        step_times=each(tables.step_times),
        first_steps=each(tables.first_steps),
        peaks=each(tables.peaks),
        sections="".join(
            f"{section}\n" for section in sections(found, compiled)
        ),
    )
