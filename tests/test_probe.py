"""Request and response, differentiated by each backend's own autodiff."""

import keras
import numpy as np
import pytest
from keras import ops
from models import to_numpy

from keras_adafisher.probe import mark_parameters
from keras_adafisher.probe import Probe
from keras_adafisher.probe import probe_of
from keras_adafisher.probe import probes_at
from keras_adafisher.probe import tap
from keras_adafisher.wrappers import DenseBlock


class Owner(keras.layers.Layer):
    """A dense map with a probe, called as often as it gets inputs."""

    full_name = "owner"

    def __init__(self, kernel):
        super().__init__()
        self.kernel = self.add_weight(shape=kernel.shape, name="kernel")
        self.kernel.assign(kernel)
        self.block = DenseBlock(self.kernel, None, *kernel.shape)
        self.probe = Probe(self.block, self)
        self.built = True

    def call(self, *inputs):
        return [tap(ops.matmul(x, self.kernel), x, self.probe) for x in inputs]


def gradients(owner, inputs, cotangents, model=None):
    """Gradients of `sum(z * cotangent)` for the variables of `owner`, by name.

    `model` is the layer that is called and differentiated, `owner` itself if
    it isn't given.
    """
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
        result = tape.gradient(loss, [v.value for v in variables])
    elif keras.backend.backend() == "torch":
        for variable in variables:
            variable.value.grad = None
        loss_of(model(*inputs)).backward()
        kernel, *answer = (owner.kernel.value, *owner.probe.inputs)
        names = ("kernel", "request", "activation", "gradient")
        return {
            name: None if tensor.grad is None else to_numpy(tensor.grad)
            for name, tensor in zip(names, (kernel, *answer), strict=True)
        }
    else:
        import jax

        def stateless_loss(values):
            return loss_of(model.stateless_call(values, [], *inputs)[0])

        result = jax.grad(stateless_loss)([v.value for v in variables])
    own = {id(variable) for variable in owner.trainable_variables}
    return {
        variable.name: None if g is None else to_numpy(g)
        for variable, g in zip(variables, result, strict=True)
        if id(variable) in own
    }


@pytest.fixture
def owner(rng):
    return Owner(rng.normal(size=(3, 2)).astype("float32"))


def arrays(rng, *shapes):
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def ask(owner, wanted):
    """As the optimizer does: through the variable, or on the host."""
    if owner.probe.variables:
        owner.probe.request.assign(float(wanted))
    owner.probe.listening = int(wanted)


def test_the_tap_returns_its_input(owner, rng):
    (x,) = arrays(rng, (4, 3))
    (z,) = owner(ops.convert_to_tensor(x))
    plain = ops.matmul(ops.convert_to_tensor(x), owner.kernel)
    np.testing.assert_array_equal(to_numpy(z), to_numpy(plain))


def test_the_answers_are_mean_squares(owner, rng):
    x, c = arrays(rng, (4, 3), (4, 2))
    answer = gradients(owner, [x], [c])
    np.testing.assert_allclose(answer["request"], 1.0)
    h = np.mean(x**2, axis=0)[:, None]
    np.testing.assert_allclose(answer["activation"], h, rtol=1e-6)
    s = np.mean(c**2, axis=0)
    np.testing.assert_allclose(answer["gradient"], s, rtol=1e-6)


def test_the_gradient_of_the_kernel_is_untouched(owner, rng):
    x, c = arrays(rng, (4, 3), (4, 2))
    answer = gradients(owner, [x], [c])
    np.testing.assert_allclose(answer["kernel"], x.T @ c, atol=1e-6)


def test_several_calls_add_up_and_are_counted(owner, rng):
    x1, x2, c1, c2 = arrays(rng, (4, 3), (6, 3), (4, 2), (6, 2))
    answer = gradients(owner, [x1, x2], [c1, c2])
    np.testing.assert_allclose(answer["request"], 2.0)
    h = np.mean(x1**2, axis=0) + np.mean(x2**2, axis=0)
    np.testing.assert_allclose(answer["activation"][:, 0], h, rtol=1e-6)
    s = np.mean(c1**2, axis=0) + np.mean(c2**2, axis=0)
    np.testing.assert_allclose(answer["gradient"], s, rtol=1e-6)


def test_without_a_request_there_is_no_answer(owner, rng):
    x, c = arrays(rng, (4, 3), (4, 2))
    ask(owner, False)
    answer = gradients(owner, [x], [c])
    for name in ("request", "activation", "gradient"):
        assert answer[name] is None or not np.any(answer[name])
    np.testing.assert_allclose(answer["kernel"], x.T @ c, atol=1e-6)


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
    assert gradients(owner, [x], [c], model)["request"] == 1
    answer = gradients(unused, [x], [c], model)
    for name in ("request", "activation", "gradient"):
        assert answer[name] is None or not np.any(answer[name])


def test_probes_know_themselves(owner):
    assert probe_of(owner.kernel) is None
    assert probes_at(owner.kernel) == []
    mark_parameters(owner.probe)
    assert probes_at(owner.kernel) == [owner.probe]
    for variable in owner.probe.variables:
        assert probe_of(variable) is owner.probe
        assert variable.overwrite_with_gradient
        assert variable.dtype == "float32"
