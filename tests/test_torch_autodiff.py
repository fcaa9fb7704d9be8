"""What PyTorch's transforms and in-place changes do with a wrapped model.

At steps that measure, where layers have taps, it is the same as without them.
"""

import io

import keras
import numpy as np
import pytest
import torch
from keras import ops
from models import assert_close
from models import probes_in
from models import to_numpy
from models import weights
from torch.utils.checkpoint import checkpoint

import keras_adafisher

SIZE = 4


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, SIZE)).astype("float32")
    return torch.from_numpy(x), torch.from_numpy(x.sum(1, keepdims=True))


def make_model(change=lambda y, h: y):
    """Two layers, what a function does to the second's output, and a third.

    Its outputs aren't the ones that a layer's code has kept.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIZE,))
    h = keras.layers.Dense(SIZE, activation="tanh", name="first")(inputs)
    y = keras.layers.Dense(SIZE, name="second")(h)
    y = Change(change)([y, h])
    y = keras.layers.Dense(1, name="third")(y)
    return keras.Model(inputs, y)


class Change(keras.layers.Layer):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def call(self, inputs):
        return self.change(*inputs)

    def compute_output_shape(self, shapes):
        return shapes[0]


def assign(y, h):
    y[:, 0] = 0
    return y


def assign_to_view(y, h):
    y[:, 1:].add_(h[:, 1:])
    return y


def add_to_view(y, h):
    y = y.view(2, -1)
    y += 1
    return y.view(-1, SIZE)


IN_PLACE = {
    "add": lambda y, h: y.add_(h),
    "multiply": lambda y, h: y.mul_(2),
    "relu": lambda y, h: y.relu_(),
    "clamp": lambda y, h: y.clamp_(-1, 1),
    "assign": assign,
    "assign to view": assign_to_view,
    "add to view": add_to_view,
    "twice": lambda y, h: y.add_(h).relu_(),
}
NOT_IN_PLACE = {
    "add": lambda y, h: y + h,
    "multiply": lambda y, h: y * 2,
    "relu": lambda y, h: y.relu(),
    "clamp": lambda y, h: y.clamp(-1, 1),
    "assign": lambda y, h: y * torch.tensor([0.0, 1, 1, 1]),
    "assign to view": lambda y, h: y + h * torch.tensor([0.0, 1, 1, 1]),
    "add to view": lambda y, h: y + 1,
    "twice": lambda y, h: (y + h).relu(),
}


def train(model, steps=3):
    """Losses, weights and state of some steps that all measure."""
    model.compile(keras_adafisher.AdaFisher(factor_update_steps=1), "mse")
    losses = [model.train_on_batch(*data()) for _ in range(steps)]
    state = [to_numpy(v) for v in model.optimizer.variables]
    return [np.array(losses), *weights(model), *state]


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_output_may_be_changed_in_place(name):
    expected = train(make_model(NOT_IN_PLACE[name]))
    assert_close(train(make_model(IN_PLACE[name])), expected, 1e-5)


def test_what_a_layer_has_kept_may_not_be_changed():
    """As without a tap: `tanh` differentiates by its result."""

    def change(y, h):
        y = y.tanh()
        y.mul_(2)
        return y

    model = make_model(change)
    model.compile(keras_adafisher.AdaFisher(), "mse")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model.train_on_batch(*data())


def test_a_view_may_be_changed_in_place():
    """Such as those that `EinsumDense` returns."""
    measured = []
    for is_in_place in (False, True):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((2, SIZE))
        layer = keras.layers.EinsumDense("abc,cd->adb", (SIZE, 2))
        h = layer(inputs)

        def change(y, h, is_in_place=is_in_place):
            return y.add_(1) if is_in_place else y + 1

        h = Change(change)([h, h])
        model = keras.Model(inputs, h)
        x = torch.ones(3, 2, SIZE)
        assert layer(x)._is_view()
        keras_adafisher.wrap(model)
        ops.sum(model(x) ** 2).backward()
        (probe,) = probes_in(model)
        measured.append(torch.cat(probe.answer[1]))
    assert torch.equal(*measured)


def plain_and_wrapped():
    """The same model without and with taps that measure."""
    plain, wrapped = make_model(), make_model()
    wrapped.compile(keras_adafisher.AdaFisher(), "mse")
    wrapped.optimizer.build(wrapped.trainable_variables)
    assert wrapped.optimizer.measures_factors()
    return plain, wrapped


def per_sample_gradients(model, x):
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).sum()

    gradients = torch.func.grad(loss, argnums=1)
    return torch.func.vmap(gradients, in_dims=(None, 0))(parameters, x)


def total(model):
    return lambda x: model(x).pow(2).sum()


def hessian_vector_product(model, x):
    (gradient,) = torch.autograd.grad(total(model)(x), x, create_graph=True)
    return torch.autograd.grad((gradient * gradient.detach()).sum(), x)[0]


def checkpointed(model, x, use_reentrant):
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    return torch.autograd.grad(y.sum(), x)[0] if not use_reentrant else y


def forward_mode(model, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent


def in_inference_mode(model, x):
    with torch.inference_mode():
        return model(torch.ones_like(x))


TRANSFORMS = {
    "keras jvp": lambda m, x: ops.jvp(lambda x: m(x), (x,), (x,))[1],
    "keras vectorized_map": lambda m, x: ops.vectorized_map(
        lambda x: m(x[None])[0], x
    ),
    "forward mode": forward_mode,
    "inference mode": in_inference_mode,
    "grad": lambda m, x: torch.func.grad(total(m))(x),
    "vmap": lambda m, x: torch.func.vmap(lambda x: m(x[None])[0])(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,))[1],
    "vjp": lambda m, x: torch.func.vjp(m, x)[1](torch.ones(8, 1))[0],
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x),
    "hessian": lambda m, x: torch.func.hessian(total(m))(x),
    "linearize": lambda m, x: torch.func.linearize(m, x)[1](x),
    "per-sample gradients": per_sample_gradients,
    "autograd jacobian": lambda m, x: torch.autograd.functional.jacobian(m, x),
    "autograd hessian": lambda m, x: torch.autograd.functional.hessian(
        total(m), x
    ),
    "vectorized jacobian": lambda m, x: torch.autograd.functional.jacobian(
        m, x, vectorize=True
    ),
    "batched gradients": lambda m, x: torch.autograd.grad(
        m(x), x, torch.ones(3, 8, 1), is_grads_batched=True
    )[0],
    "Hessian-vector product": hessian_vector_product,
    "checkpoint": lambda m, x: checkpointed(m, x, False),
    "reentrant checkpoint": lambda m, x: checkpointed(m, x, True),
    "jit trace": lambda m, x: torch.jit.trace(m, x)(x),
    "compile": lambda m, x: torch.compile(m, backend="eager", fullgraph=True)(
        x
    ),
    "compile with gradients": lambda m, x: torch.autograd.grad(
        torch.compile(m, backend="aot_eager", fullgraph=True)(x).sum(), x
    )[0],
    "export": lambda m, x: torch.export.export(m, (x,)).module()(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_the_plain_model(name):
    results = []
    for model in plain_and_wrapped():
        x = data()[0].requires_grad_()
        results.append(TRANSFORMS[name](model, x).detach().numpy())
    actual, expected = results
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_trace_can_be_saved():
    _, model = plain_and_wrapped()
    x, _ = data()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(x), model(x))


def custom_loop(model, forward, steps=4, penalty=None):
    """Train by `backward()`: weights, and what the factors have taken in."""
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=2)
    keras_adafisher.wrap(model)
    variables = model.trainable_variables
    optimizer.build(variables)
    for _ in range(steps):
        model.zero_grad()
        x, y = data()
        x.requires_grad_()
        loss = (forward(x) - y).pow(2).mean()
        if penalty is not None:
            loss = loss + penalty(x, loss)
        loss.backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in variables], variables)
    records = [optimizer.records_of(probe) for probe in probes_in(model)]
    return weights(model), records


MEASURED, ESTIMATED = (2.0, 0.0, False), (2.0, 0.0, True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_measures(backend):
    """In a graph that `fullgraph=True` doesn't break, and as without it."""
    torch._dynamo.reset()
    model = make_model()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    actual, records = custom_loop(model, compiled)
    assert records == [MEASURED] * 3
    model = make_model()
    expected, _ = custom_loop(model, model)
    assert_close(actual, expected, 1e-6)


def test_a_compiled_model_measures_for_the_next_optimizer_too():
    """Which measures at its first step, where the last one didn't measure."""
    torch._dynamo.reset()
    model = make_model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        _, records = custom_loop(model, compiled, steps=3)
        assert [estimated for *_, estimated in records] == [False] * 3


def test_a_compiled_model_is_made_anew_once():
    """For the steps that measure, and for the others."""
    torch._dynamo.reset()
    counts = []

    def backend(graph, inputs):
        counts.append(graph)
        return graph.forward

    model = make_model()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    custom_loop(model, compiled, steps=8)
    assert len(counts) == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_measure(use_reentrant):
    def forward(x):
        return checkpoint(model, x, use_reentrant=use_reentrant)

    model = make_model()
    actual, records = custom_loop(model, forward)
    assert records == [MEASURED] * 3
    model = make_model()
    expected, _ = custom_loop(model, model)
    assert_close(actual, expected, 1e-6)


def test_a_gradient_penalty_measures_once():
    def penalty(x, loss):
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        for probe in probes_in(model):
            assert probe.answer is None
        return gradient.pow(2).sum()

    model = make_model()
    _, records = custom_loop(model, model, penalty=penalty)
    assert records == [MEASURED] * 3
    # What the weights get is the plain gradient.
    gradients = []
    for model in plain_and_wrapped():
        x, _ = data()
        x.requires_grad_()
        loss = model(x).pow(2).sum()
        (loss + penalty(x, loss)).backward()
        for variable in model.trainable_variables:
            gradients.append(variable.value.grad.numpy())
        for probe in probes_in(model):
            assert torch.cat(probe.answer[1])[0] == 1
    assert_close(gradients[6:], gradients[:6], 1e-6)


@pytest.mark.parametrize("name", ["trace", "vectorized_map"])
def test_what_has_no_taps_is_estimated(name):
    model = make_model()
    if name == "trace":
        forward = torch.jit.trace(model, data()[0], check_trace=False)
    else:

        def forward(x):
            return ops.vectorized_map(lambda x: model(x[None])[0], x)

    with pytest.warns(UserWarning, match="no layer has reported anything"):
        _, records = custom_loop(model, forward)
    assert records == [ESTIMATED] * 3


@pytest.mark.parametrize("name", TRANSFORMS)
def test_training_goes_on_as_if_nothing_had_been_transformed(name):
    trained = []
    for is_transformed in (False, True):
        model = make_model()
        model.compile(keras_adafisher.AdaFisher(factor_update_steps=1), "mse")
        for _ in range(2):
            if is_transformed:
                TRANSFORMS[name](model, data()[0].requires_grad_())
            model.train_on_batch(*data())
        trained.append(weights(model))
        for probe in probes_in(model):
            assert model.optimizer.records_of(probe) == MEASURED
    assert_close(*trained, 1e-6)


def test_outputs_without_a_gradient_stay_so():
    _, model = plain_and_wrapped()
    with torch.no_grad():
        assert not model(data()[0]).requires_grad
    layer = model.get_layer("second")
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert not layer(torch.ones(2, SIZE)).requires_grad
