"""How a layer's statistics reach the optimizer.

`probe.py` says how. What a backend does differently is in a subclass of `Probe`
in the file of its name, of which only the chosen one's is imported.
"""

from keras import backend as _keras_backend

from keras_adafisher.probe.probe import Probe
from keras_adafisher.probe.variables import mark_parameters
from keras_adafisher.probe.variables import probe_of
from keras_adafisher.probe.variables import probes_at
from keras_adafisher.probe.variables import probes_of
from keras_adafisher.probe.variables import unmark_parameters
from keras_adafisher.probe.variables import with_probes


def _class_of_backend() -> type[Probe]:
    if _keras_backend.backend() == "jax":
        from keras_adafisher.probe.jax import JaxProbe

        return JaxProbe
    if _keras_backend.backend() == "tensorflow":
        from keras_adafisher.probe.tensorflow import TensorFlowProbe

        return TensorFlowProbe
    if _keras_backend.backend() == "torch":
        from keras_adafisher.probe.torch import TorchProbe

        return TorchProbe
    return Probe


# The class of all probes that are made.
BackendProbe = _class_of_backend()

__all__ = [
    "BackendProbe",
    "Probe",
    "mark_parameters",
    "probe_of",
    "probes_at",
    "probes_of",
    "unmark_parameters",
    "with_probes",
]
