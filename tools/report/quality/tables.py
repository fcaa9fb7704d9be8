"""The tables of docs/quality.md."""

import math
import statistics

from tools.report.quality import choice
from tools.report.quality.results import ABLATION
from tools.report.quality.results import ANYTIME
from tools.report.quality.results import BY_LOSS
from tools.report.quality.results import DEFAULTS
from tools.report.quality.results import divergences
from tools.report.quality.results import form_ratio_of
from tools.report.quality.results import geometric_means
from tools.report.quality.results import LONGER
from tools.report.quality.results import lowest_loss
from tools.report.quality.results import MAIN
from tools.report.quality.results import marks
from tools.report.quality.results import mean_octaves
from tools.report.quality.results import octaves
from tools.report.quality.results import PROGRAMS
from tools.report.quality.results import ranks
from tools.report.quality.results import rates_of
from tools.report.quality.results import ratio_of
from tools.report.quality.results import RIVALS
from tools.report.quality.results import table_of
from tools.report.quality.results import TASKS
from tools.report.quality.results import value_of
from tools.report.quality.results import verdict


def table(header, rows):
    """A table in Markdown."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(task, value):
    """As many digits as differ between optimizers."""
    if not math.isfinite(value):
        return "diverges"
    if task in BY_LOSS:
        return f"{value:.{1 if value > 10 else 3}f}"
    return f"{value:.2f}"


def marked(text, mark):
    """A cell: what is best in bold, what ties with the lowest with a sign."""
    return {"best": f"**{text}**", "tie": f"{text} ≈", "": text}[mark]


def show(task, values, with_spread=True):
    """A mean with its standard error."""
    mean = statistics.mean(values)
    text = number(task, mean)
    if not with_spread or len(values) < 2 or not math.isfinite(mean):
        return text
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{text} ± {number(task, error)}"


def unit(task):
    """What the numbers of a row are."""
    return "" if task in BY_LOSS else ", error in %"


def first_table(results):
    """Equal steps and equal time, of the main optimizers."""
    rows = []
    for task, data in results.items():
        both = []
        for kind in ("steps", "time"):
            # Marked next to all, not only to those shown.
            values = table_of(task, data, kind)
            signs = marks(values)
            both.append(
                {
                    r: marked(show(task, values[r], False), signs[r])
                    for r in MAIN
                    if r in values
                }
            )
        steps, time = both
        cells = [
            f"{steps.get(r, '')} ⁄ {time.get(r, '')}"
            if time.get(r) != steps.get(r)
            else steps.get(r, "")
            for r in MAIN
        ]
        rows.append([TASKS[task] + unit(task), *cells])
    return table(["task", *MAIN], rows)


def score_table(results, kind, rivals=RIVALS):
    """Errors or losses on the test split, of all optimizers."""
    rows = []
    for task, data in results.items():
        values = table_of(task, data, kind, rivals)
        signs = marks(values)
        cells = [
            marked(show(task, values[r]), signs[r]) if r in values else ""
            for r in rivals
        ]
        rows.append([TASKS[task] + unit(task), *cells])
    return table(["task", *rivals], rows)


def schedule_table(results, schedules, kind):
    """Losses with the quality benchmark's schedule, and with another.

    Geometric means over the tasks on which all were measured, next to AdamW
    with the former.
    """
    pairs = []
    for task, data in results.items():
        if task in schedules:
            own = table_of(task, data, "steps", MAIN, lowest_loss)
            other = table_of(task, schedules[task], kind, MAIN, lowest_loss)
            if len(other) == len(MAIN):
                pairs.append((own, other))

    def mean(rival, which):
        return statistics.geometric_mean(
            statistics.mean(pair[which][rival])
            / statistics.mean(pair[0]["AdamW"])
            for pair in pairs
        )

    names = {
        ANYTIME: "at any time",
        LONGER: "four times as many steps",
    }
    rows = [
        [name, *(f"{mean(rival, which):.3f}" for rival in MAIN)]
        for which, name in enumerate(("cosine", names[kind]))
        if pairs
    ]
    return table([f"{len(pairs)} tasks", *MAIN], rows)


def win_table(results):
    """How often a family is best, and by how much the other is."""
    rows = []
    names = {
        "steps": "tuned, equal steps",
        "time": "tuned, equal time",
        **{kind: f"defaults: {defaults_name(kind)}" for kind in DEFAULTS},
    }
    for kind, what in names.items():
        rows.append([what])
        for value in (value_of, lowest_loss):
            tables = (
                table_of(task, data, kind, value=value)
                for task, data in results.items()
            )
            found = [verdict(values)[0] for values in tables if values]
            counts = (str(found.count(x)) for x in ("ours", "tie", "theirs"))
            rows[-1].append(" / ".join(counts))
    header = "on the test split", "lowest validation loss"
    return table(["one of ours / tie / another", *header], rows)


def defaults_name(kind):
    """What one of `DEFAULTS` is in words."""
    schedule, factor = kind.split(", ")
    rate = "three times the default rate" if factor == "3" else "default rate"
    return f"{rate}, {schedule}"


def target_table(times, with_longest=None):
    """The table of the times to AdamW's best.

    Args:
        times: Dict from tasks to dicts from optimizers to times.
        with_longest: The same with the longest schedule only, for its mean.
    """
    rivals = [r for r in RIVALS if any(r in row for row in times.values())]

    def cell(row, rival):
        if rival not in row:
            return ""
        return f"{row[rival]:.2f}" if math.isfinite(row[rival]) else "—"

    rows = [
        [TASKS[task], *(cell(row, rival) for rival in rivals)]
        for task, row in times.items()
    ]
    for what, each in (
        ("**geometric mean**", times),
        ("with the longest schedule only", with_longest),
    ):
        if each:
            means = geometric_means(each)
            rows.append([what, *(f"{means[r]:.2f}" for r in rivals)])
    return table(["task", *rivals], rows)


def choice_table(rows):
    """What to take where time counts, and when it is at AdamW's best.

    Args:
        rows: What `choice.rows_of` returned.
    """

    def cells(times):
        return [f"{t:.2f}" if math.isfinite(t) else "—" for t in times]

    lines = [
        [TASKS[task], label, *cells(times)]
        for task, (label, times) in rows.items()
    ]
    lines.append(["**geometric mean**", "", *cells(choice.means_of(rows))])
    tasks = choice.chosen_on(rows)
    if tasks:
        what = f"of the {len(tasks)} on which settings were chosen"
        lines.append([what, "", *cells(choice.means_of(rows, tasks))])
    return table(
        ["task", "to take", "compiled", "in `fit`", *choice.RIVALS], lines
    )


def fit_table(fits):
    """What a step costs in `fit`, next to AdamW's.

    Args:
        fits: What `choice.load_fit` returned.
    """
    names = {rival: rival for rival in MAIN if rival != "AdamW"} | {
        "AdaFisherMuon, other form": "AdaFisherMuon, other form",
        "AdaFisherMuon, anytime": "AdaFisherMuon, any time",
        "AdaFisherW, anytime": "AdaFisherW, any time",
        "AdamW, anytime": "AdamW, any time",
    }
    rows = [
        [
            TASKS[task],
            *(f"{fit[n]['median']:.2f}" if n in fit else "" for n in names),
            f"{1e3 * fit['seconds']:.2f}",
        ]
        for task, fit in fits.items()
    ]
    return table(["task", *names.values(), "AdamW, ms"], rows)


def cost_table(results):
    """What a step costs next to AdamW's."""
    rivals = [r for r in RIVALS if r not in PROGRAMS]
    rows = []
    for task, data in results.items():
        step = data["rows"]["step"]
        ratios = [
            f"{ratio_of(data, r):.2f}" if r in step else "" for r in rivals
        ]
        rows.append([TASKS[task], *ratios, f"{1e3 * step['seconds']:.2f}"])
    return table(["task", *rivals, "AdamW, ms"], rows)


def chosen_table(results):
    """The learning rates; momentum and decay where they aren't the default."""

    def cell(data, rival):
        row = data["rows"].get(f"rates: {rival}")
        if row is None:
            return ""
        others = []
        if row.get("is_form"):
            row = row["form"]
            others.append("other form")
        if row["momentum"]:
            others.append(f"{row['momentum']:g}")
        if row["decay"]:
            others.append(f"decay {row['decay']:g}")
        others = f" ({', '.join(others)})" if others else ""
        return f"{row['learning_rate']:.2g}{others}"

    rivals = (*RIVALS, ABLATION)
    rows = [
        [TASKS[task], *(cell(data, r) for r in rivals)]
        for task, data in results.items()
    ]
    return table(["task", *rivals], rows)


def form_table(results):
    """What other forms cost, and where tuning takes them."""
    rows = []
    for task, data in results.items():
        row = data["rows"].get("rates: AdaFisherMuon", {})
        if "form" not in row:
            continue
        ratios = (ratio_of(data, "AdaFisherMuon"), form_ratio_of(data))
        taken = row["is_form"], choice.has_form(data, "AdaFisherMuon")
        rows.append(
            [
                TASKS[task],
                *(f"{ratio:.2f}" for ratio in ratios),
                *("yes" if is_form else "no" for is_form in taken),
            ]
        )
    header = "default", "this form", "equal steps", "equal time"
    return table(["task", *header], rows)


def octave_table(results):
    """How many octaves of rates are good."""

    def cell(data, rival):
        if not rates_of(data, rival):
            return ""
        own, best, is_open = octaves(data, rival)
        sign = "≥ " if is_open else ""
        return f"{sign}{own}, {best}"

    rows = [
        [TASKS[task], *(cell(data, r) for r in RIVALS)]
        for task, data in results.items()
    ]
    means = [mean_octaves(results, rival) for rival in RIVALS]
    rows.append(
        [
            "**mean**",
            *(f"**{m[0]:.1f}, {m[1]:.1f}**" if m else "" for m in means),
        ]
    )
    return table(["task", *RIVALS], rows)


def rank_table(results):
    """The mean ranks at the defaults, and how many runs diverge there."""
    rows = []
    for kind in DEFAULTS:
        found = ranks(results, kind)
        cells = (f"{found[r]:.1f}" if r in found else "" for r in RIVALS)
        rows.append([defaults_name(kind), *cells])
    for kind in DEFAULTS:
        counts = (divergences(results, kind, rival) for rival in RIVALS)
        rows.append(
            [
                f"diverging: {defaults_name(kind)}",
                *(f"{bad} of {all_}" for bad, all_ in counts),
            ]
        )
    return table(["mean rank", *RIVALS], rows)


def ablation_table(results):
    """With and without factors."""
    rows = []
    for task, data in results.items():
        pair = table_of(task, data, "steps", rivals=("AdaFisherMuon", ABLATION))
        if len(pair) < 2:
            continue
        signs = marks(pair)
        # Ties need no sign where there are two.
        cells = [
            marked(show(task, pair[r]), signs[r].replace("tie", ""))
            for r in pair
        ]
        rows.append([TASKS[task] + unit(task), *cells])
    return table(["task", "AdaFisherMuon", "not whitened"], rows)
