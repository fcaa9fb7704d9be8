"""What goes wrong in a long run: batches, interruptions, damaged files.

A step that the `LossScaleOptimizer` skips, a batch with NaN in its loss and
others are in `test_optimizer.py`; resuming from whole files is in
`test_saving.py`.
"""

import io
import math
import os
import random
import signal
import subprocess
import sys
import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest
from models import assert_same
from models import cross_entropy
from models import data
from models import mlp
from models import running_factors
from models import state
from models import to_numpy
from models import train
from models import trained
from models import weights
from processes import ROOT
from processes import TIMEOUT

import keras_adafisher

BACKEND = keras.backend.backend()


def adafisher(**arguments):
    """An AdaFisher that measures on each second step."""
    return keras_adafisher.AdaFisher(
        **{
            "learning_rate": 1e-2,
            "damping": 0.1,
            "gamma_1": 0.9,
            "gamma_2": 0.05,
            "factor_update_steps": 2,
            **arguments,
        }
    )


def network():
    """Dense layers and normalizations, none of which averages over batches."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="relu"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(3),
        ]
    )


def adafisher_of(model):
    """The optimizer of a model, or the one that a `LossScaleOptimizer` has."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def factors(model, layer=None):
    """The factors of a model, or those of one of its layers."""
    variables = (layer or model).trainable_variables
    return running_factors(adafisher_of(model), variables)


def assert_sound(model):
    """Each Fisher diagonal is finite and at least the damping."""
    optimizer = adafisher_of(model)
    for variable in model.trainable_variables:
        fisher = to_numpy(optimizer.preconditioner(variable))
        assert np.all(np.isfinite(fisher))
        assert np.all(fisher >= np.float32(optimizer.damping))
    for factor in factors(model):
        # From 1 at the start towards a share of a measurement, whose entries
        # are 1 on average.
        assert np.all(factor >= 0)
        assert np.all(factor <= max(1, factor.size))


def forget_momentums(model):
    """Set them to the zeros that they begin with."""
    momentums = [
        v for v in model.optimizer.variables if v.path.endswith("_momentum")
    ]
    assert len(momentums) == len(model.trainable_variables)
    for variable in momentums:
        variable.assign(np.zeros(variable.shape))


def is_finite(model):
    return all(np.all(np.isfinite(w)) for w in weights(model))


class Rewindable:
    """A compiled model that returns to its first state: compiled once."""

    def __init__(self, optimizer):
        keras.utils.set_random_seed(1)
        self.model = network()
        self.model.compile(optimizer, loss=cross_entropy())
        optimizer.build(self.model.trainable_variables)
        self.start = weights(self.model), state(self.model)

    def rewind(self):
        self.model.set_weights(self.start[0])
        variables = self.model.optimizer.variables
        values = self.start[1][len(self.start[0]) :]
        # Where an optimizer's iterations are is its own affair.
        if isinstance(self.model.optimizer, keras_adafisher.AdaFisher):
            self.model.optimizer.set_weights(values)
        else:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        return self.model


GOOD = data(examples=8, seed=0)
LABELS = GOOD[1]
BATCHES = {
    "nan": np.where(np.eye(8, 6) > 0, np.nan, GOOD[0]),
    "one nan": np.where(np.arange(48).reshape(8, 6) == 7, np.nan, GOOD[0]),
    "all nan": np.full((8, 6), np.nan),
    "inf": np.where(np.eye(8, 6) > 0, np.inf, GOOD[0]),
    "minus inf": np.where(np.eye(8, 6) > 0, -np.inf, GOOD[0]),
    "zeros": np.zeros((8, 6)),
    "constant": np.full((8, 6), 3.0),
    "equal rows": np.repeat(GOOD[0][:1], 8, axis=0),
    "one feature": np.eye(6)[np.full(8, 2)],
    "the smallest numbers": GOOD[0] * 1e-42,
    # Squares to zero.
    "small": GOOD[0] * 1e-25,
    "large": GOOD[0] * 1e5,
    # Squares to inf.
    "too large": GOOD[0] * 1e30,
    "the largest numbers": GOOD[0] * 1e38,
}


def test_training_recovers_from_a_batch_wherever_adams_does():
    """Nothing but the measurements of good batches is in the factors."""
    runs = {
        "adafisher": Rewindable(adafisher(global_clipnorm=1.0)),
        "adam": Rewindable(keras.optimizers.Adam(1e-2, global_clipnorm=1.0)),
    }
    for name, batch in BATCHES.items():
        batch = batch.astype("float32")
        alive = {}
        for which, run in runs.items():
            model = run.rewind()
            model.train_on_batch(*GOOD)
            model.train_on_batch(*GOOD)
            # The same gradients for both: whether sums of large numbers
            # overflow, and cancel to NaN, depends on the weights.
            model.set_weights(run.start[0])
            # This step measures.
            before = state(model)
            model.train_on_batch(batch, LABELS)
            if which == "adafisher":
                assert_sound(model)
            if not is_finite(model) and which == "adafisher":
                # As Adam's. But what was measured before is still there, and
                # enough to train on with weights from a checkpoint.
                kept = [w for w in before if w.dtype == "float32"]
                model.set_weights(kept[: len(model.weights)])
                forget_momentums(model)
                model.train_on_batch(*GOOD)
                assert is_finite(model), name
                alive[which] = False
                continue
            model.train_on_batch(*GOOD)
            loss = model.train_on_batch(*GOOD)
            alive[which] = bool(is_finite(model) and np.isfinite(loss))
            if which == "adafisher":
                assert_sound(model)
        assert alive["adafisher"] or not alive["adam"], name


@pytest.mark.parametrize("name", ["one nan", "inf", "all nan", "too large"])
def test_a_measurement_that_is_not_finite_changes_no_factor(name):
    run = Rewindable(adafisher())
    model = run.rewind()
    model.train_on_batch(*GOOD)
    model.train_on_batch(*GOOD)
    # The first layer's: some kernels make `relu(nan)` 0, and a normalization
    # makes anything small again.
    layer = model.layers[0]
    before = factors(model, layer)
    model.train_on_batch(BATCHES[name].astype("float32"), LABELS)
    assert_same(factors(model, layer), before)
    assert_sound(model)


def test_batches_of_one_and_of_no_example():
    """As the last batch of an epoch, and alone. An empty one's mean is NaN."""
    x, y = data(examples=9)
    ends = []
    for optimizer in (
        adafisher(factor_update_steps=1),
        keras.optimizers.Adam(),
    ):
        keras.utils.set_random_seed(1)
        model = network()
        model.compile(optimizer, loss=cross_entropy())
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        assert is_finite(model)
        try:
            model.train_on_batch(x[:0], y[:0])
            ends.append(is_finite(model))
        except Exception as error:
            # Keras can't compute a loss of nothing on PyTorch.
            ends.append(type(error))
        if isinstance(optimizer, keras_adafisher.AdaFisher):
            assert_sound(model)
    assert ends[0] == ends[1]


def test_dead_units_neither_move_nor_keep_the_others_from_training():
    keras.utils.set_random_seed(1)
    model = network()
    model.compile(adafisher(factor_update_steps=1), loss=cross_entropy())
    dense = model.layers[0]
    kernel, bias = dense.get_weights()
    # Units 0 and 1 never fire.
    bias[:2] = -1e3
    dense.set_weights([kernel, bias])
    before = weights(model)
    for _ in range(3):
        model.train_on_batch(*GOOD)
        assert_sound(model)
    after = weights(model)
    assert is_finite(model)
    assert_same([after[0][:, :2]], [before[0][:, :2]])
    assert np.all(after[0][:, 2:] != before[0][:, 2:])

    # All of them: no gradient reaches the layer, so `S` is constant.
    dense.set_weights([kernel, np.full_like(bias, -1e3)])
    before = weights(model)
    forget_momentums(model)
    model.train_on_batch(*GOOD)
    assert_sound(model)
    assert_same(weights(model)[:2], before[:2])
    # And back to life.
    dense.set_weights([kernel, np.zeros_like(bias)])
    before = weights(model)
    model.train_on_batch(*GOOD)
    assert_sound(model)
    assert np.any(weights(model)[0] != before[0])


def test_a_batch_without_gradients_moves_nothing_and_spoils_nothing():
    """All sample weights are 0. There is no momentum yet."""
    keras.utils.set_random_seed(1)
    model = network()
    model.compile(adafisher(factor_update_steps=1), loss=cross_entropy())
    before = weights(model)
    for _ in range(2):
        model.train_on_batch(*GOOD, sample_weight=np.zeros(8, "float32"))
        assert_sound(model)
    assert_same(weights(model), before)
    model.train_on_batch(*GOOD)
    assert_sound(model)
    assert is_finite(model)
    assert all(
        np.any(a != b) for a, b in zip(weights(model), before, strict=True)
    )


def test_a_layer_that_a_step_does_not_use_keeps_its_factors():
    """No answer is no measurement of zeros. No answer at all: a warning."""
    model = trained(adafisher(factor_update_steps=1), steps=2)
    optimizer, variables = model.optimizer, model.trainable_variables
    before = factors(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.apply([keras.ops.zeros(v.shape) for v in variables])
    assert any("no layer has reported" in str(w.message) for w in caught)
    assert_same(factors(model), before)
    train(model, [0])
    assert all(
        np.any(a != b) for a, b in zip(factors(model), before, strict=True)
    )


def test_float16_overflows_are_skipped_and_leave_no_trace():
    """In the activations and in the gradients, by the scale of the loss."""
    x, y = data(examples=8)
    keras.utils.set_random_seed(1)
    inner = adafisher(factor_update_steps=1)
    optimizer = keras.optimizers.LossScaleOptimizer(
        inner, initial_scale=2.0**30, dynamic_growth_steps=1000
    )
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = mlp(activity_regularizer=None)
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(optimizer, loss=cross_entropy())
    start = weights(model)
    skipped = 0
    while int(to_numpy(inner.iterations)) == 0 and skipped < 40:
        before = weights(model)
        model.train_on_batch(x, y)
        skipped += 1
    assert skipped > 1
    assert_same(before, start)
    assert_sound(model)
    assert is_finite(model)

    before, scale = factors(model), float(optimizer.dynamic_scale)
    parameters = weights(model)
    # The largest float16 is 65,504.
    model.train_on_batch(x * 1e6, y)
    assert int(to_numpy(inner.iterations)) == 1
    assert float(optimizer.dynamic_scale) < scale
    assert_same(factors(model), before)
    assert_same(weights(model), parameters)
    model.train_on_batch(x, y)
    assert int(to_numpy(inner.iterations)) == 2
    assert is_finite(model)
    assert_sound(model)


class Stop(keras.callbacks.Callback):
    """Raises at the end of a batch."""

    def __init__(self, batch, error):
        super().__init__()
        self.batch = batch
        self.error = error

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_fit_leaves_a_model_that_works(error, tmp_path):
    """At a step that measures and at one that doesn't."""
    x, y = data(examples=32)
    keras.utils.set_random_seed(1)
    model = mlp()
    model.compile(adafisher(), loss=cross_entropy())
    for batch in (0, 1, 2):
        with pytest.raises(error):
            model.fit(
                x,
                y,
                batch_size=8,
                shuffle=False,
                verbose=0,
                callbacks=[Stop(batch, error)],
            )
        assert np.all(np.isfinite(model.predict(x[:8], verbose=0)))
        assert is_finite(model)
        assert_sound(model)
        model.save(tmp_path / "model.keras")
        resumed = keras.models.load_model(tmp_path / "model.keras")
        assert_same(state(resumed), state(model))
    # The model itself and the one from the file go on alike.
    for each in (model, resumed):
        each.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert_same(state(resumed), state(model))


@pytest.mark.parametrize("step", [0, 1, 2] if BACKEND == "torch" else [0])
def test_a_step_that_fails_behind_its_backward_pass_never_was(
    step, monkeypatch
):
    """Compiled steps fail when they are traced, which is at the first."""
    expected = trained(adafisher(), steps=4)
    model = trained(adafisher(), steps=step)
    # TensorFlow never initializes what a failed trace has made. That is so for
    # Adam's variables too.
    model.optimizer.build(model.trainable_variables)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # Behind the factors, in front of the update.
        patch.setattr(keras.optimizers.Optimizer, "apply", fail)
        if step:
            patch.setattr(type(model.optimizer), "apply", fail)
        with pytest.raises(KeyboardInterrupt):
            # Other data: its gradients would show.
            train(model, [99])
    if BACKEND != "torch" or step:
        train(model, range(step, 4))
        assert_same(state(model), state(expected))
    else:
        # Without a trace, what came before the failure has happened.
        train(model, range(step, 4))
        assert is_finite(model)
        assert_sound(model)


# Damaged files.


def damaged(optimizer):
    """Functions that damage the optimizer's part of a file."""
    index = str([v.name for v in optimizer.variables].index("factors"))

    def wrong_shape(group):
        del group[index]
        group[index] = np.full((7, 1), 0.25, "float32")

    def of_another_model(group):
        value = group[index][()]
        del group[index]
        group[index] = value[:-1]

    def missing(group):
        del group[index]

    def renamed(group):
        group.move(index, "99")

    def extra(group):
        group["99"] = np.full((3,), 0.25, "float32")

    return wrong_shape, of_another_model, missing, renamed, extra


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and the file that it was saved in."""
    keras.utils.set_random_seed(1)
    model = trained(adafisher(), steps=3)
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model.save(path)
    with zipfile.ZipFile(path) as file:
        return model, {name: file.read(name) for name in file.namelist()}


def write(parts, h5, path):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            is_weights = name == "model.weights.h5"
            file.writestr(name, h5 if is_weights else content)


NOT_EQUAL = "nothing of it was loaded"
KERAS_WARNS = "Skipping variable loading for optimizer"


@pytest.mark.parametrize("number", range(5))
def test_factors_are_loaded_all_or_not_at_all(number, saved, tmp_path):
    model, parts = saved
    damage = damaged(model.optimizer)[number]
    file = io.BytesIO(parts["model.weights.h5"])
    with h5py.File(file, "a") as h5:
        damage(h5["optimizer/vars"])
    write(parts, file.getvalue(), tmp_path / "model.keras")
    (tmp_path / "model.weights.h5").write_bytes(file.getvalue())
    counts_differ = damage.__name__ in ("missing", "extra")

    def load_model():
        return keras.models.load_model(tmp_path / "model.keras")

    if counts_differ:
        with pytest.warns(UserWarning, match=KERAS_WARNS):
            loaded = load_model()
        assert_same(weights(loaded), weights(model))
        assert all(np.all(f == 1) for f in factors(loaded))
        assert int(loaded.optimizer.iterations) == 0
    else:
        with pytest.raises(ValueError, match=NOT_EQUAL) as error:
            load_model()
        assert "factors" in str(error.value)

    # Into a model that is there, and has another state.
    other = trained(adafisher(), steps=1)
    before = [to_numpy(v) for v in other.optimizer.variables]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_weights(tmp_path / "model.weights.h5", skip_mismatch=True)
    said = KERAS_WARNS if counts_differ else NOT_EQUAL
    assert any(said in str(w.message) for w in caught)
    assert_same([to_numpy(v) for v in other.optimizer.variables], before)
    if not counts_differ:
        with pytest.raises(ValueError, match=NOT_EQUAL):
            other.load_weights(tmp_path / "model.weights.h5")
        assert_same([to_numpy(v) for v in other.optimizer.variables], before)
    # The way out that the error names.
    plain = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert_same(weights(plain), weights(model))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused_before_anything_is_loaded(
    share, saved, tmp_path
):
    _, parts = saved

    def cut(content):
        return content[: int(share * len(content))]

    whole = tmp_path / "whole.keras"
    write(parts, parts["model.weights.h5"], whole)
    (tmp_path / "cut.keras").write_bytes(cut(whole.read_bytes()))
    h5 = cut(parts["model.weights.h5"])
    write(parts, h5, tmp_path / "inside.keras")
    (tmp_path / "cut.weights.h5").write_bytes(h5)

    for name in ("cut.keras", "inside.keras"):
        with pytest.raises((OSError, ValueError)):
            keras.models.load_model(tmp_path / name)
    other = trained(adafisher(), steps=1)
    before = state(other)
    with pytest.raises(OSError, match="truncated file"):
        other.load_weights(tmp_path / "cut.weights.h5")
    assert_same(state(other), before)
    train(other, [5])
    assert is_finite(other)


def test_weights_of_the_optimizer_are_set_all_or_not_at_all():
    optimizer = trained(adafisher(), steps=1).optimizer
    before = [to_numpy(v) for v in optimizer.variables]
    changed = [(value + 1).astype(value.dtype) for value in before]
    wrong = [*changed[:-1], np.zeros((7, 7), "float32")]
    with pytest.raises(ValueError, match=NOT_EQUAL):
        optimizer.set_weights(wrong)
    with pytest.raises(ValueError, match="one array for each of the opt"):
        optimizer.set_weights(changed[:-1])
    assert_same([to_numpy(v) for v in optimizer.variables], before)
    optimizer.set_weights(changed)
    assert_same([to_numpy(v) for v in optimizer.variables], changed)


# The process dies.

STEPS = 7
# A process that is to be killed sleeps as long after each step.
PAUSE = 0.01

PROCESS = """
import os
import signal
import sys
import threading
import time

import keras
import numpy as np
import test_faults

folder, delay, epochs = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
# A file that is half written is Keras' affair, and so is one of the two files
# of a backup without the other.
writing = threading.Lock()


def die():
    time.sleep(delay)
    with writing:
        os.kill(os.getpid(), signal.SIGKILL)


class Backup(keras.callbacks.BackupAndRestore):
    def on_epoch_end(self, epoch, logs=None):
        with writing:
            super().on_epoch_end(epoch, logs)


class Slowly(keras.callbacks.Callback):
    started = False

    def on_train_batch_end(self, batch, logs=None):
        if delay and not self.started:
            self.started = True
            threading.Thread(target=die, daemon=True).start()
        time.sleep(test_faults.PAUSE if delay else 0)


callbacks = [Backup(folder + "/backup"), Slowly()]
values = test_faults.run_to_the_end(callbacks, epochs)
np.savez(folder + "/end.npz", *values)
"""


def run_to_the_end(callbacks=(), epochs=10):
    keras.utils.set_random_seed(1)
    model = mlp()
    # Measures at other steps of each epoch.
    model.compile(adafisher(factor_update_steps=4), loss=cross_entropy())
    x, y = data(examples=8 * STEPS)
    model.fit(
        x,
        y,
        batch_size=8,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )
    return state(model)


def end_after_kills(folder, delays, epochs):
    """Kill one process after the other, and let the last one finish."""
    for delay in [*delays, 0.0]:
        process = subprocess.run(
            [
                sys.executable,
                "-c",
                PROCESS,
                str(folder),
                str(delay),
                str(epochs),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    [str(ROOT), str(ROOT / "tests"), *sys.path]
                ),
            },
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        expected = -signal.SIGKILL if delay else 0
        assert process.returncode == expected, process.stderr
    with np.load(folder / "end.npz") as file:
        return [file[name] for name in file.files]


def check_kills(count, folder):
    generator = random.Random(0)
    delays = [generator.uniform(0.02, 0.5) for _ in range(count)]
    # However fast the machine is, none comes to the end before it is killed.
    epochs = math.ceil(sum(delays) / (STEPS * PAUSE)) + 1
    actual = end_after_kills(folder, delays, epochs)
    assert_same(actual, run_to_the_end(epochs=epochs))


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path):
    check_kills(1, tmp_path)


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times(tmp_path):
    check_kills(10, tmp_path)


def test_a_backup_that_is_cut_off_falls_back_to_the_one_before(tmp_path):
    """If Keras is asked to keep two, and the process died while it wrote."""
    folder = tmp_path / "backup"

    class Die(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 5:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(folder, double_checkpoint=True)

    with pytest.raises(KeyboardInterrupt):
        run_to_the_end([backup(), Die()])
    latest = folder / "latest.weights.h5"
    latest.write_bytes(latest.read_bytes()[:1000])
    assert_same(run_to_the_end([backup()]), run_to_the_end())
