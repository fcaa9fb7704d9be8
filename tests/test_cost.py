"""What measuring costs, counted: no clock is asked.

Counted are the elements of all tensors that the statistics make. Building
patches of a convolution's input would make the kernel's area times as many as
the input has, an outer product the square.
"""

import math
import re

import keras
import numpy as np
import pytest
from models import PLAIN

import keras_adafisher
from keras_adafisher.wrappers import wrapper_of

BACKEND = keras.backend.backend()
ANALYZED = pytest.mark.skipif(
    BACKEND != "jax",
    reason="TensorFlow and PyTorch have no analysis of a compiled step",
)
BATCH = 32
KERNELS = (1, 3, 5, 7)


def sizes_jax(function, arrays):
    import jax

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            # Closed ones or not, and the branches of a condition.
            leaves = jax.tree.leaves(list(equation.params.values()))
            inner = [getattr(leaf, "jaxpr", leaf) for leaf in leaves]
            inner = [leaf for leaf in inner if hasattr(leaf, "eqns")]
            for sub in inner:
                yield from walk(sub)
            if not inner:
                yield from (math.prod(v.aval.shape) for v in equation.outvars)

    return walk(jax.make_jaxpr(function)(*arrays).jaxpr)


def sizes_tensorflow(function, arrays):
    import tensorflow as tf

    traced = tf.function(function).get_concrete_function(
        *(tf.TensorSpec(a.shape, a.dtype) for a in arrays)
    )
    for operation in traced.graph.get_operations():
        # An `Identity` passes a tensor on.
        if operation.type not in ("Placeholder", "Identity"):
            yield from (math.prod(o.shape) for o in operation.outputs)


def sizes_torch(function, arrays):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            results = result if isinstance(result, tuple) else [result]
            # A view takes no memory.
            if not op.is_view:
                found.extend(
                    r.numel() for r in results if isinstance(r, torch.Tensor)
                )
            return result

    tensors = [torch.from_numpy(array) for array in arrays]
    with torch.no_grad(), Count():
        function(*tensors)
    return found


def count(layer, shape, dtype="float32"):
    """What measuring makes of a layer's inputs and of gradients.

    Returns:
        Elements of the inputs and outputs, of the largest tensor made, and of
        all of them.
    """
    inputs = keras.Input(batch_shape=shape, dtype=dtype)
    outputs = layer(inputs)
    keras_adafisher.wrap(keras.Model(inputs, outputs))
    (block,) = wrapper_of(layer).blocks

    def measure(h, s):
        return block.activation_statistic(h), block.gradient_statistic(s)

    rng = np.random.default_rng(0)
    h = rng.integers(0, 9, shape).astype(dtype)
    # `EinsumDense` doesn't say how long an axis is that the input has too.
    known = [
        size or shape[axis] for axis, size in enumerate(tuple(outputs.shape))
    ]
    s = rng.normal(size=known).astype("float32")
    sizes = {
        "jax": sizes_jax,
        "tensorflow": sizes_tensorflow,
        "torch": sizes_torch,
    }[BACKEND](measure, [h, s])
    sizes = list(sizes)
    return h.size + s.size, max(sizes), sum(sizes)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("name", ["Conv2D", "DepthwiseConv2D"])
def test_patches_of_a_convolution_are_never_built(
    name, padding, record_property
):
    found = {}
    for kernel in KERNELS:
        options = {"padding": padding, "kernel_size": kernel}
        if name == "Conv2D":
            options["filters"] = 8
        layer = getattr(keras.layers, name)(**options)
        activations, largest, total = count(layer, (BATCH, 16, 16, 8))
        found[kernel] = total / activations
        record_property(
            "figure",
            f"{name}, {padding}, kernel {kernel}x{kernel}: "
            f"{activations} activations, the largest tensor has {largest} "
            f"elements, all together {total / activations:.2f} times as many",
        )
        # Nothing is larger than the input or output.
        assert largest <= BATCH * 16 * 16 * 8
    # Square, the sum over the batch, and then small maps. The input's patches
    # would be `kernel²` times as many.
    assert max(found.values()) < 3
    assert found[7] < found[1] + 0.5


LAYERS = {
    "Dense": lambda: keras.layers.Dense(16),
    "EinsumDense": lambda: keras.layers.EinsumDense(
        "abc,cde->abde", (None, 4, 4)
    ),
    "Conv1D": lambda: keras.layers.Conv1D(16, 3, padding="same"),
    "Conv1DTranspose": lambda: keras.layers.Conv1DTranspose(16, 3),
    "LayerNormalization": lambda: keras.layers.LayerNormalization(),
    "BatchNormalization": lambda: keras.layers.BatchNormalization(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_twice_the_activations_cost_twice_as_much_at_most(name):
    _, _, base = count(LAYERS[name](), (BATCH, 32, 16))
    for shape in [(2 * BATCH, 32, 16), (BATCH, 64, 16), (BATCH, 32, 32)]:
        _, _, doubled = count(LAYERS[name](), shape)
        assert doubled <= 2 * base


def test_one_hot_vectors_are_never_built():
    def embedding(ids):
        layer = keras.layers.Embedding(ids, 16)
        _, largest, total = count(layer, (BATCH, 32), "int32")
        assert largest <= BATCH * 32 * 16
        return total

    # One-hot vectors would make it grow by the number of tokens per id.
    assert embedding(200) - embedding(100) < 10 * 100


@pytest.mark.skipif(
    BACKEND != "torch",
    reason="JAX and TensorFlow fuse the square with its sum; PyTorch doesn't",
)
@pytest.mark.parametrize("name", LAYERS)
def test_the_squares_of_large_activations_are_never_all_there(
    name, monkeypatch
):
    """They would add to the peak of a step."""
    from keras_adafisher.backend import torch

    shape = (BATCH, 32, 16)
    monkeypatch.setattr(torch, "_PART_SIZE", {"cpu": 1024})
    activations, largest, total = count(LAYERS[name](), shape)
    assert largest <= 1024 < activations / 16
    assert total <= 2 * activations


def compiled_cost(optimizer, *layers):
    """Operations, bytes accessed and temporary bytes of a compiled step."""
    from benchmarks.jax_program import compiled_step

    model = keras.Sequential(
        [
            keras.Input((16, 16, 8)),
            *layers,
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    model.compile(optimizer=optimizer, loss="mse")
    compiled = compiled_step(
        model, np.ones((BATCH, 16, 16, 8)), np.ones((BATCH, 8))
    )
    return np.array(
        [
            compiled.cost_analysis()["flops"],
            compiled.cost_analysis()["bytes accessed"],
            compiled.memory_analysis().temp_size_in_bytes,
        ]
    )


@ANALYZED
def test_a_compiled_step_builds_no_patches(record_property):
    def cost(optimizer, kernel):
        layer = keras.layers.Conv2D(8, kernel, padding="same")
        return compiled_cost(optimizer, layer)

    extra = {}
    for kernel in KERNELS:
        base = cost(keras.optimizers.SGD(momentum=0.9), kernel)
        extra[kernel] = cost(keras_adafisher.AdaFisher(), kernel) - base
        flops, accessed, temporary = map(int, extra[kernel])
        record_property(
            "figure",
            f"compiled step, kernel {kernel}x{kernel}, more than SGD's: "
            f"{flops} operations, {accessed} bytes accessed, {temporary} "
            "bytes of temporary memory",
        )
    activations = BATCH * 16 * 16 * 8
    for kernel in KERNELS:
        grown = extra[kernel] - extra[1]
        # Patches would have `kernel² - 1` times as many elements, 48 for the
        # largest. What grows is the kernel itself, and a product with a matrix
        # of which tap reads what, for each axis of one map.
        assert grown[0] < 2 * activations
        assert grown[1] < 4 * 4 * activations
        assert grown[2] < 4 * activations


@ANALYZED
def test_a_compiled_step_keeps_no_activations_for_the_taps(record_property):
    def temporary(optimizer):
        layers = []
        for _ in range(3):
            layers += [
                keras.layers.BatchNormalization(),
                keras.layers.ReLU(),
                keras.layers.Conv2D(8, 3, padding="same"),
            ]
        return int(compiled_cost(optimizer, *layers)[2])

    sgd = temporary(keras.optimizers.SGD(momentum=0.9))
    adafisher = temporary(keras_adafisher.AdaFisher())
    record_property(
        "figure", f"temporary bytes of a step: SGD {sgd}, AdaFisher {adafisher}"
    )
    # The inputs of all three convolutions would be 3.01 times as many bytes as
    # one of them has; it is 1.05 times as many.
    assert adafisher - sgd < 1.5 * BATCH * 16 * 16 * 8 * 4


@ANALYZED
@pytest.mark.parametrize("rule", [{}, PLAIN], ids=["default", "published"])
def test_a_compiled_step_copies_no_parameter(rule):
    """Weights and momentum change in place: nothing needs the old ones."""
    from benchmarks.jax_program import compiled_step

    model = keras.Sequential(
        [keras.Input((64,)), *(keras.layers.Dense(64) for _ in range(3))]
    )
    model.compile(optimizer=keras_adafisher.AdaFisher(**rule), loss="mse")
    x = np.ones((BATCH, 64), "float32")
    program = compiled_step(model, x, x).as_text()
    made = re.findall(r"= f32\[64,64\]\S* ([\w-]+)\(", program)
    assert "dot" in made
    assert "copy" not in made


def count_kernels(optimizer, shape, layers):
    """How many different kernels XLA compiles for a step of some layers."""
    from benchmarks.jax_program import compiled_step
    from benchmarks.jax_program import distinct_kernels

    model = keras.Sequential([keras.Input(shape), *layers])
    model.compile(optimizer=optimizer, loss="mse")
    x = np.ones((BATCH, *shape))
    y = np.ones((BATCH, *model.output_shape[1:]))
    return distinct_kernels(compiled_step(model, x, y).as_text())


def is_without_library():
    """Whether XLA is older than its library for sums of squares."""
    import jax

    return tuple(map(int, jax.__version__.split(".")[:2])) < (0, 10)


@ANALYZED
@pytest.mark.parametrize("rule", [{}, PLAIN], ids=["default", "published"])
def test_few_kernels_are_compiled(rule, record_property):
    """Compiling is most of the first step, and kernels most of compiling."""

    def count(optimizer, sizes):
        layers = [keras.layers.Dense(size, "tanh") for size in sizes]
        return count_kernels(optimizer, (7,), layers)

    widths = range(9, 17)
    adam = count(keras.optimizers.Adam(), widths)
    adafisher = count(keras_adafisher.AdaFisher(**rule), widths)
    same, more_of_the_same = (
        count(keras_adafisher.AdaFisher(**rule), [16] * depth)
        for depth in (8, 12)
    )
    record_property(
        "figure",
        f"distinct kernels, eight widths: Adam {adam}, AdaFisher {adafisher}; "
        f"eight equal layers: {same}, twelve: {more_of_the_same}",
    )
    # A model may have many equal layers: none of them needs a kernel more.
    # (The compiler fuses what joins the small parameters of fewer layers into
    # fewer kernels.)
    assert more_of_the_same == same
    # Each other width does, though the update of Adam has as many for each: to
    # join an answer and, where a condition is around each tap, to make `H` in
    # the forward pass and to read factors in the update. Before XLA had a
    # library for sums of squares, so did the two of them.
    per_width = (3 if rule == {} else 2) + (2 if is_without_library() else 0)
    assert adafisher - adam <= 8 * per_width


@ANALYZED
def test_few_kernels_are_compiled_for_convolutions(record_property):
    def count(optimizer, widths):
        layers = [
            keras.layers.Conv2D(width, 3, activation="tanh", padding="same")
            for width in widths
        ]
        return count_kernels(optimizer, (8, 8, 3), layers)

    def more(widths):
        adam = count(keras.optimizers.Adam(), widths)
        return count(keras_adafisher.AdaFisher(), widths) - adam

    few, many = more([5, 6, 7]), more([5, 6, 7, 9, 10, 11])
    record_property("figure", f"kernels more: {few} for 3 widths, {many} for 6")
    assert many - few <= 3 * (6 if is_without_library() else 3)


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="TensorFlow alone traces Python once more to make variables",
)
def test_a_step_is_traced_once(monkeypatch):
    """Twice, if the first trace makes variables."""
    traces = []
    apply = keras_adafisher.AdaFisher.apply

    def counted(self, *args):
        traces.append(self)
        apply(self, *args)

    monkeypatch.setattr(keras_adafisher.AdaFisher, "apply", counted)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    model.compile(optimizer=keras_adafisher.AdaFisher(), loss="mse")
    x = np.ones((BATCH, 8), "float32")
    model.fit(x, x, epochs=2, verbose=0)
    assert len(traces) == 1


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="PyTorch keeps views of the factors, JAX compiles what reads them",
)
def test_an_update_reads_the_factors_once():
    import tensorflow as tf

    def reads(depth):
        layers = [keras.layers.Dense(8) for _ in range(depth)]
        model = keras.Sequential([keras.Input((8,)), *layers])
        optimizer = keras_adafisher.AdaFisher()
        keras_adafisher.wrap(model)
        variables = model.trainable_variables
        optimizer.build(variables)
        (factors,) = (v for v in optimizer.variables if "factors" in v.path)
        gradients = [tf.ones(v.shape) for v in variables]

        @tf.function
        def update():
            optimizer.apply(gradients, variables)

        graph = update.get_concrete_function().graph
        (handle,) = (
            inside
            for outside, inside in graph.captures
            if outside is factors.value.handle
        )
        return sum(
            operation.type == "ReadVariableOp" and operation.inputs[0] is handle
            for operation in graph.get_operations()
        )

    assert reads(3) == reads(9)


@pytest.mark.skipif(
    BACKEND != "jax",
    reason="TensorFlow and PyTorch compile nothing outside of a step",
)
def test_wrapping_and_building_compile_nothing():
    import jax

    layers = [keras.layers.Dense(size) for size in (5, 6, 7)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    # What other tests have compiled isn't compiled again.
    jax.clear_caches()
    # Keras compiles what fills a momentum with zeros, once for each shape.
    keras.optimizers.SGD(momentum=0.9).build(model.trainable_variables)
    compiled = []

    def listen(event, duration, **kwargs):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    keras_adafisher.wrap(model)
    keras_adafisher.AdaFisher().build(model.trainable_variables)
    assert not compiled
    keras_adafisher.wrap(model)
    keras_adafisher.unwrap(model)
    assert not compiled
    # It does listen.
    jax.jit(lambda x: x + 3)(np.ones(3)).block_until_ready()
    assert compiled


@pytest.mark.skipif(
    BACKEND != "torch",
    reason="JAX and TensorFlow infer the shapes of statistics too",
)
def test_inferring_shapes_measures_nothing(monkeypatch):
    from keras_adafisher.wrappers import DenseBlock

    measured = []
    monkeypatch.setattr(
        DenseBlock,
        "activation_statistic",
        lambda self, h: measured.append(h),
    )
    layer = keras.layers.Dense(3)
    layer.build((None, 2))
    keras_adafisher.wrap(layer)
    assert layer(keras.KerasTensor((4, 2))).shape == (4, 3)
    assert not measured
