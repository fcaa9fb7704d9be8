"""Properties that hold for random layers, models and optimizer settings.

The cases are always the same ones, 100 on each backend, but 50 on JAX:
`ADAFISHER_CASES=300` draws more, and `make test-long` 6000. Nothing is compiled
as a whole, so a case is cheap; sizes come from few values, since JAX compiles
each operation once for each shape.
"""

import contextlib
import dataclasses
import os

import keras
import numpy as np
import reference
from hypothesis import given
from hypothesis import HealthCheck
from hypothesis import Phase
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops
from models import assert_same
from models import probes_in
from models import to_numpy

import keras_adafisher
from keras_adafisher.probe import probe_of
from keras_adafisher.steps import Step

BACKEND = keras.backend.backend()
CASES = int(
    os.environ.get("ADAFISHER_CASES", "30" if BACKEND == "jax" else "100")
)


def cases(percent):
    return settings(
        max_examples=max(CASES * percent // 100, 1),
        derandomize=True,
        deadline=None,
        database=None,
        # Shrinking takes long. The case that is printed is small anyway.
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


def eagerly():
    if BACKEND != "jax":
        return contextlib.nullcontext()
    import jax

    # A `cond` would be compiled anew for each case.
    return jax.disable_jit()


def run(model, x, y, training=True):
    """Outputs, and the gradients of `mean(y * outputs)`.

    Args:
        model: `keras.Model` or `keras.layers.Layer`.
        x: Array.
        y: Array like the outputs, or `None` for `ones`.

    Returns:
        Array, and list of tensors, one for each of `trainable_variables`.
    """
    x = ops.convert_to_tensor(x)

    def loss_of(z):
        return ops.mean(z if y is None else ops.multiply(z, y))

    arguments = {"training": training} if _takes_training(model) else {}
    if BACKEND == "jax":
        import jax

        def loss(values):
            z, _ = model.stateless_call(
                values,
                [v.value for v in model.non_trainable_variables],
                x,
                **arguments,
            )
            return loss_of(z), z

        values = [v.value for v in model.trainable_variables]
        gradients, z = jax.grad(loss, has_aux=True)(values)
        return to_numpy(z), gradients
    if BACKEND == "tensorflow":
        import tensorflow as tf

        variables = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            z = model(x, **arguments)
            loss = loss_of(z)
        gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
        return to_numpy(z), list(map(tf.convert_to_tensor, gradients))
    variables = [v.value for v in model.trainable_variables]
    for value in variables:
        value.grad = None
    z = model(x, **arguments)
    loss_of(z).backward()
    return to_numpy(z), [v.grad for v in variables]


def _takes_training(model):
    return isinstance(model, keras.Model | keras.layers.BatchNormalization)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Settings of an optimizer."""

    cls: type
    learning_rate: float
    beta: float
    damping: float
    gamma_1: float
    gamma_2: float
    factor_update_steps: int
    epsilon: float
    normalization: str
    nesterov: bool
    rms_decay: float | None
    weight_decay: float
    clip: tuple

    def make(self):
        arguments = dataclasses.asdict(self)
        cls = arguments.pop("cls")
        clip = dict([arguments.pop("clip")])
        return cls(**arguments, **clip)


RULES = st.builds(
    Rule,
    cls=st.sampled_from(
        [keras_adafisher.AdaFisher, keras_adafisher.AdaFisherW]
    ),
    learning_rate=st.sampled_from([0.0, 1e-4, 1e-2]),
    beta=st.sampled_from([0.0, 0.5, 0.9]),
    damping=st.sampled_from([1e-4, 1e-2, 1.0]),
    gamma_1=st.sampled_from([0.0, 0.1, 0.92]),
    gamma_2=st.sampled_from([0.0, 0.008, 0.9]),
    factor_update_steps=st.sampled_from([1, 2, 3]),
    epsilon=st.sampled_from([0.0, 1e-6, 0.1]),
    normalization=st.sampled_from(["mean", "min_max"]),
    nesterov=st.booleans(),
    rms_decay=st.sampled_from([None, 0.0, 0.99]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    clip=st.sampled_from(
        [("clipnorm", None), ("clipnorm", 0.5), ("global_clipnorm", 0.1)]
    ),
)


# One layer: its factors are those of the definition.


@dataclasses.dataclass(frozen=True)
class Case:
    """A linear layer and the shape of its input, without the batch."""

    cls: type
    arguments: tuple
    shape: tuple

    def make(self):
        keras.utils.set_random_seed(1)
        return self.cls(**dict(self.arguments))

    def input(self, rng):
        shape = (3, *self.shape)
        if self.cls is keras.layers.Embedding:
            return rng.integers(0, 5, size=shape).astype("int32")
        # Not centered, so that factors differ.
        return rng.normal(0.3, 1.0, size=shape).astype("float32")


def some(few, more):
    """What an argument is drawn from, and what else in the longer form."""
    return few if CASES <= 300 else [*few, *more]


def drawn(cls, shape, **arguments):
    """A strategy for a `Case`. A list is what an argument is drawn from."""
    choices = {
        name: st.sampled_from(values) for name, values in arguments.items()
    }
    return st.builds(
        lambda shape, chosen: Case(cls, tuple(chosen.items()), shape),
        st.sampled_from(shape),
        st.fixed_dictionaries(choices),
    )


BIAS = [True, False]
DENSE = drawn(
    keras.layers.Dense,
    some([(3,), (2, 3)], [(1,), (2, 2, 3)]),
    units=some([2, 3], [1, 4]),
    use_bias=BIAS,
)
CONV_1D = drawn(
    keras.layers.Conv1D,
    some([(6, 2)], [(5, 2), (7, 1)]),
    filters=some([2], [1, 3]),
    kernel_size=some([2, 3], [1, 4]),
    strides=some([1, 2], [3]),
    padding=["valid", "same", "causal"],
    use_bias=BIAS,
)
CONV_1D_DILATED = drawn(
    keras.layers.Conv1D,
    some([(6, 2)], [(7, 2)]),
    filters=[2],
    kernel_size=some([2], [3]),
    dilation_rate=some([2], [3]),
    padding=["valid", "same", "causal"],
    use_bias=BIAS,
)
CONV_2D = drawn(
    keras.layers.Conv2D,
    some([(4, 5, 2)], [(5, 5, 4)]),
    filters=some([2], [4]),
    kernel_size=some([(2, 3)], [1, 3, (3, 1)]),
    strides=[1, 2],
    padding=["valid", "same"],
    groups=[1, 2],
    use_bias=BIAS,
)
NORMALIZATION = st.one_of(
    drawn(
        keras.layers.LayerNormalization,
        some([(2, 3)], [(3,), (4,)]),
        center=[True, False],
        scale=[True],
    ),
    drawn(
        keras.layers.BatchNormalization,
        some([(3,)], [(2, 3)]),
        center=[True],
        scale=[True, False],
    ),
)
EMBEDDING = drawn(
    keras.layers.Embedding,
    some([(4,)], [(2,)]),
    input_dim=[5],
    output_dim=some([3], [1]),
)
LAYERS = st.one_of(
    DENSE, CONV_1D, CONV_1D_DILATED, CONV_2D, NORMALIZATION, EMBEDDING
)


def measurements(layer, x, s):
    """`H`, the entry 1 and `S` of a layer by their definitions.

    Returns:
        `H` with one entry per weight of an output, in groups: an array of
        shape `(groups, inputs)`; `S`, by outputs; whether the 1 takes part in
        the normalization of `H`; and the number that `epsilon` is multiplied
        by.
    """
    s = np.mean(np.square(reference.rows(s)), axis=0)
    if isinstance(layer, keras.layers.Embedding):
        rows = np.eye(layer.input_dim)[x.ravel()]
        return np.mean(rows**2, axis=0)[None], s, True, 1
    if hasattr(layer, "kernel_size"):
        patches = reference.patches(
            x,
            layer.kernel_size,
            layer.strides,
            layer.dilation_rate,
            layer.padding,
        )
        h = np.mean(np.square(patches), axis=0)
        groups = np.stack(np.split(h, layer.groups, axis=-1))
        groups = groups.reshape(layer.groups, -1)
        return groups, s, True, groups.shape[1]
    h = np.mean(np.square(reference.rows(x)), axis=0)
    return h[None], s, isinstance(layer, keras.layers.Dense), 1


def expected_fisher(layer, rule, x, s):
    """Fisher diagonals of the weight and of the bias after one step."""
    h, s, normalizes_bias_input, scale = measurements(layer, x, s)
    has_bias = parts(layer)[1] is not None
    if rule.normalization == "mean":
        normalized, normalizes_bias_input = reference.mean_scaled, False
    else:
        normalized = reference.min_max
    entries = h.ravel()
    if has_bias and normalizes_bias_input:
        entries = np.append(entries, 1.0)

    def running(value):
        return (1 - rule.gamma_1) + rule.gamma_2 * value

    entries = running(normalized(entries, rule.epsilon * scale))
    one = entries[-1] if has_bias and normalizes_bias_input else running(1.0)
    h = entries[: h.size].reshape(h.shape)
    s = running(normalized(s, rule.epsilon))
    if hasattr(layer, "gamma"):
        weight = h[0] * s
    else:
        # An output reads the inputs of its group.
        per_group = s.size // h.shape[0]
        weight = np.stack([h[o // per_group] * s[o] for o in range(s.size)], -1)
    return weight + rule.damping, one * s + rule.damping


def parts(layer):
    """A layer's weight and bias."""
    if hasattr(layer, "gamma"):
        return layer.gamma, layer.beta
    if hasattr(layer, "embeddings"):
        return layer.embeddings, None
    return layer.kernel, layer.bias


def gradients_of_parameters(layer, gradients):
    """Those that aren't a probe's, as arrays."""
    return [
        to_numpy(gradient)
        for variable, gradient in zip(
            layer.trainable_variables, gradients, strict=True
        )
        if probe_of(variable) is None
    ]


def assert_close_to_each_other(actual, expected, rtol=1e-5, atol=1e-6):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@given(LAYERS, RULES, st.integers(0, 9))
@cases(75)
def test_a_layer_measures_its_definition(case, rule, seed):
    rng = np.random.default_rng(seed)
    layer = case.make()
    x = case.input(rng)
    if case.cls is keras.layers.Conv2D and BACKEND == "tensorflow":
        # TensorFlow has no gradient of these on the CPU.
        arguments = dict(case.arguments)
        if arguments["groups"] > 1:
            case = dataclasses.replace(
                case, arguments=tuple({**arguments, "groups": 1}.items())
            )
            layer = case.make()
    with eagerly():
        plain = to_numpy(layer(x))
        y = rng.normal(size=plain.shape).astype("float32")
        z, gradients = run(layer, x, y)
        before = [to_numpy(v).copy() for v in layer.trainable_weights]
        attributes = set(vars(layer))
        keras_adafisher.wrap(layer)
        assert len(probes_in(layer)) == 1

        optimizer = rule.make()
        optimizer.build(layer.trainable_variables)
        with Step([optimizer]):
            wrapped_z, wrapped_gradients = run(layer, x, y)
            np.testing.assert_array_equal(wrapped_z, z)
            assert_close_to_each_other(
                gradients_of_parameters(layer, wrapped_gradients),
                [to_numpy(g) for g in gradients],
            )
            optimizer.apply(wrapped_gradients, layer.trainable_variables)
    s = y.astype("float64") / y.size
    expected = expected_fisher(layer, rule, x, s)
    for parameter, fisher in zip(parts(layer), expected, strict=True):
        if parameter is None:
            continue
        actual = to_numpy(optimizer.preconditioner(parameter))
        assert actual.shape == tuple(parameter.shape)
        assert np.all(actual >= np.float32(rule.damping))
        fisher = fisher.reshape(parameter.shape)
        np.testing.assert_allclose(actual, fisher, rtol=2e-5, atol=1e-7)

    keras_adafisher.unwrap(layer)
    assert set(vars(layer)) == attributes
    assert not probes_in(layer)
    if rule.learning_rate == 0:
        assert_same([to_numpy(v) for v in layer.trainable_weights], before)


# Whole models.

WIDTH = 3


def dense(activation, use_bias):
    return keras.layers.Dense(WIDTH, activation=activation, use_bias=use_bias)


def conv(activation, padding, strides):
    return keras.layers.Conv1D(
        WIDTH, 2, strides=strides, padding=padding, activation=activation
    )


ACTIVATIONS = st.sampled_from([None, "relu", "tanh", "softmax"])
# All map `(batch, positions, WIDTH)` to such a tensor.
MODEL_LAYERS = st.one_of(
    st.tuples(st.just(dense), ACTIVATIONS, st.booleans()),
    st.tuples(
        st.just(conv),
        ACTIVATIONS,
        st.sampled_from(["same", "causal"]),
        st.sampled_from([1, 2]),
    ),
    st.tuples(st.just(keras.layers.LayerNormalization)),
    st.tuples(st.just(keras.layers.BatchNormalization)),
    st.tuples(st.just(keras.layers.RMSNormalization)),
    st.tuples(
        st.just(keras.layers.DepthwiseConv1D),
        st.just(2),
        st.just(1),
        st.just("same"),
    ),
    st.tuples(
        st.just(lambda: keras.layers.SeparableConv1D(WIDTH, 2, padding="same"))
    ),
    st.tuples(
        st.just(
            lambda: keras.layers.EinsumDense(
                "abc,cd->abd", (None, WIDTH), bias_axes="d"
            )
        )
    ),
    st.tuples(
        st.just(lambda: keras.layers.Conv1DTranspose(WIDTH, 2, padding="same"))
    ),
    # Not measured: estimated, or by AdamW's rule.
    st.tuples(
        st.just(lambda: keras.layers.SimpleRNN(WIDTH, return_sequences=True))
    ),
    st.tuples(st.just(keras.layers.PReLU)),
    st.tuples(st.just(keras.layers.Activation), st.just("gelu")),
)
FORMS = ["plain", "residual", "shared", "nested", "subclassed"]
# Dtype policies, and what gradients are rounded to.
DTYPES = {
    "float32": {},
    "mixed_bfloat16": {"rtol": 2e-2, "atol": 1e-3},
    "mixed_float16": {"rtol": 2e-3, "atol": 1e-4},
}


class Subclassed(keras.Model):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def call(self, x, training=False):
        for part in self.parts:
            has_modes = isinstance(part, keras.layers.BatchNormalization)
            x = part(x, training=training) if has_modes else part(x)
        return x


def build_model(recipe, form):
    keras.utils.set_random_seed(1)
    layers = [make(*arguments) for make, *arguments in recipe]
    head = keras.layers.Dense(2)
    if form == "subclassed":
        model = Subclassed([*layers, head])
        model(np.zeros((1, 4, WIDTH), "float32"))
        return model
    if form == "nested":
        inner = keras.Sequential([keras.Input((4, WIDTH)), *layers])
        return keras.Sequential([keras.Input((4, WIDTH)), inner, head])
    inputs = x = keras.Input((4, WIDTH))
    for layer in layers:
        z = layer(x)
        is_same = z.shape == x.shape
        if form == "residual" and is_same:
            z = z + x
        if form == "shared" and is_same:
            z = layer(z)
        x = z
    return keras.Model(inputs, head(x))


@given(
    st.lists(MODEL_LAYERS, min_size=1, max_size=3),
    st.sampled_from(FORMS),
    st.sampled_from(list(DTYPES)),
    RULES,
    st.integers(0, 9),
)
@cases(25)
def test_a_model(recipe, form, dtype, rule, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(0.3, 1.0, size=(3, 4, WIDTH)).astype("float32")
    keras.config.set_dtype_policy(dtype)
    try:
        check_a_model(recipe, form, DTYPES[dtype], rule, rng, x)
    finally:
        keras.config.set_dtype_policy("float32")


def check_a_model(recipe, form, tolerance, rule, rng, x):
    model = build_model(recipe, form)
    with eagerly():
        start = [np.array(w) for w in model.get_weights()]
        plain = to_numpy(model(x, training=False))
        y = rng.normal(size=plain.shape).astype("float32")
        z, gradients = run(model, x, y)
        model.set_weights(start)
        keras_adafisher.wrap(model)
        assert_same(
            [to_numpy(model(x, training=False))],
            [plain],
        )
        optimizer = rule.make()
        optimizer.build(model.trainable_variables)
        with Step([optimizer]):
            wrapped_z, wrapped_gradients = run(model, x, y)
            assert_same([wrapped_z], [z])
            assert_close_to_each_other(
                gradients_of_parameters(model, wrapped_gradients),
                [to_numpy(g) for g in gradients],
                **tolerance,
            )
            optimizer.apply(wrapped_gradients, model.trainable_variables)
    covered = 0
    for row in keras_adafisher.coverage(model).rows:
        covered += bool(row.factors)
    fishers = []
    for variable in model.trainable_variables:
        with contextlib.suppress(ValueError):
            fisher = to_numpy(optimizer.preconditioner(variable))
            assert fisher.shape == tuple(variable.shape)
            assert np.all(np.isfinite(fisher))
            assert np.all(fisher >= np.float32(rule.damping))
            fishers.append(fisher)
    assert len(fishers) == covered
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())

    # What is saved is what is loaded, in a model of another process.
    store = {}
    optimizer.save_own_variables(store)
    other = build_model(recipe, form)
    keras_adafisher.wrap(other)
    twin = rule.make()
    twin.build(other.trainable_variables)
    twin.load_own_variables(store)
    assert_same(
        [to_numpy(v) for v in twin.variables],
        [to_numpy(v) for v in optimizer.variables],
    )

    keras_adafisher.unwrap(model)
    assert not probes_in(model)
    for layer in model._flatten_layers():
        assert not isinstance(layer, keras_adafisher.LayerWrapper)
        assert "call" not in vars(layer)
    model.set_weights(start)
    with eagerly():
        assert_same([to_numpy(model(x, training=False))], [plain])
