"""What a type checker says of a user's code: `make lint` runs it, no test.

Each `type: ignore` is an error that it has to find.
"""

from collections.abc import Sequence
from typing import assert_type
from typing import Literal

import keras

import keras_adafisher
from keras_adafisher import analysis
from keras_adafisher.integration.coverage_report import Coverage
from keras_adafisher.integration.coverage_report import ParameterCoverage
from keras_adafisher.optimizer import KroneckerFactors
from keras_adafisher.wrappers import Block
from keras_adafisher.wrappers import DenseBlock


def optimizers(model: keras.Model) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(0.003, 1000)
    optimizer = keras_adafisher.AdaFisher(schedule, rms_decay=None)
    assert_type(optimizer.beta, float)
    assert_type(optimizer.factors(model.weights[0]), KroneckerFactors)
    published = keras_adafisher.AdaFisherW.as_published(beta=0.8)
    assert_type(published, keras_adafisher.AdaFisherW)
    keras_adafisher.AdaFisherMuon(0.04, keep_roots=True, exclude_layers=["a"])
    keras_adafisher.AdaFisher(beta="0.9")  # type: ignore[arg-type]
    keras_adafisher.AdaFisher(damping=None)  # type: ignore[arg-type]
    keras_adafisher.AdaFisherW(normalization="max")  # type: ignore[arg-type]
    keras_adafisher.AdaFisherMuon(ns_steps=0.5)  # type: ignore[arg-type]


def models(model: keras.Model) -> None:
    keras_adafisher.wrap(model, exclude_layers=["head"])
    keras_adafisher.wrap(model, exclude_layers=1)  # type: ignore[arg-type]
    report = keras_adafisher.coverage(model)
    assert_type(report, Coverage)
    assert_type(report.rows, list[ParameterCoverage])
    assert_type(report.factored_fraction, float)
    assert_type(report.rows[0].shape, tuple[int, ...])
    history = keras_adafisher.FisherHistory(every=10, csv_path="history.csv")
    assert_type(history.records[0].step, int)
    keras_adafisher.FisherHistory(every="step")  # type: ignore[arg-type]


def steps(optimizer: keras_adafisher.AdaFisher) -> None:
    @keras_adafisher.training_step(optimizer)
    def train_step(x: int) -> str:
        return str(x)

    assert_type(train_step(1), str)
    scope = keras_adafisher.decision_scope()
    assert_type(scope, Literal["layer", "step"])
    keras_adafisher.set_decision_scope(scope)
    keras_adafisher.set_decision_scope("model")  # type: ignore[arg-type]


class MyLayer(keras.layers.Layer):
    pass


@keras_adafisher.register_wrapper(MyLayer)
class MyWrapper(keras_adafisher.LayerWrapper):
    def make_blocks(self) -> Sequence[Block]:
        return [DenseBlock(self.host.kernel, None, *self.host.kernel.shape)]

    def call(self, inputs: object) -> object:
        return self.tap(self.host_call(inputs), inputs)


keras_adafisher.register_wrapper(MyLayer)(dict)  # type: ignore[type-var]
DenseBlock(None, None, "2", 3)  # type: ignore[arg-type]
assert_type(MyWrapper(MyLayer()).blocks, list[Block])
assert_type(analysis.diagonal_energy([[1.0]]), float)
assert_type(analysis.spectrum([[1.0]], noise=0.1).largest_shift, float)
