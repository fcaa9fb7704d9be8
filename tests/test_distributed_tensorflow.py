"""TensorFlow's distributed engines: collected for TensorFlow only.

Processes on one machine, and the loopback device. What two replicas in one
process show is in `test_mirrored_strategy.py`.
"""

import json

import numpy as np
import pytest
from processes import differences
from processes import run


def check_costs(result):
    """One transfer for all probes, and none at steps that don't measure."""
    assert result["extra_collectives_measuring"] == 1
    assert result["extra_collectives_other"] == 0
    # For each weight a number per row, a number per column, and the calls.
    convolution, hidden, norm, logits = 9 + 16, 144 + 64, 64 + 64, 64 + 16
    numbers = convolution + hidden + norm + logits + 4
    assert result["extra_bytes"] == 4 * numbers == 1780
    assert result["gradient_bytes"] == 42432


def test_three_replicas():
    output = run("tests/distributed/tensorflow_replicas.py", "3")
    result = json.loads(output.splitlines()[-1])
    assert result["difference"] <= 5e-6
    check_costs(result)
    # A last batch of one example leaves two replicas without any.
    assert result["is_adam_finite"]
    assert result["is_finite"]


def test_mirrored_example_with_four_replicas():
    output = run("examples/distributed/tensorflow_mirrored.py", "--replicas=4")
    assert "4 replicas against one device" in output
    assert max(differences(output)) <= 5e-6


def check_a_crash(folder):
    """The second of two workers is killed at step 25, in the second epoch."""
    output = run(
        "examples/distributed/tensorflow_multi_worker.py",
        "--kill-at-step=25",
        f"--output={folder}/restarted.npz",
    )
    assert "Worker 1 is killed at step 25" in output
    assert max(differences(output)) <= 5e-6


def test_two_workers_and_a_crash(tmp_path):
    check_a_crash(tmp_path)


@pytest.mark.slow
def test_two_workers_with_and_without_a_crash(tmp_path):
    output = run("tests/distributed/tensorflow_workers.py", str(tmp_path))
    result = json.loads(output.splitlines()[-1])
    assert result["difference"] <= 5e-6
    check_costs(result)
    # If it doesn't any more, the example can do without its own loop.
    assert result["keras_fit_fails"]

    check_a_crash(tmp_path)
    # Bit for bit what the workers that nobody killed had in the end.
    restarted, *undisturbed = (
        np.load(tmp_path / f"{name}.npz")
        for name in ("restarted", "worker_0", "worker_1")
    )
    for arrays in undisturbed:
        assert list(arrays) == list(restarted)
        for name in arrays:
            np.testing.assert_array_equal(restarted[name], arrays[name])
