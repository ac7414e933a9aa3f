"""Figures of the runs and of the law: one function a figure, none of which fails for want of data."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from atlas.report import style
from atlas.report.style import COLOURS, FAINT, INK, MUTED
from atlas.scaling import COOLDOWN, Z90, Fit, JointFit, Runs

_K_STYLES = ((1, "-", "1 language"), (2, (0, (4, 1.5)), "2 languages"), (np.inf, (0, (1, 1.2)), "more"))


@style.styled
def loss_curves(runs: Runs, unit: str) -> Figure:
    """Loss of each language over all training tokens of its runs; colour N, line style the number of languages K.

    Lines join the rows of one run and phase; dots are cooled-down checkpoints or runs of a single row.
    """
    frame = _plain(runs)
    frame = frame[frame.own > 0]
    chosen = _busiest(frame.language, style.MAX_PANELS)
    figure, axes = style.panels(len(chosen), xlabel="training tokens, all languages", ylabel=unit)
    colours = _size_colours(frame.num_params)
    for axis, language in zip(axes, chosen, strict=True):
        part = frame[frame.language == language]
        for (_, phase), run in part.groupby(["run", "phase"], sort=False):
            run = run.sort_values("tokens")
            look = next(dash for most, dash, _ in _K_STYLES if run.K.iloc[0] <= most)
            colour = colours[run.num_params.iloc[0]]
            if len(run) > 1 and phase != COOLDOWN:
                axis.plot(run.tokens, run.loss, color=colour, ls=look, lw=1.2, alpha=0.85)
            else:
                axis.plot(run.tokens, run.loss, "o", color=colour, ms=3, alpha=0.8, mew=0)
        axis.set_title(language)
        style.log_axis(axis.xaxis, part.tokens)
        style.log_axis(axis.yaxis, _without_outliers(part.loss))
    sizes = sorted(colours)
    shown = np.unique(np.linspace(0, len(sizes) - 1, min(5, len(sizes))).round().astype(int))
    handles = [Line2D([], [], color=colours[sizes[i]], label=f"N = {style.short(sizes[i])}") for i in shown]
    handles += [Line2D([], [], color=MUTED, ls=dash, label=text) for _, dash, text in _K_STYLES]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.4, handlelength=2)
    return figure


@style.styled
def observed_and_predicted(rows: pd.DataFrame, unit: str) -> Figure:
    """Observed loss against the loss predicted, [language, loss, predicted, split]; split "" was fitted.

    Left all fitted rows; right rows that the predicting fit had not seen, by split.
    """
    figure = style.canvas(4.4)
    fitted, held = figure.subplots(1, 2)
    rows = rows[np.isfinite(rows.loss) & np.isfinite(rows.predicted)]
    for axis, title, part in (
        (fitted, "fitted rows", rows[rows.split == ""]),
        (held, "held-out rows", rows[rows.split != ""]),
    ):
        if part.empty:
            style.say(axis, f"no {title}")
            continue
        both = np.concatenate([part.loss, part.predicted])
        ends = np.array([both.min() * 0.98, both.max() * 1.02])
        axis.fill_between(ends, ends * 0.98, ends * 1.02, color=FAINT, lw=0, zorder=0)
        axis.plot(ends, ends, color=MUTED, lw=0.8)
        for i, (split, points) in enumerate(part.groupby("split")):
            colour = COLOURS[(i + (axis is held)) % len(COLOURS)]
            axis.scatter(points.predicted, points.loss, s=9, color=colour, alpha=0.55, lw=0, label=split or None)
        error = np.median(np.abs(np.log(part.loss / part.predicted)))
        axis.set_title(f"{title}: median error {100 * error:.2g} %")
        for side in (axis.xaxis, axis.yaxis):
            style.log_axis(side, both)
        axis.set(xlabel=f"predicted, {unit}", ylabel=f"observed, {unit}", box_aspect=1)
        if axis is held:
            axis.legend(loc="upper left", markerscale=2.5, handletextpad=0.2)
    return figure


@style.styled
def residuals(runs: Runs, fit: Fit | JointFit) -> Figure:
    """log(observed/predicted) of the fitted rows against N, tokens, their ratio and epochs: any structure is misfit."""
    frame = _plain(runs).assign(residual=100 * np.log(runs.loss / fit.predict_runs(runs)[0]))
    frame["ratio"] = frame.tokens / frame.num_params
    frame = frame[np.isfinite(frame.residual) & ~(frame.own <= 0)]
    figure = style.canvas(2.9)
    axes = figure.subplots(1, 4, sharey=True)
    limit = 1.1 * max(float(np.quantile(np.abs(frame.residual), 0.995)), 1e-3) if len(frame) else 1.0
    columns = {"num_params": "parameters N", "tokens": "training tokens", "ratio": "tokens / N", "epochs": "epochs"}
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        x = frame[column]
        axis.axhline(0, color=MUTED, lw=0.8)
        axis.set_xlabel(label)
        if not (x > 0).any():
            style.say(axis, f"no {label}\nrecorded")
            continue
        axis.scatter(x, frame.residual, s=6, color=COLOURS[0], alpha=0.3, lw=0)
        _binned(axis, x.to_numpy(), frame.residual.to_numpy())
        style.log_axis(axis.xaxis, x)
        axis.set_ylim(-limit, limit)
    axes[0].set_ylabel("residual of log loss, %")
    return figure


def _binned(axis, x: np.ndarray, y: np.ndarray) -> None:
    """Medians with their central 90 %, in up to eight groups of neighbouring x."""
    x = np.exp(np.round(np.log(x), 3))  # totals of shares differ in their last digits
    distinct = np.unique(x)
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 9))) if len(distinct) > 8 else distinct
    group = np.searchsorted(edges, x, side="right")
    for g in np.unique(group):
        low, middle, high = np.quantile(y[group == g], [0.05, 0.5, 0.95])
        at = np.exp(np.mean(np.log(x[group == g])))
        axis.plot([at, at], [low, high], color=INK, lw=1)
        axis.plot([at], [middle], "o", color=INK, ms=4)


@style.styled
def law(runs: Runs, fit: JointFit, unit: str) -> Figure:
    """The fitted law of each language with 90 % intervals: loss against N, and against effective tokens D_eff.

    Points are the fitted rows moved along the law to the panel's fixed tokens or size: their distance from
    the line is their residual.
    """
    languages = runs.evaluations().language
    chosen = _busiest(languages[languages.isin(fit.targets)], style.MAX_SERIES)
    rows = runs.where(languages.isin(chosen).to_numpy())
    language = rows.evaluations().language.to_numpy()
    index = pd.Index(fit.targets).get_indexer(language)
    share = np.asarray(fit.law.effective_share(*rows.aligned(fit.sources), index))
    # A run that transfer leaves no effective tokens has no place on their axis.
    rows, language, share = rows.where(share > 0), language[share > 0], share[share > 0]
    effective = share * rows.total_tokens
    ratio = rows.loss / fit.predict_runs(rows)[0]
    middle_D, middle_N = np.exp(np.median(np.log(effective))), np.exp(np.median(np.log(rows.N)))
    figure = style.canvas(4.3)
    axes = figure.subplots(1, 2, sharey=True)
    at_D, at_N = f"at D_eff = {style.short(middle_D)}", f"at N = {style.short(middle_N)}"
    views = (
        (axes[0], rows.N, "parameters N", at_D, lambda x: (x, middle_D)),
        (axes[1], effective, "effective tokens D_eff", at_N, lambda x: (middle_N, x)),
    )
    for axis, values, label, title, where in views:
        grid = np.geomspace(values.min() / 1.3, values.max() * 3, 60)
        # One call each for lines and points: every new length compiles anew.
        lines, bands = _alone(fit, np.repeat(chosen, len(grid)), *where(np.tile(grid, len(chosen))))
        points = _alone(fit, language, *where(values))[0] * ratio
        ends = []
        for i, (colour, name) in enumerate(zip(COLOURS, chosen, strict=False)):
            part = slice(i * len(grid), (i + 1) * len(grid))
            loss, spread = lines[part], np.exp(Z90 * bands[part] / lines[part])
            axis.plot(grid, loss, color=colour)
            axis.fill_between(grid, loss / spread, loss * spread, color=colour, alpha=0.15, lw=0)
            mine = language == name
            axis.scatter(values[mine], points[mine], s=8, color=colour, alpha=0.45, lw=0)
            ends.append((loss[-1], name, colour))
        style.log_axis(axis.xaxis, grid)
        axis.set(xlabel=label, title=title)
    shown = np.concatenate([line.get_ydata() for line in axes[0].lines + axes[1].lines])
    style.log_axis(axes[0].yaxis, _without_outliers(shown))
    axes[0].set_ylabel(unit)
    figure.draw_without_rendering()
    style.label_ends(axes[1], grid[-1], ends)
    return figure


def _alone(fit: JointFit, names: np.ndarray, N: np.ndarray, D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss and its deviation [n] of monolingual runs without repetition, whose D_eff is D; names [n]."""
    N, D = np.broadcast_to(N, names.shape), np.broadcast_to(D, names.shape)
    tokens = D[:, None] * (names[:, None] == np.asarray(fit.sources))
    return fit.predict(N, tokens, np.full(tokens.shape, np.inf), names)


def _plain(runs: Runs) -> pd.DataFrame:
    """Evaluations with K languages, own tokens and epochs of the evaluated one."""
    own = runs.own(runs.D)
    return runs.evaluations().assign(K=(runs.D > 0).sum(1), own=own, epochs=own / runs.own(runs.U))


def _busiest(languages: pd.Series, most: int) -> list[str]:
    """The `most` languages with the most rows, in alphabetical order."""
    return sorted(languages.value_counts(sort=True).index[:most])


def _size_colours(sizes: pd.Series) -> dict[float, tuple]:
    unique = np.sort(sizes.unique())
    shades = colormaps[style.SEQUENTIAL](np.linspace(0.05, 0.85, max(len(unique), 2)))
    return {float(N): tuple(shade) for N, shade in zip(unique, shades, strict=False)}


def _without_outliers(values) -> np.ndarray:
    """Values without a far upper tail: a diverged run must not squeeze all others into a line."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) < 8:
        return values
    low, high = np.quantile(np.log(values), [0.0, 0.9])
    return values[np.log(values) <= high + 1.0 * (high - low) + 0.05]
