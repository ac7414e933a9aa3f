"""Figures that decide: which languages help which, what more languages cost, what to train next."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from atlas.report import style
from atlas.report.style import COLOURS, FAINT, INK, MUTED
from atlas.scaling import CapacityExponents, JointFit, MixturePlan, iso_loss

_ROOMY = 16  # cells side by side, beyond which figures in them are smaller
_NUMBERS_UP_TO = 10  # languages, beyond which cells are too small for figures


@style.styled
def transfer(
    fit: JointFit,
    scores: pd.DataFrame | None,
    relatedness: Mapping[tuple[str, str], float] | None,
    relatedness_name: str,
) -> Figure:
    """Heat maps [target, source] side by side: fitted τ, measured bilingual scores, relatedness; those that exist.

    τ is hatched where the runs do not determine it and bold where its 90 % interval excludes 0.
    """
    maps = [("fitted transfer weight τ", _off_diagonal(fit.transfer_matrix()), fit)]
    if scores is not None:
        maps.append(("bilingual transfer score", scores, None))
    if relatedness:
        maps.append((relatedness_name, _off_diagonal(pd.Series(dict(relatedness)).unstack()), None))
    maps = [entry for entry in maps if entry[1].notna().any(axis=None)]
    if not maps:
        return style.nothing("no transfer was measured")
    # The fit's own order first.
    names = list(dict.fromkeys(name for _, table, _ in maps for name in (*table.index, *table.columns)))
    numbers = np.concatenate([table.to_numpy(float).ravel() for _, table, _ in maps])
    limit = float(np.nanquantile(np.abs(numbers), 0.98)) or 1.0  # of all maps, which are to be compared
    wide = len(names) > _NUMBERS_UP_TO or len(maps) == 1
    columns = 1 if wide else len(maps)
    side = style.WIDTH / columns
    rows = -(-len(maps) // columns)
    height = rows * (min(side, 7.0) + 0.3) if wide else 0.93 * side
    figure = style.canvas(height)
    for axis, (title, table, source) in zip(figure.subplots(rows, columns, squeeze=False).flat, maps, strict=True):
        _heat_map(axis, table, names, limit, title, source)
    return figure


def _off_diagonal(table: pd.DataFrame) -> pd.DataFrame:
    same = np.asarray(table.index)[:, None] == np.asarray(table.columns)[None]
    return table.astype(float).mask(same)


def _heat_map(
    axis: Axes, table: pd.DataFrame, names: list[str], limit: float, title: str, fit: JointFit | None
) -> None:
    targets = [name for name in names if name in table.index]
    sources = [name for name in names if name in table.columns]
    values = table.reindex(index=targets, columns=sources).to_numpy(float)
    image = axis.imshow(values, cmap=style.DIVERGING, vmin=-limit, vmax=limit)
    axis.set_facecolor("#F2F2F2")
    axis.grid(False)
    size = 9 if len(names) <= 20 else 7
    axis.set_xticks(range(len(sources)), sources, fontsize=size, rotation=90 if len(names) > 12 else 0)
    axis.set_yticks(range(len(targets)), targets, fontsize=size)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(title=title, xlabel="source", ylabel="target")
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.6, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    sure, guess = _verdicts(fit, targets, sources)
    cells = np.argwhere(np.isfinite(values))
    boxes = [Rectangle((j - 0.5, i - 0.5), 1, 1) for i, j in cells if guess[i, j]]
    hatch = "////" if len(names) <= 20 else "////////"
    axis.add_collection(PatchCollection(boxes, hatch=hatch, facecolor="none", edgecolor=MUTED, lw=0))
    room = axis.get_subplotspec().get_gridspec().ncols * len(names)
    digits = 8.5 if room <= _ROOMY else 6
    for i, j in cells:
        if len(names) <= _NUMBERS_UP_TO:
            text = f"{values[i, j]:.2f}".replace("-", "−").replace("0.", ".")
            look = {"color": "white" if abs(values[i, j]) > 0.6 * limit else INK}
            look["weight"] = "bold" if sure[i, j] else "normal"
            axis.text(j, i, text, ha="center", va="center", fontsize=digits, **look)


def _verdicts(fit: JointFit | None, targets: list[str], sources: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """[target, source] where the interval of τ excludes 0, and where τ is a guess; nowhere without a fit."""
    if fit is None:
        return (np.zeros((len(targets), len(sources)), bool),) * 2
    fields = ("low", "high", "identified")
    low, high, told = (fit.transfer_matrix(f).reindex(index=targets, columns=sources).to_numpy() for f in fields)
    told = told.astype(bool)
    return told & ((low > 0) | (high < 0)), ~told


@style.styled
def score_drift(scores: pd.DataFrame) -> Figure:
    """Bilingual transfer score of each pair against its anchor, at the largest N; arrows are bounds."""
    largest = scores[scores.num_params == scores.num_params.max()]
    largest = largest[np.isfinite(largest.score) | np.isfinite(largest.high)]
    targets = largest.target.value_counts().index[: style.MAX_PANELS]
    if not len(targets):
        return style.nothing("no score could be measured or bounded")
    figure, axes = style.panels(len(targets), height=2.3, xlabel="anchor d, monolingual tokens", ylabel="score")
    sources = list(dict.fromkeys(sorted(largest.source)))
    shown = largest[np.isfinite(largest.score)].score
    low, high = (shown.min(), shown.max()) if len(shown) else (-1.0, 1.0)
    for axis, target in zip(axes, sorted(targets), strict=True):
        part, ends = largest[largest.target == target], []
        axis.axhline(0, color=MUTED, lw=0.8)
        for source, pair in part.groupby("source"):
            colour = COLOURS[sources.index(source) % len(COLOURS)] if len(sources) <= len(COLOURS) else MUTED
            pair = pair.sort_values("anchor_tokens")
            measured, bounds = pair[pair.score.notna()], pair[pair.score.isna() & (pair.censored == "at most")]
            axis.plot(measured.anchor_tokens, measured.score, "o-", ms=3, lw=1.2, color=colour)
            band = measured.low.clip(-3), measured.high
            axis.fill_between(measured.anchor_tokens, *band, color=colour, alpha=0.1, lw=0)
            visible = bounds[bounds.high.between(low - 0.5, high + 0.5)]
            axis.plot(visible.anchor_tokens, visible.high, "v", ms=4, color=colour, mfc="none")
            if len(measured):
                ends.append((measured.score.iloc[-1], source, colour))
        axis.set_title(f"target {target}")
        style.log_axis(axis.xaxis, part.anchor_tokens)
        axis.set_ylim(low - 0.15 * (high - low + 0.1), high + 0.15 * (high - low + 0.1))
        figure.draw_without_rendering()
        style.label_ends(axis, max(part.anchor_tokens), ends)
    return figure


@style.styled
def iso_loss_curves(law: CapacityExponents, origin: str) -> Figure:
    """How N and all tokens can grow when K languages become r·K at the same loss; dots are the cheapest points.

    origin: where the law is from, for the title.
    """
    figure = style.canvas(4.2)
    axis = figure.subplots()
    u = np.concatenate([np.geomspace(1e-4, 0.5, 400), 1 - np.geomspace(0.5, 1e-4, 400)])
    multipliers = (2, 4, 8, 16)
    cheapest = [iso_loss(float(r), law=law) for r in multipliers]
    right = 4 * max(point.tokens for point in cheapest)
    top = 4 * max(point.params for point in cheapest)
    bottom, left = 0.5 * min(1.0, *(point.params for point in cheapest)), 0.7 * min(1.0, cheapest[0].tokens)
    for colour, r, best in zip(COLOURS, multipliers, cheapest, strict=False):
        curve = iso_loss(float(r), u, law)
        inside = (curve.tokens < right) & (curve.params < top) & (curve.tokens > left) & (curve.params > bottom)
        axis.plot(curve.tokens[inside], curve.params[inside], color=colour)
        label = f"{r}× languages: {best.tokens:.3g}× tokens, {best.params:.3g}× N"
        axis.plot([best.tokens], [best.params], "o", color=colour, ms=7, mec="white", label=label)
        if inside.any():
            end = int(np.argmax(np.where(inside, curve.params, 0)))
            end = (curve.tokens[end], curve.params[end])
            axis.annotate(f"{r}×", end, xytext=(0, 4), textcoords="offset points", color=colour, ha="center")
    axis.plot([1], [1], "s", color=INK, ms=6)
    axis.annotate("baseline", (1, 1), xytext=(-6, -13), textcoords="offset points", ha="center", fontsize=9)
    for compute in (1, 2, 4, 8, 16, 32):
        x = np.array([left, right])
        axis.plot(x, compute / x, color=FAINT, lw=0.9, zorder=0)
    style.log_axis(axis.xaxis, [left, right], most=7, text=style.times)
    style.log_axis(axis.yaxis, [bottom, top], most=7, text=style.times)
    axis.grid(False)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0)}  # no curve is there
    axis.legend(**beside, title="cheapest point", alignment="left", handletextpad=0.2)
    axis.set(xlabel="training tokens of all languages", ylabel="parameters N")
    axis.set_title(f"same loss with more languages: {origin}")
    return figure


@style.styled
def next_run(expansion: pd.DataFrame, mixture: MixturePlan | None) -> Figure:
    """Left, what r times as many languages cost; right, the best mixture against an even one."""
    shown = None if mixture is None else mixture.table.sort_values("share", ascending=False).head(20)[::-1]
    figure = style.canvas(3.4 if shown is None else max(3.4, 0.24 * len(shown) + 1.2))
    left, right = figure.subplots(1, 2)
    series = {"compute": "compute C", "tokens": "tokens, all languages", "params": "parameters N"}
    series["tokens_per_language"] = "tokens per language"
    ends = []
    for colour, (column, label) in zip(COLOURS, series.items(), strict=False):
        left.plot(expansion.multiplier, expansion[column], "o-", ms=3.5, color=colour)
        ends.append((expansion[column].iloc[-1], label, colour))
    style.log_axis(left.xaxis, expansion.multiplier, most=6, text=style.times)
    style.log_axis(left.yaxis, expansion[list(series)].to_numpy().ravel(), most=6, text=style.times)
    left.set(xlabel="times as many languages", title="needed for the same loss")
    if shown is None:
        style.say(right, "no mixture was planned")
    else:
        _mixture_bars(right, shown, mixture)
    figure.draw_without_rendering()
    style.label_ends(left, expansion.multiplier.iloc[-1], ends)
    return figure


def _mixture_bars(axis: Axes, shown: pd.DataFrame, mixture: MixturePlan) -> None:
    place = np.arange(len(shown))
    axis.barh(place, 100 * shown.share, color=COLOURS[0], height=0.65)
    even = 100 / max(int((mixture.table.weight > 0).sum()), 1)
    axis.axvline(even, color=INK, lw=1, ls=(0, (3, 2)))
    for y, share, epochs in zip(place, shown.share, shown.epochs, strict=True):
        note = f"{100 * share:.1f} %" + (f", {epochs:.1f} epochs" if epochs > 1 else "")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        at = {"xy": (100 * share, y), "xytext": (5, 0), "textcoords": "offset points"}
        axis.annotate(note, **at, va="center", fontsize=8.5, bbox=box)
    axis.set_yticks(place, shown.language)
    axis.set_xlim(0, 1.6 * 100 * max(shown.share.max(), even / 100))
    axis.grid(axis="y", visible=False)
    size, tokens = style.short(mixture.params), style.short(mixture.tokens)
    title = f"best mixture for {style.short(mixture.flops)} FLOPs:\nN = {size}, D = {tokens}"
    axis.set(xlabel="share of tokens, % (dashed: even)", title=title)
