"""PyTorch's distributed engines: collected for PyTorch only.

Processes on one machine, gloo on the loopback device. See
`distributed/torch_ddp.py` for what is run.
"""

import json

import pytest
from processes import run

# In one process of the test run, which then starts them once.
pytestmark = pytest.mark.xdist_group("distributed")

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def ddp():
    output = run(*TORCHRUN, "tests/distributed/torch_ddp.py")
    return json.loads(output.splitlines()[-1])


def test_two_processes_give_the_weights_and_factors_of_one(ddp):
    assert ddp["difference"] <= 2e-6
    assert ddp["difference_of_processes"] == 0


def test_the_order_of_wrap_and_ddp_does_not_matter(ddp):
    assert ddp["difference_wrapped_after"] <= 2e-6


def test_accumulation_under_no_sync(ddp):
    """Four backward passes, one transfer, one step."""
    assert ddp["difference_no_sync"] <= 2e-6


def test_the_scale_of_the_gradient_is_that_of_the_whole_batch(ddp):
    """A process' own `s` is twice that. It shows unless `epsilon` is 0."""
    assert ddp["difference_epsilon"] <= 2e-6


def test_factors_that_are_estimated_from_gradients(ddp):
    assert ddp["difference_estimated"] <= 2e-6


def test_one_transfer_for_all_probes_at_measuring_steps(ddp):
    assert ddp["extra_collectives_measuring"] == 1
    assert ddp["extra_collectives_other"] == 0
    # One number for each row and each column of a weight, and the calls.
    convolution, dense, norm, logits = 18 + 4, 4 + 4, 64 + 64, 64 + 3
    assert ddp["extra_bytes"] == 4 * (
        convolution + dense + norm + logits + 4 * 1
    )


def test_models_outside_of_ddp_do_not_communicate(ddp):
    assert ddp["transfers_alone"] == 0


def test_example():
    output = run(
        *TORCHRUN, "examples/distributed/torch_ddp.py", "--epochs", "1"
    )
    differences = [
        float(line.split(":")[1])
        for line in output.splitlines()
        if "largest difference" in line
    ]
    assert len(differences) == 3
    assert max(differences) <= 1e-5
