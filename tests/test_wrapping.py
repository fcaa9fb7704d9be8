import keras
import numpy as np
import pytest
from keras import ops
from models import assert_same
from models import cnn
from models import cross_entropy
from models import data
from models import image_data
from models import mlp
from models import probes_in
from models import train
from models import trained
from models import weights

import keras_adafisher
from keras_adafisher.wrappers import DenseBlock
from keras_adafisher.wrappers import registry
from keras_adafisher.wrappers.dense import DenseWrapper


class Attention(keras.layers.Layer):
    """A layer that makes a sub-layer in `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.normalization = keras.layers.LayerNormalization()

    def build(self, shape):
        self.normalization.build(shape)
        self.dense = keras.layers.Dense(shape[-1], activation="relu")
        self.dense.build(shape)

    def call(self, x):
        return x + self.dense(self.normalization(x))


class Untapped(keras.layers.Layer):
    """Two products, of which a wrapper taps the second, or none."""

    def build(self, shape):
        self.first = self.add_weight(shape=(shape[-1], 4))
        self.second = self.add_weight(shape=(shape[-1], 4))

    def call(self, x):
        return ops.matmul(x, self.first) + ops.matmul(x, self.second)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(5, activation="tanh")
        self.block = Attention()
        self.batch = keras.layers.BatchNormalization()
        self.out = keras.layers.Dense(3)

    def call(self, x, training=None):
        x = self.block(self.hidden(x))
        return self.out(self.batch(x, training=training))


def nested():
    inner = mlp(6, 4)
    inputs = keras.Input((6,))
    return keras.Model(inputs, keras.layers.Dense(3)(inner(inputs)))


def lazy():
    return keras.Sequential(
        [
            keras.layers.Dense(5, activation="relu"),
            Attention(),
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.parametrize(
    ("make_model", "layers"),
    [(mlp, 2), (nested, 3), (lazy, 4), (Subclassed, 5)],
)
def test_every_kind_of_model_is_wrapped_by_compile(make_model, layers):
    """Functional, nested, not yet built, and made in `build`."""
    x, y = data()
    model = make_model()
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    history = model.fit(x, y, batch_size=16, epochs=4, verbose=0)
    assert len(probes_in(model)) == layers
    assert keras_adafisher.coverage(model).factored_fraction == 1.0
    assert history.history["loss"][-1] < history.history["loss"][0]


def test_wrapping_twice_changes_nothing():
    model = cnn()
    keras_adafisher.wrap(model)
    before = [id(v) for v in model.trainable_variables]
    keras_adafisher.wrap(model)
    for layer in model.layers:
        keras_adafisher.wrap(layer)
    assert [id(v) for v in model.trainable_variables] == before
    assert len(probes_in(model)) == 4


def test_an_optimizer_that_comes_later_measures_at_its_first_step():
    """Where the one before it wouldn't have measured."""
    model = trained(keras_adafisher.AdaFisher(factor_update_steps=100), 2)
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=100)
    model.compile(optimizer, loss=cross_entropy())
    train(model, range(1))
    for row in keras_adafisher.coverage(model).rows:
        assert row.source == "measured"


def test_unwrapping_restores_the_model():
    x, _ = image_data()
    model = cnn()
    plain = model.predict(x, verbose=0)
    variables = [id(v) for v in model.variables]
    attributes = [set(vars(layer)) for layer in model.layers]
    saved = [set(dir(layer)) for layer in model.layers]
    keras_adafisher.wrap(model)
    assert len(probes_in(model)) == 4
    keras_adafisher.unwrap(model)
    assert [id(v) for v in model.variables] == variables
    assert [id(v) for v in model.trainable_weights] == [
        id(v) for v in model.trainable_variables
    ]
    for layer, names, all_names in zip(
        model.layers, attributes, saved, strict=True
    ):
        assert set(vars(layer)) - names <= {"_torch_params"}
        assert set(dir(layer)) - all_names <= {"_torch_params"}
        assert layer.call.__func__ is type(layer).call
    keras_adafisher.unwrap(model)
    assert_same([model.predict(x, verbose=0)], [plain])


def test_unwrapping_before_the_model_is_built():
    model = lazy()
    keras_adafisher.wrap(model)
    keras_adafisher.unwrap(model)
    model.build((None, 6))
    assert probes_in(model) == []


def test_only_what_trains_is_captured():
    x, y = data()
    model = mlp()
    model.layers[0].trainable = False
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    assert len(probes_in(model)) == 1
    frozen = weights(model.layers[0])
    model.fit(x, y, batch_size=16, verbose=0)
    assert_same(weights(model.layers[0]), frozen)

    model.layers[0].trainable = True
    model.layers[1].trainable = False
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    assert len(probes_in(model)) == 1
    frozen = weights(model.layers[1])
    model.fit(x, y, batch_size=16, verbose=0)
    assert_same(weights(model.layers[1]), frozen)
    model.optimizer.preconditioner(model.layers[0].kernel)


def test_weights_pass_between_a_wrapped_and_a_plain_model():
    wrapped, plain = cnn(), cnn()
    keras_adafisher.wrap(wrapped)
    plain.set_weights(wrapped.get_weights())
    assert_same(weights(plain), weights(wrapped))
    rng = np.random.default_rng(0)
    values = [rng.uniform(size=w.shape) for w in plain.get_weights()]
    wrapped.set_weights(values)
    plain.set_weights(values)
    assert_same(weights(plain), weights(wrapped))
    assert wrapped.count_params() == plain.count_params()


def test_config_and_signature_stay_as_they_are():
    model = mlp()
    config = model.get_config()
    keras_adafisher.wrap(model)
    assert model.get_config() == config
    assert probes_in(keras.models.clone_model(model)) == []


def test_paths_of_variables_do_not_repeat():
    """Also where layers of the same name sit in different parents."""
    inputs = keras.Input((6,))
    x = Attention(name="first")(inputs)
    x = Attention(name="second")(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    keras_adafisher.wrap(model)
    paths = [v.path for v in model.variables]
    assert len(set(paths)) == len(paths)


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="PyTorch's probes have no path"
)
@pytest.mark.parametrize("is_built", [True, False])
def test_probes_have_the_path_of_their_layer(is_built):
    layer = keras.layers.Dense(3, name="inner")
    model = keras.Sequential([layer], name="outer")
    if is_built:
        model.build((None, 6))
    keras_adafisher.wrap(model)
    model.build((None, 6))
    (probe,) = probes_in(model)
    assert layer.kernel.path == "outer/inner/kernel"
    assert probe.variable.path == "outer/inner/adafisher/probe"


def test_a_call_that_was_replaced_later_stays():
    x, y = data()
    model = mlp()
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    layer = model.layers[0]
    before, seen = layer.call, []

    def watched(*args, **kwargs):
        seen.append(args)
        return before(*args, **kwargs)

    layer.call = watched
    for optimizer in (model.optimizer, "sgd", keras_adafisher.AdaFisher()):
        model.compile(optimizer, loss=cross_entropy())
        seen.clear()
        model.train_on_batch(x, y)
        assert seen
        assert layer.call is watched
    assert "dense" not in [
        variable.path.split("/")[-2]
        for variable in model.optimizer.factored_variables
    ]


def test_a_layer_whose_call_was_replaced_is_left_alone():
    model = mlp()
    layer = model.layers[0]
    original = layer.call
    layer.call = lambda inputs: 2 * original(inputs)
    keras_adafisher.wrap(model)
    assert len(probes_in(model)) == 1
    row = keras_adafisher.coverage(model).rows[0]
    assert row.reason == f"the `call` of {layer.name} was replaced"


@pytest.mark.parametrize("function", ["wrap", "unwrap", "coverage"])
@pytest.mark.parametrize("wrong", [None, "model", keras.layers.Dense, [1]])
def test_what_is_no_layer_is_refused(function, wrong):
    with pytest.raises(
        TypeError,
        match=f"Argument `target` of `{function}` must be a `keras.Model` or "
        "a `keras.layers.Layer`. Received: target=",
    ):
        getattr(keras_adafisher, function)(wrong)


def test_layers_are_left_out_by_name():
    """Also by `compile`, until another list comes."""
    model = mlp()
    first, second = (layer.name for layer in model.layers)

    def factored():
        return [bool(r.factors) for r in keras_adafisher.coverage(model).rows]

    keras_adafisher.wrap(model, exclude_layers=[f"{first}$", "nothing"])
    assert factored() == [False, False, True, True]
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    model.train_on_batch(*data(examples=8))
    assert factored() == [False, False, True, True]
    reason = keras_adafisher.coverage(model).rows[0].reason
    assert reason == f"{first} is left out by `exclude_layers`"
    keras_adafisher.wrap(model, exclude_layers=[second])
    assert factored() == [True, True, False, False]
    keras_adafisher.wrap(model, exclude_layers=[])
    assert factored() == [True] * 4


def test_exclude_layers_must_be_a_list_of_patterns():
    for wrong in ("dense", [1], ["("]):
        with pytest.raises(ValueError, match="`exclude_layers` must be a list"):
            keras_adafisher.wrap(mlp(), exclude_layers=wrong)


@pytest.mark.parametrize("taps_second", [False, True])
def test_what_a_wrapper_does_not_tap_is_estimated(taps_second, monkeypatch):
    """That a layer runs is no answer."""

    class Wrapper(keras_adafisher.LayerWrapper):
        def make_blocks(self):
            return [
                DenseBlock(kernel, None, *kernel.shape)
                for kernel in (self.host.first, self.host.second)
            ]

    class TappingWrapper(Wrapper):
        def call(self, x):
            z = ops.matmul(x, self.host.second)
            return ops.matmul(x, self.host.first) + self.tap(z, x, 1)

    monkeypatch.setattr(registry, "_WRAPPERS", dict(registry._WRAPPERS))
    wrapper = TappingWrapper if taps_second else Wrapper
    keras_adafisher.register_wrapper(Untapped)(wrapper)
    model = keras.Sequential([keras.Input((6,)), Untapped()])
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    model.train_on_batch(x, np.ones((8, 4)))
    sources = [row.source for row in keras_adafisher.coverage(model).rows]
    second = "measured" if taps_second else "estimated"
    assert sources == ["estimated", second]


def test_where_nothing_is_measured_the_plain_layers_run(monkeypatch):
    calls = []
    original = DenseWrapper.call

    def counted(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DenseWrapper, "call", counted)
    model = mlp()
    x, y = data()
    model.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    model.train_on_batch(x, y)
    assert calls
    calls.clear()
    # The second step doesn't measure. (On TensorFlow and JAX it isn't traced.)
    model.train_on_batch(x, y)
    model.predict(x, verbose=0)
    model.evaluate(x, y, verbose=0)
    assert not calls


def test_a_class_whose_call_is_replaced(monkeypatch):
    layer = keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), layer])
    keras_adafisher.wrap(model)
    monkeypatch.setattr(keras.layers.Dense, "call", lambda self, x: 7 * x)
    np.testing.assert_array_equal(layer(np.ones((2, 4))), np.full((2, 4), 7))
