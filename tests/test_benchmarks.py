"""The benchmarks run, and their page has all of its rows. No times."""

import json
import pathlib
import re
import runpy
import sys

import keras
import numpy as np
import pytest
from processes import ROOT
from processes import run
from processes import slow_where_compiled

BACKEND = keras.backend.backend()
MODELS = ("wide MLP", "MobileNet")


@slow_where_compiled
def test_the_benchmarks_and_their_page(tmp_path):
    # One test, since each process that runs tests would measure again.
    folder = tmp_path / "results"
    for benchmark in ("step_time", "memory", "scaling"):
        run(
            f"benchmarks/{benchmark}.py",
            "--level=tiny",
            f"--results={folder}",
        )
    check_figures(folder)
    check_page(folder, tmp_path)
    check_resuming(folder)


def read(folder, benchmark):
    return json.loads((folder / f"{benchmark}-{BACKEND}.json").read_text())


def numbers(data):
    if isinstance(data, dict):
        return [n for value in data.values() for n in numbers(value)]
    return [data] if isinstance(data, (int, float)) else []


def check_page(results, tmp_path):
    run("docs/performance.py", f"--results={results}", f"--output={tmp_path}")
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


def check_figures(results):
    for benchmark in ("step_time", "memory", "scaling"):
        data = read(results, benchmark)
        assert data["backend"] == BACKEND
        assert data["device"]
        found = numbers(data["rows"])
        assert len(found) >= 10
        assert all(abs(number) < float("inf") for number in found)


def check_resuming(results):
    path = results / f"memory-{BACKEND}.json"
    complete = json.loads(path.read_text())
    partial = json.loads(path.read_text())
    del partial["rows"]["peak: MobileNet"]
    # Something that no measurement would give.
    partial["rows"]["peak: wide MLP"] = {"ratio": -1.0}
    path.write_text(json.dumps(partial))
    run("benchmarks/memory.py", "--level=tiny", f"--results={results}")
    resumed = json.loads(path.read_text())["rows"]
    assert resumed.keys() == complete["rows"].keys()
    assert resumed["peak: wide MLP"] == {"ratio": -1.0}


def test_slopes_are_those_of_power_laws():
    sys.path.insert(0, str(pathlib.Path(ROOT, "docs")))
    try:
        import performance
    finally:
        sys.path.pop(0)

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
        slope, error = performance.slope(points(power))
        assert abs(slope - power) < 1e-9
        assert 0 < error < 0.2
    noise = [{**point, "error": 1e12} for point in points(1)]
    assert performance.slope(noise) is None


@pytest.mark.skipif(BACKEND != "jax", reason="compiles whole runs with JAX")
def test_the_quality_benchmark_and_its_page(tmp_path):
    folder = tmp_path / "results"
    run("benchmarks/quality.py", "--level=tiny", f"--results={folder}")
    rows = json.loads((folder / "quality-diabetes-jax.json").read_text())[
        "rows"
    ]
    # The cost of a step, and four comparisons of ten optimizers.
    assert len(rows) == 1 + 4 * 10
    for name, row in rows.items():
        if name.startswith(("tuned", "defaults")):
            assert all(
                np.isfinite(run["validation"]).all() for run in row["runs"]
            )
        if name.startswith("sooner") and "ScheduleFree" not in name:
            for share in ("0.5", "0.7"):
                (losses,) = row[share]
                assert np.isfinite(losses).all()
                assert len(losses) == 1
    run("docs/quality.py", f"--results={folder}", f"--output={tmp_path}")
    page = (tmp_path / "quality.md").read_text()
    # Scores tuned and at the defaults, times to the target, costs, rates.
    assert page.count("| diabetes, MLP |") == 5
    for plot in ("curves", "profiles", "robustness"):
        path = tmp_path / "quality" / f"{plot}.svg"
        assert path.stat().st_size > 10_000
        assert f"(quality/{plot}.svg)" in page


def test_times_to_a_target():
    """The first of the schedules stops the clock, the median seed counts."""
    page = runpy.run_path(str(ROOT / "docs" / "quality.py"))
    rows = {"step": {rival: {"median": 1.0} for rival in page["RIVALS"]}}
    for rival in page["RIVALS"]:
        losses = [[4, 3, 3, 3]] * 3
        rows[f"tuned: {rival}"] = {"runs": [{"validation": x} for x in losses]}
        rows[f"sooner: {rival}"] = {"0.5": [[4, 3.5]] * 3}
    # Its lowest are 2, 1 and 1.5.
    losses = [[4, 3, 2, 2], [4, 3, 2, 1], [4, 3, 1.5, 2]]
    rows["tuned: AdamW"] = {"runs": [{"validation": x} for x in losses]}
    # At 1.5, after three, three and a half and no evaluations.
    losses = [[4, 3, 1.5, 1.5], [4, 3, 2, 1], [4, 3, 2, 2]]
    rows["tuned: Adam"] = {"runs": [{"validation": x} for x in losses]}
    # Two of them are there after one and three quarters.
    rows["sooner: Adam"] = {"0.5": [[3, 1], [3, 1], [4, 3.5]]}
    rows["step"]["Adam"]["median"] = 2.0
    # The median of AdamW's own: never, 3.5, 3.
    longest = page["times_to_target"]({"rows": rows}, only_longest=True)
    assert longest["AdamW"] == 1
    assert longest["Adam"] == pytest.approx(2 * 3.5 / 3.5)
    assert longest["SGD"] == float("inf")
    times = page["times_to_target"]({"rows": rows})
    assert times["Adam"] == pytest.approx(2 * 1.75 / 3.5)
