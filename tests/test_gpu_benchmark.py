"""The benchmark of a GPU runs, in its tiny form, and its page is complete."""

import json
import math

import pytest
from processes import ROOT
from processes import run

from tools.report.performance_gpu.page import page
from tools.report.performance_gpu.results import load

# It starts a process for each backend that it measures, whatever this one's is.
pytestmark = pytest.mark.once
MODELS = {
    "gpt": "GPT",
    "vit": "ViT-S/16",
    "resnet50": "ResNet50",
    "resnet": "small ResNet",
}
OPTIMIZERS = {
    "SGD",
    "Adam",
    "Muon",
    "AdaFisher, default",
    "AdaFisher, every 100",
    "AdaFisher, every step",
}


def ratio(value):
    return {"median": value, "low": value - 0.01, "high": value + 0.01}


def found(backend, default, first):
    """What a run finds if all models give the same figures."""
    facts = {
        "first_seconds": 10.0,
        "first_processor_seconds": 20.0,
        "peak_bytes": 5e9,
        "conditionals": 0,
        "instructions": 1000,
    }
    row = {
        "rounds": 21,
        "milliseconds": dict.fromkeys(OPTIMIZERS, 17.8),
        "over Adam": {
            **dict.fromkeys(OPTIMIZERS, ratio(1.0)),
            "AdaFisher, default": ratio(default),
        },
        "programs": {
            **dict.fromkeys(OPTIMIZERS, facts),
            "AdaFisher, default": {**facts, "first_seconds": first},
        },
    }
    return {
        "level": "gpu",
        "date": "2027-01-31",
        "backend": backend,
        "version": "1.2.3",
        "keras": "3.15.1",
        "package": "0.1.0",
        "device": "A card",
        "late": [],
        "rows": dict.fromkeys(MODELS, row),
    }


def test_the_page_judges_the_goals(tmp_path):
    for backend, data in {
        # Just met, and just missed.
        "jax": found("jax", default=1.0204, first=22.1),
        "torch": found("torch", default=1.031, first=10.0),
    }.items():
        path = tmp_path / f"gpu-{backend}.json"
        path.write_text(json.dumps(data))
    text = page(load(tmp_path))
    step = "A step with the default settings, next to Adam's"
    assert f"| JAX | {step} | 1.02 | 4 of 4 |" in text
    assert f"| PyTorch | {step} | 1.03 | 0 of 4 |" in text
    first = "The first step with the default settings, next to Adam's"
    assert f"| JAX | {first} | 2.20 | 0 of 4 |" in text
    assert "| 1.2.3 | 3.15.1 | 0.1.0 | A card | 2027-01-31 |" in text
    # In a table of sizes, three of each backend, and one of programs.
    for title in MODELS.values():
        assert text.count(f"| {title} |") == 1 + 2 * 3 + 1
    assert "–" not in text
    assert "Prototypes" not in text


def test_the_page_shows_what_is_not_known():
    data = found("jax", default=1.03, first=10.0)
    data["rows"] = {
        "gpt": {"over Adam": {"AdaFisher, default": {"median": 1.03}}}
    }
    data["late"] = ["torch-vit"]
    text = page({"jax": data})
    assert "| GPT | – | – | – | 1.03, **no** | – | – | – |" in text
    assert "| PyTorch | A step with `factor_update_steps=1`, next" in text
    assert text.count("| not measured |") == 6
    # First steps, memory and programs.
    assert text.count("\nNot measured.\n") == 3
    assert "may be disturbed: torch-vit." in text


def test_the_page_is_that_of_the_results():
    folder = ROOT / "benchmarks" / "results" / "gpu"
    if not folder.exists():
        pytest.skip("distributions have no results")
    written = (ROOT / "docs" / "performance_gpu.md").read_text(encoding="utf-8")
    assert written == page(load(folder))


def numbers(data):
    if isinstance(data, dict):
        return [n for value in data.values() for n in numbers(value)]
    return [data] if isinstance(data, (int, float)) else []


@pytest.mark.slow
def test_the_tiny_form_runs(tmp_path):
    # It takes 150 seconds of two processors together, minutes where these are
    # busy, and gives up by itself.
    run("benchmarks/gpu.py", "--tiny", f"--results={tmp_path}", timeout=600)
    for backend in ("jax", "torch"):
        data = json.loads((tmp_path / f"gpu-{backend}.json").read_text())
        assert list(data["rows"]) == list(MODELS)
        for row in data["rows"].values():
            assert row["over Adam"].keys() == OPTIMIZERS
            assert row["programs"].keys() == OPTIMIZERS
            assert all(0 < n < math.inf for n in numbers(row["over Adam"]))
            default = row["programs"]["AdaFisher, default"]
            assert default["first_seconds"] > 0
            if backend == "jax":
                assert default["peak_bytes"] > 0
                assert default["instructions"] > 100
    run(
        *("-m", "tools.report.performance_gpu"),
        *(f"--results={tmp_path}", f"--output={tmp_path}"),
    )
    text = (tmp_path / "performance_gpu.md").read_text()
    assert "No claims." in text
    assert "nan" not in text
