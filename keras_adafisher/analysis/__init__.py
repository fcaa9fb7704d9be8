"""Look at the curvature: full Kronecker factors, and how diagonal they are.

    from keras_adafisher import analysis

AdaFisher keeps the diagonals of two matrices per layer, `H`, the second moment
of the layer's input, and `S`, that of the gradient at its pre-activation. The
functions here compute the whole matrices, for one batch, and the numbers by
which the paper judges what is lost without the rest (Martins Gomes et al.,
ICLR 2025, arXiv 2405.16397, Section 3.1 and Appendix A). Nothing of this runs
in training. All results are NumPy arrays; `keras_adafisher.plotting` draws
them.
"""

from keras_adafisher.analysis.full_factors import kronecker_factors
from keras_adafisher.analysis.full_factors import KroneckerFactors
from keras_adafisher.analysis.matrices import diagonal_energy
from keras_adafisher.analysis.matrices import fourier_spectrum
from keras_adafisher.analysis.matrices import gershgorin
from keras_adafisher.analysis.matrices import GershgorinDisks
from keras_adafisher.analysis.matrices import Spectrum
from keras_adafisher.analysis.matrices import spectrum
from keras_adafisher.analysis.tables import diagonal_energy_table

# A float32 matrix with so many rows and columns takes 1 GiB. Users may set it.
LARGEST_FACTOR = 16_384

__all__ = [
    "LARGEST_FACTOR",
    "GershgorinDisks",
    "KroneckerFactors",
    "Spectrum",
    "diagonal_energy",
    "diagonal_energy_table",
    "fourier_spectrum",
    "gershgorin",
    "kronecker_factors",
    "spectrum",
]
