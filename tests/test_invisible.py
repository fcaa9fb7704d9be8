"""Whoever looks at variables and gradients sees the plain model.

Outside of a training step, lists of a wrapped model are those of a plain one.
Inside of one, on JAX, probes are at the end of those that are differentiated,
and weigh nothing.
"""

import warnings

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from keras.src.legacy.saving import legacy_h5_format
from models import assert_close
from models import assert_same
from models import to_numpy
from models import weights

import keras_adafisher

BACKEND = keras.backend.backend()
if BACKEND == "jax":
    import jax
elif BACKEND == "tensorflow":
    import tensorflow
else:
    import torch
HAS_PROBES_IN_LISTS = BACKEND == "jax"
LISTS = [
    "variables",
    "weights",
    "trainable_variables",
    "trainable_weights",
    "non_trainable_variables",
    "non_trainable_weights",
]


def nested():
    """A model in a model, with every kind of variable list."""
    base = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(6, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.1),
        ],
        name="base",
    )
    inputs = keras.Input((8,))
    outputs = keras.layers.Dense(1, name="head")(base(inputs))
    return keras.Model(inputs, outputs)


def data(examples=32):
    x = np.random.default_rng(0).normal(size=(examples, 8)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


def layers_of(model):
    return [model, *model.layers, *model.get_layer("base").layers]


def list_ids(model):
    return [
        [id(variable) for variable in getattr(layer, name)]
        for layer in layers_of(model)
        for name in LISTS
    ]


# Lists.


def test_lists_are_those_of_the_plain_model():
    """Of a model, of its layers and of a model inside, at any time."""
    model = nested()
    plain = list_ids(model)
    layers = [len(layer._flatten_layers()) for layer in layers_of(model)]
    for optimizer in (keras_adafisher.AdaFisher(), "adam"):
        model.compile(optimizer, loss="mse")
        assert list_ids(model) == plain
        model.fit(*data(), batch_size=8, epochs=2, verbose=0)
        model.evaluate(*data(), verbose=0)
        assert list_ids(model) == plain
        assert [
            len(layer._flatten_layers()) for layer in layers_of(model)
        ] == layers
    # 8·6 + 6, gamma and beta, 6 + 1.
    scalars = sum(np.prod(v.shape) for v in model.trainable_variables)
    assert scalars == model.count_params() - 12 == 73


class Watched(keras.Model):
    """Notes what its lists are in a training step."""

    def train_step(self, *args):
        self.seen = [
            [v.name for v in getattr(layer, name)]
            for layer in (self, self.layers[1])
            for name in ("trainable_variables", "trainable_weights", "weights")
        ]
        return super().train_step(*args)


def test_in_a_step_probes_are_behind_what_is_trained():
    inputs = keras.Input((8,))
    hidden = keras.layers.Dense(4)(inputs)
    model = Watched(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    model.train_on_batch(*data())
    probes = ["probe"] if HAS_PROBES_IN_LISTS else []
    of_model = ["kernel", "bias"] * 2
    of_layer = ["kernel", "bias"]
    # That of a part is there for its length.
    assert model.seen == [
        of_model + 2 * probes,
        of_model + 2 * probes,
        of_model,
        of_layer,
        of_layer,
        of_layer,
    ]


class Parts(keras.Model):
    """Two models in one, whose step tells their weights by their number."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.front, self.head = (
            keras.Sequential([keras.Input((8,)), *map(keras.layers.Dense, n)])
            for n in ((5, 8), (4, 1))
        )

    def call(self, inputs, training=None):
        return self.head(self.front(inputs, training=training))

    def only_head(self, gradients):
        count = len(self.front.trainable_variables)
        return [
            *(0.0 * gradient for gradient in gradients[:count]),
            *gradients[count:],
        ]

    def jax_step(self, state, y, outputs_of, change=list):
        """A step on JAX.

        Args:
            state: What `train_step` is given.
            y: Targets.
            outputs_of: Function of the weights.
            change: Function of the list of gradients.
        """
        trainable, other, optimizer, metrics = state

        def loss_of(trainable):
            return ops.mean(ops.square(outputs_of(trainable) - y))

        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        trainable, optimizer = self.optimizer.stateless_apply(
            optimizer, change(gradients), trainable
        )
        return {"mse": loss}, (trainable, other, optimizer, metrics)


class FrozenFront(Parts):
    if BACKEND == "jax":

        def train_step(self, state, batch):
            x, y, *_ = batch

            def outputs_of(weights):
                return self.stateless_call(weights, [], x, training=True)[0]

            return self.jax_step(state, y, outputs_of, self.only_head)

    elif BACKEND == "tensorflow":

        def train_step(self, batch):
            x, y, *_ = batch
            with tensorflow.GradientTape() as tape:
                loss = ops.mean(ops.square(self(x, training=True) - y))
            variables = self.trainable_variables
            gradients = tape.gradient(loss, variables)
            self.optimizer.apply(self.only_head(gradients), variables)
            return {"mse": loss}

    else:

        def train_step(self, batch):
            x, y, *_ = batch
            self.zero_grad()
            ops.mean(ops.square(self(x, training=True) - y)).backward()
            variables = self.trainable_variables
            gradients = [v.value.grad for v in variables]
            with torch.no_grad():
                self.optimizer.apply(self.only_head(gradients), variables)
            return {}


def test_a_step_may_tell_weights_by_the_lengths_of_lists():
    model = FrozenFront()
    x, y = data()
    model(x)
    model.compile(keras_adafisher.AdaFisher())
    before = model.get_weights()
    model.fit(x, y, epochs=3, verbose=0)
    is_moved = [
        np.any(old != new)
        for old, new in zip(before, model.get_weights(), strict=True)
    ]
    assert is_moved == [False] * 4 + [True] * 4
    rows = keras_adafisher.coverage(model).rows
    assert {row.source for row in rows[4:]} == {"measured"}


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="JAX and PyTorch differentiate with respect to no list",
)
@pytest.mark.parametrize("freezes", [False, True])
def test_a_step_may_differentiate_with_respect_to_several_lists(freezes):
    """Of an encoder and a decoder, for instance, trained by one optimizer."""
    parts = Parts()
    x, y = data()
    parts(x)
    models = parts.front, parts.head
    for model in models:
        keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher()
    optimizer.build([v for m in models for v in m.trainable_variables])
    parts.front.layers[0].trainable = not freezes

    @tensorflow.function
    @keras_adafisher.training_step(optimizer)
    def step():
        with tensorflow.GradientTape() as tape:
            z = parts.head(parts.front(x, training=True), training=True)
            loss = ops.mean(ops.square(z - y))
        variables = [v for m in models for v in m.trainable_variables]
        optimizer.apply(tape.gradient(loss, variables), variables)

    step()
    rows = keras_adafisher.coverage(parts).rows
    assert len(rows) == (6 if freezes else 8)
    for variable in parts.trainable_variables[::2]:
        (probe,) = keras_adafisher.probe.probes_at(variable)
        assert optimizer.records_of(probe) == (1, 0, False)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch has no steps")
def test_optimizers_of_models_that_share_a_layer_measure_it():
    """In one step: each has the answers of its own backward pass."""
    inputs = keras.Input((8,))
    trunk = keras.layers.Dense(5, name="trunk")(inputs)
    models = [keras.Model(inputs, keras.layers.Dense(n)(trunk)) for n in (3, 1)]
    optimizers = []
    for model in models:
        keras_adafisher.wrap(model)
        optimizers.append(keras_adafisher.AdaFisher())
        optimizers[-1].build(model.trainable_variables)
    x, _ = data()
    if BACKEND == "tensorflow":

        @tensorflow.function
        @keras_adafisher.training_step(*optimizers)
        def step():
            with tensorflow.GradientTape(persistent=True) as tape:
                losses = [ops.mean(ops.square(m(x))) for m in models]
            for model, loss, optimizer in zip(
                models, losses, optimizers, strict=True
            ):
                # Read more than once, as with the losses of regularizers.
                assert sum(map(len, (model.losses, model.trainable_weights)))
                gradients = tape.gradient(loss, model.trainable_variables)
                optimizer.apply(gradients, model.trainable_variables)

        step()
    else:

        @jax.jit
        @keras_adafisher.training_step(*optimizers)
        def step(states, x):
            found = []
            for model, optimizer, (weights, own) in zip(
                models, optimizers, states, strict=True
            ):

                def loss_of(weights, model=model):
                    z, _ = model.stateless_call(weights, [], x)
                    return ops.mean(ops.square(z))

                gradients = jax.grad(loss_of)(weights)
                found.append(optimizer.stateless_apply(own, gradients, weights))
            return found

        lists = [
            (model.trainable_variables, optimizer.variables)
            for model, optimizer in zip(models, optimizers, strict=True)
        ]
        found = step(
            [[[v.value for v in vs] for vs in two] for two in lists], x
        )
        for two, values in zip(lists, found, strict=True):
            for variables, new in zip(two, values, strict=True):
                for variable, value in zip(variables, new, strict=True):
                    variable.assign(value)
    kernel = models[0].get_layer("trunk").kernel
    probes = keras_adafisher.probe.probes_at(kernel)
    for optimizer in optimizers:
        records = [optimizer.records_of(probe) for probe in probes]
        assert (1, 0, False) in records


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="JAX passes one optimizer's state, PyTorch needs no step",
)
def test_optimizers_that_are_built_in_the_step():
    """With slices of one list of gradients, from its end too."""

    class Two(Parts):
        def train_step(self, batch):
            x, y, *_ = batch
            with tensorflow.GradientTape() as tape:
                loss = ops.mean(ops.square(self(x, training=True) - y))
            gradients = tape.gradient(loss, self.trainable_variables)
            first, second = (p.trainable_variables for p in self.layers)
            self.two[0].apply(gradients[: len(first)], first)
            self.two[1].apply(gradients[-len(second) :], second)
            return {"mse": loss}

    model = Two()
    x, y = data()
    model(x)
    keras_adafisher.wrap(model)
    model.two = [keras_adafisher.AdaFisher(), keras_adafisher.AdaFisherW()]
    model.compile("sgd")
    model.fit(x, y, epochs=2, verbose=0)
    rows = keras_adafisher.coverage(model).rows
    assert [row.source for row in rows] == ["measured"] * 8


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="JAX and PyTorch read no list in a step"
)
def test_what_is_frozen_later_hides_no_probe():
    model = FrozenFront()
    x, y = data()
    model(x)
    model.compile(keras_adafisher.AdaFisher())
    model.optimizer.build(model.trainable_variables)
    model.front.trainable = False
    model.only_head = lambda gradients: gradients
    model.fit(x, y, epochs=2, verbose=0)
    rows = keras_adafisher.coverage(model).rows
    assert [row.source for row in rows] == ["measured"] * 4


@pytest.mark.skipif(
    BACKEND != "jax", reason="TensorFlow and PyTorch have no stateless steps"
)
def test_a_step_may_call_parts_with_their_weights():
    """What they report isn't in the model's list. It is estimated then."""

    class CallsParts(Parts):
        def train_step(self, state, batch):
            x, y, *_ = batch
            count = len(self.front.trainable_variables)

            def outputs_of(weights):
                z, _ = self.front.stateless_call(weights[:count], [], x)
                return self.head.stateless_call(weights[count:], [], z)[0]

            return self.jax_step(state, y, outputs_of)

    model = CallsParts()
    x, y = data()
    model(x)
    model.compile(keras_adafisher.AdaFisher(1e-2))
    before = model.get_weights()
    with pytest.warns(UserWarning, match="no layer has reported anything"):
        model.fit(x, y, epochs=3, verbose=0)
    assert all(
        np.any(old != new)
        for old, new in zip(before, model.get_weights(), strict=True)
    )
    rows = keras_adafisher.coverage(model).rows
    assert {row.source for row in rows} == {"estimated"}


@pytest.mark.skipif(
    BACKEND != "jax", reason="TensorFlow and PyTorch have no stateless steps"
)
def test_a_step_may_call_the_model_with_averages_of_its_weights():
    """As a mean teacher does, or BYOL."""

    class Teacher(Parts):
        def train_step(self, state, batch):
            x, y, *_ = batch
            # As long as the plain list, and nothing else is like it.
            averages = [0.5 * w for w in state[0][:8]]
            target, _ = self.stateless_call(averages, [], x)

            def outputs_of(weights):
                return self.stateless_call(weights, [], x, training=True)[0]

            return self.jax_step(state, y + target, outputs_of)

    model = Teacher()
    x, y = data()
    model(x)
    model.compile(keras_adafisher.AdaFisher(1e-2))
    model.fit(x, y, epochs=3, verbose=0)
    rows = keras_adafisher.coverage(model).rows
    assert {row.source for row in rows} == {"measured"}


@pytest.mark.skipif(
    BACKEND != "jax", reason="TensorFlow and PyTorch have no stateless steps"
)
def test_a_step_that_measures_nothing_is_told_of():
    """Its gradients of probes are zeros: nothing else tells of it."""

    class WithScope(Parts):
        def train_step(self, state, batch):
            x, y, *_ = batch
            parts = [v for p in self.layers for v in p.trainable_variables]

            def outputs_of(weights):
                mapping = zip(parts, weights, strict=False)
                with keras.StatelessScope(mapping):
                    return self(x)

            return self.jax_step(state, y, outputs_of)

    model = WithScope()
    x, y = data()
    model(x)
    model.compile(keras_adafisher.AdaFisher())
    with pytest.warns(
        UserWarning, match="measured nothing so far for .*, which it trains"
    ):
        model.fit(x, y, epochs=12, verbose=0)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", LISTS[:4])
def test_a_target_network_follows(name, use_bias):
    """As in DQN, SAC or BYOL: pairs of equal weights, by `zip`."""

    def network():
        return keras.Sequential(
            [
                keras.Input((8,)),
                keras.layers.Dense(8, activation="relu", use_bias=use_bias),
                keras.layers.Dense(8, activation="relu", use_bias=use_bias),
                keras.layers.Dense(2, use_bias=use_bias),
            ]
        )

    model, target = network(), network()
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    model.fit(np.ones((16, 8)), np.ones((16, 2)), verbose=0)
    for _ in range(40):
        for old, new in zip(
            getattr(target, name), getattr(model, name), strict=True
        ):
            old.assign(0.5 * to_numpy(old) + 0.5 * to_numpy(new))
    assert_close(weights(target), weights(model), 1e-6)


class Encoder(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(5, activation="relu")
        self.second = keras.layers.Dense(4)

    def build(self, shape):
        self.first.build(shape)
        self.second.build((shape[0], 5))
        self.built = True

    def call(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("name", ["variables", "weights"])
def test_the_averaged_copy_of_a_layer(name):
    """A mean teacher whose encoder is a layer, not a model."""
    student, teacher = Encoder(), Encoder(trainable=False)
    inputs = keras.Input((8,))
    teacher(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(student(inputs)))
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    model.fit(*data(), verbose=0)
    pairs = zip(getattr(teacher, name), getattr(student, name), strict=True)
    for old, new in pairs:
        old.assign(new)
    assert_same(teacher.get_weights(), student.get_weights())


def test_an_averaged_copy_inside_of_a_training_step():
    """`variables` and `weights` are plain ones there too."""
    student, teacher = Encoder(), Encoder(trainable=False)

    class Model(keras.Model):
        def train_step(self, *args):
            for name in ("variables", "weights"):
                names = [
                    [v.name for v in getattr(layer, name)]
                    for layer in (student, teacher)
                ]
                assert names[0] == names[1]
            return super().train_step(*args)

    inputs = keras.Input((8,))
    teacher(inputs)
    model = Model(inputs, keras.layers.Dense(1)(student(inputs)))
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    model.train_on_batch(*data())


@pytest.mark.parametrize("optimizers", [("adam", "adafisher"), ("adafisher",)])
def test_models_that_share_a_layer_train_on(optimizers):
    """One with Adam, also when the other gets an AdaFisher, or loses it."""
    x, y = data(60)
    inputs = keras.Input((8,))
    shared = keras.layers.Dense(6)(inputs)
    first, second = (
        keras.Model(inputs, keras.layers.Dense(1)(shared)) for _ in range(2)
    )
    second.compile("adam", "mse")
    second.fit(x[:48], y[:48], batch_size=16, verbose=0)
    for optimizer in [*optimizers, "sgd"]:
        first.compile(optimizer, "mse")
        first.fit(x, y, verbose=0)
        # A batch of another size is traced anew.
        second.fit(x, y, batch_size=20, verbose=0)
        second.fit(x[:48], y[:48], batch_size=16, verbose=0)


# Files.


def test_files_go_both_ways(tmp_path):
    model, plain = nested(), nested()
    model.compile(keras_adafisher.AdaFisher(), keras.losses.MeanSquaredError())
    model.fit(*data(), verbose=0)
    x, _ = data()
    for name in ("model.keras", "model.h5"):
        model.save(tmp_path / name)
        loaded = keras.models.load_model(tmp_path / name, compile=False)
        assert_same(weights(loaded), weights(model))
    model.save_weights(tmp_path / "model.weights.h5")
    plain.load_weights(tmp_path / "model.weights.h5")
    assert_same(weights(plain), weights(model))

    fresh = nested()
    with h5py.File(tmp_path / "legacy.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, fresh)
    fresh.save_weights(tmp_path / "fresh.weights.h5")
    for name in ("legacy.h5", "fresh.weights.h5"):
        with warnings.catch_warnings():
            # Of Keras: there is no state of an optimizer in them.
            warnings.simplefilter("ignore")
            model.load_weights(tmp_path / name)
        assert_same(weights(model), weights(fresh))
    np.testing.assert_allclose(
        model.predict(x, verbose=0), fresh.predict(x, verbose=0), rtol=1e-6
    )


# Gradients.


class ByHand(keras.Model):
    """A `train_step` of one's own that changes the list of gradients."""

    change = None

    def changed(self, gradients):
        gradients = [ops.convert_to_tensor(g) for g in gradients]
        return type(self).change(gradients, self.trainable_variables)

    if BACKEND == "tensorflow":

        def train_step(self, data):
            import tensorflow as tf

            x, y, *_ = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            variables = self.trainable_variables
            gradients = self.changed(tape.gradient(loss, variables))
            self.optimizer.apply(gradients, variables)
            return {"loss": loss}

    elif BACKEND == "jax":

        def train_step(self, state, data):
            import jax

            trainable, other, optimizer, metrics = state
            x, y, *_ = data

            def loss_of(trainable):
                z, _ = self.stateless_call(trainable, other, x, training=True)
                return self.compute_loss(x, y, z)

            loss, gradients = jax.value_and_grad(loss_of)(trainable)
            trainable, optimizer = self.optimizer.stateless_apply(
                optimizer, self.changed(gradients), trainable
            )
            return {"loss": loss}, (trainable, other, optimizer, metrics)

    else:

        def train_step(self, data):
            import torch

            x, y, *_ = data
            loss = self.compute_loss(x, y, self(x, training=True))
            self.zero_grad()
            loss.backward()
            variables = self.trainable_weights
            gradients = self.changed([v.value.grad for v in variables])
            with torch.no_grad():
                self.optimizer.apply(gradients, variables)
            return {"loss": loss}


def trained_by_hand(change, optimizer, scale=100.0, steps=13):
    """Weights and Fisher diagonals after steps on inputs of some scale."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    hidden = keras.layers.Dense(6, activation="tanh")(inputs)
    cls = type("Changed", (ByHand,), {"change": staticmethod(change)})
    model = cls(inputs, keras.layers.Dense(1)(hidden))
    model.compile(optimizer, loss="mse")
    x, y = data()
    for _ in range(steps):
        model.train_on_batch(scale * x, 10 * y)
    fishers = [to_numpy(optimizer.preconditioner(v)) for v in model.weights]
    return weights(model), fishers


def norm_of(tensors):
    return ops.sqrt(sum(ops.sum(ops.square(t)) for t in tensors))


def clipped_by_global_norm(gradients, variables):
    scale = ops.minimum(1.0, 1.0 / norm_of(gradients))
    return [g * scale for g in gradients]


def test_clipping_by_the_global_norm_by_hand():
    """Is what `global_clipnorm` does: no step sees another norm."""
    by_hand = trained_by_hand(
        clipped_by_global_norm, keras_adafisher.AdaFisher(1e-3)
    )
    built_in = trained_by_hand(
        lambda gradients, variables: gradients,
        keras_adafisher.AdaFisher(1e-3, global_clipnorm=1.0),
    )
    for actual, expected in zip(by_hand, built_in, strict=True):
        assert_close(actual, expected, 1e-5)


def unchanged(gradients, variables):
    return gradients


CHANGES = {
    "by value": lambda gs, vs: [ops.clip(g, -1e4, 1e4) for g in gs],
    "by each norm": lambda gs, vs: [
        g * ops.minimum(1.0, 1e6 / (norm_of([g]) + 1e-12)) for g in gs
    ],
    # As keras.io does it: of kernels.
    "centralized": lambda gs, vs: [
        g
        if len(g.shape) < 2
        else g - 0.0 * ops.mean(g, axis=tuple(range(len(g.shape) - 1)))
        for g in gs
    ],
    "decayed": lambda gs, vs: [
        g + 0.0 * ops.convert_to_tensor(v) for g, v in zip(gs, vs, strict=True)
    ],
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_that_change_nothing(name):
    """Thresholds that no gradient reaches, and so on: bit by bit."""
    actual = trained_by_hand(CHANGES[name], keras_adafisher.AdaFisher(1e-3))
    expected = trained_by_hand(unchanged, keras_adafisher.AdaFisher(1e-3))
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-6)


def test_gradients_of_norm_one_keep_the_factors():
    """A factor on all that a probe reports cancels out."""
    _, actual = trained_by_hand(
        lambda gs, vs: [g / (norm_of([g]) + 1e-30) for g in gs],
        keras_adafisher.AdaFisher(0.0),
    )
    _, expected = trained_by_hand(unchanged, keras_adafisher.AdaFisher(0.0))
    assert_close(actual, expected, 1e-5)


def test_norms_and_penalties_over_lists_see_the_weights_only():
    seen = []

    def note(gradients, variables):
        count = 4
        norms = [
            norm_of(gradients),
            norm_of(gradients[:count]),
            norm_of(map(ops.convert_to_tensor, variables)),
            norm_of(map(ops.convert_to_tensor, variables[:count])),
        ]
        # In a trace, there are no numbers yet: what differs shows in a ratio.
        ratio = ops.stack([norms[0] / norms[1], norms[2] / norms[3]])
        seen.append(ops.max(ops.abs(ratio - 1)))
        return [g * (1 + 1e3 * seen[-1]) for g in gradients]

    actual, _ = trained_by_hand(note, keras_adafisher.AdaFisher(1e-3))
    expected, _ = trained_by_hand(unchanged, keras_adafisher.AdaFisher(1e-3))
    assert_close(actual, expected, 1e-3)


class Centralized(keras_adafisher.AdaFisher):
    """As keras.io's example of gradient centralization, and on all tensors."""

    def __init__(self, everywhere=False, **kwargs):
        super().__init__(**kwargs)
        self.everywhere = everywhere

    def apply(self, grads, trainable_variables=None):
        smallest = 1 if self.everywhere else 2
        grads = [
            g
            if g is None or len(g.shape) < smallest
            else g
            - ops.mean(
                g, axis=tuple(range(max(len(g.shape) - 1, 1))), keepdims=True
            )
            for g in grads
        ]
        super().apply(grads, trainable_variables)


@pytest.mark.skipif(
    not HAS_PROBES_IN_LISTS,
    reason="TensorFlow and PyTorch: no list has a probe",
)
def test_what_cannot_be_a_mean_square_is_dropped():
    """With one warning, at the end of `fit`. The factors stay at 1."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(2)]
    )
    x, y = data()
    optimizer = Centralized(everywhere=True)
    model.compile(optimizer, loss="mse")
    with pytest.warns(UserWarning, match="dropped most of what it measured"):
        model.fit(x, y, epochs=12, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(x, y, verbose=0)
    for layer in model.layers:
        fisher = to_numpy(optimizer.preconditioner(layer.kernel))
        np.testing.assert_array_equal(fisher, np.full(fisher.shape, 2.0))
    assert "nothing so far" in str(keras_adafisher.coverage(model))


def test_losses_that_are_not_finite():
    """All measurements are dropped, and `fit` says so at its end."""
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    x, y = data()
    model.compile(keras_adafisher.AdaFisher(0.0), loss="mse")
    cause = "the loss isn't finite" if HAS_PROBES_IN_LISTS else "The loss may"
    with pytest.warns(UserWarning, match=cause):
        model.fit(np.inf * x, y, verbose=0)


def test_centralized_gradients_of_kernels():
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(1)]
    )
    x, y = data()
    optimizer = Centralized()
    model.compile(optimizer, loss="mse")
    loss = model.fit(100 * x, y, epochs=12, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    for row in keras_adafisher.coverage(model).rows:
        assert row.source == "measured"
    for layer in model.layers:
        fisher = to_numpy(optimizer.preconditioner(layer.kernel))
        assert np.all(fisher >= 1)
        assert np.any(fisher != 2)


# Lost answers.


class Reads(keras.layers.Layer):
    """Calls a layer in evaluation, and reads its weights in training."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x, training=False):
        if training:
            return ops.matmul(x, self.dense.kernel) + self.dense.bias
        return self.dense(x)


class Vectorized(keras.layers.Layer):
    """Calls a layer for each example."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def build(self, shape):
        self.dense.build((None, shape[-1]))

    def call(self, x):
        return ops.vectorized_map(self.dense, x)


def fisher_and_source(layer, kernel, x, evaluate_first=False):
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=1)
    model.compile(optimizer, loss="mse")
    y = np.random.default_rng(1).normal(size=(*x.shape[:-1], 4))
    if evaluate_first:
        model.evaluate(x, y, verbose=0)
    for _ in range(3):
        model.train_on_batch(x, y.astype("float32"))
    rows = keras_adafisher.coverage(model).rows
    return to_numpy(optimizer.preconditioner(kernel())), rows[0]


@pytest.mark.parametrize("evaluate_first", [False, True])
def test_a_layer_that_is_read_in_training_is_estimated(evaluate_first, rng):
    x = rng.normal(size=(16, 4)).astype("float32") * [1, 2, 3, 4]
    layer = Reads()
    with pytest.warns(UserWarning, match="no layer has reported anything"):
        fisher, row = fisher_and_source(
            layer, lambda: layer.dense.kernel, x, evaluate_first
        )
    assert fisher.max() > 1.2 * fisher.min()
    assert row.source == "estimated"
    assert "estimated from the gradient" in row.factors


def test_a_layer_in_a_vectorized_map_has_factors(rng):
    """TensorFlow drops the tap's gradient there: it is estimated."""
    x = rng.normal(size=(16, 3, 4)).astype("float32") * [1, 2, 3, 4]
    layer = Vectorized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fisher, row = fisher_and_source(layer, lambda: layer.dense.kernel, x)
    assert fisher.max() > 1.2 * fisher.min()
    assert row.source == {"tensorflow": "estimated"}.get(BACKEND, row.source)
    assert row.source in ("measured", "estimated")


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="JAX and PyTorch trace no lengths that are unknown",
)
def test_time_distributed_over_varying_lengths(rng):
    import tensorflow as tf

    lengths = rng.integers(3, 9, 32)
    sequences = [
        rng.normal(size=(n, 4)).astype("float32") * [1, 2, 3, 4]
        for n in lengths
    ]
    batches = tf.data.Dataset.from_generator(
        lambda: ((s, s.sum(-1, keepdims=True)) for s in sequences),
        output_signature=(
            tf.TensorSpec((None, 4)),
            tf.TensorSpec((None, 1)),
        ),
    ).padded_batch(8)
    inputs = keras.Input((None, 4))
    dense = keras.layers.Dense(6, activation="relu")
    hidden = keras.layers.TimeDistributed(dense)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    model.fit(batches, epochs=2, verbose=0)
    fisher = to_numpy(model.optimizer.preconditioner(dense.kernel))
    assert fisher.max() > 1.2 * fisher.min()


class Filtered(ByHand):
    """Picks its variables by name."""

    if BACKEND == "tensorflow":

        def train_step(self, data):
            import tensorflow as tf

            x, y, *_ = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            variables = [
                v
                for v in self.trainable_variables
                if v.name in ("kernel", "bias")
            ]
            gradients = tape.gradient(loss, variables)
            self.optimizer.apply_gradients(
                zip(gradients, variables, strict=True)
            )
            return {"loss": loss}


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="JAX and PyTorch differentiate what the list leaves out too",
)
def test_a_filtered_list_of_variables():
    inputs = keras.Input((8,))
    layer = keras.layers.Dense(4)
    model = Filtered(inputs, layer(inputs))
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    x, y = data()
    model.fit(x * np.arange(1, 9), y, epochs=2, verbose=0)
    fisher = to_numpy(model.optimizer.preconditioner(layer.kernel))
    assert fisher.max() > 1.2 * fisher.min()
    assert keras_adafisher.coverage(model).rows[0].source == "measured"


def test_float8_after_training():
    x = np.random.default_rng(0).uniform(size=(32, 16)).astype("float32")
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16)])
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    model.fit(x, x, verbose=0)
    assert keras_adafisher.coverage(model).rows[0].source == "measured"
    with warnings.catch_warnings():
        # Of Keras, about the input layer.
        warnings.simplefilter("ignore")
        model.quantize("float8")
    optimizer = keras_adafisher.AdaFisher(factor_update_steps=1)
    model.compile(optimizer, loss="mse")
    assert keras_adafisher.coverage(model).rows[0].source == "not yet"
    model.fit(x, x, epochs=3, verbose=0)
    fisher = to_numpy(optimizer.preconditioner(model.layers[0].kernel))
    assert fisher.max() > 1.2 * fisher.min()
    assert keras_adafisher.coverage(model).rows[0].source == "estimated"


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch needs no decorator")
def test_a_custom_loop_without_the_decorator_says_so(rng):
    x = rng.normal(size=(16, 8)).astype("float32") * np.arange(1, 9)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    keras_adafisher.wrap(model)
    optimizer = keras_adafisher.AdaFisher()
    optimizer.build(model.trainable_variables)
    variables = model.trainable_variables
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = ops.mean(model(x, training=True) ** 2)
        gradients = tape.gradient(loss, variables)
        with pytest.warns(UserWarning, match="training_step"):
            optimizer.apply(gradients, variables)
    else:
        import jax

        def loss_of(values):
            return ops.mean(model.stateless_call(values, [], x)[0] ** 2)

        values = [v.value for v in variables]
        state = [v.value for v in optimizer.variables]
        with pytest.warns(UserWarning, match="training_step"):
            values, state = optimizer.stateless_apply(
                state, jax.grad(loss_of)(values), values
            )
        for variable, value in zip(optimizer.variables, state, strict=True):
            variable.assign(value)
        assert len(values) == 2
    # Estimated, and so not 2 for all.
    fisher = to_numpy(optimizer.preconditioner(model.layers[0].kernel))
    assert fisher.max() > 1.2 * fisher.min()


# Autodiff.


def trained_model(steps=10):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(6, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras_adafisher.AdaFisher(), loss="mse")
    x = np.random.default_rng(0).uniform(size=(16, 3)).astype("float32")
    for _ in range(steps):
        model.train_on_batch(x, x.sum(1, keepdims=True))
    return model, ops.convert_to_tensor(x)


@pytest.mark.skipif(
    BACKEND == "tensorflow", reason="Keras has no `jvp` for TensorFlow"
)
def test_forward_mode_of_a_trained_model():
    """Also where the next step is to measure."""
    for steps in (0, 3, 10):
        model, x = trained_model(steps)
        _, tangent = ops.jvp(model, (x,), (ops.ones_like(x),))
        step = 1e-2
        difference = (model(x + step) - model(x - step)) / (2 * step)
        np.testing.assert_allclose(
            to_numpy(tangent), to_numpy(difference), atol=1e-3
        )


@pytest.mark.parametrize("steps", [0, 10])
def test_vectorized_maps_of_a_trained_model(steps):
    model, x = trained_model(steps)
    each = ops.vectorized_map(lambda row: model(row[None])[0], x)
    np.testing.assert_allclose(to_numpy(each), to_numpy(model(x)), rtol=1e-5)


@pytest.mark.skipif(
    BACKEND != "jax", reason="TensorFlow and PyTorch have no `jax.linearize`"
)
@pytest.mark.parametrize("transform", ["jacfwd", "jacrev", "linearize"])
def test_transformations_of_jax(transform):
    import jax

    model, x = trained_model()
    if transform == "linearize":
        _, linear = jax.linearize(model, x)
        assert linear(x).shape == (16, 1)
    else:
        assert getattr(jax, transform)(model)(x).shape == (16, 1, 16, 3)


@pytest.mark.skipif(
    BACKEND != "jax", reason="TensorFlow and PyTorch have no `jax.jvp`"
)
@pytest.mark.parametrize("steps", [3, 10])
def test_forward_mode_in_a_training_step(steps):
    """Measures nothing, and fails at no step."""
    import jax

    model, x = trained_model(steps)

    @jax.jit
    @keras_adafisher.training_step(model.optimizer)
    def step(trainable, optimizer_variables):
        def loss_of(values):
            return ops.sum(model.stateless_call(values, [], x)[0])

        return jax.jvp(loss_of, (trainable,), (trainable,))[1]

    values = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.optimizer.variables]
    tangent = float(step(values, state))
    size = 1e-2
    losses = [
        float(
            ops.sum(
                model.stateless_call([(1 + e) * v for v in values], [], x)[0]
            )
        )
        for e in (size, -size)
    ]
    difference = (losses[0] - losses[1]) / (2 * size)
    np.testing.assert_allclose(tangent, difference, rtol=1e-2)


@pytest.mark.skipif(
    BACKEND != "jax", reason="TensorFlow and PyTorch have no `jax.linearize`"
)
def test_products_with_the_hessian_in_a_training_step():
    """Forward over reverse mode: the tap is differentiated once more."""
    import jax

    model, x = trained_model()

    @jax.jit
    @keras_adafisher.training_step(model.optimizer)
    def step(trainable, optimizer_variables):
        gradient = jax.grad(
            lambda values: ops.sum(model.stateless_call(values, [], x)[0] ** 2)
        )
        return jax.jvp(gradient, (trainable,), (trainable,))[1]

    values = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.optimizer.variables]
    product = step(values, state)
    assert [p.shape for p in product] == [v.shape for v in values]


# Sparse inputs.


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="JAX and PyTorch have no `tf.SparseTensor`"
)
def test_a_sparse_input_is_made_dense_where_it_is_measured_only():
    import tensorflow as tf

    layer = keras.layers.Dense(2)
    layer.build((None, 50))
    keras_adafisher.wrap(layer)
    optimizer = keras_adafisher.AdaFisher()
    optimizer.build(layer.trainable_variables)

    @tf.function(input_signature=[tf.SparseTensorSpec((4, 50), tf.float32)])
    @keras_adafisher.training_step(optimizer)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x))
        variables = layer.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)

    graph = step.get_concrete_function().graph
    names = {operation.type for operation in graph.get_operations()}
    assert "SparseToDense" not in names
    inside = {
        operation.type
        for function in graph.as_graph_def().library.function
        for operation in [
            type("Node", (), {"type": node.op}) for node in function.node_def
        ]
    }
    assert "SparseToDense" in inside
