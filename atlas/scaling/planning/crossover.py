"""Pretrain or finetune: after how many tokens training from scratch overtakes continued training.

A model continued from a multilingual checkpoint starts ahead; a model trained from scratch on the target
language alone catches up. Both curves are compared at equal tokens of their own training (ATLAS section 6), so
the crossover says from which budget on the checkpoint is no longer worth its head start.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from atlas.scaling.estimates import Z90
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN
from atlas.scaling.table import published
from atlas.scaling.table.curves import LossCurve, loss_curve
from atlas.scaling.table.runs import Runs
from atlas.scaling.transfer.scores import best_phase, replicate_deviation
from checked import UserError, unknown

_DRAWS = 100  # of both curves: five lie beyond each end of a 90 % interval
_GRID = 257  # points between the curves' common ends, far denser than curves are observed
_MONOLINGUAL = 0.999  # least share of the target language: all but stray windows
_LEAST_POINTS = 5  # of a curve, whose three inner ones can then tell noise from bend
COLUMNS = ["language", "num_params", "tokens", "low", "high", "flops", "censored", "phase"]


def measured_crossovers(runs: Runs, seed: int = 0) -> pd.DataFrame:
    """Crossover of every language and size for which a table holds both curves.

    Rows of runs that name a parent in the column `initialize` continue it; blank means from scratch. Both must
    train on the evaluated language alone. Curves join all runs of one kind, language and N, in one phase (cooled
    down, or trunk).

    Args:
      runs: a table with the column `initialize`.
      seed: of the draws behind the intervals.

    Returns:
      A row per (language, N): tokens of the crossover with its 90 % interval (the scatter of the curves, and the
      differences between replicated runs where there are any), flops = 6·N·tokens, phase. Where the curves do not
      cross, tokens is NaN and censored "later" (the continued run is ahead to the last common tokens, which low
      states) or "earlier" (behind from the first, which high states). Where a bound of the interval lies beyond
      the curves it is 0 or infinite.

    Raises:
      UserError: the column is missing or no language and size has both curves.
    """
    if "initialize" not in runs.frame:
        raise UserError("a crossover needs the column 'initialize': the parent run of continued runs, blank otherwise")
    rng = np.random.default_rng(seed)
    rows = []
    for language, N, phase, scratch, continued in _pairs(runs):
        curves = [loss_curve(side.tokens, side.loss) for side in (scratch, continued)]
        noise = [_noise(curve, side) for curve, side in zip(curves, (scratch, continued), strict=True)]
        tokens, low, high, censored = _crossing_with_interval(*curves, noise, rng)
        rows.append((language, N, tokens, low, high, FLOPS_PER_PARAMETER_TOKEN * N * tokens, censored, phase))
    if not rows:
        raise UserError("no language and size has both a curve from scratch and a continued one on it alone")
    return pd.DataFrame(rows, columns=COLUMNS)


def _pairs(runs: Runs) -> Iterator[tuple[str, float, str, pd.DataFrame, pd.DataFrame]]:
    alone = runs.own(runs.shares) >= _MONOLINGUAL
    frame = runs.evaluations().assign(source="", continued=runs.continued)[alone]
    for (language, N), rows in frame.groupby(["language", "num_params"]):
        sides = [rows[~rows.continued], rows[rows.continued]]
        phase = best_phase(*sides)
        if phase is not None:
            yield str(language), float(N), phase, *(side[side.phase == phase] for side in sides)


def _noise(curve: LossCurve, rows: pd.DataFrame) -> tuple[float, float]:
    """Standard deviation of the log loss of a curve's point, and of an offset of the whole curve."""
    point = np.nan_to_num(np.fmin(curve.noise, _local_noise(curve, rows)))
    offset = np.nan_to_num(replicate_deviation(rows)) / np.sqrt(rows.run.nunique())
    return float(point * np.sqrt(len(curve.tokens) / len(rows))), float(offset)


def _local_noise(curve: LossCurve, rows: pd.DataFrame) -> float:
    """Scatter of each point around the line through its neighbours, which a bent curve hardly adds to."""
    y = np.log(rows.loss).groupby(rows.tokens).mean().to_numpy()
    x = np.log(curve.tokens)
    if len(x) < _LEAST_POINTS:
        return float("nan")
    part = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    miss = y[1:-1] - (1 - part) * y[:-2] - part * y[2:]
    mean = np.sqrt(np.mean(miss**2 / (1 + part**2 + (1 - part) ** 2)))
    return float(mean * np.sqrt(len(rows) / len(x)))


def _crossing_with_interval(
    scratch: LossCurve, continued: LossCurve, noise: list[tuple[float, float]], rng: np.random.Generator
) -> tuple[float, float, float, str]:
    low = max(scratch.tokens[0], continued.tokens[0])
    high = min(scratch.tokens[-1], continued.tokens[-1])
    if not low < high:
        return np.nan, np.nan, np.nan, "no common tokens"
    found = _crossing(scratch, continued, low, high)
    drawn = np.array([_crossing(*_redraw((scratch, continued), noise, rng), low, high) for _ in range(_DRAWS)])
    bounds = np.quantile(drawn, [0.05, 0.95], method="inverted_cdf")
    if found == np.inf:
        return np.nan, min(bounds[0], high), np.inf, "later"
    if found == 0:
        return np.nan, 0.0, max(bounds[1], low), "earlier"
    return found, float(bounds[0]), float(bounds[1]), ""


def _redraw(curves: tuple[LossCurve, ...], noise: list[tuple[float, float]], rng: np.random.Generator):
    for curve, (point, offset) in zip(curves, noise, strict=True):
        shift = point * rng.normal(size=len(curve.loss)) + offset * rng.normal()
        yield loss_curve(curve.tokens, curve.loss * np.exp(shift))


def _crossing(scratch: LossCurve, continued: LossCurve, low: float, high: float) -> float:
    """Tokens that best part "continued ahead" from "scratch ahead": 0 if all is the latter, infinite if the former.

    The gap is summed up along log tokens; its sum peaks at the crossover. Noise makes nearly parallel curves touch
    several times, and the first or last touch would be early or late on average.
    """
    tokens = np.geomspace(low * (1 + 1e-12), high * (1 - 1e-12), _GRID)
    gap = _log_loss(scratch, tokens) - _log_loss(continued, tokens)
    total = np.cumsum(gap)
    i = int(np.argmax(total))
    if total[i] <= 0:
        return 0.0
    if i == _GRID - 1:
        return float(np.inf)
    part = gap[i] / (gap[i] - gap[i + 1])
    return float(np.exp((1 - part) * np.log(tokens[i]) + part * np.log(tokens[i + 1])))


def _log_loss(curve: LossCurve, tokens: np.ndarray) -> np.ndarray:
    return np.interp(np.log(tokens), np.log(curve.tokens), np.log(curve.loss))


class CrossoverLaw(NamedTuple):
    """C = coefficient · N^exponent FLOPs of the crossover of one language, by its sizes; and the exponent's error."""

    coefficient: float
    exponent: float
    exponent_se: float
    sizes: int

    def flops(self, params: float) -> float:
        """C at N parameters."""
        return self.coefficient * params**self.exponent


def crossover_law(table: pd.DataFrame) -> CrossoverLaw | None:
    """Power law through the crossovers of one language at several sizes, weighted by their intervals.

    Args:
      table: rows of `measured_crossovers` of one language.

    Returns:
      None with fewer than two sizes whose crossover was measured.
    """
    rows = table[np.isfinite(table.tokens)]
    if len(rows) < 2:
        return None
    x, y = np.log(rows.num_params.to_numpy()), np.log(rows.flops.to_numpy())
    with np.errstate(divide="ignore"):
        width = np.log(rows.high.to_numpy()) - np.log(np.maximum(rows.low.to_numpy(), 0.0))
    spread = np.where(np.isfinite(width) & (width > 0), width / (2 * Z90), np.nan)
    # An interval that is open at one end is at least as wide as the widest closed one.
    spread = np.where(np.isnan(spread), np.nanmax(spread, initial=0.0) or 1.0, spread)
    (exponent, level), covariance = np.polyfit(x - x.mean(), y, 1, w=1 / spread, cov="unscaled")
    coefficient = float(np.exp(level - exponent * x.mean()))
    return CrossoverLaw(coefficient, float(exponent), float(np.sqrt(covariance[0, 0])), len(rows))


def published_crossovers(params: float, language: str = "") -> pd.DataFrame:
    """Tokens and compute after which training from scratch beats continuing the multilingual checkpoint.

    Args:
      params: N.
      language: if one is named, scales each consistent formula by its published crossover at 2.03e9 parameters
        (Fig. 6); the paper gives no size dependence per language, so at other sizes this assumes that all share one.

    Returns:
      A row per printed formula: source, flops, tokens = flops / 6N, consistent. Use the rows that are
      consistent: their spread is what the paper leaves open. No repetition of data is accounted for.

    >>> published_crossovers(2_034_422_912).query("consistent").tokens.div(1e9).round(0).tolist()
    [182.0, 209.0]
    """
    if not (np.isfinite(params) and params > 0):
        raise UserError(f"the number of parameters must be positive; got {params}")
    table = published.table("crossover_formulas")
    flops = table.coefficient * params**table.exponent
    if language:
        measured = published.table("crossover_tokens").set_index("language")
        if language not in measured.index:
            raise unknown("language with a published crossover", language, measured.index)
        size, tokens = measured.loc[language]
        ratio = FLOPS_PER_PARAMETER_TOKEN * size * tokens / (table.coefficient * size**table.exponent)
        flops *= ratio.where(table.consistent, 1.0)
    table = table.assign(flops=flops, tokens=flops / (FLOPS_PER_PARAMETER_TOKEN * params))
    return table[["source", "flops", "tokens", "consistent"]]
