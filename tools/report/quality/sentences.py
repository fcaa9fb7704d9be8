"""The sentences of docs/quality.md that depend on what was found."""

import statistics

from tools.report.quality.results import ABLATION
from tools.report.quality.results import DEFAULTS
from tools.report.quality.results import divergences
from tools.report.quality.results import is_better
from tools.report.quality.results import MAIN
from tools.report.quality.results import mean_octaves
from tools.report.quality.results import OURS
from tools.report.quality.results import table_of
from tools.report.quality.results import TASKS
from tools.report.quality.results import verdicts
from tools.report.quality.tables import defaults_name
from tools.report.quality.tables import number


def wins(results, kind):
    """How many tasks ours win, and lose."""
    found = [who for who, _, _ in verdicts(results, kind).values()]
    return (
        f"one of ours is best beyond the noise on {found.count('ours')} of "
        f"{len(found)} tasks, another optimizer on {found.count('theirs')}"
    )


def losses(results, kind):
    """A list of where another optimizer is better than all of ours."""
    items = []
    for task, (who, ours, theirs) in verdicts(results, kind).items():
        if who != "theirs":
            continue
        values = table_of(task, results[task], kind)
        means = {r: statistics.mean(values[r]) for r in (ours, theirs)}
        items.append(
            f"- {TASKS[task]}: {theirs} has {number(task, means[theirs])}, "
            f"{ours} {number(task, means[ours])}."
        )
    return "\n".join(items) or "- On none."


def each_of_ours(results, kind):
    """How many tasks each of ours is better on than AdamW, Nadam and Muon."""
    items = []
    for rival in OURS:
        parts = []
        for other in ("AdamW", "Nadam", "Muon"):
            pairs = [
                table_of(task, data, kind, (rival, other))
                for task, data in results.items()
            ]
            pairs = [pair for pair in pairs if len(pair) == 2]
            better = sum(is_better(p[rival], p[other]) for p in pairs)
            worse = sum(is_better(p[other], p[rival]) for p in pairs)
            parts.append(
                f"than {other} on {better} tasks, worse on {worse}, "
                f"of {len(pairs)}"
            )
        items.append(f"- {rival} is better {'; '.join(parts)}.")
    return "\n".join(items)


def times_of(means):
    """The geometric means of the times to AdamW's best."""
    return ", ".join(f"{r} {means[r]:.2f}" for r in MAIN if r in means)


def octaves(results):
    """The widths of the ranges of learning rates."""
    found = {rival: mean_octaves(results, rival) for rival in MAIN}
    return ", ".join(
        f"{rival} {own:.1f} ({best:.1f})"
        for rival, (own, best, _) in (
            (rival, values) for rival, values in found.items() if values
        )
    )


def whitening(results):
    """On how many tasks the factors make a difference."""
    names = ("AdaFisherMuon", ABLATION)
    pairs = [
        table_of(task, data, "steps", names) for task, data in results.items()
    ]
    pairs = [pair for pair in pairs if len(pair) == 2]
    with_, without = names
    better = sum(is_better(p[with_], p[without]) for p in pairs)
    worse = sum(is_better(p[without], p[with_]) for p in pairs)
    return (
        f"better beyond the noise on {better} of {len(pairs)} tasks, worse on "
        f"{worse}"
    )


def diverging(results):
    """How many runs of ours diverge at their defaults."""
    parts = []
    for kind in DEFAULTS:
        counts = [divergences(results, kind, rival) for rival in OURS]
        bad, runs = map(sum, zip(*counts, strict=True))
        parts.append(f"{bad} of {runs} ({defaults_name(kind)})")
    return ", ".join(parts)
