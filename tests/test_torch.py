"""What only PyTorch has: waits for the device, and modules' registries.

Every wait goes through one of a few methods of `torch.Tensor`, so counting
their calls shows on a CPU what would happen on a GPU.
"""

import keras
import pytest
import torch
from models import cnn
from models import cross_entropy
from models import image_data

import keras_adafisher

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
    for variable in model.trainable_variables:
        if hasattr(variable, "adafisher_probe"):
            assert variable.value.grad is None


def test_a_modules_parameters_include_the_probes_until_unwrapped():
    """`zero_grad()` and DistributedDataParallel go by `parameters()`."""
    model = keras.Sequential([keras.Input((6, 6, 2)), cnn()])
    plain = len(list(model.parameters()))
    keras_adafisher.wrap(model)
    known = {id(p) for p in model.parameters()}
    for variable in model.trainable_variables:
        assert id(variable.value) in known
    keras_adafisher.unwrap(model)
    assert len(list(model.parameters())) == plain


def test_layer_torch_params():
    """The registry that the package adds its probes to, private to Keras."""
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    assert set(layer.torch_params) == {v.path for v in layer.variables}


def test_probes_take_no_gradient_unless_they_measure():
    """DistributedDataParallel waits for those of all that require one."""
    x, y = image_data(examples=8)
    model = cnn()
    model.compile(
        keras_adafisher.AdaFisher(factor_update_steps=2), loss=cross_entropy()
    )
    probes = [v for v in model.trainable_variables if v.path.count("adafisher")]
    assert len(probes) == 3 * 4
    assert not any(v.value.requires_grad for v in probes)
    model(x[:1])
    assert all(v.value.requires_grad for v in probes)
    for _ in range(2):
        model.train_on_batch(x, y)
        assert not any(v.value.requires_grad for v in probes)


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
