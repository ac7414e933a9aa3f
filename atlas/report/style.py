"""One look for all figures: restrained, readable at 900 pixels, safe for colour-blind readers."""

import pathlib
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

_RC = matplotlib.rc_params_from_file(pathlib.Path(__file__).with_name("house.mplstyle"), use_default_template=False)

# Okabe and Ito's palette without its yellow, which is too faint for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F4F24", "#333333")
INK, MUTED, FAINT = _RC["text.color"], _RC["axes.edgecolor"], "#DDDDDD"
SEQUENTIAL, DIVERGING = "viridis", "RdBu"
WIDTH = 9.0  # inches; 900 pixels at the report's 100 per inch
MAX_SERIES = len(COLOURS)
MAX_PANELS = 12

styled = matplotlib.rc_context(_RC)  # decorates functions that draw, and leaves the caller's own settings alone


def canvas(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches, that keeps its parts from overlapping."""
    spaced = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.05)
    return Figure(figsize=(width, height), layout=spaced)


def panels(
    count: int, columns: int = 3, height: float = 2.5, xlabel: str = "", ylabel: str = ""
) -> tuple[Figure, list[Axes]]:
    """A grid of `count` panels, as few rows as they need, sharing no axes; labels stand below and left of the grid."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = canvas(height * rows + 0.7, WIDTH if columns > 1 else 0.7 * WIDTH)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in axes[count:]:
        spare.set_axis_off()
    for lowest in axes[max(count - columns, 0) : count]:
        lowest.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    return figure, list(axes[:count])


def short(value: float) -> str:
    """A number in three digits with a letter for the power of a thousand.

    >>> short(1_234_000), short(0.5), short(2e12), short(6e21)
    ('1.23M', '0.5', '2T', '6e21')
    """
    if abs(value) >= 1e15:
        return f"{value:.3g}".replace("e+", "e")
    for power, letter in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{value / 10**power:.3g}{letter}"
    return f"{value:.3g}"


def times(value: float) -> str:
    """A multiple: 2×."""
    return f"{value:g}×"


def log_axis(axis, values: ArrayLike, most: int = 4, text: Callable[[float], str] = short) -> None:
    """A logarithmic axis of a panel with a few ticks as `text`, over positive finite `values`."""
    name = axis.axis_name
    values = np.asarray(values, float)
    values = values[np.isfinite(values) & (values > 0)]
    getattr(axis.axes, f"set_{name}scale")("log")
    if not len(values):
        return
    low, high = np.log10(values.min()), np.log10(values.max())
    if high - low < 0.05:
        low, high = low - 0.1, high + 0.1
    ticks = _ticks(low, high, most)
    margin = 0.05 * (high - low)
    getattr(axis.axes, f"set_{name}lim")(10 ** (low - margin), 10 ** (high + margin))
    axis.set_ticks(ticks, [text(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def _ticks(low: float, high: float, most: int) -> Sequence[float]:
    """At most `most` round numbers between 10^low and 10^high, more of them where the range is short."""
    if high - low < 0.75:
        ticks = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(10**low, 10**high)
        return [tick for tick in ticks if 0.99 * 10**low <= tick <= 1.01 * 10**high]
    decades = range(int(np.floor(low)) - 1, int(np.ceil(high)) + 1)
    for steps, every in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
        ticks = [s * 10.0**d for d in decades if d % every == 0 for s in steps]
        ticks = [tick for tick in ticks if low - 0.02 <= np.log10(tick) <= high + 0.02]
        if len(ticks) <= most:
            break
    return ticks


def label_ends(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right end of lines, (y, text, colour) each, pushed apart so that none covers another."""
    ends = sorted((end for end in ends if np.isfinite(end[0])), key=lambda end: end[0])
    to_pixels = axes.transData.transform
    gap = 12.5 * axes.figure.dpi / 100
    placed = []
    for y, _, _ in ends:
        pixel = to_pixels((x, y))[1]
        placed.append(max(pixel, placed[-1] + gap) if placed else pixel)
    shift = (placed[-1] - to_pixels((x, ends[-1][0]))[1]) / 2 if ends else 0
    if ends:
        shift = min(shift, placed[0] - axes.bbox.y0 - gap / 2)  # never down over the axis
    for pixel, (y, text, colour) in zip(placed, ends, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(6, float(pixel - shift - to_pixels((x, y))[1]) * 72 / axes.figure.dpi),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def doubted(figure: Figure, text: str) -> None:
    """Writes a doubt across a finished figure."""
    figure.text(0.5, 0.5, text, ha="center", va="center", rotation=15, fontsize=36, color=MUTED, alpha=0.4)


def nothing(text: str) -> Figure:
    """A figure of one empty panel that says why it is empty."""
    figure = canvas(1.5)
    say(figure.subplots(), text)
    return figure


def say(axes: Axes, text: str) -> None:
    """An empty panel that says why it is empty."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, wrap=True, transform=axes.transAxes)
