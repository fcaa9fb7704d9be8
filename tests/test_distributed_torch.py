"""PyTorch's distributed engines: collected for PyTorch only.

Processes on one machine, gloo on the loopback device. Each script is started
once, and one test looks at all that it tells.
"""

import json

from processes import differences
from processes import run

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def test_distributed_data_parallel():
    output = run(*TORCHRUN, "tests/distributed/torch_ddp.py")
    result = json.loads(output.splitlines()[-1])

    # The weights, momentums and factors of one device, in both processes.
    assert result["difference"] <= 2e-6
    assert result["difference_of_processes"] == 0
    # `wrap` may come after DistributedDataParallel.
    assert result["difference_wrapped_after"] <= 2e-6
    # A checkpoint runs layers in the backward pass again.
    assert result["difference_checkpointed"] <= 2e-6
    # Four backward passes under `no_sync`, then one step.
    assert result["difference_no_sync"] <= 2e-6
    # A process' own gradients are twice those of the whole batch, which shows
    # unless `epsilon` is 0.
    assert result["difference_epsilon"] <= 2e-6
    # Factors that are estimated from the gradients.
    assert result["difference_estimated"] <= 2e-6

    # Each process orthogonalizes what all of them have. The smallest singular
    # values are rounding errors, which that makes large, so that how far they
    # are apart is chance. The median of four seeds, and the largest.
    assert result["difference_orthogonalized"] <= 1e-5
    assert result["difference_resting"] <= 1e-5
    assert result["largest_difference_orthogonalized"] <= 2e-5
    assert result["largest_difference_resting"] <= 2e-5

    # One transfer for all probes, and none at steps that don't measure: for
    # each weight a number per row, a number per column, and the calls.
    assert result["extra_collectives_measuring"] == 1
    assert result["extra_collectives_other"] == 0
    convolution, dense, norm, logits = 18 + 4, 4 + 4, 64 + 64, 64 + 3
    numbers = convolution + dense + norm + logits + 4
    assert result["extra_bytes"] == 4 * numbers
    # None for a model that isn't parallel.
    assert result["transfers_alone"] == 0

    # If it is, docs/distributed.md can say so, and FSDP2 needs a test.
    assert not result["is_sharded"]


def test_example():
    script = "examples/distributed/torch_ddp.py"
    output = run(*TORCHRUN, script, "--epochs", "1")
    assert max(differences(output)) <= 1e-5
