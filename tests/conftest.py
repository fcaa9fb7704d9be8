"""What all tests share. Each process runs one backend: `KERAS_BACKEND`."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile

if (
    os.environ.get("KERAS_BACKEND") == "jax"
    and "JAX_COMPILATION_CACHE_DIR" not in os.environ
    # JAX 0.5's cache crashes on a CPU.
    and tuple(map(int, importlib.metadata.version("jax").split(".")[:2]))
    >= (0, 10)
):
    # Many tests compile the same program, and that is half of their time. What
    # one process has compiled, all of this session load. Before JAX starts.
    _cache = tempfile.mkdtemp(prefix="jax-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ.update(
        JAX_COMPILATION_CACHE_DIR=_cache,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()

# Files about something that not every backend has.
collect_ignore = [
    name
    for name, backends in {
        "test_mirrored_strategy.py": ["tensorflow"],
        "test_tapes.py": ["tensorflow"],
        "test_distributed_tensorflow.py": ["tensorflow"],
        "test_torch.py": ["torch"],
        "test_torch_autodiff.py": ["torch"],
        "test_torch_counter.py": ["torch"],
        "test_torch_update.py": ["torch"],
        "test_distributed_torch.py": ["torch"],
        "test_distributed_jax.py": ["jax"],
        "test_rematerialization.py": ["jax", "torch"],
    }.items()
    if BACKEND not in backends
]

if BACKEND == "tensorflow":
    import tensorflow as tf

    # For `MirroredStrategy`, before TensorFlow starts.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )


def pytest_collection_finish():
    # `clear_session` collects garbage, and would look through all that the
    # backends have loaded, once per test.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_state():
    keras.utils.clear_session()
    # What the tests so far have imported and compiled stays, and there is no
    # need to look through it again: that took a fifth of the time.
    gc.freeze()
    keras.utils.set_random_seed(1234)
    yield
    # Keras makes its default policy when it is needed first, of what `floatx`
    # is then. The fixtures of the next module come before `clear_session`.
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pytest_terminal_summary(terminalreporter):
    """Print what tests recorded with `record_property("figure", text)`."""
    figures = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "figure"
    ]
    if figures:
        terminalreporter.section(f"figures ({BACKEND})")
        for figure in figures:
            terminalreporter.line(figure)
