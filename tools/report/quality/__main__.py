"""Write docs/quality.md and its plots."""

from tools.report import pages
from tools.report import quality
from tools.report.quality import choice
from tools.report.quality import figures
from tools.report.quality import sentences
from tools.report.quality import tables
from tools.report.quality.results import ANYTIME
from tools.report.quality.results import anytime_times
from tools.report.quality.results import DEFAULTS
from tools.report.quality.results import ERRORS
from tools.report.quality.results import geometric_means
from tools.report.quality.results import load
from tools.report.quality.results import load_schedules
from tools.report.quality.results import LONGER
from tools.report.quality.results import MAIN
from tools.report.quality.results import minutes
from tools.report.quality.results import NEVER
from tools.report.quality.results import NO_SCHEDULE
from tools.report.quality.results import TASKS
from tools.report.quality.results import times_to_target


def write(results, schedules, fits, output):
    """Write the page and its plots.

    Args:
        results: What `load` returned.
        schedules: What `load_schedules` returned.
        fits: What `load_fit` returned.
        output: `pathlib.Path` of a folder.
    """
    folder = output / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    # Schedules of several lengths were measured for these alone.
    times = {
        task: only_main(times_to_target(data)) for task, data in results.items()
    }
    longest = {
        task: times_to_target(data, only_longest=True)
        for task, data in results.items()
    }
    figures.plot_sensitivity(results, folder / "sensitivity.svg")
    figures.plot_curves(results, folder / "curves.svg")
    figures.plot_rates(results, folder / "rates.svg")
    figures.plot_profiles(times, folder / "profiles.svg")
    text = pages.fill(
        __file__,
        **facts(results),
        **found(results, times),
        **found_of_schedules(results, schedules),
        **found_of_fit(results, schedules, fits),
        never=f"{NEVER:g}",
        errors=ERRORS,
        target=tables.target_table(times, longest),
        sections=by_hand(),
    )
    pages.write(output / "quality.md", text)


def only_main(row):
    """The times of the optimizers that are tried most."""
    return {rival: row[rival] for rival in MAIN if rival in row}


def facts(results):
    """Where the figures come from."""
    first = next(iter(results.values()))
    missing = [TASKS[task] for task in TASKS if task not in results]
    note = f"\nNot measured yet: {'; '.join(missing)}.\n" if missing else ""
    return {
        **{key: first[key] for key in ("device", "version", "keras")},
        "missing": note,
        "minutes": f"{minutes(results):.0f}",
        "count": len(results),
    }


def found(results, times):
    """Tables and sentences."""
    return {
        "first": tables.first_table(results),
        "wins_steps": sentences.wins(results, "steps"),
        "wins_time": sentences.wins(results, "time"),
        "times": sentences.times_of(geometric_means(times)),
        "octaves": sentences.octaves(results),
        "whitening": sentences.whitening(results),
        "diverging": sentences.diverging(results),
        "lost_steps": sentences.losses(results, "steps"),
        "lost_time": sentences.losses(results, "time"),
        "pairs": sentences.each_of_ours(results, "steps"),
        "wins": tables.win_table(results),
        "steps": tables.score_table(results, "steps"),
        "time": tables.score_table(results, "time"),
        "octave_table": tables.octave_table(results),
        "chosen": tables.chosen_table(results),
        "cost": tables.cost_table(results),
        "forms": tables.form_table(results),
        "ablation": tables.ablation_table(results),
        "ranks": tables.rank_table(results),
        "defaults": "\n\n".join(
            f"### {tables.defaults_name(kind).capitalize()}\n\n"
            + tables.score_table(results, kind)
            for kind in DEFAULTS
        ),
    }


def found_of_schedules(results, schedules):
    """The same without a schedule, and with a longer one."""
    # The larger GPT has no longer runs.
    longer = {
        task: data
        for task, data in schedules.items()
        if any(name.startswith(LONGER) for name in data["rows"])
    }
    return {
        "anytime_means": tables.schedule_table(results, schedules, ANYTIME),
        "longer_means": tables.schedule_table(results, longer, LONGER),
        "anytime": tables.score_table(schedules, ANYTIME, (*MAIN, NO_SCHEDULE)),
        "wins_anytime": sentences.wins(schedules, ANYTIME),
        "anytime_times": tables.target_table(
            {
                task: anytime_times(results[task], data)
                for task, data in schedules.items()
            }
        ),
        "longer": tables.score_table(longer, LONGER, MAIN),
        "wins_longer": sentences.wins(longer, LONGER),
        "schedule_minutes": f"{minutes(schedules):.0f}",
    }


def found_of_fit(results, schedules, fits):
    """What to take where time counts, and what steps cost in `fit`."""
    rows = choice.rows_of(results, schedules, fits)
    return {
        "choices": tables.choice_table(rows) if rows else "Not measured yet.",
        "fit_cost": tables.fit_table(fits) if fits else "Not measured yet.",
    }


def by_hand():
    """What the figures mean."""
    notes = pages.DOCS / "quality" / "notes.md"
    return notes.read_text(encoding="utf-8") if notes.exists() else ""


def main():
    """Read the command line."""
    arguments = pages.parser(quality.__doc__).parse_args()
    results = load(arguments.results)
    if not results:
        raise SystemExit(f"No complete results in {arguments.results}.")
    schedules = load_schedules(arguments.results, results)
    fits = choice.load_fit(arguments.results, results)
    write(results, schedules, fits, arguments.output)


if __name__ == "__main__":
    main()
