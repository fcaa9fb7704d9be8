"""What only PyTorch has: waits, multi-tensor updates, modules' registries.

Every wait goes through one of a few methods of `torch.Tensor`, so counting
their calls shows on a CPU what would happen on a GPU.
"""

import warnings

import keras
import numpy as np
import pytest
import torch
from models import cnn
from models import cross_entropy
from models import image_data
from models import own_variable
from models import probes_in
from torch_counts import apply
from torch_counts import CountReads
from torch_counts import deep

import keras_adafisher
from benchmarks.models import make_task
from keras_adafisher import backend
from keras_adafisher.backend import torch as torch_backend
from keras_adafisher.optimizer import torch_diagonals
from keras_adafisher.optimizer import torch_update
from keras_adafisher.probe import torch as torch_probe

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
def test_apply_waits_for_nothing(
    learning_rate, factor_update_steps, weight_decay
):
    optimizer = keras_adafisher.AdaFisher(
        learning_rate,
        factor_update_steps=factor_update_steps,
        weight_decay=weight_decay,
    )
    assert count_in_apply(deep(), optimizer).reads == 0


def test_all_operations_of_plain_steps_are_for_lists_of_variables():
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
    assert growth == [0, 0]


def added_for_a_layer(kind, dtype=None):
    """How many more a layer takes on a step that measures."""

    def count(depth, factor_update_steps):
        model = deep(depth=depth, dtype=dtype)
        model.compile(
            keras_adafisher.AdaFisher(factor_update_steps=factor_update_steps),
            loss="mse",
        )
        for _ in range(3):
            with CountReads() as counts:
                model.train_on_batch(np.ones((2, 6)), np.ones((2, 4)))
        return getattr(counts, kind)

    measuring, plain = (
        count(13, steps) - count(3, steps) for steps in (1, 100)
    )
    return (measuring - plain) / 10


def test_operations_for_a_layer_on_steps_that_measure():
    """Each is a call, and takes as long as a small layer's work."""
    # The identity, and for each of `H` and `S` squares and their mean.
    assert added_for_a_layer("operations") == 5


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "other"])
def test_kernels_for_a_layer_on_steps_that_measure(device, policy, monkeypatch):
    if device == "other":
        monkeypatch.setattr(torch_backend, "_SLOW_NORM", {})
    # The identity, and for each of `H` and `S` a norm and its square. On a CPU
    # squares and their mean, of a copy in single precision. No weight is cast.
    expected = 7 if (device, policy) == ("cpu", "mixed_bfloat16") else 5
    assert added_for_a_layer("kernels", policy) == expected


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("order", "axis"),
    [
        ((0, 1, 2, 3), (0, 1, 2)),
        ((0, 1, 2, 3), (0,)),
        # As a convolution hands it on: channels-last by its strides only.
        ((0, 2, 3, 1), (0, 2, 3)),
        ((3, 1, 0, 2), (1, 3)),
    ],
)
def test_mean_squares_on_a_gpu(order, axis, dtype, rng, on_an_accelerator):
    x = torch.tensor(rng.normal(size=(3, 4, 5, 6)))
    x = x.to(getattr(torch, dtype)).permute(order)
    x[(0,) * 4] = 0
    found = backend.mean_square(x, axis)
    expected = np.mean(np.square(x.double().numpy()), axis)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_mean_squares_of_whole_numbers_and_of_nothing(on_an_accelerator):
    found = backend.mean_square(torch.tensor([[1, 2], [3, 4]]), (0,))
    assert found.tolist() == [5, 10]
    empty = backend.mean_square(torch.ones((0, 2)), (0,))
    assert torch.all(torch.isnan(empty)) and empty.shape == (2,)


def test_what_is_made_of_a_variable_follows_it():
    """Views are made once. What has other entries than views is made anew."""
    variable = keras.Variable(np.arange(4, dtype="float32"))
    calls = []

    def halves(x):
        calls.append("halves")
        return x[:2], x[2:]

    def columns(x):
        calls.append("columns")
        return x.reshape(2, 2).T.reshape(-1), x[:2]

    views = {}
    for start in (0, 4):
        variable.assign(np.arange(start, start + 4, dtype="float32"))
        found = backend.view(variable, halves, views, "halves")
        assert [x.tolist() for x in found] == [
            [start, start + 1],
            [start + 2, start + 3],
        ]
        found, _ = backend.view(variable, columns, views, "columns")
        assert found.tolist() == [start, start + 2, start + 1, start + 3]
    assert calls == ["halves", "columns", "columns"]


def operations_of_vit(optimizer, steps, kind="operations", sizes=None):
    task = make_task("ViT", sizes=sizes)
    task.compile(optimizer)
    counts = []
    for _ in range(steps):
        with CountReads() as count:
            task.step()
        counts.append(getattr(count, kind))
    return counts


# For what doesn't depend on how large layers are.
SMALL = {"size": 8, "batch": 1, "image": 8}


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """What is done there, on a CPU."""
    monkeypatch.setattr(backend, "has_accelerator", lambda: True)
    monkeypatch.setattr(backend, "half_precision", lambda: "float16")
    monkeypatch.setattr(torch_update, "_can_be_read", lambda rate: False)
    monkeypatch.setattr(torch_update, "_BATCH_SIZE", {})
    monkeypatch.setattr(torch_diagonals, "_SLOW_ADDCMUL", {})
    monkeypatch.setattr(torch_backend, "_SLOW_NORM", {})


def test_kernels_of_a_step_that_does_not_measure(
    record_property, on_an_accelerator
):
    """One for each of the 39 variables beside what Adam starts."""
    *_, adam = operations_of_vit(keras.optimizers.Adam(), 2, "kernels", SMALL)
    ours = operations_of_vit(keras_adafisher.AdaFisher(), 12, "kernels", SMALL)
    *_, measures, plain = ours
    record_property(
        "figure",
        f"kernels of a ViT's step on a GPU: Adam {adam}; ours {plain}, "
        f"measuring {measures}",
    )
    assert plain <= adam + 39


def test_operations_where_kernels_move_at_every_second_step(record_property):
    """Orthogonalization is half of them, and none while kernels rest."""
    adamw = operations_of_vit(keras.optimizers.AdamW(), 2)[1]
    *_, rests, moves = operations_of_vit(
        keras_adafisher.AdaFisherMuon(kernel_update_steps=2), 14
    )
    record_property(
        "figure",
        f"operations of a ViT's step: AdamW {adamw}; AdaFisherMuon {moves}, "
        f"{rests} while kernels rest",
    )
    assert moves <= 850
    assert rests <= adamw + 5


@pytest.mark.parametrize(
    "optimizer", [keras_adafisher.AdaFisher, keras_adafisher.AdaFisherMuon]
)
def test_no_more_numbers_are_copied_to_a_gpu(optimizer, on_an_accelerator):
    """Each makes the host wait. Keras makes ten tensors of numbers in a step
    with AdamW, whose step is one of them. Measuring takes none."""
    limit = operations_of_vit(keras.optimizers.AdamW(), 2, "numbers", SMALL)[1]
    found = operations_of_vit(optimizer(), 13, "numbers", SMALL)
    assert max(found[1:]) <= limit


def test_kernels_of_an_orthogonalized_step(record_property, on_an_accelerator):
    adam, muon, ours = (
        operations_of_vit(optimizer, 12, "kernels", SMALL)[-1]
        for optimizer in (
            keras.optimizers.Adam(),
            keras.optimizers.Muon(),
            keras_adafisher.AdaFisherMuon(),
        )
    )
    record_property(
        "figure",
        f"kernels of a ViT's step on a GPU: Adam {adam}; Muon {muon}; "
        f"AdaFisherMuon {ours}",
    )
    assert ours - adam <= 0.15 * (muon - adam)


@pytest.mark.parametrize(("device", "limit"), [("cpu", 736), ("other", 700)])
def test_operations_of_a_vision_transformer(
    device, limit, record_property, monkeypatch
):
    """The one of the benchmarks: 20 taps, 39 variables.

    On a CPU, variables are updated in four lists, on accelerators in one.
    """
    if device != "cpu":
        monkeypatch.setattr(torch_update, "_BATCH_SIZE", {})

    adam = operations_of_vit(keras.optimizers.Adam(), 2)
    ours = operations_of_vit(keras_adafisher.AdaFisher(), 12)
    # The first ten steps measure the size of the steps, and one in ten the
    # factors too.
    first, second, measuring, plain = (ours[step] for step in (0, 1, 10, 11))
    record_property(
        "figure",
        f"operations of a ViT's step ({device}): Adam {adam[1]}, first "
        f"{adam[0]}; ours {plain}, measuring {measuring}, first {first}, "
        f"second {second}",
    )
    assert plain <= adam[1] + 20
    assert second <= adam[1] + 50
    assert measuring <= limit
    # Nothing but what it makes: each layer's views, each parameter's momentum,
    # and where its scaled factors are.
    assert first - measuring <= 590


@pytest.mark.parametrize("make_model", [cnn, recurrent])
@pytest.mark.parametrize("factor_update_steps", [1, 2, 100])
def test_no_more_waits_than_momentum_sgd(
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
    assert ours == plain


def test_probes_keep_no_answer():
    """What a step leaves behind would be added to the next measurement."""
    x, y = image_data(examples=8)
    model = cnn()
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    model.train_on_batch(x, y)
    probes = probes_in(model)
    assert len(probes) == 4
    for probe in probes:
        assert probe.answer is None
        assert probe.tensor.grad is None


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


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_step_that_is_skipped_leaves_nothing_behind(value, set_to_none):
    """Once `zero_grad()` has cleared what it did to the weights."""
    x, y = map(torch.from_numpy, image_data(examples=8))
    diagonals = []
    for skips in (False, True):
        keras.utils.set_random_seed(0)
        model = cnn()
        keras_adafisher.wrap(model)
        optimizer = keras_adafisher.AdaFisher.as_published(
            factor_update_steps=1
        )
        optimizer.build(model.trainable_variables)
        # Without batch statistics, which the skipped step would change.
        model.layers[1].trainable = False
        if skips:
            backward(model, cross_entropy(), value * x.flip(0) ** 2, y)
            model.zero_grad(set_to_none=set_to_none)
        backward(model, cross_entropy(), x, y)
        apply(model, optimizer)
        diagonals.append(optimizer.preconditioner(model.layers[-1].kernel))
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
        optimizer = keras_adafisher.AdaFisher.as_published(
            factor_update_steps=1, epsilon=0.0
        )
        optimizer.build(model.trainable_variables)
        for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            backward(model, cross_entropy(), *part)
        apply(model, optimizer)
        diagonals.append(optimizer.preconditioner(model.layers[-1].kernel))
    for other in diagonals[1:]:
        torch.testing.assert_close(other, diagonals[0], rtol=1e-6, atol=0)


def test_backward_passes_that_keep_gradients_add_up_in_one_vector():
    """However many there are before the next update."""
    x, y = map(torch.from_numpy, image_data(examples=8))
    model = cnn()
    keras_adafisher.wrap(model)
    for count in range(1, 4):
        backward(model, cross_entropy(), x, y)
        for probe in probes_in(model):
            _, parts = probe.answer
            calls = torch.cat(parts)[0]
            assert calls == count
            assert sum(map(len, parts)) == probe.size


def test_gradients_of_autograd_grad_are_measured_too():
    x, y = map(torch.from_numpy, image_data(examples=8))
    diagonals = []
    for by_grad in (False, True):
        keras.utils.set_random_seed(0)
        model = cnn()
        keras_adafisher.wrap(model)
        optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
        variables = model.trainable_variables
        optimizer.build(variables)
        loss = cross_entropy()(y, model(x, training=True))
        if by_grad:
            values = [v.value for v in variables]
            optimizer.apply(torch.autograd.grad(loss, values), variables)
        else:
            loss.backward()
            apply(model, optimizer)
        diagonals.append(optimizer.preconditioner(model.layers[-1].kernel))
    assert torch.equal(*diagonals)


def test_gradients_for_inputs_only_are_no_measurement():
    """Those of a gradient penalty, for instance."""
    x, y = map(torch.from_numpy, image_data(examples=8))
    model = cnn()
    keras_adafisher.wrap(model)
    x.requires_grad_(True)
    for by_grad in (True, False):
        loss = cross_entropy()(y, model(x, training=True))
        if by_grad:
            torch.autograd.grad(loss, x)
        else:
            loss.backward(inputs=[x])
        assert [probe.answer for probe in probes_in(model)] == [None] * 4


def test_names_of_pytorch_that_are_not_public():
    """What a tap asks the engine, in the three kinds of backward passes."""
    weight = torch.ones(2, requires_grad=True)
    x = torch.ones(2, requires_grad=True)
    node = (2 * weight).grad_fn.next_functions[0][0]
    passes = {
        "all": lambda loss: loss.backward(),
        "inputs": lambda loss: torch.autograd.grad(loss, x),
        "weights": lambda loss: torch.autograd.grad(loss, weight),
    }
    found, numbers = {}, set()

    def ask(name):
        found[name] = torch_probe._is_computed(node)
        numbers.add(torch._C._current_graph_task_id())

    for name, run in passes.items():
        y = x * weight
        y.register_hook(lambda _, name=name: ask(name))
        y.register_hook(lambda _, name=name: ask(name))
        run(y.sum())
    assert found == {"all": True, "inputs": False, "weights": True}
    assert len(numbers) == 3
    assert torch._C._will_engine_execute_node
    assert not torch._C._are_functorch_transforms_active()
    torch.vmap(
        lambda x: numbers.add(torch._C._are_functorch_transforms_active()) or x
    )(x)
    assert True in numbers


@pytest.fixture
def one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_the_parallel_module_whose_forward_runs(one_process):
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

    parallel = torch.nn.parallel.DistributedDataParallel(Module())
    parallel(torch.ones(1))
    assert seen == [parallel]
    assert parallel.process_group is not None


def test_processes_that_join_are_refused(one_process):
    """The others would wait for ever for what these don't measure."""
    x, y = map(torch.from_numpy, image_data(examples=8))
    model = cnn()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher()
    optimizer.build(model.trainable_variables)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    with parallel.join():
        with torch.no_grad():
            parallel(x)
        with pytest.raises(RuntimeError, match="can't measure its Kronecker"):
            parallel(x, training=True)
    # In others, it goes by as many batches as all have.
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    backward(parallel, cross_entropy(), x, y)
    apply(model, optimizer)
    assert int(optimizer.iterations) == 1


def test_processes_that_are_no_parallel_module_are_told(
    one_process, monkeypatch
):
    x, y = map(torch.from_numpy, image_data(examples=8))
    model = cnn()
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=1)
    optimizer.build(model.trainable_variables)
    with warnings.catch_warnings():
        # A group of one process is alone.
        warnings.simplefilter("error")
        backward(model, cross_entropy(), x, y)
        apply(model, optimizer)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    backward(model, cross_entropy(), x, y)
    with pytest.warns(UserWarning, match="There are 3 processes"):
        apply(model, optimizer)


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
        return optimizer.preconditioner(kernel).detach().numpy()

    # All factors start at 1.
    np.testing.assert_allclose(fisher(), 1.5)
    factors = own_variable(optimizer, "factors")
    with keras.StatelessScope([(factors, 2 * factors.value)]):
        np.testing.assert_allclose(fisher(), 4.5)
    np.testing.assert_allclose(fisher(), 1.5)
    factors.assign(3 * factors.value)
    np.testing.assert_allclose(fisher(), 9.5)
