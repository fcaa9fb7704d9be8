"""JAX' distributed engines, `keras.distribution`: collected for JAX only.

JAX makes the devices when it starts, so each script runs in a process of its
own. Each is started once, and the tests look at what it tells.
"""

import functools
import json

import pytest
from processes import differences
from processes import run


@functools.cache
def devices():
    """What `distributed/jax_devices.py` found on eight devices."""
    output = run("tests/distributed/jax_devices.py")
    results = [json.loads(line) for line in output.splitlines()]
    return {result.pop("name"): result for result in results}


def test_data_parallel():
    """The weights, momentums and factors of one device."""
    result = devices()["DataParallel"]
    assert result["difference"] <= 2e-6
    # `H` travels in the forward pass and `S` in the backward pass: one transfer
    # for each of the four layers, in the branch that measures. All gradients
    # travel in one.
    assert result["inside"] == {"all-reduce": 2 * 4}
    assert result["extra_collectives_measuring"] == 2 * 4
    assert result["extra_collectives_other"] == 0
    # Of the convolution, the mean square of its 8 x 8 inputs.
    convolution, hidden, norm, logits = 64 + 16, 144 + 64, 64 + 64, 64 + 16
    numbers = convolution + hidden + norm + logits
    assert result["extra_bytes"] == 4 * numbers


@pytest.mark.parametrize("name", ["orthogonalized", "resting"])
def test_orthogonalized_steps(name):
    """Kernels and momentums stay split, whatever their matrices are."""
    import jax

    result = devices()[name]
    assert result["difference_DataParallel"] <= 1e-5
    # Orthogonalization makes singular values that are rounding errors large, so
    # that how far devices are apart is chance: up to 5e-6 with JAX 0.10, and
    # 1.3e-5 with 0.12.
    bound = 1e-5 if jax.__version_info__ < (0, 12) else 2e-5
    assert result["difference_ModelParallel"] <= bound
    assert result["splits"] == ["einsum/kernel", "muon/einsum_kernel_momentum"]


@pytest.mark.parametrize("engine", ["DataParallel", "ModelParallel"])
def test_one_condition_around_the_step(engine):
    """Steps that don't measure have no collective more than SGD's."""
    result = devices()[engine]
    assert result["difference_of_scopes"] <= 2e-6
    assert result["extra_of_a_plain_step"] == {}
    assert result["extra_of_a_measuring_step"]["bytes"] > 0


def test_model_parallel():
    result = devices()["ModelParallel"]
    assert result["difference"] <= 2e-6
    assert result["extra_collectives_other"] == 0
    # Besides those of the layers, what the split ones measured is gathered:
    # each device has all factors. The mean squares of split parameters travel
    # in one transfer.
    assert result["inside"] == {"all-reduce": 2 * 4 + 1, "all-gather": 5}
    assert result["extra_bytes"] < 4 * 2 * 496


def test_what_is_split():
    """Momentums are split like the parameters, probes and factors whole."""
    splits = devices()["ModelParallel"]["splits"]
    expected = {
        "sequential/conv/kernel": [None, None, None, "model"],
        "sequential/conv/bias": ["model"],
        "sequential/hidden/kernel": [None, "model"],
        "sequential/hidden/bias": ["model"],
        "sequential/logits/kernel": ["model", None],
        "adafisher/sequential_conv_kernel_momentum": [
            None,
            None,
            None,
            "model",
        ],
        "adafisher/sequential_conv_bias_momentum": ["model"],
        "adafisher/sequential_hidden_kernel_momentum": [None, "model"],
        "adafisher/sequential_hidden_bias_momentum": ["model"],
        "adafisher/sequential_logits_kernel_momentum": ["model", None],
    }
    assert splits == expected


def test_more_layers():
    """An embedding, attention and an einsum, with patterns that match probes.

    With gradient accumulation, where answers are added on every step.
    """
    result = devices()["more layers"]
    assert result["difference"] <= 2e-6
    assert result["extra_collectives_other"] == 0
    splits = result["splits"]
    assert splits["einsum/kernel"] == ["batch", "model", None]
    # Factors are small, and whole on each device.
    assert not [path for path in splits if "factors" in path]
    assert not [path for path in splits if "probe" in path]


def test_layers_that_are_built_late():
    """Keras gives their variables values, and looks at layouts, afterwards."""
    result = devices()["late"]
    assert result["difference"] <= 2e-6
    momentum = "adafisher/late_hidden_kernel_momentum"
    assert result["splits"][momentum] == [None, "model"]


def test_saving():
    """A loaded model goes on as if it hadn't been interrupted."""
    result = devices()["saving"]
    assert result["is_split"]
    assert result["difference_resumed"] == 0
    assert result["difference_resumed_on_one_device"] <= 2e-6


@pytest.mark.parametrize(
    "script", ["jax_model_parallel.py", "jax_processes.py"]
)
def test_examples(script):
    """36 steps, which let rounding grow.

    What `jax_data_parallel.py` does both of them import.
    """
    output = run(f"examples/distributed/{script}")
    assert max(differences(output)) <= 1e-5
