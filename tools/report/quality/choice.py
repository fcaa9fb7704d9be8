"""What the page tells to take where time counts, and how soon that is there.

Time is measured in two ways. A compiled training run has nothing but the steps'
arithmetic; in `fit`, a batch is made ready and a step started too, which
`benchmarks/quality_fit.py` has measured.
"""

import json
import math

from tools.report.quality.results import anytime_times
from tools.report.quality.results import mean_time
from tools.report.quality.results import NOT_CHOSEN_ON
from tools.report.quality.results import ratio_in_time
from tools.report.quality.results import ratio_of
from tools.report.quality.results import TASKS
from tools.report.quality.results import times_to_target

COSINE, ANYTIME = "cosine", "anytime"
OURS = ("AdaFisherMuon", ANYTIME)
# What the table in docs/quality/notes.md names for a kind of model, if it isn't
# `OURS`.
_TABLES = ("diabetes", "cancer", "digits")
CHOICES = {
    **dict.fromkeys(_TABLES, ("AdaFisherW", COSINE)),
    "raw": ("AdaFisherMuon", COSINE),
    "mlp": ("AdamW", COSINE),
    "tuning": ("AdaFisherW", ANYTIME),
}
# In `fit`, a step of a small network costs little next to what is around it.
IN_FIT = dict.fromkeys(_TABLES, ("AdaFisherMuon", COSINE))
# Whom to compare with: the better of both schedules, task by task.
RIVALS = ("AdamW", "Nadam")


def load_fit(folder, results):
    """From a task's name to the costs of steps in `fit`, next to AdamW's."""
    found = {}
    for task in results:
        path = folder / f"fit-{task}-jax.json"
        if path.exists():
            found[task] = json.loads(path.read_text())["rows"]["fit"]
    return found


def choice_of(task, in_fit):
    """The optimizer and the schedule to take."""
    choices = {**CHOICES, **IN_FIT} if in_fit else CHOICES
    return choices.get(task, OURS)


def time_of(rival, schedule, data, schedules, fit=None):
    """When AdamW's lowest loss is reached, next to AdamW's own time.

    Args:
        rival, schedule: Strings.
        data: What `load` gives for a task.
        schedules: What `load_schedules` gives for it.
        fit: What `load_fit` gives for it. If `None`, the time is that of
            compiled runs.
    """
    if schedule == ANYTIME:
        time = anytime_times(data, schedules).get(rival, math.inf)
        ratio, program = ratio_of(data, rival), f"{rival}, anytime"
    else:
        time = times_to_target(data).get(rival, math.inf)
        ratio, program = ratio_in_time(data, rival), rival
        if has_form(data, rival):
            program = f"{rival}, other form"
    return time if fit is None else time / ratio * fit[program]["median"]


def has_form(data, rival):
    """Whether the runs in equal time are of the rival's other form."""
    rows = data["rows"]
    # Who isn't tuned for equal time goes on with what equal steps chose.
    return {
        **rows.get(f"rates: {rival}", {}),
        **rows.get(f"time: {rival}", {}),
    }.get("is_form")


def rows_of(results, schedules, fits):
    """What to take, and its times.

    Returns:
        Dict from a task to a tuple of the label of what to take and a list of
        times: of that in compiled runs and in `fit`, and of the better of both
        schedules for each of `RIVALS` in `fit`.
    """
    rows = {}
    for task, data in results.items():
        if task not in schedules or task not in fits:
            continue
        known = data, schedules[task]
        fit = fits[task]
        compiled, in_fit = choice_of(task, False), choice_of(task, True)
        label = _label(data, *compiled)
        if in_fit != compiled:
            label += f"; in `fit` {_label(data, *in_fit)}"
        rows[task] = (
            label,
            [
                time_of(*compiled, *known),
                time_of(*in_fit, *known, fit),
                *(
                    min(
                        time_of(rival, schedule, *known, fit)
                        for schedule in (COSINE, ANYTIME)
                    )
                    for rival in RIVALS
                ),
            ],
        )
    return rows


def means_of(rows, tasks=TASKS):
    """The geometric mean of each column, over some tasks."""
    columns = zip(*(rows[t][1] for t in tasks if t in rows), strict=True)
    return [mean_time(column) for column in columns]


def chosen_on(rows):
    """The tasks among them on which settings were chosen."""
    return [task for task in rows if task not in NOT_CHOSEN_ON]


def _label(data, rival, schedule):
    if schedule == ANYTIME:
        return f"{rival}.anytime"
    return f"{rival}, other form" if has_form(data, rival) else rival
