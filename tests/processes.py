"""Scripts that tests run as processes of their own."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 300


def slow_where_compiled(test):
    """Mark a test of scripts that take minutes to trace and compile.

    The suite runs it on PyTorch, `make test-long` on all backends.
    """
    if keras.backend.backend() == "torch":
        return test
    return pytest.mark.slow(test)


def run(*arguments, timeout=TIMEOUT, **environment):
    """Run Python, and stop it together with all that it started.

    Args:
        *arguments: The command line. A path is relative to the project.
        timeout: Number, the seconds that it may take.
        **environment: Variables to set besides the present ones.

    Returns:
        What it wrote to its standard output.
    """
    # The script's own affair: how many devices there are, for instance.
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **inherited,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            # A window would wait for somebody to close it.
            "MPLBACKEND": "agg",
            "COLUMNS": "100",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun stops its processes, which aren't of its group.
        process.terminate()
        process.communicate(timeout=TIMEOUT)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{output}\n{errors}"
    return output


def differences(output):
    """What an example of `examples/distributed` found: three numbers."""
    lines = [line for line in output.splitlines() if "largest diff" in line]
    assert len(lines) == 3
    return [float(line.split(":")[1]) for line in lines]
