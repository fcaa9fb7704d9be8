"""The benchmarks run, and their page has all of its rows. No times."""

import ast
import importlib.util
import json
import os
import re

import numpy as np
import pytest
from processes import run

from tools.report.performance.results import slope
from tools.report.quality import choice
from tools.report.quality.results import ANYTIME
from tools.report.quality.results import is_better
from tools.report.quality.results import load
from tools.report.quality.results import load_schedules
from tools.report.quality.results import LONGER
from tools.report.quality.results import lowest_loss
from tools.report.quality.results import MAIN
from tools.report.quality.results import marks
from tools.report.quality.results import OURS
from tools.report.quality.results import RIVALS
from tools.report.quality.results import runs_of
from tools.report.quality.results import times_to_target
from tools.report.quality.results import verdict

# Each process that measures is told its backend, whatever this one's is.
pytestmark = pytest.mark.once
MODELS = ("wide MLP", "MobileNet")
# It compiles whole runs, which only JAX does. No times are looked at: as
# quickly as the tests compile.
ENVIRONMENT = {
    "KERAS_BACKEND": "jax",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
}


@pytest.mark.parametrize(
    "backend",
    [
        # Where programs are compiled, it takes minutes.
        pytest.param("jax", marks=pytest.mark.slow),
        pytest.param("tensorflow", marks=pytest.mark.slow),
        "torch",
    ],
)
def test_the_benchmarks_and_their_page(backend, tmp_path):
    # One test, since each process that runs tests would measure again.
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} isn't installed")
    folder = tmp_path / "results"
    for benchmark in ("step_time", "memory", "scaling"):
        run(
            f"benchmarks/{benchmark}.py",
            "--level=tiny",
            f"--results={folder}",
            KERAS_BACKEND=backend,
        )
    check_figures(folder, backend)
    check_page(folder, tmp_path)
    check_resuming(folder, backend)


def numbers(data):
    if isinstance(data, dict):
        return [n for value in data.values() for n in numbers(value)]
    return [data] if isinstance(data, (int, float)) else []


def check_page(results, tmp_path):
    run(
        *("-m", "tools.report.performance"),
        *(f"--results={results}", f"--output={tmp_path}"),
    )
    page = (tmp_path / "performance.md").read_text()
    assert not re.search(r"\b(nan|inf)\b", page)
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for model in MODELS:
        # Five ratios, the milliseconds, and the peak.
        assert sum(f"| {model} |" in row for row in rows) == 7
    goals = [row for row in rows if "| ≤ " in row]
    # Two models five times and for the peak, one state, six kinds of growth.
    assert len(goals) == 2 * 5 + 2 + 1 + 6
    assert all(re.search("yes|no|can't tell", row) for row in goals)
    for plot in ("step_time", "scaling"):
        path = tmp_path / "performance" / f"{plot}.svg"
        assert path.stat().st_size > 10_000
        assert f"(performance/{plot}.svg)" in page


def check_figures(results, backend):
    for benchmark in ("step_time", "memory", "scaling"):
        path = results / f"{benchmark}-{backend}.json"
        data = json.loads(path.read_text())
        assert data["backend"] == backend
        assert data["device"]
        found = numbers(data["rows"])
        assert len(found) >= 10
        assert all(abs(number) < float("inf") for number in found)


def check_resuming(results, backend):
    path = results / f"memory-{backend}.json"
    complete = json.loads(path.read_text())
    partial = json.loads(path.read_text())
    del partial["rows"]["peak: MobileNet"]
    # Something that no measurement would give.
    partial["rows"]["peak: wide MLP"] = {"ratio": -1.0}
    path.write_text(json.dumps(partial))
    run(
        "benchmarks/memory.py",
        "--level=tiny",
        f"--results={results}",
        KERAS_BACKEND=backend,
    )
    resumed = json.loads(path.read_text())["rows"]
    assert resumed.keys() == complete["rows"].keys()
    assert resumed["peak: wide MLP"] == {"ratio": -1.0}


def test_slopes_are_those_of_power_laws():
    def points(power):
        return [
            {
                "sweep": "batch",
                "bytes": size,
                "extra": size**power,
                "error": 0.01 * size**power,
            }
            for size in (1e3, 1e4, 1e5)
        ]

    for power in (0, 1, 2):
        value, error = slope(points(power))
        assert abs(value - power) < 1e-9
        assert 0 < error < 0.2
    noise = [{**point, "error": 1e12} for point in points(1)]
    assert slope(noise) is None


def test_the_quality_benchmark_and_its_page(tmp_path):
    folder = tmp_path / "results"
    run(
        "benchmarks/quality.py",
        "--level=tiny",
        f"--results={folder}",
        **ENVIRONMENT,
    )
    (data,) = load(folder).values()
    for rival in RIVALS:
        for kind in ("steps", "time", "constant, 1", "cosine, 3"):
            (one,) = runs_of(data, kind, rival)
            assert np.isfinite(one["validation"]).all(), (kind, rival)
        tuned = data["rows"][f"rates: {rival}"]
        assert len(tuned["rates"]) == 2
        # Other momentum is tried at all rates that are about as good.
        least = min(sum(losses) for _, losses in tuned["rates"])
        assert {rate for rate, *_ in tuned["momentums"]} == {
            rate
            for rate, losses in tuned["rates"]
            if sum(losses) <= 1.01 * least
        }
    ours = data["rows"]["time: AdaFisherMuon"]
    assert len(ours["form"]["rates"]) == 2
    forms = data["rows"]["step of forms"]["AdaFisherMuon"]["median"]
    default = data["rows"]["step"]["AdaFisherMuon"]["median"]
    assert ours["ratio"] == (forms if ours["is_form"] else default)
    assert len(ours["runs"][0]["validation"]) == ours["parts"]
    for share in ("0.35", "0.5", "0.7"):
        (losses,) = data["rows"]["sooner: AdamW"][share]
        assert np.isfinite(losses).all()
    run(
        "benchmarks/quality_schedules.py",
        "--level=tiny",
        f"--results={folder}",
        **ENVIRONMENT,
    )
    run(
        "benchmarks/quality_fit.py",
        "--level=tiny",
        f"--results={folder}",
        **ENVIRONMENT,
    )
    (fit,) = choice.load_fit(folder, {"diabetes": data}).values()
    for rival in MAIN:
        assert fit[rival]["median"] > 0
        assert fit[f"{rival}, anytime"]["median"] > 0
    assert fit["AdamW"]["median"] == 1
    assert fit["AdaFisherMuon, other form"]["median"] > 0
    (other,) = load_schedules(folder, {"diabetes": data}).values()
    for rival in MAIN:
        parts = len(runs_of(data, "steps", rival)[0]["validation"])
        for kind, times in ((ANYTIME, 1), (LONGER, 4)):
            (one,) = runs_of(other, kind, rival)
            assert np.isfinite(one["validation"]).all(), (kind, rival)
            assert len(one["validation"]) == times * parts
    run(
        *("-m", "tools.report.quality"),
        *(f"--results={folder}", f"--output={tmp_path}"),
    )
    page = (tmp_path / "quality.md").read_text()
    assert not re.search(r"\b(nan|inf)\b", page)
    # Scores at equal steps and time, at four defaults, and with two other
    # schedules; times to the target, also with one of these, and for what to
    # take, rates, octaves, other forms, costs, also in `fit`, factors; the
    # first table; and that of what whitening adds, which the notes have.
    assert len(re.findall(r"\| diabetes, MLP \|", page)) == 19
    for plot in ("sensitivity", "curves", "rates", "profiles"):
        path = tmp_path / "quality" / f"{plot}.svg"
        assert path.stat().st_size > 10_000
        assert f"(quality/{plot}.svg)" in page


AS_ANYTIME = """
import keras
from benchmarks.quality_tasks import TASKS
from benchmarks.training import Trainer
from keras_adafisher import AdaFisherMuon

task = TASKS["diabetes"]()
trainer = Trainer(task, AdaFisherMuon)
run = trainer.run(
    0.05, seed=3, parts=2, schedule="inverse_sqrt, 100", is_averaged=True
)

keras.utils.set_random_seed(3)
model = task.make_model()
model.compile(AdaFisherMuon.anytime(0.05), loss="mse")
batches = trainer.batches(seed=3)
for _ in range(2 * task.steps):
    rows = next(batches)
    model.train_on_batch(task.train.x[rows], task.train.y[rows])
before = model.evaluate(task.validation.x, task.validation.y, verbose=0)
model.optimizer.finalize_variable_values(model.trainable_variables)
loss = model.evaluate(task.validation.x, task.validation.y, verbose=0)
print(run.validation[-1], loss, before)
"""
SCHEDULES = """
from benchmarks import quality_schedules
from benchmarks.quality import Contest
from benchmarks.training import Run

asked = []


class Recorded(Contest):
    def run(self, rate, seed, parts, momentum, decay, **changes):
        asked.append((rate, parts, momentum, decay, changes))
        return Run([1.0], abs(rate - 0.02), 0.0)


found = {"learning_rate": 0.04, "momentum": 0.8, "decay": 0.3}
for regime in quality_schedules.REGIMES.values():
    plan = quality_schedules.PLANS["long"]
    contest = Recorded("diabetes", "AdamW", 1.0, plan)
    rate = quality_schedules.tuned(contest, regime, found)["learning_rate"]
    parts = {a[1] for a in asked}
    settings = {a[2:4] for a in asked}
    runs = [(a[0], a[4]["schedule"], a[4]["is_averaged"]) for a in asked]
    task = quality_schedules.task_of("diabetes")
    print([rate, parts, settings, runs, task.parts])
    asked.clear()
"""


def test_averages_of_weights_are_those_of_anytime():
    output = run("-c", AS_ANYTIME, KERAS_BACKEND="jax")
    measured, users, not_averaged = map(float, output.split()[-3:])
    assert abs(measured - users) < 1e-4 * users
    assert abs(measured - not_averaged) > 1e-3 * users


def test_what_runs_with_other_schedules_are():
    output = run("-c", SCHEDULES, KERAS_BACKEND="jax")
    anytime, longer = map(ast.literal_eval, output.splitlines()[-2:])
    parts = anytime[-1]
    # What falls later is tried at the best rate and at half of it.
    later = ("inverse_sqrt, 400", True)
    assert anytime[:3] == [0.02, {parts}, {(0.8, 0.3)}]
    assert anytime[3][-7:] == [
        (0.02, *later),
        (0.01, *later),
        *[(0.02, "inverse_sqrt, 100", True)] * 5,
    ]
    assert longer[:3] == [0.02, {4 * parts}, {(0.8, 0.3)}]
    assert {run[1:] for run in longer[3]} == {("cosine", False)}


def test_what_to_take_where_time_counts():
    """With the schedule that the page names, at the cost of its own steps."""

    def runs(*losses):
        return {"runs": [{"validation": list(losses)}] * 3}

    step = {rival: {"median": 1.0} for rival in RIVALS}
    step["AdaFisherW"] = {"median": 1.25}
    rows = {"step": step, "time: AdamW": runs(4, 3, 2, 1)}
    # Its other form is at 1 after two evaluations, 2.5 times as long.
    rows["time: AdaFisherMuon"] = {**runs(2, 1), "is_form": True, "ratio": 2.5}
    # This one is there after three with a cosine.
    rows["time: AdaFisherW"] = {**runs(3, 2, 1), "ratio": 1.25}
    rows["time: Nadam"] = runs(4, 4, 4, 4)
    averaged = {
        "anytime: AdaFisherMuon": runs(2, 1, 1, 1),
        "anytime: AdaFisherW": runs(1, 1, 1, 1),
        "anytime: Nadam": runs(3, 3, 3, 3),
    }
    fit = {
        "AdaFisherMuon": {"median": 1.9},
        "AdaFisherMuon, other form": {"median": 1.2},
        "AdaFisherMuon, anytime": {"median": 2.0},
        "AdaFisherW": {"median": 1.5},
        "AdaFisherW, anytime": {"median": 1.75},
        **{
            f"{rival}{kind}": {"median": 1.0}
            for rival in ("AdamW", "Nadam")
            for kind in ("", ", anytime")
        },
    }
    tasks = ("digits", "gpt", "tuning", "mlp")
    found = choice.rows_of(
        {task: {"rows": rows} for task in tasks},
        {task: {"rows": averaged} for task in tasks},
        {task: fit for task in tasks},
    )
    # Of four evaluations of AdamW's: three by 1.25, and in `fit` two by 1.2;
    # two by 1, and by 2; one by 1.25, and by 1.75. Nadam never is at 1.
    inf = float("inf")
    assert {task: times for task, (_, times) in found.items()} == {
        "digits": pytest.approx([3.75 / 4, 2.4 / 4, 1, inf]),
        "gpt": pytest.approx([0.5, 1, 1, inf]),
        "tuning": pytest.approx([1.25 / 4, 1.75 / 4, 1, inf]),
        "mlp": [1, 1, 1, inf],
    }
    assert [label for label, _ in found.values()] == [
        "AdaFisherW; in `fit` AdaFisherMuon, other form",
        "AdaFisherMuon.anytime",
        "AdaFisherW.anytime",
        "AdamW",
    ]
    # What isn't reached counts as 2.
    assert choice.means_of(found, ("gpt", "mlp"))[2:] == pytest.approx([1, 2])


def test_the_lowest_loss_of_a_run():
    nan = float("nan")
    assert lowest_loss("gpt", {"validation": [3.0, 1.0, 2.0, nan]}) == 1
    assert lowest_loss("gpt", {"validation": [nan]}) == float("inf")


def test_a_difference_beyond_the_noise():
    # Seed by seed, the first is lower by 1 to 1.2.
    assert is_better([1, 5, 3], [2, 6.2, 4.1])
    assert not is_better([2, 6.2, 4.1], [1, 5, 3])
    # As much on average, but not for all seeds alike.
    assert not is_better([1, 5, 3], [5, 4.2, 6])
    # One seed has no noise to compare with.
    assert not is_better([1], [2])
    # Next to one that has several, it is taken to have as much.
    assert is_better([1, 1.2, 0.8], [2])
    assert is_better([2], [3, 3.2, 2.8])
    assert not is_better([1, 1.2, 0.8], [1.3])
    # What has no number is worse than what has.
    assert is_better([1, 2], [1, float("inf")])
    assert not is_better([1, float("inf")], [3, 4])


def test_ties_are_shown_as_ties():
    """In bold is what beats all but its family."""
    values = {rival: [9, 9.1, 9.2] for rival in RIVALS}
    values["AdaFisherW"] = [1, 2, 3]
    values["AdaFisher"] = [1.1, 1.9, 3]
    found = marks(values)
    assert found.pop("AdaFisherW") == "best"
    assert set(found.values()) == {""}
    assert verdict(values)[:2] == ("ours", "AdaFisherW")
    values["Nadam"] = [0.9, 2.2, 3]
    found = marks(values)
    ties = {rival for rival, mark in found.items() if mark == "tie"}
    assert ties == {"AdaFisherW", "AdaFisher", "Nadam"}
    assert "best" not in found.values()
    assert verdict(values)[0] == "tie"
    values["Nadam"] = [0.1, 1, 2]
    assert marks(values)["Nadam"] == "best"
    assert verdict(values) == ("theirs", "AdaFisherW", "Nadam")
    assert {"AdaFisherMuon", "AdaFisherW", "AdaFisher"} == set(OURS)


def test_times_to_a_target():
    """The first of the schedules stops the clock, the median seed counts."""
    rows = {"step": {rival: {"median": 1.0} for rival in RIVALS}}
    for rival in RIVALS:
        losses = [[4, 3, 3, 3]] * 3
        rows[f"time: {rival}"] = {"runs": [{"validation": x} for x in losses]}
        rows[f"sooner: {rival}"] = {"0.5": [[4, 3.5]] * 3, "took": 1.0}
    # Its lowest are 2, 1 and 1.5.
    losses = [[4, 3, 2, 2], [4, 3, 2, 1], [4, 3, 1.5, 2]]
    rows["time: AdamW"] = {"same": True}
    rows["steps: AdamW"] = {"runs": [{"validation": x} for x in losses]}
    # At 1.5, after three, three and a half and no evaluations.
    losses = [[4, 3, 1.5, 1.5], [4, 3, 2, 1], [4, 3, 2, 2]]
    rows["time: Nadam"] = {"runs": [{"validation": x} for x in losses]}
    # Two of them are there after one and three quarters.
    rows["sooner: Nadam"] = {"0.5": [[3, 1], [3, 1], [4, 3.5]]}
    rows["step"]["Nadam"]["median"] = 2.0
    # The median of AdamW's own: never, 3.5, 3.
    longest = times_to_target({"rows": rows}, only_longest=True)
    assert longest["AdamW"] == 1
    assert longest["Nadam"] == pytest.approx(2 * 3.5 / 3.5)
    assert longest["SGD"] == float("inf")
    times = times_to_target({"rows": rows})
    assert times["Nadam"] == pytest.approx(2 * 1.75 / 3.5)
