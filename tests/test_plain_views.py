"""A wrapped model looks like a plain one wherever users look at it."""

import keras
import numpy as np
import pytest
from models import assert_same
from models import data
from models import mlp
from models import state
from models import to_numpy
from models import train
from models import trained
from models import weights

import keras_adafisher

BACKEND = keras.backend.backend()


def trained_model():
    return trained(keras_adafisher.AdaFisher(factor_update_steps=2))


def summary_of(model):
    lines = []
    model.summary(print_fn=lambda line, **kwargs: lines.append(line))
    return "\n".join(lines)


def test_summary_counts_the_weights():
    """6·5 + 5 + 5·3 + 3. Without an optimizer there would be no last lines."""
    summary = summary_of(trained_model())
    assert "Trainable params: 53 " in summary
    assert "Non-trainable params: 0 " in summary
    assert "adafisher" not in summary


def test_summary_of_a_plain_and_of_a_wrapped_model():
    model = mlp()
    plain = summary_of(model)
    keras_adafisher.wrap(model)
    assert summary_of(model) == plain


def test_trainable_variables_pair_up_with_those_of_a_plain_model():
    """As target networks in reinforcement learning are updated."""
    model, target = trained_model(), mlp()
    names = [v.name for v in target.trainable_variables]
    assert [v.name for v in model.trainable_variables][:4] == names
    pairs = zip(
        target.trainable_variables, model.trainable_variables, strict=False
    )
    for old, new in pairs:
        old.assign(0.5 * to_numpy(old) + 0.5 * to_numpy(new))
    assert_same(weights(target)[1:2], [w / 2 for w in weights(model)[1:2]])


def test_weights_go_both_ways_between_wrapped_and_plain_models():
    model, target = trained_model(), mlp()
    target.set_weights(model.get_weights())
    assert_same(weights(target), weights(model))
    model.set_weights(mlp().get_weights())


def export_savedmodel(model, path):
    model.export(path, format="tf_saved_model", verbose=False)


# Keras' PyTorch export fails for any optimizer (Keras 3.15).
@pytest.mark.skipif(BACKEND == "torch", reason="plain Keras fails with PyTorch")
def test_an_exported_model_has_no_trace_of_probes(tmp_path):
    tf = pytest.importorskip("tensorflow")
    model = trained_model()
    export_savedmodel(model, tmp_path / "model")
    loaded = tf.saved_model.load(tmp_path / "model")
    assert len(loaded.variables) == 4
    x, _ = data(examples=4)
    try:
        outputs = loaded.serve(x)
    except tf.errors.InvalidArgumentError as error:
        if "deserialize" not in str(error):
            raise
        # JAX 0.12 with TensorFlow 2.21, whatever the optimizer.
        pytest.skip("TensorFlow is too old for what this JAX exports")
    np.testing.assert_allclose(
        to_numpy(outputs), model.predict(x, verbose=0), rtol=1e-5
    )


@pytest.mark.skipif(BACKEND == "torch", reason="plain Keras fails with PyTorch")
def test_a_model_whose_optimizer_averages_weights_is_exported(tmp_path):
    pytest.importorskip("tensorflow")
    model = trained(keras_adafisher.AdaFisher(use_ema=True))
    export_savedmodel(model, tmp_path / "model")
    assert (tmp_path / "model" / "saved_model.pb").exists()


@pytest.mark.skipif(
    BACKEND != "tensorflow",
    reason="not tried: JAX has no LiteRT export, PyTorch needs litert-torch",
)
def test_an_exported_lite_model_gives_the_same_outputs(tmp_path):
    import tensorflow as tf

    model = trained_model()
    model.export(tmp_path / "model.tflite", format="litert", verbose=False)
    lite = tf.lite.Interpreter(str(tmp_path / "model.tflite"))
    names = " ".join(t["name"] for t in lite.get_tensor_details())
    assert "request" not in names
    x, _ = data(examples=1)
    lite.allocate_tensors()
    lite.set_tensor(lite.get_input_details()[0]["index"], x)
    lite.invoke()
    np.testing.assert_allclose(
        lite.get_tensor(lite.get_output_details()[0]["index"]),
        model.predict(x, verbose=0),
        rtol=1e-4,
        atol=1e-6,
    )


NEEDED_FOR_ONNX = {
    "tensorflow": ["tf2onnx"],
    "jax": ["jax2onnx"],
    "torch": ["onnx", "onnxscript"],
}


def test_an_exported_onnx_model_has_no_trace_of_probes(tmp_path):
    for package in NEEDED_FOR_ONNX[BACKEND]:
        pytest.importorskip(
            package, reason=f"not tried: {BACKEND} needs {package}"
        )
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model = trained_model()
    path = str(tmp_path / "model.onnx")
    model.export(path, format="onnx", verbose=False)
    exported = onnx.load(path)
    shapes = sorted(
        tuple(tensor.dims)
        for tensor in exported.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    )
    assert shapes == [(3,), (5,), (5, 3), (6, 5)]
    x, _ = data(examples=4)
    name = exported.graph.input[0].name
    (actual,) = ReferenceEvaluator(exported).run(None, {name: x})
    np.testing.assert_allclose(
        actual, model.predict(x, verbose=0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.skipif(
    BACKEND != "torch", reason="JAX and TensorFlow have no `torch.export`"
)
def test_an_exported_program_of_pytorch_has_no_trace_of_probes(tmp_path):
    import torch

    model = trained_model()
    path = str(tmp_path / "model.pt2")
    model.export(path, format="torch", verbose=False)
    program = torch.export.load(path)
    # A layer's weights are there under two names.
    shapes = {tuple(v.shape) for v in program.state_dict.values()}
    assert sorted(shapes) == [(3,), (5,), (5, 3), (6, 5)]
    # Keras exports for a batch of one.
    x, _ = data(examples=1)
    actual = program.module()(torch.from_numpy(x))
    np.testing.assert_allclose(
        actual.detach().numpy(), model.predict(x, verbose=0), rtol=1e-5
    )


def test_training_goes_on_after_a_look(tmp_path):
    expected = trained_model()
    train(expected, range(3))
    model = trained_model()
    summary_of(model)
    if BACKEND != "torch":
        pytest.importorskip("tensorflow")
        export_savedmodel(model, tmp_path / "model")
    train(model, range(3))
    assert_same(state(model), state(expected))


def test_a_failed_export_leaves_the_model_wrapped(tmp_path):
    model = trained_model()
    with pytest.raises(ValueError, match="format"):
        model.export(tmp_path / "model", format="nonsense")
    train(model, range(3))
    expected = trained_model()
    train(expected, range(3))
    assert_same(state(model), state(expected))
