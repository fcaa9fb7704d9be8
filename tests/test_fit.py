"""Whatever a script does with `fit`, it does with AdaFisher as with others."""

import contextlib
import threading

import keras
import numpy as np
import pytest
from models import assert_close
from models import assert_same
from models import cross_entropy
from models import data
from models import mlp
from models import own_variable
from models import probes_in
from models import state
from models import to_numpy
from models import weights

import keras_adafisher
from keras_adafisher.probe import probes_of

BACKEND = keras.backend.backend()
BATCH = 8


def adafisher(**arguments):
    return keras_adafisher.AdaFisher(**{**arguments, "factor_update_steps": 2})


def compiled(optimizer=None, **arguments):
    keras.utils.set_random_seed(1)
    model = mlp()
    model.compile(optimizer or adafisher(), loss=cross_entropy(), **arguments)
    return model


def fit(model, *inputs, **arguments):
    model.fit(*inputs, epochs=2, shuffle=False, verbose=0, **arguments)
    return state(model)


@pytest.fixture(scope="module")
def expected():
    return fit(compiled(), *data(), batch_size=BATCH)


def tf_dataset(x, y):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow isn't installed")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)


def torch_dataloader(x, y):
    torch = pytest.importorskip("torch", reason="PyTorch isn't installed")
    dataset = torch.utils.data.TensorDataset(*map(torch.from_numpy, (x, y)))
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH)


def py_dataset(x, y):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(x) // BATCH

        def __getitem__(self, index):
            part = slice(index * BATCH, (index + 1) * BATCH)
            return x[part], y[part]

    return Batches()


@pytest.mark.parametrize("source", [tf_dataset, torch_dataloader, py_dataset])
def test_sources_of_data(source, expected):
    actual = fit(compiled(), source(*data()))
    assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"run_eagerly": True},
        {"jit_compile": True},
        {"jit_compile": False},
        {"jit_compile": "auto"},
        {"steps_per_execution": 3},
    ],
    ids=["run_eagerly", "jit", "no_jit", "auto", "steps_per_execution"],
)
def test_ways_to_execute(arguments, expected):
    if BACKEND == "torch" and "steps_per_execution" in arguments:
        pytest.skip("Keras has no `steps_per_execution` with PyTorch")
    actual = fit(compiled(**arguments), *data(), batch_size=BATCH)
    assert_close(actual, expected, 1e-5)


def test_train_on_batch_is_fit(expected):
    model = compiled()
    x, y = data()
    for start in (*range(0, len(x), BATCH), *range(0, len(x), BATCH)):
        part = slice(start, start + BATCH)
        model.train_on_batch(x[part], y[part])
    assert_close(state(model), expected, 2e-6)


def test_evaluating_and_predicting_change_nothing(expected):
    x, y = data()
    model = compiled()
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    before = state(model)
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    model.predict_on_batch(x)
    assert_same(state(model), before)
    # Nor what comes next.
    model.fit(
        x, y, batch_size=BATCH, shuffle=False, verbose=0, validation_data=(x, y)
    )
    assert_close(state(model), expected, 2e-6)


def test_backup_and_restore(tmp_path):
    """Training that is interrupted ends as if it hadn't been."""
    x, y = data()

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def train(*callbacks):
        model = compiled()
        model.fit(
            x,
            y,
            batch_size=BATCH,
            epochs=4,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        return state(model)

    expected = train()
    backup = tmp_path / "backup"
    with pytest.raises(KeyboardInterrupt):
        train(keras.callbacks.BackupAndRestore(backup), Interrupt())
    assert_same(train(keras.callbacks.BackupAndRestore(backup)), expected)


def test_callbacks_that_set_the_learning_rate_and_save(tmp_path):
    x, y = data()
    model = compiled()
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1**epoch)
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.5, patience=0, min_delta=1e9
    )
    file = str(tmp_path / "{epoch}.keras")
    history = model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=[rates, plateau, keras.callbacks.ModelCheckpoint(file)],
    )
    # Before what `ReduceLROnPlateau` does at the end of an epoch.
    np.testing.assert_allclose(
        history.history["learning_rate"], [1, 0.1, 0.01], rtol=1e-6
    )
    assert float(model.optimizer.learning_rate) == pytest.approx(0.005)
    saved = keras.models.load_model(tmp_path / "3.keras")
    assert_same(state(saved)[2:], state(model)[2:])


def test_class_weights_are_sample_weights():
    x, y = data()
    of_classes = fit(
        compiled(), x, y, batch_size=BATCH, class_weight={0: 1, 1: 2, 2: 0.5}
    )
    of_samples = fit(
        compiled(),
        x,
        y,
        batch_size=BATCH,
        sample_weight=np.array([1, 2, 0.5], "float32")[y],
    )
    unweighted = fit(compiled(), x, y, batch_size=BATCH)
    assert_close(of_classes, of_samples, 2e-6)
    assert np.abs(of_classes[0] - unweighted[0]).max() > 1e-3


def test_weights_of_the_samples_enter_s():
    """A sample of weight 0 has `s = 0`, but its `h` counts."""
    x, y = data(examples=4)
    rule = {"damping": 1e-6, "epsilon": 0.0}
    model = compiled(keras_adafisher.AdaFisher.as_published(**rule))
    weight = np.array([1, 1, 0, 0], "float32")
    model.train_on_batch(x, y, sample_weight=weight)
    plain = compiled(keras_adafisher.AdaFisher.as_published(**rule))
    plain.train_on_batch(x[:2], y[:2])

    def first(model):
        return model.optimizer.factors(model.layers[0].kernel)

    # S up to its scale, which Min–Max normalization removes.
    s, plain_s = (to_numpy(first(m).gradient) for m in (model, plain))
    np.testing.assert_allclose(s, plain_s, rtol=1e-5)
    # Both start at 1, and keep 0.08 of it. The bias' input is a 1.
    squares = np.append((x**2).mean(axis=0), 1)
    scaled = (squares - squares.min()) / (squares.max() - squares.min())
    np.testing.assert_allclose(
        to_numpy(first(model).activation).ravel(),
        0.08 + 0.008 * scaled[:-1],
        rtol=1e-5,
    )


class WithAddedLoss(keras.layers.Layer):
    def __init__(self, kernel_of, **kwargs):
        super().__init__(**kwargs)
        self.kernel_of = [kernel_of]

    def call(self, x):
        kernel = self.kernel_of[0].kernel
        self.add_loss(0.01 * keras.ops.sum(keras.ops.square(kernel)))
        return x


def test_an_added_loss_is_a_regularizer():
    """Its gradient doesn't pass through the layer, and so isn't in `s`."""

    def model(regularizer, adds_loss):
        keras.utils.set_random_seed(1)
        dense = keras.layers.Dense(5, kernel_regularizer=regularizer)
        more = [WithAddedLoss(dense)] if adds_loss else []
        model = keras.Sequential(
            [keras.Input((6,)), dense, *more, keras.layers.Dense(3)]
        )
        model.compile(adafisher(), loss=cross_entropy())
        return model

    x, y = data()
    regularized = fit(model("l2", False), x, y, batch_size=BATCH)
    added = fit(model(None, True), x, y, batch_size=BATCH)
    plain = fit(model(None, False), x, y, batch_size=BATCH)
    assert_close(added, regularized, 1e-5)
    assert np.abs(added[0] - plain[0]).max() > 1e-4


def test_constraints():
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3, kernel_constraint="non_neg")]
    )
    assert weights(model)[0].min() < 0
    model.compile(adafisher(), loss=cross_entropy())
    model.fit(*data(), verbose=0)
    assert weights(model)[0].min() >= 0


def test_several_inputs_and_outputs():
    """Two networks in one model are those two networks."""
    x, y = data()
    targets = np.eye(3, dtype="float32")[y]
    alone = compiled(adafisher())
    keras.utils.set_random_seed(1)
    first, second = mlp(), mlp()
    inputs = {name: keras.Input((6,), name=name) for name in "ab"}
    model = keras.Model(
        inputs, {"c": first(inputs["a"]), "d": second(inputs["b"])}
    )
    model.compile(
        adafisher(),
        loss={"c": cross_entropy(), "d": "mse"},
        loss_weights={"c": 1.0, "d": 0.1},
        metrics={"c": ["accuracy"]},
    )
    fit(
        model,
        {"a": x, "b": x[::-1]},
        {"c": y, "d": targets},
        batch_size=BATCH,
    )
    fit(alone, x, y, batch_size=BATCH)
    assert_close(weights(first), weights(alone), 1e-5)


@pytest.fixture
def float64():
    keras.config.set_floatx("float64")
    context = contextlib.nullcontext()
    if BACKEND == "jax":
        import jax

        context = jax.enable_x64(True)
    with context:
        yield
    keras.config.set_floatx("float32")


def test_float64(float64):
    """The factors stay in float32, like those of other models."""
    model = compiled()
    x, y = data()
    actual = fit(model, x.astype("float64"), y, batch_size=BATCH)
    assert {str(w.dtype) for w in weights(model)} == {"float64"}
    assert own_variable(model.optimizer, "factors").dtype == "float32"
    assert all(np.isfinite(array).all() for array in actual)


@pytest.mark.parametrize("is_default", [True, False])
def test_one_of_several_optimizers(is_default):
    """The others' parameters have the other rule."""
    keras.utils.set_random_seed(1)
    model = mlp()
    first, second = model.layers
    ours, other = adafisher(), keras.optimizers.SGD(0.0)
    optimizers = keras.optimizers.OptimizerMap(ours if is_default else other)
    pattern = (first if is_default else second).path + "/.*"
    optimizers[pattern] = other if is_default else ours
    model.compile(
        keras.optimizers.MultiOptimizer(optimizers), loss=cross_entropy()
    )
    before = weights(model)
    model.fit(*data(), batch_size=BATCH, verbose=0)
    after = weights(model)
    assert_same(after[:2], before[:2])
    assert np.abs(after[2] - before[2]).max() > 1e-4
    # Has been measured: all factors start at 1.
    assert np.ptp(to_numpy(ours.preconditioner(second.kernel))) > 0.1
    with pytest.raises(ValueError, match="has Kronecker factors for"):
        ours.preconditioner(first.kernel)


def test_one_of_several_optimizers_has_the_kernels():
    """What a layer measures goes to the one that has its weight."""
    keras.utils.set_random_seed(1)
    model = mlp()
    ours, other = adafisher(), keras.optimizers.SGD(0.0)
    model.compile(
        keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(other, {".*/kernel": ours})
        ),
        loss=cross_entropy(),
    )
    model.fit(*data(), batch_size=BATCH, verbose=0)
    probes = probes_in(model)
    assert len(probes) == 2
    for probe in probes:
        taken, dropped, is_estimated = ours.records_of(probe)
        assert taken > 0
        assert not dropped
        assert not is_estimated


def test_an_optimizer_for_each_variable_of_a_model_that_is_built_late():
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(3)])
    keras_adafisher.wrap(model)
    ours, other = adafisher(), keras.optimizers.SGD(0.1)
    model.compile(
        keras.optimizers.MultiOptimizer(
            lambda variable: ours if "kernel" in variable.path else other
        ),
        loss=cross_entropy(),
    )
    model.fit(*data(), batch_size=BATCH, epochs=2, verbose=0)
    assert len(ours.factored_variables) == 2
    for probe in probes_in(model):
        taken, _, is_estimated = ours.records_of(probe)
        assert taken > 0
        assert not is_estimated


@pytest.mark.parametrize("has_loss_scale", [False, True])
def test_an_optimizer_for_each_variable(has_loss_scale):
    """As in the documentation of `MultiOptimizer`."""
    keras.utils.set_random_seed(1)
    model = mlp()
    optimizer = keras.optimizers.MultiOptimizer(lambda variable: adafisher())
    outer = optimizer
    if has_loss_scale:
        outer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(outer, loss=cross_entropy())
    model.fit(*data(), batch_size=BATCH, verbose=0)
    assert len(optimizer.optimizers) == len(model.trainable_variables)
    # One of a kernel, one of a bias, and so on.
    for ours, layer in zip(
        optimizer.optimizers[::2], model.layers, strict=True
    ):
        assert ours.factored_variables == [layer.kernel]
        for probe in probes_of([layer.kernel]):
            taken, dropped, is_estimated = ours.records_of(probe)
            assert taken > 0
            assert not dropped
            assert not is_estimated


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("make", [adafisher, keras.optimizers.SGD])
def test_one_of_several_optimizers_has_nothing_to_train(make, run_eagerly):
    expected = compiled(make(), run_eagerly=run_eagerly)
    fit(expected, *data(), batch_size=BATCH)
    unused = adafisher()
    model = compiled(
        keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(unused, {".*": make()})
        ),
        run_eagerly=run_eagerly,
    )
    fit(model, *data(), batch_size=BATCH)
    assert_close(weights(model), weights(expected), 1e-6)
    assert not unused.built


def test_four_threads_predict():
    x, y = data(examples=64)
    model = compiled()
    model.fit(x, y, verbose=0)
    expected = model.predict_on_batch(x)
    found = []

    def predict():
        for _ in range(5):
            found.append(to_numpy(model(x)))

    threads = [threading.Thread(target=predict) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for each in found:
        np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)
