"""Draw the pictures of docs/analysis.md, and write its table of costs.

    make docs-analysis

Runs examples/analysis.py, and times `FisherHistory` on each backend. With
`--table`, only the latter.
"""

import json
import os
import statistics
import subprocess
import sys
import time

from tools.report import pages

MODELS = ("wide MLP", "ResNet", "GPT")
ROUNDS = 10


def measure():
    """Print the costs for the present backend, one line for each model."""
    import keras_adafisher
    from benchmarks.models import make_task

    for name in MODELS:
        task = make_task(name)
        task.compile(keras_adafisher.AdaFisher())
        history = keras_adafisher.FisherHistory()
        history.set_model(task.model)
        steps, records = [], []
        task.step()
        for _ in range(ROUNDS):
            steps.append(_seconds(task.step))
            records.append(_seconds(history.record))
        result = {
            "model": name,
            "parameters": task.model.count_params(),
            "first": records[0],
            "record": statistics.median(records),
            "step": statistics.median(steps),
        }
        print(json.dumps(result), flush=True)


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _run(backend, *command):
    print(backend, *command, flush=True)
    return subprocess.run(
        [sys.executable, *command],
        cwd=pages.ROOT,
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": str(pages.ROOT),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def table():
    """The table in Markdown."""
    rows = [
        "| backend | model | parameters | a record | the first one "
        "| a training step |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for backend, title in pages.BACKENDS.items():
        output = _run(backend, "-m", "tools.report.analysis", "measure")
        for line in output.splitlines():
            if line.startswith("{"):
                rows.append(
                    "| {title} | {model} | {parameters:,} | {record:.0f} ms "
                    "| {first:.0f} ms | {step:.0f} ms |".format(
                        title=title, **_milliseconds(json.loads(line))
                    )
                )
    return "\n".join(rows) + "\n"


def _milliseconds(result):
    times = {key: 1e3 * result[key] for key in ("first", "record", "step")}
    return {**result, **times}


def main():
    """Draw the pictures and replace the table."""
    if "--table" not in sys.argv:
        _run("jax", "examples/analysis.py", f"--plots={pages.DOCS / 'images'}")
    pages.replace_table(pages.DOCS / "analysis.md", table())


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        main()
