"""Pictures of the curvature and of the ways that optimizers take.

    from keras_adafisher import plotting

Needs matplotlib: `pip install keras-adafisher[plot]`. Each function returns a
`matplotlib.figure.Figure` that no window shows; `figure.savefig("name.pdf")`
saves it, and a notebook draws it. Inside of `paper_style`, figures fit a page
of two columns. Colours are those of Okabe and Ito, which colour-blind readers
can tell apart; lines differ in style too, for print.
"""

try:
    import matplotlib as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`keras_adafisher.plotting` needs matplotlib: "
        "`pip install keras-adafisher[plot]`."
    ) from error

from keras_adafisher.plotting.common import COLORS
from keras_adafisher.plotting.common import paper_style
from keras_adafisher.plotting.distributions import plot_bars
from keras_adafisher.plotting.distributions import plot_histograms
from keras_adafisher.plotting.matrices import plot_factors
from keras_adafisher.plotting.matrices import plot_gershgorin
from keras_adafisher.plotting.matrices import plot_spectrum
from keras_adafisher.plotting.trajectories import loss_surface_trajectories
from keras_adafisher.plotting.trajectories import weight_trajectories

__all__ = [
    "COLORS",
    "loss_surface_trajectories",
    "paper_style",
    "plot_bars",
    "plot_factors",
    "plot_gershgorin",
    "plot_histograms",
    "plot_spectrum",
    "weight_trajectories",
]
