"""The optimizers."""

from keras_adafisher.optimizer.adafisher import AdaFisher
from keras_adafisher.optimizer.adafisher_muon import AdaFisherMuon
from keras_adafisher.optimizer.adafisherw import AdaFisherW
from keras_adafisher.optimizer.inspection import KroneckerFactors
from keras_adafisher.optimizer.schedules import InverseSqrtDecay

__all__ = [
    "AdaFisher",
    "AdaFisherMuon",
    "AdaFisherW",
    "InverseSqrtDecay",
    "KroneckerFactors",
]
