"""Callbacks that record what an optimizer divides its momentum by."""

from keras_adafisher.callbacks.history import DistributionHistory
from keras_adafisher.callbacks.history import FisherHistory
from keras_adafisher.callbacks.history import SecondMomentHistory
from keras_adafisher.callbacks.records import BINS
from keras_adafisher.callbacks.records import QUANTILES
from keras_adafisher.callbacks.records import Record
from keras_adafisher.callbacks.records import SAMPLE

__all__ = [
    "BINS",
    "QUANTILES",
    "SAMPLE",
    "DistributionHistory",
    "FisherHistory",
    "Record",
    "SecondMomentHistory",
]
