"""Write docs/gallery.md and its pictures.

    make docs-gallery

The page is a program: first `PREPARE`, then the lines of each picture, each of
which leaves a `figure`. They are run here, and by the tests as all pages are.
"""

import argparse
import dataclasses
import pathlib

ROOT = pathlib.Path(__file__).parents[1]

INTRODUCTION = """\
# Gallery

<!-- Written by `make docs-gallery` (`tools/gallery.py`). -->

What `keras_adafisher.plotting` draws, each picture with the lines that make
it. They go on after these, which train a small network on scikit-learn's
digits, with AdaFisher and with Adam, and record what both divide by:
"""

PREPARE = """\
import keras
import sklearn.datasets

import keras_adafisher
from keras_adafisher import analysis
from keras_adafisher import plotting
from keras_adafisher.callbacks import SecondMomentHistory

digits = sklearn.datasets.load_digits()
x, y = digits.images[..., None].astype("float32") / 16, digits.target
histories = [keras_adafisher.FisherHistory(10), SecondMomentHistory(10)]
optimizers = {
    "AdaFisher": keras_adafisher.AdaFisher(),
    "Adam": keras.optimizers.Adam(),
}
trajectories = {}
for name, history in zip(optimizers, histories, strict=True):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="tanh", name="hidden"),
            keras.layers.Dense(10, name="output"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizers[name], loss=loss)
    snapshots = trajectories[name] = [model.get_weights()]
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: snapshots.append(model.get_weights())
    )
    model.fit(x, y, 64, 8, verbose=0, callbacks=[history, keep])
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of the page.

    Attributes:
        name: String, that of its file.
        title: String.
        text: String, what there is to see.
        code: String, the lines that make it.
    """

    name: str
    title: str
    text: str
    code: str


PICTURES = (
    Picture(
        "histograms",
        "Distributions over training",
        "Each column is a histogram, darker is more; the lines are quantiles.\n"
        "Adam's second moment spreads over many powers of ten, the Fisher\n"
        "diagonal over little more than one.",
        """\
kernel = model.get_layer("hidden").kernel
figure = plotting.plot_histograms(*histories, parameter=kernel)
figure.savefig("histograms.pdf")
""",
    ),
    Picture(
        "bars",
        "Distributions at three moments",
        "The same as bar charts, at the first record, one in the middle and\n"
        "the last.",
        """\
figure = plotting.plot_bars(*histories, parameter=kernel, moments=3)
figure.savefig("bars.pdf")
""",
    ),
    Picture(
        "factors",
        "The factors of a layer",
        "How much of the two matrices of a layer is on their diagonals, which\n"
        "is what AdaFisher keeps of them.",
        """\
layers = [model.get_layer(name) for name in ("hidden", "output")]
factors = analysis.kronecker_factors(model, x[:256], y[:256], layers)
figure = plotting.plot_factors(factors[1])
figure.savefig("factors.pdf")
""",
    ),
    Picture(
        "gershgorin",
        "Gershgorin's disks",
        "Each eigenvalue lies in one of the disks. Next to them are those of\n"
        "the factor with noise off the diagonal.",
        """\
figure = plotting.plot_gershgorin(
    factors[1].gradient, "Output layer, S", noise=0.05
)
figure.savefig("gershgorin.pdf")
""",
    ),
    Picture(
        "gershgorin_large",
        "Gershgorin's disks of a large factor",
        "With more than 60 rows, colour says which share of the disks holds a\n"
        "point.",
        """\
figure = plotting.plot_gershgorin(
    factors[0].activation, "Hidden layer, H", noise=0.05
)
figure.savefig("gershgorin_large.pdf")
""",
    ),
    Picture(
        "spectrum",
        "Eigenvalues with and without noise",
        "If noise off the diagonal hardly moves them, what is there hardly\n"
        "matters.",
        """\
figure = plotting.plot_spectrum(
    factors[0].gradient, noise=0.05, title="Hidden layer, S"
)
figure.savefig("spectrum.pdf")
""",
    ),
    Picture(
        "surface",
        "Ways over a loss of two parameters",
        "A bent valley, fifty times as steep across as along.",
        """\
def valley(x, y):
    return x**2 / 50 + (y - keras.ops.sin(x)) ** 2 + 0.01


walkers = {
    "SGD": keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": keras.optimizers.Adam(0.1),
    "AdaFisher": keras_adafisher.AdaFisher(0.1, factor_update_steps=1),
}
figure = plotting.loss_surface_trajectories(
    valley, walkers, start=(-5.0, 2.5), steps=80, verbose=0
)
figure.savefig("surface.pdf")
""",
    ),
    Picture(
        "weights",
        "Ways through the weights of a network",
        "On the plane of the first two principal components of all snapshots.\n"
        "With `verbose=1`, the default, Keras' progress bar counts the losses\n"
        "that are computed.",
        """\
figure = plotting.weight_trajectories(
    model, x[:256], y[:256], trajectories, resolution=12, verbose=0
)
figure.savefig("weights.pdf")
""",
    ),
    Picture(
        "column",
        "One column of a paper",
        "3.35 inches wide, with text of 7 points that stays text in a PDF.",
        """\
with plotting.paper_style(columns=1):
    figure = plotting.plot_spectrum(factors[1].gradient, noise=0.05)
    figure.savefig("column.pdf")
""",
    ),
)


def main():
    """Draw all pictures and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs")
    parser.add_argument(
        "--only", nargs="*", help="names of pictures; the page isn't written"
    )
    arguments = parser.parse_args()

    images = arguments.docs / "images" / "gallery"
    images.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION, f"```python\n{PREPARE}```\n"]
    namespace = {"__name__": "__main__"}
    exec(PREPARE, namespace)
    for picture in PICTURES:
        print(picture.title, flush=True)
        # The reader's copy is a PDF in the working directory; the site's is
        # a picture of screen size.
        code = "\n".join(
            line
            for line in picture.code.splitlines()
            if ".savefig(" not in line
        )
        exec(code, namespace)
        if not arguments.only or picture.name in arguments.only:
            figure = namespace["figure"]
            # A column of a paper is narrow.
            dpi = 100 if figure.get_figwidth() > 4 else 200
            figure.savefig(images / f"{picture.name}.png", dpi=dpi)
        parts.append(
            f"## {picture.title}\n\n{picture.text}\n\n"
            f"```python\n{picture.code}```\n\n"
            f"![{picture.title}](images/gallery/{picture.name}.png)\n"
        )
    if not arguments.only:
        (arguments.docs / "gallery.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
