"""The private names of Keras that the package uses, one test each.

If a Keras release moves one, the test that fails has its name. PyTorch's own
is in `test_torch.py`.
"""

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from keras.src.applications.convnext import LayerScale
from keras.src.backend.common.masking import get_keras_mask
from keras.src.backend.common.masking import set_keras_mask
from keras.src.backend.common.stateless_scope import in_stateless_scope
from models import mlp

from keras_adafisher.wrappers import find_wrapper
from keras_adafisher.wrappers import LayerScaleWrapper


@pytest.fixture
def layer():
    layer = keras.layers.Dense(3)
    layer.build((None, 4))
    return layer


@pytest.fixture
def optimizer():
    optimizer = keras.optimizers.SGD(use_ema=True)
    optimizer.build(mlp().trainable_variables)
    return optimizer


def test_layer_flatten_layers():
    """`wrap` walks through a model: parents before their sub-layers."""
    model = mlp()
    outer = keras.Sequential([keras.Input((6,)), model])
    layers = outer._flatten_layers()
    assert layers[0] is outer
    assert layers.index(model) < layers.index(model.layers[0])


def test_build_is_an_attribute_of_the_layer():
    """What isn't built yet is wrapped in its `build`."""
    assert "build" in vars(keras.layers.Dense(3))
    assert "call" not in vars(keras.layers.Dense(3))


def test_saving_passes_over_names_with_two_underscores(layer, tmp_path):
    """The wrapper is kept under such a name."""
    layer._tracker.unlock()
    layer.__seen__ = keras.layers.Dense(2)
    layer.__seen__.build((None, 4))
    model = keras.Sequential([keras.Input((4,)), layer])
    model.save_weights(tmp_path / "model.weights.h5")
    found = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visit(found.append)
    assert found
    assert not any("seen" in name for name in found)


def test_overwrite_with_gradient(layer):
    """Marks the probes for optimizers that don't know them."""
    layer._tracker.unlock()
    variable = layer.add_weight(shape=(), overwrite_with_gradient=True)
    assert variable.overwrite_with_gradient
    optimizer = keras.optimizers.Adam()
    optimizer.build([variable, layer.kernel])
    assert len(optimizer.variables) == 2 + 2


def test_optimizer_get_variable_index(optimizer):
    variables = optimizer._trainable_variables
    assert [optimizer._get_variable_index(v) for v in variables] == [0, 1, 2, 3]
    with pytest.raises(KeyError):
        optimizer._get_variable_index(optimizer.iterations)


def test_variable_value():
    """A variable's own tensor, where `value` is a copy in another dtype."""
    seen = []

    class Layer(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(2,))

        def call(self, inputs):
            seen.append((self.kernel.value, self.kernel._value))
            return inputs

    layer = Layer(dtype="mixed_bfloat16")
    layer(np.ones(2, "float32"))
    cast, own = seen[-1]
    assert keras.backend.standardize_dtype(cast.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(own.dtype) == "float32"
    assert layer.kernel._value is own
    if keras.backend.backend() == "torch":
        # It is in the module's list of parameters.
        assert [id(p) for p in layer.parameters()] == [id(own)]


def test_optimizer_iterations():
    """Counts steps, where `iterations` counts updates."""
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=2)
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer.build([variable])
    for _ in range(3):
        optimizer.apply([ops.ones(2)], [variable])
    assert int(optimizer._iterations) == 3
    assert int(optimizer.iterations) == 1


def test_optimizer_apply_weight_decay():
    """`apply` calls it once, with all variables, and it reads the attribute."""
    calls = []

    class Optimizer(keras.optimizers.SGD):
        def _apply_weight_decay(self, variables):
            calls.append(list(variables))
            vars(self)["weight_decay"] = 0.5
            super()._apply_weight_decay(variables)

    optimizer = Optimizer(0.1, weight_decay=0.1)
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer.build([variable])
    optimizer.apply([ops.zeros(2)], [variable])
    assert calls == [[variable]]
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [0.95, 0.95])


def test_optimizer_use_weight_decay():
    optimizer = keras.optimizers.SGD(weight_decay=0.1)
    first, second = keras.Variable([1.0]), keras.Variable([1.0])
    optimizer.exclude_from_weight_decay(var_list=[second])
    optimizer.build([first, second])
    assert optimizer._use_weight_decay(first)
    assert not optimizer._use_weight_decay(second)


def test_optimizer_model_variables_moving_average(optimizer):
    averages = optimizer._model_variables_moving_average
    assert [a.shape for a in averages] == [
        v.shape for v in optimizer._trainable_variables
    ]


def test_optimizer_update_model_variables_moving_average():
    """`apply` calls it once, when weights have moved, with all of them."""
    calls = []

    class Optimizer(keras.optimizers.SGD):
        def _update_model_variables_moving_average(self, trainable_variables):
            values = [
                float(ops.convert_to_numpy(variable))
                for variable in trainable_variables
            ]
            calls.append((int(self._iterations), values))

    optimizer = Optimizer(0.5, use_ema=True)
    variables = [keras.Variable(1.0), keras.Variable(2.0)]
    optimizer.build(variables)
    for _ in range(2):
        optimizer.apply([ops.ones(()), ops.ones(())], variables)
    assert calls == [(0, [0.5, 1.5]), (1, [0.0, 1.0])]


def test_in_stateless_scope():
    """On PyTorch, the update of all variables together works in place."""
    assert not in_stateless_scope()
    with keras.StatelessScope():
        assert in_stateless_scope()


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="Keras' optimizers for JAX and PyTorch haven't got it",
)
def test_optimizer_distributed_tf_update_step(optimizer):
    """On TensorFlow, it has the gradients of all replicas together."""
    calls = []
    optimizer._distributed_tf_update_step = lambda *args: calls.append(args)
    variables = optimizer._trainable_variables
    optimizer.apply([ops.ones(v.shape) for v in variables], variables)
    ((strategy, pairs, learning_rate),) = calls
    grads, updated = zip(*pairs, strict=True)
    local = [strategy.experimental_local_results(g) for g in grads]
    assert [tuple(g.shape) for (g,) in local] == [v.shape for v in variables]
    assert [optimizer._get_variable_index(v) for v in updated] == [0, 1, 2, 3]
    assert float(learning_rate) == pytest.approx(0.01)


def test_optimizer_backend_update_step(optimizer):
    """It has all gradients, and on PyTorch updates all variables together."""
    calls = []
    optimizer._backend_update_step = lambda *args: calls.append(args)
    variables = optimizer._trainable_variables
    grads = [ops.ones(v.shape) for v in variables]
    optimizer.apply(grads, variables)
    ((grads, updated, learning_rate),) = calls
    assert len(grads) == len(variables)
    assert [id(v) for v in updated] == [id(v) for v in variables]
    assert float(learning_rate) == pytest.approx(0.01)


def test_optimizer_backend_gradient_accumulators():
    """On PyTorch, they are added to and reset together."""
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=2)
    variable = keras.Variable(np.zeros(2, "float32"))
    optimizer.build([variable])
    calls = []
    optimizer._backend_increment_gradient_accumulators = lambda grads, acc: (
        calls.append(acc)
    )
    optimizer._backend_reset_gradient_accumulators = lambda: calls.append(None)
    for _ in range(2):
        optimizer.apply([ops.ones(2)], [variable])
    accumulators = optimizer._accumulated_gradients
    # JAX has a way of its own.
    expected = [] if keras.backend.backend() == "jax" else [accumulators, None]
    assert [c and [id(v) for v in c] for c in calls] == [
        e and [id(v) for v in e] for e in expected
    ]


def test_keras_masks_of_tensors():
    """A tapped embedding hands on the mask of the plain one."""
    tensor = ops.ones((2, 3))
    assert get_keras_mask(tensor) is None
    set_keras_mask(tensor, ops.ones((2,), "bool"))
    assert get_keras_mask(tensor).shape == (2,)


def test_layer_scale_of_convnext():
    """Registered by its name. (keras_hub's are in `test_wrapper_keras_hub`.)"""
    assert find_wrapper(LayerScale(1e-6, 3)) == (LayerScaleWrapper, "")


def test_multi_optimizer_optimizer_map():
    """`build` asks it for the optimizer of each variable."""
    optimizer = keras.optimizers.MultiOptimizer(lambda variable: None)
    found = keras.optimizers.SGD()
    vars(optimizer)["_optimizer_map"] = lambda variable: found
    optimizer.build(mlp().trainable_variables)
    assert optimizer.optimizers == [found]
