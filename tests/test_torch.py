"""What only PyTorch has: waits, multi-tensor updates, modules' registries.

Every wait goes through one of a few methods of `torch.Tensor`, so counting
their calls shows on a CPU what would happen on a GPU.
"""

import keras
import numpy as np
import pytest
import torch
from models import cnn
from models import cross_entropy
from models import image_data
from models import probes_in
from torch.utils._python_dispatch import TorchDispatchMode

import keras_adafisher
from benchmarks.published import PUBLISHED
from keras_adafisher.backend import torch as torch_backend
from keras_adafisher.backend import torch_update

WAITS = ("__bool__", "__int__", "__float__", "__index__", "item", "numpy")


@pytest.fixture
def waits(monkeypatch):
    calls = []
    for name in WAITS:
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    # A learning rate on the CPU may be read. This one counts as elsewhere.
    monkeypatch.setattr(
        torch_update,
        "_can_be_read",
        lambda rate: not isinstance(rate, (keras.Variable, torch.Tensor)),
    )
    return calls


def recurrent():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Reshape((6, 12)),
            keras.layers.LSTM(4),
            keras.layers.Dense(3),
        ]
    )


def step_waits(make_model, optimizer, waits, steps):
    x, y = image_data(examples=8)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    keras.utils.set_random_seed(0)
    model = make_model()
    model.compile(optimizer, loss=cross_entropy())
    model.train_step((x, y))
    counts = []
    for _ in range(steps):
        waits.clear()
        model.train_step((x, y))
        counts.append(len(waits))
    return counts


class CountReads(TorchDispatchMode):
    """Counts what PyTorch itself, Python or not, reads from a device."""

    def __init__(self):
        super().__init__()
        self.reads = 0
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def deep(width=4, depth=3):
    return keras.Sequential(
        [
            keras.Input((6,)),
            *(keras.layers.Dense(width) for _ in range(depth)),
        ]
    )


def count_in_apply(model, optimizer, steps=3):
    """What the last of some steps of `apply` does."""
    keras_adafisher.wrap(model)
    variables = model.trainable_variables
    optimizer.build(variables)
    for _ in range(steps):
        model.zero_grad()
        torch.sum(model(torch.ones(2, 6)) ** 2).backward()
        with torch.no_grad(), CountReads() as counts:
            optimizer.apply([v.value.grad for v in variables], variables)
    return counts


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("weight_decay", [None, 0.1])
@pytest.mark.parametrize("factor_update_steps", [1, 100])
@pytest.mark.parametrize(
    "learning_rate", [0.1, keras.optimizers.schedules.CosineDecay(0.1, 9)]
)
def test_apply_reads_the_counter_only(
    learning_rate, factor_update_steps, weight_decay
):
    optimizer = keras_adafisher.AdaFisher(
        learning_rate,
        factor_update_steps=factor_update_steps,
        weight_decay=weight_decay,
    )
    assert count_in_apply(deep(), optimizer).reads == 1


def test_one_operation_per_variable_on_steps_that_do_not_measure():
    """The product `H * S`: all others are for lists of variables."""
    growth = []
    for make in (
        # The fourth step is the first that doesn't measure.
        lambda: keras_adafisher.AdaFisher(factor_update_steps=2),
        keras.optimizers.Adam,
    ):
        counts = [
            count_in_apply(deep(depth=depth), make(), steps=4).operations
            for depth in (3, 13)
        ]
        growth.append(counts[1] - counts[0])
    assert growth == [2 * 10, 0]


def test_operations_for_a_layer_on_steps_that_measure():
    """Each is a call, and takes as long as a small layer's work."""

    def operations(depth, factor_update_steps):
        model = deep(depth=depth)
        model.compile(
            keras_adafisher.AdaFisher(factor_update_steps=factor_update_steps),
            loss="mse",
        )
        for _ in range(3):
            with CountReads() as counts:
                model.train_on_batch(np.ones((2, 6)), np.ones((2, 4)))
        return counts.operations

    measuring, plain = (
        operations(13, steps) - operations(3, steps) for steps in (1, 100)
    )
    # For each of `H` and `S`: squares, their sum, its division. The copy of
    # `H` for its gradient, the 1. Two gradients of three that are detached.
    # Then views of `H`: as measured, as answered, old and new.
    assert (measuring - plain) / 10 <= 18


@pytest.mark.parametrize("make_model", [cnn, recurrent])
@pytest.mark.parametrize("factor_update_steps", [1, 2, 100])
def test_one_wait_more_than_momentum_sgd(
    factor_update_steps, make_model, waits
):
    sgd = keras.optimizers.SGD(momentum=0.9)
    plain = step_waits(make_model, sgd, waits, 4)
    ours = step_waits(
        make_model,
        keras_adafisher.AdaFisher(factor_update_steps=factor_update_steps),
        waits,
        4,
    )
    more = [a - b for a, b in zip(ours, plain, strict=True)]
    assert max(more) <= 1


def test_probes_keep_no_gradient():
    """What a step leaves behind would be added to the next measurement."""
    x, y = image_data(examples=8)
    model = cnn()
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    model.train_on_batch(x, y)
    probes = probes_in(model)
    assert len(probes) == 4
    for probe in probes:
        assert [tensor.grad for tensor in probe.inputs] == [None] * 3


def test_modules_show_no_probes():
    """To optimizers of PyTorch, `clip_grad_norm_`, parallel modules, files."""
    model = keras.Sequential([keras.Input((6, 6, 2)), cnn()])
    parameters = [id(p) for p in model.parameters()]
    names = list(model.state_dict())
    keras_adafisher.wrap(model)
    assert [id(p) for p in model.parameters()] == parameters
    assert list(model.state_dict()) == names
    assert [id(v.value) for v in model.trainable_variables] == [
        id(v.value) for v in model.weights if v.trainable
    ]


def backward(model, loss_fn, x, y):
    loss_fn(y, model(x, training=True)).backward()


def apply(model, optimizer):
    variables = model.trainable_variables
    optimizer.apply([v.value.grad for v in variables], variables)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_step_that_is_skipped_leaves_nothing_behind(value):
    """Once `zero_grad()` has cleared what it did to the weights."""
    x, y = map(torch.from_numpy, image_data(examples=8))
    diagonals = []
    for skips in (False, True):
        keras.utils.set_random_seed(0)
        model = cnn()
        keras_adafisher.wrap(model)
        optimizer = keras_adafisher.AdaFisher(
            **{**PUBLISHED, "factor_update_steps": 1}
        )
        optimizer.build(model.trainable_variables)
        # Without batch statistics, which the skipped step would change.
        model.layers[1].trainable = False
        if skips:
            backward(model, cross_entropy(), value * x.flip(0) ** 2, y)
            model.zero_grad()
        backward(model, cross_entropy(), x, y)
        apply(model, optimizer)
        diagonals.append(optimizer.fisher_diagonal(model.layers[-1].kernel))
    assert torch.equal(*diagonals)
    assert diagonals[0].max() < 1


def test_backward_passes_add_up_until_the_gradients_are_cleared():
    x, y = map(torch.from_numpy, image_data(examples=8))
    diagonals = []
    for parts in (1, 2, 4):
        keras.utils.set_random_seed(0)
        model = cnn()
        model.layers[1].trainable = False
        keras_adafisher.wrap(model)
        optimizer = keras_adafisher.AdaFisher(
            **{**PUBLISHED, "factor_update_steps": 1, "epsilon": 0.0}
        )
        optimizer.build(model.trainable_variables)
        for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            backward(model, cross_entropy(), *part)
        apply(model, optimizer)
        diagonals.append(optimizer.fisher_diagonal(model.layers[-1].kernel))
    for other in diagonals[1:]:
        torch.testing.assert_close(other, diagonals[0], rtol=1e-6, atol=0)


def test_gradients_that_bypass_the_probes_warn():
    x, y = map(torch.from_numpy, image_data(examples=8))
    model = cnn()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
    variables = model.trainable_variables
    optimizer.build(variables)

    def step():
        loss = cross_entropy()(y, model(x, training=True))
        values = [v.value for v in variables]
        optimizer.apply(torch.autograd.grad(loss, values), variables)

    with pytest.warns(UserWarning, match=r"gradients by `loss\.backward\(\)`"):
        step()
    step()


def test_gradients_for_inputs_only_are_no_measurement():
    """Those of a gradient penalty, for instance."""
    x, y = map(torch.from_numpy, image_data(examples=8))
    model = cnn()
    keras_adafisher.wrap(model)
    x.requires_grad_(True)
    loss = cross_entropy()(y, model(x, training=True))
    torch.autograd.grad(loss, x)
    for probe in probes_in(model):
        assert [tensor.grad for tensor in probe.inputs] == [None] * 3


def test_the_parallel_module_whose_forward_runs():
    """Private to PyTorch: the processes that a model trains with."""
    seen = []

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            active = torch.nn.parallel.DistributedDataParallel
            seen.append(active._active_ddp_module)
            return x * self.weight

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(Module())
        parallel(torch.ones(1))
    finally:
        torch.distributed.destroy_process_group()
    assert seen == [parallel]
    assert parallel.process_group is not None


@pytest.mark.parametrize("axis", [(0,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_a_mean_square_in_parts_is_the_mean_of_all_squares(axis, monkeypatch):
    monkeypatch.setattr(torch_backend, "_PART_SIZE", {"cpu": 32})
    x = np.random.default_rng(0).normal(size=(9, 5, 7)).astype("float32")
    actual = torch_backend.mean_square(torch.from_numpy(x), axis).numpy()
    expected = np.mean(np.square(x.astype("float64")), axis=axis)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_a_stateless_scope_shows_its_own_factors():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    optimizer = keras_adafisher.AdaFisher(damping=0.5)
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    kernel = model.weights[0]

    def fisher():
        return optimizer.fisher_diagonal(kernel).detach().numpy()

    # All factors start at 1.
    np.testing.assert_allclose(fisher(), 1.5)
    (factors,) = (v for v in optimizer.variables if v.name == "factors")
    with keras.StatelessScope([(factors, 2 * factors.value)]):
        np.testing.assert_allclose(fisher(), 4.5)
    np.testing.assert_allclose(fisher(), 1.5)
    factors.assign(3 * factors.value)
    np.testing.assert_allclose(fisher(), 9.5)
