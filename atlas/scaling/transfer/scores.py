"""Cross-lingual transfer scores from loss curves, and what the published matrix says (ATLAS section 4).

A bilingual transfer score is measured at an anchor d, and it drifts with d; it depends on both runs having
the same learning-rate phase; and one run a pair cannot show the variation between seeds. So every function
here takes or returns anchors, compares curves of one phase only, and says what its interval covers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

from atlas.errors import UserError
from atlas.scaling.table.curves import LossCurve, loss_curve

# A run counts as 50/50 when the target's share is this close to one half: window counts are whole numbers.
_HALF_TOLERANCE = 0.02
_PREFIX = "tokens."
SCORE_COLUMNS = ("anchor_tokens", "score", "low", "high", "censored")


def score_from_tau(tau: np.ndarray | float) -> np.ndarray | float:
    """Bilingual transfer score that a transfer weight τ > −1 implies: 2τ / (1 + τ).

    Exact for the ATLAS law in a single epoch of a 50/50 mixture at equal N (from Eq. 2 of arXiv 2510.22037).

    >>> round(score_from_tau(1 / 3), 12), score_from_tau(1.0)
    (0.5, 1.0)
    """
    return 2 * tau / (1 + tau)


def tau_from_score(score: np.ndarray | float) -> np.ndarray | float:
    """Transfer weight τ implied by a bilingual transfer score below 2: score / (2 − score).

    >>> round(tau_from_score(-1.6), 4)
    -0.4444
    """
    return score / (2 - score)


def bilingual_transfer_score(
    mono: LossCurve,
    bilingual: LossCurve,
    anchors: Sequence[float],
    noise: float | None = None,
    confidence: float = 0.9,
) -> pd.DataFrame:
    """Score 2 − σ/d of a source language at every anchor d (arXiv 2510.22037, section 4).

    σ is the number of tokens, of both languages, after which the 50/50 bilingual run reaches the loss that
    the monolingual run has after d tokens. 0: a source token is worth nothing; 1: as much as a target token.

    Args:
      mono, bilingual: target-language loss curves over *total* tokens of the run.
      anchors: tokens d of the monolingual run, [n].
      noise: standard deviation of one run's log loss, for both curves; by default each curve's scatter around
        its own trend, which does not see an offset that all checkpoints of a run share.
      confidence: of the interval, which is the delta method's: the noise of both losses, moved through the
        slope of the bilingual curve at σ.

    Returns:
      A frame [n] of anchor_tokens, score, low, high, censored. Nothing is extrapolated: where the bilingual
      run never comes down to the loss, score is NaN, censored "at most" and high the bound; where it is below
      the loss from its first point, censored is "at least" and low the bound. An anchor outside the
      monolingual run gives NaN and censored "no anchor"; an unknown noise gives NaN limits.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rows = [(float(d), *_score(mono, bilingual, float(d), noise, z)) for d in anchors]
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


def _score(mono: LossCurve, bilingual: LossCurve, d: float, noise: float | None, z: float):
    nan = float("nan")
    loss = mono.at(d)
    if np.isnan(loss):
        return nan, nan, nan, "no anchor"
    sigma = bilingual.reach(loss)
    inside = float(np.clip(sigma, bilingual.tokens[0], bilingual.tokens[-1]))
    spread = z * _log_tokens_sd(mono, bilingual, inside, noise)
    if sigma in (0.0, np.inf):
        spread = np.nan_to_num(spread, nan=0.0, posinf=np.inf)
    low, high = 2 - inside / d * np.exp(spread), min(2.0, 2 - inside / d * np.exp(-spread))
    if sigma == np.inf:
        return nan, -np.inf, high, "at most"
    if sigma == 0:
        return nan, low, 2.0, "at least"
    return 2 - sigma / d, low, high, ""


def _log_tokens_sd(mono: LossCurve, bilingual: LossCurve, sigma: float, noise: float | None) -> float:
    loss_sd = np.hypot(mono.noise, bilingual.noise) if noise is None else np.sqrt(2) * noise
    slope = bilingual.elasticity(sigma)
    # Where the trend does not fall, no number of tokens is excluded.
    return float(loss_sd / -slope) if slope < 0 else float("inf")


def bilingual_transfer_scores(
    frame: pd.DataFrame, anchors: Sequence[float] | None = None, confidence: float = 0.9
) -> pd.DataFrame:
    """Scores of every (target, source) pair that a runs table holds monolingual and 50/50 bilingual runs for.

    Curves are gathered over all runs of one mixture, N and `model`: several seeds or cooldown branches make
    one curve. Cooled-down losses are compared with cooled-down ones, or trunk with trunk: the first that has
    four points on both sides, or else two. Where runs repeat each other (same tokens, other run), their scatter
    replaces a smaller scatter within the curves as the noise of the interval.

    Args:
      frame: a runs table with columns `tokens.<language>` (tokens seen), language, num_params, loss; optional
        run, phase, model.
      anchors: monolingual tokens d; by default five a pair, over the range where it can be measured.
      confidence: of low and high.

    Returns:
      Columns target, source, num_params, anchor_tokens, score, low, high, censored, phase (and model where
      the table has it); scores as in `bilingual_transfer_score`. Empty when no pair is complete.
    """
    keys = [key for key in ("model", "num_params") if key in frame]
    curves = _curves(frame, keys)
    parts = []
    for (target, source, *where), bilingual in curves.items():
        mono = curves.get((target, "", *where))
        if not source or mono is None:
            continue
        pair = _compare(mono, bilingual, anchors, confidence)
        if pair is not None:
            parts.append(pair.assign(target=target, source=source, **dict(zip(keys, where, strict=True))))
    columns = ["target", "source", *keys, *SCORE_COLUMNS, "phase"]
    if not parts:
        return pd.DataFrame(columns=columns)
    return pd.concat(parts)[columns].sort_values(["target", "source", *keys, "anchor_tokens"], ignore_index=True)


def _curves(frame: pd.DataFrame, keys: list[str]) -> dict[tuple, pd.DataFrame]:
    """Rows by (target, source or "" for monolingual, *keys), reduced to run, phase, tokens, loss."""
    missing = {"language", "num_params", "loss"} - set(frame)
    columns = [name for name in frame if name.startswith(_PREFIX)]
    if missing or not columns:
        absent = sorted(missing) or [_PREFIX + "<language>"]
        raise UserError(f"transfer scores need the column(s) {', '.join(absent)}; the table has {', '.join(frame)}")
    tokens_RL = frame[columns].fillna(0).to_numpy(np.float64)
    total_R = tokens_RL.sum(axis=1)
    names = np.array([name.removeprefix(_PREFIX) for name in columns])
    rows = pd.DataFrame(
        {
            "target": frame.language.to_numpy(),
            "source": _sources(tokens_RL, names, frame.language.to_numpy()),
            **{key: frame[key].to_numpy() for key in keys},
            "run": frame["run"].to_numpy() if "run" in frame else np.arange(len(frame)),
            "phase": frame["phase"].to_numpy() if "phase" in frame else "",
            "tokens": total_R,
            "loss": frame.loss.to_numpy(np.float64),
        }
    )
    usable = rows.source.notna() & (rows.tokens > 0) & (rows.loss > 0) & np.isfinite(rows.loss)
    return dict(list(rows[usable].groupby(["target", "source", *keys], sort=True)))


def _sources(tokens_RL: np.ndarray, names: np.ndarray, target_R: np.ndarray) -> list[str | None]:
    """The other language of a 50/50 run, "" for a monolingual run on the target, None for any other row."""
    found: list[str | None] = []
    for tokens_L, target in zip(tokens_RL, target_R, strict=True):
        seen = tokens_L > 0
        half = abs(tokens_L[names == target].sum() / max(tokens_L.sum(), 1.0) - 0.5) <= _HALF_TOLERANCE
        if seen.sum() == 1 and names[seen][0] == target:
            found.append("")
        elif seen.sum() == 2 and half and target in names[seen]:
            found.append(str(names[seen & (names != target)][0]))
        else:
            found.append(None)
    return found


def _compare(
    mono: pd.DataFrame, bilingual: pd.DataFrame, anchors: Sequence[float] | None, confidence: float
) -> pd.DataFrame | None:
    """Scores of one pair in the best phase that both sides share; None when none has two points on both."""
    phase = best_phase(mono, bilingual)
    if phase is None:
        return None
    sides = [side[side.phase == phase] for side in (mono, bilingual)]
    curves = [loss_curve(side.tokens, side.loss) for side in sides]
    own = np.sqrt(np.mean([curve.noise**2 for curve in curves]))
    noise = float(np.fmax(own, replicate_deviation(pd.concat(sides))))
    at = _shared_range(*curves) if anchors is None else anchors
    scores = bilingual_transfer_score(*curves, at, noise=noise, confidence=confidence)
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

    Pairs that were only bounded keep their latest bound (score NaN, `censored` set).
    """
    order = scores.assign(_measured=scores.score.notna()).sort_values(["num_params", "_measured", "anchor_tokens"])
    order = order[order.censored != "no anchor"]
    last = order.groupby(["target", "source"]).tail(1)
    return last.drop(columns="_measured").sort_values(["target", "source"], ignore_index=True)


def score_matrix(scores: pd.DataFrame) -> pd.DataFrame:
    """`latest_scores` as a matrix [target, source], NaN where no score was measured."""
    return latest_scores(scores).pivot(index="target", columns="source", values="score")


def adaptation_score(tokens: np.ndarray, loss: np.ndarray, base_loss: np.ndarray | float) -> tuple[float, float]:
    """Finetuning adaptation score and end difference of a model continued on a source language.

    Args:
      tokens: tokens of finetuning, increasing, [n].
      loss: target-language loss after them, [n].
      base_loss: target-language loss of the multilingual model, a number or [n].

    Returns:
      (FAS, δ): the mean over tokens of base_loss − loss by the trapezoid rule from the first to the last
      point, and loss − base_loss at the last (below 0 helps). Source: arXiv 2510.22037, App. B.5.2.

    >>> adaptation_score([0.0, 1.0, 2.0], [3.0, 2.5, 2.0], 3.0)
    (0.5, -1.0)
    """
    tokens, gain = (
        np.asarray(tokens, np.float64),
        np.asarray(base_loss, np.float64) - np.asarray(loss, np.float64),
    )
    if len(tokens) < 2 or np.any(np.diff(tokens) <= 0):
        raise UserError("an adaptation score needs two or more points with increasing tokens")
    area = np.sum(np.diff(tokens) * (gain[1:] + gain[:-1]) / 2)
    return float(area / (tokens[-1] - tokens[0])), float(-gain[-1])


def target_centred(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores [target, source] less each target's mean over sources: what is left to say about the pair."""
    return scores.sub(scores.mean(axis=1), axis=0)


@dataclass(frozen=True)
class MatrixStatistics:
    """What a transfer matrix says in sum; means are over ordered pairs of different languages."""

    same_script_mean: float
    same_script_pairs: int
    different_script_mean: float
    different_script_pairs: int
    reciprocity: float  # Pearson correlation of s→t with t→s
    explained_by_target: float  # shares of the variance over pairs
    explained_by_source: float
    explained_by_both: float


def matrix_statistics(scores: pd.DataFrame, scripts: Mapping[str, str]) -> MatrixStatistics:
    """Statistics of a transfer matrix [target, source] with the same languages on both sides.

    Shares of variance are those of least-squares target effects, source effects, and both.

    >>> from atlas.scaling import published
    >>> round(matrix_statistics(published.transfer_scores(), published.scripts()).explained_by_target, 3)
    0.831
    """
    scores = scores.loc[scores.index, list(scores.index)]
    target, source = np.nonzero(~np.eye(len(scores), dtype=bool) & scores.notna().to_numpy())
    value_TS = scores.to_numpy()
    value = value_TS[target, source]
    script = np.array([scripts[language] for language in scores.index])
    same = script[target] == script[source]
    back = value_TS[source, target]
    both_ways = np.isfinite(back)
    eye = np.eye(len(scores))
    return MatrixStatistics(
        same_script_mean=float(value[same].mean()),
        same_script_pairs=int(same.sum()),
        different_script_mean=float(value[~same].mean()),
        different_script_pairs=int((~same).sum()),
        reciprocity=float(np.corrcoef(value[both_ways], back[both_ways])[0, 1]),
        explained_by_target=_explained(value, eye[target]),
        explained_by_source=_explained(value, eye[source]),
        explained_by_both=_explained(value, np.hstack([eye[target], eye[source]])),
    )


def _explained(value: np.ndarray, effects: np.ndarray) -> float:
    fitted = effects @ np.linalg.lstsq(effects, value, rcond=None)[0]
    return float(1 - np.sum((value - fitted) ** 2) / np.sum((value - value.mean()) ** 2))
