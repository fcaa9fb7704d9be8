"""Request and response, differentiated by each backend's own autodiff."""

import keras
import numpy as np
import pytest
from keras import ops
from models import to_numpy

import keras_adafisher
from keras_adafisher.integration.keras_hooks import install
from keras_adafisher.probe import BackendProbe
from keras_adafisher.probe import mark_parameters
from keras_adafisher.probe import probe_of
from keras_adafisher.probe import probes_at
from keras_adafisher.probe import unmark_parameters
from keras_adafisher.probe import with_probes
from keras_adafisher.steps import current
from keras_adafisher.steps import Step
from keras_adafisher.wrappers import DenseBlock


class Owner(keras.layers.Layer):
    """A dense map with a probe, called as often as it gets inputs."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = self.add_weight(shape=kernel.shape, name="kernel")
        self.kernel.assign(kernel)
        self.block = DenseBlock(self.kernel, None, *kernel.shape)
        self.probe = BackendProbe(self.block, self)
        mark_parameters(self.probe)
        self.built = True

    def call(self, *inputs):
        return [self.probe.tap(ops.matmul(x, self.kernel), x) for x in inputs]


def gradients(owner, inputs, cotangents, model=None):
    """Gradients of `sum(z * cotangent)` at the kernel and the probe of `owner`.

    `model` is the layer that is called and differentiated, `owner` itself if
    it isn't given. What the probe got is as measured, or `None`.
    """
    # What `wrap` does: lists and tapes know of probes then.
    install()
    model = model or owner
    inputs = [ops.convert_to_tensor(x) for x in inputs]

    def loss_of(outputs):
        return sum(
            ops.sum(z * ops.convert_to_tensor(c))
            for z, c in zip(outputs, cotangents, strict=True)
        )

    variables = model.trainable_variables
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = loss_of(model(*inputs))
        found = dict(
            zip(map(id, variables), tape.gradient(loss, variables), strict=True)
        )
        kernel = found[id(owner.kernel)]
        answer = owner.probe.answer_in(found, None)
        return [x if x is None else to_numpy(x) for x in (kernel, answer)]
    elif keras.backend.backend() == "torch":
        for variable in variables:
            variable.value.grad = None
        loss_of(model(*inputs)).backward()
        answer = owner.probe.answer_in({}, None)
        if answer is not None:
            answer = to_numpy(owner.probe.join([answer]))
        return to_numpy(owner.kernel.value.grad), answer
    else:
        import jax

        def stateless_loss(values):
            return loss_of(model.stateless_call(values, [], *inputs)[0])

        result = jax.grad(stateless_loss)([v.value for v in variables])
    found = {
        id(variable): to_numpy(g)
        for variable, g in zip(variables, result, strict=True)
    }
    answer = found.get(id(owner.probe.variable))
    return found[
        id(owner.kernel)
    ], answer if answer is None else answer * 2.0**40


@pytest.fixture
def owner(rng):
    return Owner(rng.normal(size=(3, 2)).astype("float32"))


def arrays(rng, *shapes):
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def test_the_tap_returns_its_input(owner, rng):
    (x,) = arrays(rng, (4, 3))
    with Step([]):
        (z,) = owner(ops.convert_to_tensor(x))
    plain = ops.matmul(ops.convert_to_tensor(x), owner.kernel)
    np.testing.assert_array_equal(to_numpy(z), to_numpy(plain))


@pytest.mark.parametrize("mode", ["conditional", "measure"])
def test_an_answer_has_the_mean_squares(owner, rng, mode):
    x, c = arrays(rng, (4, 3), (4, 2))
    with Step([], mode):
        kernel, answer = gradients(owner, [x], [c])
    h, s = np.mean(x**2, axis=0), np.mean(c**2, axis=0)
    np.testing.assert_allclose(answer, [1, *h, *s], rtol=1e-6)
    np.testing.assert_allclose(kernel, x.T @ c, atol=1e-6)
    calls, activation, gradient = owner.probe.split(answer)
    assert calls == 1
    np.testing.assert_allclose(activation, h[:, None], rtol=1e-6)
    np.testing.assert_allclose(gradient, s, rtol=1e-6)


def test_several_calls_add_up_and_are_counted(owner, rng):
    x1, x2, c1, c2 = arrays(rng, (4, 3), (6, 3), (4, 2), (6, 2))
    with Step([]):
        _, answer = gradients(owner, [x1, x2], [c1, c2])
    h = np.mean(x1**2, axis=0) + np.mean(x2**2, axis=0)
    s = np.mean(c1**2, axis=0) + np.mean(c2**2, axis=0)
    np.testing.assert_allclose(answer, [2, *h, *s], rtol=1e-6)


def test_a_plain_step_has_no_answer(owner, rng):
    x, c = arrays(rng, (4, 3), (4, 2))
    with Step([], "plain"):
        kernel, answer = gradients(owner, [x], [c])
    assert answer is None or not np.any(answer)
    np.testing.assert_allclose(kernel, x.T @ c, atol=1e-6)


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="PyTorch: loops need no decorator",
)
def test_outside_of_steps_there_is_neither_tap_nor_probe(owner, rng):
    x, c = arrays(rng, (4, 3), (4, 2))
    assert owner.trainable_variables == [owner.kernel]
    kernel, answer = gradients(owner, [x], [c])
    assert answer is None
    np.testing.assert_allclose(kernel, x.T @ c, atol=1e-6)


def test_steps_nest_and_end_with_an_error():
    assert current() is None
    with Step([]) as outer:
        with Step([]) as inner:
            assert current() is inner
        assert current() is outer
        with pytest.raises(ZeroDivisionError), Step([]):
            raise ZeroDivisionError
        assert current() is outer
    assert current() is None


class OnlyFirst(keras.layers.Layer):
    """Owns two layers and calls one."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        self.built = True

    def call(self, x):
        return self.first(x)


def test_an_unused_layer_does_not_answer(owner, rng):
    x, c = arrays(rng, (4, 3), (4, 2))
    unused = Owner(np.ones((3, 2), "float32"))
    model = OnlyFirst(owner, unused)
    with Step([]) as step:
        assert gradients(owner, [x], [c], model)[1][0] == 1
        answer = gradients(unused, [x], [c], model)[1]
    assert answer is None or not np.any(answer)
    assert set(step.answering) == {id(owner.probe)}


def test_a_frozen_layer_does_not_answer(owner, rng):
    (x,) = arrays(rng, (4, 3))
    frozen = Owner(np.ones((3, 2), "float32"))
    frozen.trainable = False
    optimizer = keras_adafisher.AdaFisher()
    with Step([optimizer]) as step:
        frozen(ops.convert_to_tensor(x))
        owner(ops.convert_to_tensor(x))
    assert set(step.answering) == {id(owner.probe)}


def test_probes_know_themselves(owner):
    other = keras.Variable(np.ones(2, "float32"))
    assert probe_of(owner.kernel) is None
    assert probes_at(other) == []
    assert probes_at(owner.kernel) == [owner.probe]
    variables = with_probes([other, owner.kernel])
    assert variables[:2] == [other, owner.kernel]
    assert with_probes(variables) == variables
    for variable in variables[2:]:
        assert probe_of(variable) is owner.probe
        assert variable.overwrite_with_gradient
        assert variable.dtype == "float32"
        assert variable.shape == (1 + 3 + 2,)
    is_listed = keras.backend.backend() == "jax"
    assert len(variables) == (3 if is_listed else 2)
    unmark_parameters(owner.probe)
    assert probes_at(owner.kernel) == []
