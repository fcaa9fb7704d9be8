"""The examples run: `make demo` is the first thing that a newcomer sees."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run(script, *arguments):
    # A window would wait for somebody to close it.
    environment = {**os.environ, "MPLBACKEND": "agg", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


def test_digits(tmp_path):
    plot = tmp_path / "digits.png"
    output = run("digits.py", "--epochs", "1", "--plot", str(plot))
    # Progress bars, the coverage, and the table with a row per optimizer.
    assert output.count("val_accuracy:") == 2
    assert "Kronecker factors for 100.00%" in output
    rows = [line for line in output.splitlines() if "%" in line and "│" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["Adam", "AdaFisher"]
    accuracies = [float(row.split("│")[2].strip(" %")) for row in rows]
    assert min(accuracies) > 20
    assert plot.stat().st_size > 10_000
