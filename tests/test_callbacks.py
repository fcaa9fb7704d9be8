"""Histories against the optimizer's own state."""

import csv
import importlib.util
import sys

import keras
import numpy as np
import pytest
from models import assert_close
from models import assert_same
from models import cross_entropy
from models import data
from models import mlp
from models import state
from models import to_numpy
from processes import run

import keras_adafisher
from keras_adafisher import FisherHistory
from keras_adafisher.callbacks import QUANTILES
from keras_adafisher.callbacks import records
from keras_adafisher.callbacks import SecondMomentHistory

RATE = 1e-3
# Four steps per epoch.
FIT = {"batch_size": 12, "shuffle": False, "verbose": 0}


def make_optimizer(**kwargs):
    return keras_adafisher.AdaFisher(
        learning_rate=RATE,
        damping=1e-3,
        gamma_1=0.9,
        gamma_2=0.05,
        factor_update_steps=1,
        rms_decay=None,
        **kwargs,
    )


def compiled(optimizer=None):
    # For always the same names.
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    model = mlp()
    model.compile(optimizer or make_optimizer(), loss=cross_entropy())
    return model


def fit(model, history, epochs=2, **kwargs):
    model.fit(*data(), epochs=epochs, callbacks=[history], **FIT, **kwargs)


def test_an_orthogonalized_kernel_has_no_rate_for_each_entry():
    model = compiled(keras_adafisher.AdaFisherMuon())
    history = FisherHistory()
    fit(model, history, epochs=1)
    recorded = {(r.parameter, r.quantity) for r in history.records}
    for layer in model.layers:
        quantities = ["fisher", "activation", "gradient"]
        kernel = {(layer.kernel.path, name) for name in quantities}
        assert kernel <= recorded
        assert (layer.kernel.path, "effective_learning_rate") not in recorded
        assert (layer.bias.path, "effective_learning_rate") in recorded


def correction(step):
    """For that Nesterov's momentum started at zero."""
    return 1 / (1 - 0.9 ** (step + 1))


def test_records_are_those_of_the_fisher_diagonal():
    model, history = compiled(), FisherHistory()
    fit(model, history)
    assert sorted({(r.epoch, r.step) for r in history.records}) == [
        (0, 4),
        (1, 8),
    ]
    assert len(history.records) == 2 * 4 * 4

    for variable in model.trainable_variables[:4]:
        fisher = to_numpy(model.optimizer.preconditioner(variable))
        record = history.select(variable, "fisher")[-1]
        np.testing.assert_allclose(
            record.quantiles, np.quantile(fisher, QUANTILES), rtol=1e-6
        )
        values = fisher.astype("float64")
        edges = np.geomspace(values.min(), values.max(), 31)
        # Nothing is lost to rounding at the ends.
        edges[0], edges[-1] = values.min(), values.max()
        counts, _ = np.histogram(values, edges)
        np.testing.assert_array_equal(record.counts, counts)
        np.testing.assert_allclose(record.edges, edges, rtol=1e-6)
        record = history.select(variable.path, "effective_learning_rate")[-1]
        np.testing.assert_allclose(
            record.quantiles,
            np.quantile(RATE * correction(8) / fisher, QUANTILES),
            rtol=1e-6,
        )
    layer = model.layers[0]
    kernel = model.optimizer.factors(layer.kernel)
    bias = model.optimizer.factors(layer.bias)
    for variable, quantity, factor in (
        (layer.kernel, "activation", kernel.activation),
        (layer.kernel, "gradient", kernel.gradient),
        (layer.bias, "activation", bias.activation),
        # Both are of the same outputs.
        (layer.bias, "gradient", kernel.gradient),
    ):
        record = history.select(variable, quantity)[-1]
        factor = to_numpy(factor)
        np.testing.assert_allclose(
            record.quantiles, np.quantile(factor, QUANTILES), rtol=1e-6
        )
        assert record.counts.sum() == factor.size
    # They all began at 1.
    assert history.select(layer.kernel, "gradient")[0].quantiles[-1] < 0.2


def test_recording_in_the_middle_of_an_epoch_sees_that_step():
    """On JAX, the trainer keeps the state to itself during an epoch."""
    history = FisherHistory(every=3)
    fit(compiled(), history)
    assert [r.step for r in history.records[::16]] == [3, 6]

    model = compiled()
    x, y = data()
    for step in range(3):
        model.train_on_batch(x[12 * step :][:12], y[12 * step :][:12])
    for variable in model.trainable_variables[:4]:
        fisher = to_numpy(model.optimizer.preconditioner(variable))
        record = history.select(variable, "fisher")[0]
        np.testing.assert_allclose(
            record.quantiles, np.quantile(fisher, QUANTILES), rtol=1e-5
        )


def test_recording_changes_nothing():
    states = []
    for callbacks in ([], [FisherHistory(every=1)]):
        model = compiled()
        model.fit(*data(), epochs=2, callbacks=callbacks, **FIT)
        states.append(state(model))
    assert_same(*states)


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="Keras has no `steps_per_execution` with PyTorch",
)
def test_several_steps_per_execution():
    model = mlp()
    model.compile(make_optimizer(), loss=cross_entropy(), steps_per_execution=2)
    history = FisherHistory(every=3)
    fit(model, history)
    assert [r.step for r in history.records[::16]] == [4, 6]


def test_inside_loss_scale_optimizer_and_with_a_schedule():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [6], [RATE, RATE / 10]
    )
    optimizer = make_optimizer()
    optimizer.learning_rate = schedule
    scaled = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    model, history = compiled(scaled), FisherHistory()
    fit(model, history)
    kernel = model.layers[0].kernel
    fisher = history.select(kernel, "fisher")
    rates = history.select(kernel, "effective_learning_rate")
    for index, rate in enumerate((RATE, RATE / 10)):
        rate *= correction(4 * (index + 1))
        expected = rate / fisher[index].quantiles[0]
        assert rates[index].quantiles[-1] == pytest.approx(expected)


class Slope(keras.layers.Layer):
    """Takes AdamW's rule."""

    def build(self, shape):
        self.alpha = self.add_weight(shape=(shape[-1],), name="alpha")

    def call(self, x):
        return x * self.alpha


class Tied(keras.Model):
    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.ReversibleEmbedding(5, 4)
        self.slope = Slope()

    def call(self, ids):
        return self.embedding(self.slope(self.embedding(ids)), reverse=True)


def test_weights_with_two_uses_and_those_without_factors():
    model, history = Tied(), FisherHistory(every=1)
    model.compile(make_optimizer(), loss=cross_entropy())
    ids = np.array([[0, 1, 1], [4, 2, 1]])
    model.fit(ids, ids, verbose=0, callbacks=[history])
    assert [(r.parameter, r.quantity) for r in history.records] == [
        (model.embedding.embeddings.path, quantity)
        for quantity in (
            "fisher",
            "effective_learning_rate",
            "activation",
            "gradient",
            "activation_1",
            "gradient_1",
        )
    ]


@pytest.mark.once
def test_large_parameters_are_sampled(monkeypatch):
    monkeypatch.setattr(records, "SAMPLE", 700)
    rng = np.random.default_rng(0)
    values = np.outer(rng.uniform(size=120), rng.uniform(size=100))
    record = records.summarize(values, 0, 0, "w", "fisher")
    assert 300 < record.counts.sum() <= 702
    exact = np.quantile(values, QUANTILES)
    np.testing.assert_array_equal(record.quantiles[[0, -1]], exact[[0, -1]])
    np.testing.assert_allclose(record.quantiles, exact, atol=0.05)


@pytest.mark.once
def test_parameters_that_are_no_longer_finite():
    values = np.array([1.0, np.nan])
    record = records.summarize(values, 0, 0, "w", "fisher")
    assert np.all(np.isnan(record.quantiles))
    assert record.counts.sum() == 0


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_file_has_the_records(tmp_path):
    path = tmp_path / "new" / "fisher.csv"
    history = FisherHistory(csv_path=path)
    fit(compiled(), history)
    for row, record in zip(rows(path), history.records, strict=True):
        assert row["epoch"] == str(record.epoch)
        assert row["step"] == str(record.step)
        assert row["parameter"] == record.parameter
        assert row["quantity"] == record.quantity
        quantiles = [float(row[f"q{q:g}"]) for q in QUANTILES]
        np.testing.assert_allclose(quantiles, record.quantiles, rtol=1e-8)
        counts = [int(count) for count in row["counts"].split()]
        np.testing.assert_array_equal(counts, record.counts)


def test_csv_file_of_a_run_that_goes_on(tmp_path):
    """From a checkpoint that is older than the last rows."""
    path, model = tmp_path / "fisher.csv", compiled()
    fit(model, FisherHistory(csv_path=path), epochs=1)
    model.save(tmp_path / "model.keras")
    fit(model, FisherHistory(csv_path=path), epochs=3, initial_epoch=1)
    complete = rows(path)
    assert [row["step"] for row in complete[::16]] == ["4", "8", "12"]
    # Cut off while it was written.
    path.write_text(path.read_text()[:-20])

    resumed = keras.models.load_model(tmp_path / "model.keras")
    fit(resumed, FisherHistory(csv_path=path), epochs=3, initial_epoch=1)
    for row, expected in zip(rows(path), complete, strict=True):
        # The layers of a model that was loaded don't have its name.
        expected["parameter"] = expected["parameter"].removeprefix(
            "sequential/"
        )
        row["parameter"] = row["parameter"].removeprefix("sequential/")
        assert row == expected

    # A row of the run's past, which has all columns, but not all counts.
    fit(compiled(), FisherHistory(csv_path=path), epochs=1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines)[:-4])
    resumed = keras.models.load_model(tmp_path / "model.keras")
    fit(resumed, FisherHistory(csv_path=path), epochs=2, initial_epoch=1)
    assert [row["step"] for row in rows(path)[14:16]] == ["4", "8"]

    # A new run begins it anew.
    fit(compiled(), FisherHistory(csv_path=path), epochs=1)
    assert [row["step"] for row in rows(path)[::16]] == ["4"]


def test_csv_file_of_something_else(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("epoch,loss\n0,1.5\n")
    with pytest.raises(ValueError, match=r"`csv_path` .*\['epoch', 'loss'\]"):
        fit(compiled(), FisherHistory(csv_path=path))
    assert path.read_text() == "epoch,loss\n0,1.5\n"


def test_second_moment_of_adam():
    optimizer = keras.optimizers.Adam(RATE, beta_2=0.9)
    model, history = compiled(optimizer), SecondMomentHistory()
    fit(model, history)
    assert len(history.records) == 2 * 4 * 2
    kernel = model.layers[0].kernel
    velocities = [
        v for v in optimizer.variables if v.path.endswith("_velocity")
    ]
    moment = to_numpy(velocities[0]) / (1 - 0.9**8)
    np.testing.assert_allclose(
        history.select(kernel, "second_moment")[-1].quantiles,
        np.quantile(moment, QUANTILES),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        history.select(kernel, "effective_learning_rate")[-1].quantiles,
        np.quantile(RATE / (1 - 0.9**8) / (np.sqrt(moment) + 1e-7), QUANTILES),
        rtol=1e-5,
    )


def test_what_a_history_cannot_use():
    for every in (0, 1.5, True, "step"):
        with pytest.raises(ValueError, match=f"`every` must .*every={every}"):
            FisherHistory(every=every)
    with pytest.raises(ValueError, match=r"compiled with it.*optimizer=.*Adam"):
        fit(compiled(keras.optimizers.Adam()), FisherHistory())
    with pytest.raises(ValueError, match=r"compiled with it.*optimizer=.*SGD"):
        fit(compiled(keras.optimizers.SGD()), SecondMomentHistory())
    with pytest.raises(ValueError, match=r"no records .*parameter=a/kernel"):
        FisherHistory().select("a/kernel", "fisher")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="TensorBoard isn't installed",
)
def test_tensorboard_reads_the_histograms(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    model = compiled()
    history = FisherHistory(log_dir=tmp_path)
    fit(model, history)
    fit(model, history, epochs=3, initial_epoch=2)
    events = event_accumulator.EventAccumulator(
        str(tmp_path), size_guidance={"histograms": 0}
    )
    events.Reload()
    kernel = model.layers[0].kernel
    tag = f"fisher/{kernel.path}"
    assert tag in events.Tags()["histograms"]
    records = history.select(kernel, "fisher")
    found = events.Histograms(tag)
    assert [event.step for event in found] == [4, 8, 12]
    for event, record in zip(found, records, strict=True):
        histogram = event.histogram_value
        assert histogram.min == record.quantiles[0]
        assert histogram.num == 30
        np.testing.assert_array_equal(histogram.bucket, record.counts)
        np.testing.assert_array_equal(histogram.bucket_limit, record.edges[1:])


@pytest.mark.once
def test_without_tensorboard(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        FisherHistory(log_dir=tmp_path)


def test_the_package_imports_nothing_but_keras():
    """Beyond what `import keras` imports by itself."""
    output = run(
        "-c",
        "import sys, keras; before = set(sys.modules)\n"
        "import keras_adafisher\n"
        "keras_adafisher.FisherHistory()\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'matplotlib', 'tensorflow', 'tensorboard', 'pandas'}\n"
        "print(sorted(new & heavy), 'keras_adafisher.analysis' in sys.modules,"
        " 'keras_adafisher.plotting' in sys.modules)\n",
    )
    assert output.split("\n")[-2] == "[] False False"


class StopAfterTwo(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == 1


@pytest.mark.parametrize("stops_early", [False, True])
def test_averages_of_weights_are_evaluated_and_stay(stops_early):
    """Keras' `SwapEMAWeights`, next to averages of a run without it."""
    x, y = data()
    plain = compiled(keras_adafisher.AdaFisherMuon(0.02))
    average, losses = None, []
    for _ in range(2):
        for start in range(0, len(x), FIT["batch_size"]):
            rows = slice(start, start + FIT["batch_size"])
            plain.train_on_batch(x[rows], y[rows])
            weights = [np.array(to_numpy(v)) for v in plain.trainable_variables]
            # It begins with the weights after the first step.
            average = average or weights
            average = [
                0.75 * a + 0.25 * w
                for a, w in zip(average, weights, strict=True)
            ]
        evaluated = compiled()
        evaluated.set_weights(average)
        losses.append(evaluated.evaluate(x, y, verbose=0))

    model = compiled(
        keras_adafisher.AdaFisherMuon(0.02, use_ema=True, ema_momentum=0.75)
    )
    history = model.fit(
        x,
        y,
        epochs=4 if stops_early else 2,
        validation_data=(x, y),
        callbacks=[
            # Swapping at the end of epochs is for training that isn't stopped.
            keras.callbacks.SwapEMAWeights(swap_on_epoch=not stops_early),
            StopAfterTwo(),
        ],
        **FIT,
    )
    np.testing.assert_allclose(history.history["val_loss"], losses, rtol=1e-5)
    found = [to_numpy(variable) for variable in model.trainable_variables]
    assert_close(found, average, 1e-5)
