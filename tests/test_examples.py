"""The examples run: `make demo` is the first thing that a newcomer sees."""

import keras
from processes import run


def test_digits(tmp_path):
    plot = tmp_path / "digits.png"
    output = run("examples/digits.py", "--epochs=1", f"--plot={plot}")
    # Progress bars, the coverage, and the table with a row per optimizer.
    assert output.count("val_accuracy:") == 2
    assert "Kronecker factors for 100.00%" in output
    rows = [line for line in output.splitlines() if "%" in line and "│" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["Adam", "AdaFisher"]
    accuracies = [float(row.split("│")[2].strip(" %")) for row in rows]
    assert min(accuracies) > 20
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


def test_analysis(tmp_path):
    output = run("examples/analysis.py", "--epochs=1", f"--plots={tmp_path}")
    rows = [line for line in output.splitlines() if " % " in line]
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
