"""The number of a step, which PyTorch's host knows without a wait."""

import keras
import pytest
import torch
from models import probes_in
from torch_counts import apply
from torch_counts import CountReads
from torch_counts import deep

import keras_adafisher


class Counting:
    """An optimizer whose counter tells how often it is read."""

    def __init__(self, **arguments):
        self.model = deep()
        self.optimizer = keras_adafisher.AdaFisher(
            factor_update_steps=3, rms_decay=None, **arguments
        )
        keras_adafisher.wrap(self.model)
        self.optimizer.build(self.model.trainable_variables)

    def step(self):
        """Take a step: whether it measured, and how often it had to wait."""
        (probe, *_) = probes_in(self.model)
        self.model.zero_grad()
        with CountReads() as counts:
            torch.sum(self.model(torch.ones(2, 6)) ** 2).backward()
            has_answer = probe.answer is not None
            apply(self.model, self.optimizer)
        return has_answer, counts.reads


def test_the_number_of_a_step_is_read_when_somebody_has_written_it():
    counting = Counting(learning_rate=0.1)
    optimizer = counting.optimizer
    steps = [counting.step() for _ in range(4)]
    measured, reads = zip(*steps, strict=True)
    assert measured == (True, False, False, True)
    # Once, that of a new counter.
    rates = reads[1]
    assert reads == (rates + 1, rates, rates, rates)

    optimizer.iterations.assign(3)
    assert counting.step() == (True, rates + 1)
    assert counting.step() == (False, rates)
    optimizer.iterations.assign_add(1)
    assert counting.step() == (True, rates + 1)
    with torch.no_grad():
        optimizer.iterations.value.fill_(9)
    assert counting.step() == (True, rates + 1)
    optimizer.set_weights([v.numpy() for v in optimizer.variables])
    assert counting.step() == (False, rates + 1)
    assert int(optimizer.iterations.value) == 11


def test_a_step_that_fails_does_not_count(monkeypatch):
    counting = Counting()
    counting.step()

    def fail(self, *args):
        raise RuntimeError("once")

    with monkeypatch.context() as patch:
        patch.setattr(keras_adafisher.AdaFisher, "_backend_update_step", fail)
        with pytest.raises(RuntimeError, match="once"):
            counting.step()
    assert [counting.step()[0] for _ in range(3)] == [False, False, True]


def test_stateless_calls_do_not_change_the_number():
    counting = Counting()
    optimizer = counting.optimizer
    counting.step()
    variables = [v.value for v in counting.model.trainable_variables]
    state = [v.value for v in optimizer.variables]
    with torch.no_grad():
        grads = [torch.ones_like(v) for v in variables]
        _, state = optimizer.stateless_apply(state, grads, variables)
    assert int(state[0]) == 2
    with keras.StatelessScope([(optimizer.iterations, torch.tensor(3))]):
        assert optimizer.measures_factors()
    assert not optimizer.measures_factors()
    assert [counting.step()[0] for _ in range(3)] == [False, False, True]


def test_the_number_runs_over_with_the_counter():
    counting = Counting()
    counting.optimizer.iterations.assign(2**31 - 1)
    counting.step()
    counting.step()
    assert int(counting.optimizer.iterations.value) == -(2**31) + 1


def test_accumulated_steps_measure_together():
    counting = Counting(gradient_accumulation_steps=2)
    measured = [counting.step()[0] for _ in range(8)]
    assert measured == [True] * 2 + [False] * 4 + [True] * 2


def test_a_layer_that_two_optimizers_train_measures_for_both():
    counting = Counting()
    other = keras_adafisher.AdaFisher(factor_update_steps=2)
    other.build(counting.model.trainable_variables)
    counting.step()
    # The other one has taken no step yet.
    assert counting.step()[0]
    other.iterations.assign(1)
    assert [counting.step()[0] for _ in range(3)] == [False, True, False]
    other.iterations.assign(2)
    assert counting.step()[0]
