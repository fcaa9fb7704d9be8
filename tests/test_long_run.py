"""What happens after very many steps.

The 20,000 steps run with `make test-long`.
"""

import gc
import pathlib
import time

import keras
import numpy as np
import pytest
from models import assert_same
from models import cross_entropy
from models import data
from models import factored
from models import mlp
from models import running_factors
from models import to_numpy
from models import train
from models import trained
from models import weights

import keras_adafisher

LARGEST = 2**31 - 1
STEPS = 20_000
# A leak of one small array per step would be ten times as much.
MEBIBYTES = 24


def optimizer(**arguments):
    return keras_adafisher.AdaFisher(
        **{
            "learning_rate": 1e-2,
            "beta": 0.9,
            "damping": 0.1,
            "gamma_1": 0.9,
            "gamma_2": 0.05,
            "factor_update_steps": 2,
            **arguments,
        }
    )


def changes_of(model, steps):
    """The largest change of a weight, step by step, on the same batch."""
    changes = []
    for _ in range(steps):
        before = weights(model)
        train(model, [0])
        pairs = zip(weights(model), before, strict=True)
        changes.append(max(np.abs(a - b).max() for a, b in pairs))
    return changes


@pytest.mark.parametrize("adamw", [False, True])
def test_training_goes_on_when_the_counter_runs_over(adamw):
    """Past 2³¹ - 1 an int32 is negative, and Adam's weights become NaN.

    (TensorFlow's counter has 64 bits.)
    """
    model = trained(optimizer(learning_rate=1e-3), steps=2)
    if adamw:
        # The rule of parameters without factors.
        class Plain(keras.layers.Dense):
            def call(self, x):
                return super().call(x)

        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((6,)), Plain(3)])
        with pytest.warns(UserWarning):
            model.compile(optimizer(learning_rate=1e-3), loss=cross_entropy())
            train(model, range(2))
    counter = model.optimizer.iterations
    # With the counter at a large number that is even, there is nothing left of
    # the bias correction.
    counter.assign(LARGEST - 3)
    changes, seen = [], []
    for _ in range(8):
        changes += changes_of(model, 1)
        seen.append(running_factors(model.optimizer, factored(model)))
        assert all(np.all(np.isfinite(w)) for w in weights(model))
    changes = np.array(changes)
    # No jump and no stop.
    assert np.all(changes[1:] < 1.5 * changes[:-1])
    assert np.all(changes[1:] > 0.5 * changes[:-1])
    if not adamw:
        moved = [
            any(np.any(a != b) for a, b in zip(x, y, strict=True))
            for x, y in zip(seen[1:], seen[:-1], strict=True)
        ]
        # Each second step measures, and none is lost where the counter runs
        # over: 2³¹ is even.
        assert sum(moved) in (3, 4)
        assert all(a != b for a, b in zip(moved[1:], moved[:-1], strict=True))


def test_steps_near_the_largest_are_those_of_any_late_step():
    ends = []
    for start in (10_000, LARGEST - 9):
        model = trained(optimizer(), steps=2)
        model.optimizer.iterations.assign(start)
        train(model, range(4))
        ends.append(weights(model))
    assert_same(*ends)


def resident_mebibytes():
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the system has no /proc")
    gc.collect()
    (line,) = (
        line for line in status.read_text().splitlines() if "VmRSS" in line
    )
    return int(line.split()[1]) / 1024


@pytest.mark.slow
def test_twenty_thousand_steps(record_property):
    keras.utils.set_random_seed(1)
    model = mlp()
    # With the default settings.
    rule = keras_adafisher.AdaFisher()
    model.compile(rule, loss=cross_entropy())
    x, y = data(examples=8 * 1000)
    figures = []

    def thousand_steps():
        start = time.perf_counter()
        model.fit(x, y, batch_size=8, verbose=0)
        figures.append((time.perf_counter() - start, resident_mebibytes()))
        for factor in running_factors(rule, model.trainable_variables):
            assert np.all(np.isfinite(factor))
            assert np.all(factor >= 0)
            # Averages of what is 1 on average.
            np.testing.assert_allclose(factor.mean(), 1, rtol=1e-3)

    for _ in range(STEPS // 1000):
        thousand_steps()
    assert int(to_numpy(rule.iterations)) == STEPS
    warm, end = figures[3], figures[-1]
    record_property(
        "figure",
        f"{STEPS} steps: {warm[0]:.2f} s for a thousand steps after warm-up, "
        f"{end[0]:.2f} s at the end, {warm[1]:.0f} and {end[1]:.0f} MiB",
    )
    assert end[1] - warm[1] < MEBIBYTES
    assert all(np.all(np.isfinite(w)) for w in weights(model))
