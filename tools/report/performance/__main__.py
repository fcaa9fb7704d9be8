"""Write docs/performance.md and its plots."""

import matplotlib.pyplot as plt

from tools.report import pages
from tools.report import performance
from tools.report.performance import figures
from tools.report.performance import tables
from tools.report.performance.results import bandwidths
from tools.report.performance.results import load
from tools.report.performance.results import STEP_GOALS


def page(found, notes):
    """The page.

    Args:
        found: What `load` returned.
        notes: String, what was written by hand: it explains the figures.

    Returns:
        String.
    """
    goals = tables.Goals()
    # In the order of the page, which is that of the summary.
    values = {
        "titles": tables.STEP_TITLES,
        "ratios": {
            key: tables.step_ratios(found, goals, key) for key in STEP_GOALS
        },
        "milliseconds": tables.milliseconds(found),
        "state": tables.state(found, goals),
        "peak": tables.peak(found, goals),
        "scaling": tables.scaling(found, goals),
    }
    data = [next(iter(d.values())) for d in found.values() if d]
    return pages.fill(
        __file__,
        machines=tables.machine_rows(data),
        summary=goals.summary(),
        bandwidth=", ".join(
            f"{value / 1e9:.1f} GB/s ({pages.BACKENDS[backend]})"
            for backend, value in bandwidths(found).items()
        ),
        notes=notes,
        **conditions(found, data),
        **values,
    )


def conditions(found, data):
    """What the machine did meanwhile, and which one it was."""
    settings = {f"`{k}={v}`" for d in data for k, v in d["environment"].items()}
    loads = [b["load"] for d in found.values() for b in d.values()]
    is_gpu = any("cores" not in d["device"] for d in data)
    return {
        "lowest_load": min(loads),
        "highest_load": max(loads),
        "threads": ", ".join(sorted(s for s in settings if "LOG" not in s)),
        "device": "The device is named beside each backend."
        if is_gpu
        else "All of these figures are a CPU's.",
    }


def main():
    """Read the command line, and write the page and the plots."""
    parser = pages.parser(performance.__doc__, results="full")
    arguments = parser.parse_args()

    found = load(arguments.results)
    plots = arguments.output / "performance"
    plots.mkdir(parents=True, exist_ok=True)
    # The same figures give the same files.
    plt.rcParams["svg.hashsalt"] = "performance"
    figures.plot_step_times(found, plots / "step_time.svg")
    figures.plot_scaling(found, plots / "scaling.svg")
    path = plots / "notes.md"
    notes = path.read_text(encoding="utf-8") if path.exists() else ""
    pages.write(arguments.output / "performance.md", page(found, notes))


if __name__ == "__main__":
    main()
