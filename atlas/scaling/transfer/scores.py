"""Cross-lingual transfer scores from loss curves (ATLAS section 4), and the transfer weights that they imply.

A bilingual transfer score is measured at an anchor d, and it drifts with d; it depends on both runs having
the same learning-rate phase; and one run a pair cannot show the variation between seeds. So every function
here takes or returns anchors, compares curves of one phase only, and says what its interval covers.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from atlas.scaling.estimates import Z90
from atlas.scaling.table.curves import LossCurve, loss_curve
from atlas.scaling.table.runs import Runs

# A run counts as 50/50 when the target's share is this close to one half: window counts are whole numbers.
_HALF_TOLERANCE = 0.02
SCORE_COLUMNS = ("anchor_tokens", "score", "low", "high", "censored")


def score_from_tau(tau: np.ndarray | float, eta: np.ndarray | float = 1.0) -> np.ndarray | float:
    """Bilingual transfer score that a transfer weight τ > −1 implies: 2 − 2·(1 + τ)^{−1/η}, for η = 1 2τ / (1 + τ).

    Exact for the ATLAS law in a single epoch of a 50/50 mixture at equal N (from Eq. 2 of arXiv 2510.22037).

    >>> round(score_from_tau(1 / 3), 12), score_from_tau(1.0)
    (0.5, 1.0)
    """
    return 2 - 2 * (1 + tau) ** (-1 / eta)


def tau_from_score(score: np.ndarray | float) -> np.ndarray | float:
    """Transfer weight τ implied by a bilingual transfer score below 2: score / (2 − score).

    >>> round(tau_from_score(-1.6), 4)
    -0.4444
    """
    return score / (2 - score)


def bilingual_transfer_score(
    mono: LossCurve, bilingual: LossCurve, anchors: Sequence[float], noise: float
) -> pd.DataFrame:
    """Score 2 − σ/d of a source language at every anchor d (arXiv 2510.22037, section 4).

    σ is the number of tokens, of both languages, after which the 50/50 bilingual run reaches the loss that
    the monolingual run has after d tokens. 0: a source token is worth nothing; 1: as much as a target token.

    Args:
      mono, bilingual: target-language loss curves over *total* tokens of the run.
      anchors: tokens d of the monolingual run, [n].
      noise: standard deviation of one run's log loss, for both curves.

    Returns:
      A frame [n] of anchor_tokens, score, low, high (90 % interval by the delta method: the noise of both losses,
      moved through the slope of the bilingual curve at σ), censored. Nothing is extrapolated: where the bilingual
      run never comes down to the loss, score is NaN, censored "at most" and high the bound; where it is below
      the loss from its first point, censored is "at least" and low the bound. An anchor outside the
      monolingual run gives NaN and censored "no anchor"; an unknown noise gives NaN limits.
    """
    rows = [(float(d), *_score(mono, bilingual, float(d), noise)) for d in anchors]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


def _score(mono: LossCurve, bilingual: LossCurve, d: float, noise: float):
    nan = float("nan")
    loss = mono.at(d)
    if np.isnan(loss):
        return nan, nan, nan, "no anchor"
    sigma = bilingual.reach(loss)
    inside = float(np.clip(sigma, bilingual.tokens[0], bilingual.tokens[-1]))
    slope = bilingual.elasticity(inside)
    # Where the trend does not fall, no number of tokens is excluded.
    spread = Z90 * np.sqrt(2) * noise / -slope if slope < 0 else np.inf
    if sigma in (0.0, np.inf):
        spread = np.nan_to_num(spread, nan=0.0, posinf=np.inf)
    low, high = 2 - inside / d * np.exp(spread), min(2.0, 2 - inside / d * np.exp(-spread))
    if sigma == np.inf:
        return nan, -np.inf, high, "at most"
    if sigma == 0:
        return nan, low, 2.0, "at least"
    return 2 - sigma / d, low, high, ""


def bilingual_transfer_scores(runs: Runs, anchors: Sequence[float] | None = None) -> pd.DataFrame:
    """Scores of every (target, source) pair that a runs table holds monolingual and 50/50 bilingual runs for.

    Curves are gathered over all runs of one mixture, N and `model`: several seeds or cooldown branches make
    one curve. Cooled-down losses are compared with cooled-down ones, or trunk with trunk: the first that has
    four points on both sides, or else two. Where runs repeat each other (same tokens, other run), their scatter
    replaces a smaller scatter within the curves as the noise of the interval.

    Args:
      runs: rows of any phase; see `Runs.single_epoch` for those from which transfer alone speaks.
      anchors: monolingual tokens d; by default five a pair, over the range where it can be measured.

    Returns:
      Columns target, source, num_params, anchor_tokens, score, low, high, censored, phase (and model where
      the table has it); scores as in `bilingual_transfer_score`. Empty when no pair is complete.
    """
    keys = [key for key in ("model", "num_params") if key in runs.frame]
    curves = _curves(runs, keys)
    parts = []
    for (target, source, *where), bilingual in curves.items():
        mono = curves.get((target, "", *where))
        if not source or mono is None:
            continue
        pair = _compare(mono, bilingual, anchors)
        if pair is not None:
            parts.append(pair.assign(target=target, source=source, **dict(zip(keys, where, strict=True))))
    columns = ["target", "source", *keys, *SCORE_COLUMNS, "phase"]
    if not parts:
        return pd.DataFrame(columns=columns)
    return pd.concat(parts)[columns].sort_values(["target", "source", *keys, "anchor_tokens"], ignore_index=True)


def _curves(runs: Runs, keys: list[str]) -> dict[tuple, pd.DataFrame]:
    """Evaluations by (target, source or "" for monolingual, *keys)."""
    rows = runs.evaluations().assign(source=_sources(runs), **{key: runs.frame[key].to_numpy() for key in keys})
    return dict(list(rows[rows.source.notna()].groupby(["language", "source", *keys])))


def _sources(runs: Runs) -> np.ndarray:
    """[n] the other language of a 50/50 run, "" for a monolingual run on the target, None for any other row."""
    seen, own = runs.D > 0, runs.own(runs.shares)
    count = seen.sum(1)
    half = (count == 2) & (np.abs(own - 0.5) <= _HALF_TOLERANCE)
    seen[np.arange(len(runs)), runs.target] = False
    found = np.full(len(runs), None, object)
    found[(count == 1) & (own > 0)] = ""
    found[half] = np.asarray(runs.languages, object)[seen[half].argmax(1)]
    return found


def _compare(mono: pd.DataFrame, bilingual: pd.DataFrame, anchors: Sequence[float] | None) -> pd.DataFrame | None:
    """Scores of one pair in the best phase that both sides share; None when none has two points on both."""
    phase = best_phase(mono, bilingual)
    if phase is None:
        return None
    sides = [side[side.phase == phase] for side in (mono, bilingual)]
    curves = [loss_curve(side.tokens, side.loss) for side in sides]
    own = np.sqrt(np.mean([curve.noise**2 for curve in curves]))
    noise = float(np.fmax(own, replicate_deviation(pd.concat(sides))))
    at = _shared_range(*curves) if anchors is None else anchors
    scores = bilingual_transfer_score(*curves, at, noise=noise)
    return scores.assign(phase=phase)


def best_phase(mono: pd.DataFrame, bilingual: pd.DataFrame) -> str | None:
    """The phase in which two sets of rows (phase, tokens) are compared; None where none has two points on both.

    Cooled down, then trunk, where both sides have the four points that tell noise from trend; else two.
    """
    phases = sorted(set(mono.phase) & set(bilingual.phase))  # "cooldown" sorts before "trunk"
    points = [min(side.tokens[side.phase == phase].nunique() for side in (mono, bilingual)) for phase in phases]
    return next((phase for least in (4, 2) for phase, n in zip(phases, points, strict=True) if n >= least), None)


def _shared_range(mono: LossCurve, bilingual: LossCurve) -> np.ndarray:
    """Five anchors whose losses both curves have; one that can only be bounded if there are none."""
    low = max(mono.reach(bilingual.loss[0]), mono.tokens[0])
    high = min(mono.reach(bilingual.loss[-1]), mono.tokens[-1])
    if low < high:
        # Just inside, so that rounding cannot leave the bilingual curve's last loss unreached.
        return np.geomspace(low * (1 + 1e-9), high * (1 - 1e-9), 5)
    return mono.tokens[-1:] if low > mono.tokens[-1] else mono.tokens[:1]


def replicate_deviation(rows: pd.DataFrame) -> float:
    """Standard deviation of log loss between runs of the same mixture at the same tokens; NaN without any.

    Args:
      rows: run, source, tokens, loss of one target language.
    """
    groups = rows.assign(log_loss=np.log(rows.loss)).groupby(["source", "tokens"])
    freedom = (groups.run.nunique() - 1).clip(lower=0)
    if not freedom.sum():
        return float("nan")
    return float(np.sqrt((groups.log_loss.var(ddof=1) * freedom).sum() / freedom.sum()))


def latest_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """One row a (target, source): the largest N, and there the latest anchor at which the score was measured.

    Pairs that were only bounded keep their latest bound (score NaN, `censored` set). Column tau: what a score implies.
    """
    order = scores.assign(_measured=scores.score.notna()).sort_values(["num_params", "_measured", "anchor_tokens"])
    order = order[order.censored != "no anchor"]
    last = order.groupby(["target", "source"]).tail(1).drop(columns="_measured")
    return last.assign(tau=tau_from_score(last.score)).sort_values(["target", "source"], ignore_index=True)
