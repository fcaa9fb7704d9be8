"""What all pictures share: figures, styles, axes and checks of arguments."""

import contextlib
import contextvars
from contextlib import AbstractContextManager
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.ticker import LogLocator
from matplotlib.ticker import MaxNLocator
from matplotlib.ticker import NullFormatter

from keras_adafisher.optimizer.arguments import is_integer

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")

# Inches, of the usual pages with two columns.
_COLUMN_WIDTHS = {1: 3.35, 2: 6.95}

_page_width = contextvars.ContextVar("page_width", default=None)


def paper_style(columns: Literal[1, 2] = 1) -> AbstractContextManager[None]:
    """Context in which figures fit a page that has two columns.

    ```python
    with plotting.paper_style(columns=2):
        figure = plotting.plot_factors(factors[0])
        figure.savefig("factors.pdf")
    ```

    Figures are 3.35 or 6.95 inches wide, and their text has 7 points, so that
    they are included as they are. In PDF and SVG files, text stays text. Save
    figures inside of the context: some settings matter only then.

    Args:
        columns: Int, the columns that a figure reaches over: 1 or 2. Those
            with several panels side by side need 2. Defaults to `1`.

    Returns:
        Context manager.

    Raises:
        ValueError: `columns` is neither.
    """
    if not is_integer(columns) or columns not in _COLUMN_WIDTHS:
        raise ValueError(
            f"Argument `columns` must be 1 or 2. Received: columns={columns}"
        )
    return _page_of(_COLUMN_WIDTHS[columns])


@contextlib.contextmanager
def _page_of(width):
    token = _page_width.set(width)
    settings = {
        "font.size": 7,
        "axes.linewidth": 0.6,
        "axes.titlesize": "medium",
        "figure.titlesize": "medium",
        "grid.linewidth": 0.4,
        "lines.linewidth": 1.0,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        "svg.fonttype": "none",
        "savefig.dpi": 300,
    }
    try:
        with matplotlib.rc_context(settings):
            yield
    finally:
        _page_width.reset(token)


def new_figure(width, height):
    """A figure of some inches, or as wide as the page's style wants it."""
    page = _page_width.get()
    if page is not None:
        width, height = page, height * page / width
    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def panels(rows, columns, height=4.2):
    """A figure, and the list of its axes, row by row."""
    figure = new_figure(4.6 * columns + 1, height)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def points(size):
    """The size of a marker or line, in proportion to that of the text."""
    return size * matplotlib.rcParams["font.size"] / 10


def log_axis(axis, low, high):
    """Make an axis logarithmic, with labels that are plain numbers.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
        low, high: Floats > 0, the axis' range.
    """
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    # There may be no power of ten on it.
    if high < 4 * low:
        axis.set_major_locator(MaxNLocator(5))
    elif high < 1e3 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if low >= 1e-3 and high <= 1e5:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def integer_ticks(axis):
    """Let an axis of steps or rows have integer ticks only."""
    axis.set_major_locator(MaxNLocator(integer=True))


def scientific(value):
    """A number as a formula: 2.5·10⁻⁸ but 0.25."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"${mantissa} \cdot 10^{{{int(exponent)}}}$"


def check_named(argument, value):
    """Raise a `ValueError` if an argument is no dict with entries."""
    if not isinstance(value, dict) or not value:
        raise ValueError(
            f"Argument `{argument}` must be a dict with an entry for each "
            f"line to draw. Received: {argument}={value}"
        )


def check_count(argument, value, least):
    """Raise a `ValueError` if an argument is no integer, or too small."""
    if not is_integer(value) or value < least:
        raise ValueError(
            f"Argument `{argument}` must be an integer >= {least}. "
            f"Received: {argument}={value}"
        )


def check_verbose(value):
    """Raise a `ValueError` if `verbose` is neither 0 nor 1."""
    if not is_integer(value) or value not in (0, 1):
        raise ValueError(
            f"Argument `verbose` must be 0 or 1. Received: verbose={value}"
        )


def check_numbers(argument, value, shape, what, is_ascending=False):
    """Raise a `ValueError` if an argument is no finite array of a shape."""
    try:
        array = np.asarray(value, "float64")
    except (TypeError, ValueError):
        array = np.array(np.nan)
    is_right = array.shape == shape and np.all(np.isfinite(array))
    if not is_right or (is_ascending and np.any(np.diff(array) <= 0)):
        raise ValueError(
            f"Argument `{argument}` must be {what}. "
            f"Received: {argument}={value}"
        )
