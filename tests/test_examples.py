"""The examples run: `make demo` is the first thing that a newcomer sees."""

import keras
import pytest
from processes import run
from processes import slow_where_compiled


def what_was_shown(output):
    """The last line of an example's output, without its beginning."""
    last = output.strip().splitlines()[-1]
    assert last.startswith("Shown: ")
    return last


def test_digits(tmp_path):
    plot = tmp_path / "digits.png"
    output = run("examples/digits.py", "--quick", f"--plot={plot}")
    # A line per run, the coverage, and the table with a row per optimizer.
    assert output.count("seed 0: validation loss") == 4
    assert "Kronecker factors for 100.00%" in output
    names, accuracies, _, first, others = zip(*rows(output), strict=True)
    assert names == ("Adam, 1e-3", "Adam, 3e-3", "AdaFisher", "AdaFisherMuon")
    assert min(map(number, accuracies)) > 20
    # What is compiled is told apart from what a step takes.
    assert all(cell.endswith(" s") for cell in first)
    assert all(cell.endswith(" ms") for cell in others)
    assert "the validation loss ends at" in what_was_shown(output)
    assert plot.stat().st_size > 10_000


def test_custom_loop():
    backend = keras.backend.backend()
    output = run(f"examples/custom_loop_{backend}.py", "--epochs=2")
    accuracy = output.split("Validation accuracy: ")[1].split()[0]
    assert float(accuracy) > 60


def test_gan(tmp_path):
    plot = tmp_path / "gan.png"
    output = run("examples/gan.py", "--epochs=6", f"--plot={plot}")
    words = output.split("Squared Fréchet distance: ")[1].split()
    before, after = float(words[0]), float(words[2])
    assert after < 0.7 * before
    assert plot.stat().st_size > 5_000


def rows(output):
    """The cells of each row of the last table that an example printed."""
    table = output.rpartition("┏")[2]
    lines = [line for line in table.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def number(cell):
    return float(cell.strip(" %").replace(",", ""))


@slow_where_compiled
def test_vision_transformer(tmp_path):
    plot = tmp_path / "vision_transformer.png"
    output = run(
        "examples/vision_transformer.py",
        "--quick",
        f"--plot={plot}",
    )
    assert "Kronecker factors for 100.00%" in output
    names, accuracies, *_ = zip(*rows(output), strict=True)
    assert names == ("Adam", "AdaFisherW")
    assert min(map(number, accuracies)) > 30
    assert "a whole transformer has factors" in what_was_shown(output)
    assert plot.stat().st_size > 10_000


@slow_where_compiled
def test_language_model():
    output = run("examples/language_model.py", "--quick")
    assert "Kronecker factors for 100 %" in output
    bits = {name: number(bits) for name, bits, _ in rows(output)}
    # It knows more than how frequent each character is.
    assert bits["AdaFisherW"] < bits["(frequencies)"] < bits["(guessing)"]
    assert "def " in output.rpartition("writes:")[2]
    assert "bits per character" in what_was_shown(output)


@slow_where_compiled
def test_transfer_learning():
    output = run("examples/transfer_learning.py", "--quick")
    steps, trained, factored, accuracies = zip(*rows(output), strict=True)
    assert steps == ("first task", "the head", "fine-tuning")
    # Only the head trains while the rest is frozen.
    assert number(trained[1]) < number(trained[0]) == number(trained[2])
    assert set(factored) == {"100 %"}
    # Of five classes.
    assert min(map(number, accuracies)) > 40
    assert f"by {accuracies[2]} after fine-tuning" in what_was_shown(output)


def test_custom_layer():
    output = run("examples/custom_layer.py", "--seeds=1", "--epochs=12")
    assert "no wrapper for GatedDense" in output
    without, with_wrapper = ([*map(number, r[1:])] for r in rows(output))
    assert without[0] < 10
    assert with_wrapper[0] == 100
    # The wrapper is worth it.
    assert with_wrapper[1] < without[1]
    assert with_wrapper[2] > 90
    assert "100.0 % of the parameters factors" in what_was_shown(output)


# `test_custom_layer` runs it with each backend.
@pytest.mark.once
def test_custom_layer_has_a_quick_run():
    output = run("examples/custom_layer.py", "--quick")
    assert "5 epochs, runs: 1" in output
    assert "the wrapper gives" in what_was_shown(output)


@slow_where_compiled
def test_analysis(tmp_path):
    output = run("examples/analysis.py", "--quick", f"--plots={tmp_path}")
    assert "of the squared norm of H" in what_was_shown(output)
    rows = [
        line
        for line in output.splitlines()
        if " % " in line and line.startswith("│")
    ]
    # Both convolutions and both dense layers.
    assert len(rows) == 4
    pictures = {path.name for path in tmp_path.iterdir()}
    assert pictures == {
        f"{name}.png"
        for name in (
            "factors",
            "gershgorin",
            "histograms",
            "spectrum",
            "surface",
            "weights",
        )
    }
    assert all(path.stat().st_size > 5_000 for path in tmp_path.iterdir())
