"""The benchmark of a GPU runs, in its tiny form, and its page is complete."""

import json
import math

import pytest
from processes import ROOT
from processes import run

from tools.report.performance_gpu.page import page
from tools.report.performance_gpu.results import load
from tools.report.performance_gpu.results import load_compiled

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
    "AdaFisher, every step",
    "AdaFisherMuon",
}
# What is timed too: steps of the default's that don't measure.
TIMED = OPTIMIZERS | {"AdaFisher, every 100"}


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
        "milliseconds": dict.fromkeys(TIMED, 17.8),
        "over Adam": {
            **dict.fromkeys(TIMED, ratio(1.0)),
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
    machine = "| 1.2.3 | 3.15.1 | 0.1.0 | A card | 2027-01-31 |"
    assert f"| JAX {machine} not tuned |" in text
    assert f"| PyTorch {machine} – |" in text
    # In a table of sizes, three of each backend, and one of programs.
    for title in MODELS.values():
        assert text.count(f"| {title} |") == 1 + 2 * 3 + 1
    assert text.count("–") == 1
    assert "prototypes" not in text


def test_the_page_shows_what_is_not_known():
    data = found("jax", default=1.03, first=10.0)
    data["rows"] = {
        "gpt": {"over Adam": {"AdaFisher, default": {"median": 1.03}}}
    }
    data["late"] = ["torch-vit"]
    text = page({"jax": data})
    assert "| GPT | – | – | – | 1.03, **no** | – | – | – | – |" in text
    assert "| PyTorch | A step with `factor_update_steps=1`, next" in text
    assert text.count("| not measured |") == 10
    # First steps, memory and programs.
    assert text.count("\nNot measured.\n") == 3
    assert "may be disturbed: torch-vit." in text


def test_the_page_is_that_of_the_results():
    folder = ROOT / "benchmarks" / "results" / "gpu"
    if not folder.exists():
        pytest.skip("distributions have no results")
    written = (ROOT / "docs" / "performance_gpu.md").read_text(encoding="utf-8")
    assert written == page(load(folder), load_compiled(folder))


def test_the_page_shows_what_was_compiled_without_a_gpu():
    def facts(least, most, peak, seconds):
        return {
            "kernels": [least, most],
            "peak_bytes": peak,
            "processor_seconds": seconds,
        }

    row = {
        "SGD": facts(990, 990, 2e9, 9),
        "Adam": facts(1000, 1000, 3e9, 10),
        "Muon": facts(2000, 2000, 2e9, 15),
        "AdaFisher, default": facts(900, 1400, 2.01e9, 27),
        "AdaFisher, every step": facts(1390, 1390, 2.1e9, 22),
        "AdaFisherMuon": facts(1200, 1700, 2.7e9, 33),
    }
    compiled = {
        "device": "A card",
        "version": "1.2.3",
        "date": "2027-01-31",
        "rows": {"gpt": row},
    }
    text = page({"jax": found("jax", default=1, first=1)}, compiled)
    assert "For A card, JAX 1.2.3, 2027-01-31" in " ".join(text.split())
    cells = "990 | 1,000 | 900 | 1,400 | 1,200 | 1,700 | 1,390 | 2,000"
    assert f"| GPT | {cells} | 0.90 | 1.20 |" in text
    memory = "2,000 | 1.005, yes | 1.050 | 0.900, yes"
    cells = f"{memory} | 10.0 | 2.70 | 2.20 | 3.30"
    assert f"| GPT | {cells} |" in text


PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_add (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %add.1 = f32[8]{0} add(%p, %p)
}

%command_buffer (q: f32[8]) -> (f32[8], f32[8]) {
  %q = f32[8]{0} parameter(0)
  %fusion.1 = f32[8]{0} fusion(%q), kind=kLoop, calls=%fused_add
  %copy.1 = f32[8]{0} copy(%fusion.1)
  ROOT %tuple = (f32[8]{0}, f32[8]{0}) tuple(%fusion.1, %copy.1)
}

%measures (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  %call = (f32[8]{0}, f32[8]{0}) call(%r), to_apply=%command_buffer
  ROOT %part = f32[8]{0} get-tuple-element(%call), index=1
}

%plain (s: f32[8]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  ROOT %fusion.2 = f32[8]{0} fusion(%s), kind=kLoop, calls=%fused_add
}

ENTRY %main (x: f32[8], t: pred[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %t = pred[] parameter(1)
  %gemm = (f32[8]{0}, s8[16]{0}) custom-call(%x, %x), custom_call_target="c"
  %y = f32[8]{0} get-tuple-element(%gemm), index=0
  ROOT %cond = f32[8]{0} conditional(%t, %y, %y), BRANCHES
}
"""


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%plain, %measures}",
        "true_computation=%measures, false_computation=%plain",
    ],
)
def test_the_kernels_that_a_program_starts(branches):
    """A library's, and one in one branch or two in the other."""
    from benchmarks.jax_program import started_kernels

    text = PROGRAM.replace("BRANCHES", branches)
    assert started_kernels(text) == (2, 3)


def test_the_losses_of_a_gpt_on_a_gpu_are_those_of_the_results():
    path = ROOT / "benchmarks" / "results" / "gpu" / "quality.json"
    if not path.exists():
        pytest.skip("distributions have no results")
    found = json.loads(path.read_text())["optimizers"]
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    text = text[text.index("## 25 million weights") :]
    for name, runs in found.items():
        best = min(runs, key=lambda run: run["lowest"])
        others = sorted(
            (run for run in runs if run is not best),
            key=lambda run: run["key"]["rate"],
        )
        first, *cells = [
            f"{run['lowest']:.3f} ({run['key']['rate']:g})"
            for run in [best, *others]
        ]
        assert f"| {name} | {first} | {', '.join(cells)} |" in text
    # After how many of the steps ours is below what others end at.
    ours = min(found["AdaFisherMuon"], key=lambda run: run["lowest"])
    for name, part in (("AdamW", 3), ("Nadam", 4), ("Muon", 6)):
        lowest = min(run["lowest"] for run in found[name])
        validation = ours["validation"]
        assert validation[part - 1] < lowest < validation[part - 2]
        assert f"below {lowest:.3f} after {50 * part}" in text


def test_models_of_the_same_day_are_kept(tmp_path):
    from benchmarks import gpu

    class Worker:
        backend = "jax"

        def __init__(self, model):
            self.model = model
            self.flags = gpu.flags_of(model, False)

    machine = {"version": "1", "keras": "2", "package": "3", "device": "A card"}

    def rows_after(model, **changes):
        results = gpu.Results(tmp_path, "gpu", tunes=False)
        found = {"machine": {**machine, **changes}, "row": {"of": model}}
        results.add(Worker(model), found)
        results.write()
        return list(json.loads((tmp_path / "gpu-jax.json").read_text())["rows"])

    assert rows_after("resnet") == ["resnet"]
    assert rows_after("gpt") == ["gpt", "resnet"]
    # What another choice of kernels was measured with isn't comparable.
    path = tmp_path / "gpu-jax.json"
    path.write_text(path.read_text().replace("autotune_level=1", "level=0"))
    assert rows_after("gpt") == ["gpt"]
    assert rows_after("vit", device="Another") == ["vit"]


@pytest.mark.slow
def test_the_tiny_form_tunes_a_gpt(tmp_path):
    run("benchmarks/quality_gpu.py", "--tiny", f"--results={tmp_path}")
    found = json.loads((tmp_path / "quality.json").read_text())["optimizers"]
    assert found.keys() == {"AdamW", "Nadam", "Muon", "AdaFisherMuon"}
    for runs in found.values():
        # Three rates at least, another momentum and decay, and fresh seeds.
        assert len(runs) >= 7
        for trained in runs:
            assert math.isfinite(trained["lowest"])
            # It had its turns with the device.
            assert trained["seconds"] > 0


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
            assert row["over Adam"].keys() == TIMED
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
