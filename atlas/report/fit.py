"""A fit of `experiments.fit` as pictures."""

import io

import numpy as np
from matplotlib.figure import Figure

from atlas.report import figures, style
from atlas.report.style import COLOURS, MUTED
from atlas.scaling import FLOPS_PER_PARAMETER_TOKEN, Fit, JointFit, Runs

_BEYOND = 30.0  # times the largest value of a column to which the law is drawn
_POINTS, _BUDGETS = 60, 5  # of a curve, and iso-FLOP curves
_DPI = 120


def draw_fit(fit: Fit | JointFit, runs: Runs) -> dict[str, bytes]:
    """The figures of a fit as PNG by file name: observed against predicted, residuals, the law, iso-FLOP curves."""
    if isinstance(fit, JointFit):  # which leaves the others out
        runs = runs.where(runs.own(runs.D) > 0)
    unit = runs.loss_unit or "loss"
    rows = runs.evaluations().assign(predicted=fit.predict_runs(runs)[0], split="")
    drawn = {}
    if np.all(runs.loss > 0):  # both are logarithmic
        drawn["observed.png"] = figures.observed_and_predicted(rows, unit)
        drawn["residuals.png"] = figures.residuals(runs, fit)
    if isinstance(fit, JointFit):
        drawn["law.png"] = figures.law(runs, fit, unit)
    else:
        drawn["law.png"] = law(runs, fit, unit)
        if {"N", "D"} <= set(fit.column_names):
            drawn["iso_flop.png"] = iso_flop(runs, fit, unit)
    return {name: _png(figure) for name, figure in drawn.items()}


@style.styled
def law(runs: Runs, fit: Fit, unit: str) -> Figure:
    """The law with its 90 % band against each of its columns, beyond the data, the others at the middle of the runs.

    Points are the rows moved along the law to the middle: their distance from the line is their residual.
    """
    columns = {column.name: column.read(runs, fit.tokens) for column in fit.model.columns}
    varied = {name: x for name, x in columns.items() if np.all(np.isfinite(x) & (x > 0)) and np.ptp(np.log(x)) > 1e-3}
    if not varied:
        return style.nothing("no column of the law varies in these runs")
    middle = {name: _middle(x) for name, x in columns.items()}
    raw, predicted = fit.model.residual == "raw", fit.predict_runs(runs)[0]
    figure, axes = style.panels(len(varied), columns=2, height=3.2, ylabel=unit)
    for axis, (name, x) in zip(axes, varied.items(), strict=True):
        grid = np.geomspace(x.min() / 1.3, x.max() * _BEYOND, _POINTS)
        loss, (low, high) = fit.predict(**middle | {name: grid})[0], fit.interval(**middle | {name: grid})
        axis.plot(grid, loss, color=COLOURS[0])
        axis.fill_between(grid, low, high, color=COLOURS[0], alpha=0.15, lw=0)
        axis.axvline(x.max(), color=MUTED, lw=0.8, ls=":")
        at = fit.predict(**middle | {name: x})[0]
        moved = at + runs.loss - predicted if raw else at * runs.loss / predicted
        axis.scatter(x, moved, s=8, color=COLOURS[1], alpha=0.45, lw=0)
        held = ", ".join(f"{other} = {style.short(middle[other])}" for other in varied if other != name)
        axis.set(xlabel=f"{name}, to {_BEYOND:g} times the largest", title=f"at {held}" if held else "")
        style.log_axis(axis.xaxis, grid)
        if not raw:
            style.log_axis(axis.yaxis, axis.lines[0].get_ydata())
    return figure


@style.styled
def iso_flop(runs: Runs, fit: Fit, unit: str) -> Figure:
    """Loss against N at budgets C = 6·N·D from the runs' middle to 30 times the largest, with the best N of each."""
    others = {column.name: column.read(runs, fit.tokens) for column in fit.model.columns}
    N, D = others.pop("N"), others.pop("D")
    middle = {name: _middle(values) for name, values in others.items()}
    flops = FLOPS_PER_PARAMETER_TOKEN * N * D
    figure = style.canvas(4.0, 0.7 * style.WIDTH)
    axis = figure.subplots()
    grid = np.geomspace(N.min() / 3, N.max() * _BEYOND, 4 * _POINTS)
    for colour, budget in zip(COLOURS, np.geomspace(np.median(flops), flops.max() * _BEYOND, _BUDGETS), strict=False):
        loss = fit.predict(N=grid, D=budget / (FLOPS_PER_PARAMETER_TOKEN * grid), **middle)[0]
        best = int(np.argmin(loss))
        near = np.abs(loss / loss[best] - 1.0) < 0.1
        axis.plot(
            grid[near], loss[near], color=colour, label=f"C = {style.short(budget)}, best N = {style.short(grid[best])}"
        )
        axis.plot(grid[best], loss[best], "o", color=colour, ms=4)
    style.log_axis(axis.xaxis, np.concatenate([line.get_xdata() for line in axis.lines]))
    axis.set(xlabel="parameters N", ylabel=unit)
    axis.legend()
    return figure


def _middle(values: np.ndarray) -> float:
    """The geometric mean of positive values; the median of others, such as infinite unique tokens."""
    return (
        float(np.exp(np.mean(np.log(values))))
        if np.all((values > 0) & np.isfinite(values))
        else float(np.median(values))
    )


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=_DPI)
    return content.getvalue()
