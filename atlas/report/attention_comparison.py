"""Figures of a comparison of attention kinds: one line a kind, everywhere in the same colour."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from atlas.report import style
from atlas.report.style import COLOURS


@style.styled
def training_curves(curves: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """A panel for each column that `titles` names: over the steps, thin each run, thick the mean over seeds.

    curves: one row a run and span of steps, with columns kind, seed, step and those of `titles`; NaN where a kind has
    no such number. Loss has a logarithmic axis.
    """
    shown = {column: title for column, title in titles.items() if column in curves and curves[column].notna().any()}
    figure, axes = style.panels(len(shown), columns=2, height=2.8)
    for axis, (column, title) in zip(axes, shown.items(), strict=True):
        for part, colour in _means(axis, curves, "step", column):
            for _, run in part.groupby("seed"):
                axis.plot(run.step, run[column], color=colour, lw=0.6, alpha=0.4)
        axis.set(title=title, xlabel="step")
        if column == "loss":
            style.log_axis(axis.yaxis, curves[column])
    _legend(figure, curves)
    return figure


@style.styled
def accuracy_by_length(accuracy: pd.DataFrame) -> Figure:
    """Exact matches over document length, a panel a task; dots are runs, lines the mean over seeds.

    accuracy: columns kind, seed, task, length (tokens), accuracy (0 to 1).
    """
    names = list(accuracy.task.unique())
    figure, axes = style.panels(len(names))
    for axis, task in zip(axes, names, strict=True):
        part = accuracy[accuracy.task == task]
        for mine, colour in _means(axis, part, "length", "accuracy"):
            axis.plot(mine.length, mine.accuracy, "o", color=colour, ms=3, alpha=0.5, mew=0)
        lengths = sorted(part.length.unique())
        axis.set_xscale("log")
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_xticks([], minor=True)
        axis.set(title=task, xlabel="document length, tokens", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("answers matched")
    _legend(figure, accuracy)
    return figure


@style.styled
def learning_rates(rates: pd.DataFrame) -> Figure:
    """Loss at the end of short runs over their learning rate; a cross marks a run that diverged.

    rates: columns kind, learning_rate, loss (nats per token; a run where it is NaN is not drawn), diverged.
    """
    figure, (axis,) = style.panels(1, height=3.4)
    if not np.isfinite(rates.loss).any():
        style.say(axis, "no short run ended with a finite loss")
        return figure
    for mine, colour in _means(axis, rates, "learning_rate", "loss"):
        for diverged, part in mine.groupby("diverged"):
            axis.plot(part.learning_rate, part.loss, "x" if diverged else "o", color=colour, ms=5)
    style.log_axis(axis.xaxis, rates.learning_rate, most=len(rates.learning_rate.unique()))
    style.log_axis(axis.yaxis, rates.loss)
    axis.set(xlabel="learning rate", ylabel="loss at the end, nats per token")
    _legend(figure, rates)
    return figure


def _means(axis: Axes, frame: pd.DataFrame, x: str, y: str) -> Iterator[tuple[pd.DataFrame, str]]:
    """Draws the mean over the seeds of every kind; gives a kind's rows that have the number, and its colour."""
    for kind, colour in _colours(frame).items():
        part = frame[(frame.kind == kind) & frame[y].notna()]
        mean = part.groupby(x)[y].mean()
        axis.plot(mean.index, mean, color=colour)
        yield part, colour


def _colours(frame: pd.DataFrame) -> dict[str, str]:
    """A colour for each kind, in the order of the frame."""
    return dict(zip(frame.kind.unique(), np.resize(COLOURS, frame.kind.nunique()), strict=True))


def _legend(figure: Figure, frame: pd.DataFrame) -> None:
    handles = [Line2D([], [], color=colour, label=kind) for kind, colour in _colours(frame).items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
