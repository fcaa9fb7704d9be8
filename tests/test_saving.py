import copy
import pickle
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest
from models import assert_same
from models import cnn
from models import cross_entropy
from models import image_data
from models import state

import keras_adafisher

STEPS = 7


def compiled(**arguments):
    model = cnn()
    model.compile(
        keras_adafisher.AdaFisher(factor_update_steps=3, **arguments),
        loss=cross_entropy(),
    )
    return model


def batches():
    x, y = image_data(examples=8 * STEPS)
    return list(zip(np.split(x, STEPS), np.split(y, STEPS), strict=True))


def train(model, steps):
    for x, y in steps:
        model.train_on_batch(x, y)


@pytest.fixture(scope="module")
def uninterrupted():
    keras.utils.set_random_seed(1)
    model = compiled()
    train(model, batches())
    return state(model)


# A file that was saved before the first step has no optimizer state. Keras
# says so, with Adam too.
@pytest.mark.filterwarnings("default:Skipping variable loading")
@pytest.mark.parametrize("cut", range(STEPS))
def test_resuming_is_as_if_there_had_been_no_interruption(
    cut, uninterrupted, tmp_path
):
    keras.utils.set_random_seed(1)
    model = compiled()
    train(model, batches()[:cut])
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    assert type(resumed.optimizer) is keras_adafisher.AdaFisher
    train(resumed, batches()[cut:])
    assert_same(state(resumed), uninterrupted)


def test_resuming_in_the_middle_of_an_accumulation(tmp_path):
    keras.utils.set_random_seed(1)
    model = compiled(gradient_accumulation_steps=2)
    train(model, batches()[:3])
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, resumed):
        train(each, batches()[3:])
    assert_same(state(resumed), state(model))


def test_weights_and_optimizer_return_into_a_model_that_has_trained_on(
    uninterrupted, tmp_path
):
    """Also where the step to return to measures and the next one doesn't."""
    keras.utils.set_random_seed(1)
    model = compiled()
    train(model, batches()[:3])
    model.save_weights(tmp_path / "checkpoint.weights.h5")
    train(model, batches()[3:5])
    model.load_weights(tmp_path / "checkpoint.weights.h5")
    train(model, batches()[3:])
    assert_same(state(model), uninterrupted)


def test_early_stopping_restores_the_best_weights():
    x, y = image_data()
    model = compiled()
    stop = keras.callbacks.EarlyStopping(
        monitor="loss", patience=0, mode="max", restore_best_weights=True
    )
    model.fit(x, y, epochs=3, callbacks=[stop], verbose=0)
    assert len(model.get_weights()) == len(cnn().get_weights())


PLAIN_PROCESS = """
import sys
import keras
import numpy as np

folder = sys.argv[1]
data = np.load(folder + "/data.npz")
model = keras.models.load_model(folder + "/wrapped.keras", compile=False)
other = keras.models.clone_model(model)
other.load_weights(folder + "/wrapped.weights.h5")
for m in (model, other):
    np.testing.assert_array_equal(m.predict(data["x"], verbose=0), data["z"])
    assert len(m.trainable_variables) == int(data["count"])
model.compile("adam", "mse")
model.train_on_batch(data["x"], data["z"])
model.save(folder + "/plain.keras")
model.save_weights(folder + "/plain.weights.h5")
np.save(folder + "/plain.npy", model.predict(data["x"], verbose=0))
assert "keras_adafisher" not in sys.modules
"""


def test_files_pass_to_and_from_a_process_without_the_package(tmp_path):
    x, _ = image_data(examples=4)
    count = len(cnn().trainable_variables)
    model = compiled()
    train(model, batches()[:2])
    model.save(tmp_path / "wrapped.keras")
    model.save_weights(tmp_path / "wrapped.weights.h5")
    z = model.predict(x, verbose=0)
    np.savez(tmp_path / "data.npz", x=x, z=z, count=count)
    # With Adam's state in the file, which isn't AdaFisher's: Keras warns.
    script = tmp_path / "plain.py"
    script.write_text(PLAIN_PROCESS)
    subprocess.run(
        [sys.executable, str(script), str(tmp_path)], check=True, timeout=300
    )

    expected = np.load(tmp_path / "plain.npy")
    loaded = keras.models.load_model(tmp_path / "plain.keras", compile=False)
    loaded.compile(keras_adafisher.AdaFisher(), loss=cross_entropy())
    wrapped = compiled()
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        wrapped.optimizer.build(wrapped.trainable_variables)
        wrapped.load_weights(tmp_path / "plain.weights.h5")
    for each in (loaded, wrapped):
        assert_same([each.predict(x, verbose=0)], [expected])
        train(each, batches()[:1])


def test_files_hold_no_trace_of_a_wrapper(tmp_path):
    keras.utils.set_random_seed(1)
    model = cnn()

    def names(path):
        model.save_weights(path)
        found = []
        with h5py.File(path) as file:
            file["layers"].visit(found.append)
        return found

    plain = names(tmp_path / "plain.weights.h5")
    keras_adafisher.wrap(model)
    assert names(tmp_path / "wrapped.weights.h5") == plain


def test_loading_in_safe_mode(tmp_path):
    model = compiled()
    train(model, batches()[:1])
    model.save(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras", safe_mode=True)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_alone_as_the_original_would(copied):
    model = compiled()
    train(model, batches()[:2])
    before = state(model)
    twin = copied(model)
    train(twin, batches()[2:5])
    assert_same(state(model), before)
    train(model, batches()[2:5])
    assert_same(state(model), state(twin))


def test_a_clone_is_wrapped_for_itself():
    model = compiled()
    train(model, batches()[:2])
    before = state(model)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    train(clone, batches()[2:5])
    assert_same(state(model), before)
    own = {id(v) for v in model.variables}
    assert len(clone.variables) == len(own)
    assert not own & {id(v) for v in clone.variables}
