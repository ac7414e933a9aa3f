"""Transfer of language pairs that were not measured, from the pairs that were, with the skill of the guess.

Most of a transfer matrix is how hard each target is (83 % of the published one's variance), so a completion
that only learns target effects scores well and says nothing about which source to choose. Skill is therefore
stated twice: of the scores, and of the scores less what the target's other pairs already say.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
import pandas as pd

from atlas.errors import UserError
from atlas.scaling.law import JointLaw

_FOLDS = 5
_REPEATS = 5
# Pairs without effect that an effect of a target, a source or a feature is drawn to 0 by.
_PSEUDO_PAIRS = (0.3, 1.0, 3.0, 10.0, 100.0)
_LEAST_PAIRS = 6


@dataclass(frozen=True)
class Skill:
    """How well cross-validation predicts pairs whose both directions were left out.

    Attributes:
      r2: 1 − squared error over that of the overall mean.
      spearman: rank correlation of predicted with measured.
      centred_r2: 1 − squared error over that of the target's mean over its training pairs: the part of the
        skill that chooses between sources.
      centred_spearman: rank correlation after taking that mean from both.
      pairs: number of measured ordered pairs.
    """

    r2: float
    spearman: float
    centred_r2: float
    centred_spearman: float
    pairs: int


@dataclass(frozen=True)
class Completion:
    """A transfer matrix without gaps.

    Attributes:
      scores: [target, source] measured where measured, predicted elsewhere, NaN on the diagonal.
      measured: [target, source] bool.
      error: root mean squared error of a predicted score in cross-validation.
      skill: of the predictions.
    """

    scores: pd.DataFrame
    measured: pd.DataFrame
    error: float
    skill: Skill

    def table(self) -> pd.DataFrame:
        """A row an ordered pair: target, source, score, measured; the best sources of each target first."""
        named = [x.rename_axis("target").rename_axis(columns="source").stack() for x in (self.scores, self.measured)]
        pairs = pd.DataFrame({"score": named[0].dropna(), "measured": named[1]}).dropna().reset_index()
        return pairs.sort_values(["target", "score"], ascending=[True, False], ignore_index=True)


def fitted_scores(law: JointLaw, parameters: Mapping[str, Mapping]) -> pd.DataFrame:
    """τ [target, source] of a joint law; NaN where the runs do not tell it.

    Args:
      law: the law.
      parameters: by the names of `JointLaw.named`, as fit.json holds them: "identified" says what the runs tell.
    """
    cells = jax.tree.map(lambda values: np.full(np.shape(values), -1), law)
    cells = dataclasses.replace(cells, tau=np.arange(np.size(law.tau)).reshape(np.shape(law.tau)))
    tau = np.array(law.tau, float)
    for name, cell in cells.named().items():
        if cell >= 0 and not parameters[name]["identified"]:
            tau.flat[cell] = np.nan
    return pd.DataFrame(tau, law.targets, law.sources)


def complete(
    scores: pd.DataFrame,
    scripts: Mapping[str, str] | None = None,
    families: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Completion:
    """Fills the gaps of a transfer matrix by ridge regression.

    Features: an effect of the target and of the source, same script and same family. How far effects are drawn to 0 is
    chosen by generalised cross-validation; skill is measured by cross-validation over unordered pairs, since one
    bilingual run gives both directions.

    Args:
      scores: [target, source], NaN where not measured; the diagonal is ignored.
      scripts, families: of the languages; one without an entry shares neither with any other.
      seed: of the folds.

    Raises:
      UserError: fewer than six measured pairs.

    >>> from atlas.scaling import published
    >>> found = complete(published.measured_scores(), published.scripts(), published.families())
    >>> found.skill.pairs
    72
    """
    targets, sources = np.meshgrid(scores.index.astype(str), scores.columns.astype(str), indexing="ij")
    other = targets != sources
    target, source, value = targets[other], sources[other], scores.to_numpy(float)[other]
    known = np.isfinite(value)
    rows = _Rows(*_design(target, source, scripts or {}, families or {}), value, target, source)
    count = len(np.unique(rows.where(known).pair))
    if count < _LEAST_PAIRS:
        raise UserError(f"{count} measured pairs cannot tell how to complete the others; {_LEAST_PAIRS} or more can")
    skill, error = _cross_validate(rows.where(known), seed)
    filled = np.full(scores.shape, np.nan)
    filled[other] = np.where(known, value, _predict(rows.where(known), rows.design))
    measured = scores.notna() & other
    return Completion(pd.DataFrame(filled, scores.index, scores.columns), measured, error, skill)


@dataclass(frozen=True)
class _Rows:
    """Ordered pairs: features [n, p] and the kind of each [p] (−1 for the mean), scores [n], languages [n]."""

    design: np.ndarray
    kinds: np.ndarray
    value: np.ndarray
    target: np.ndarray
    source: np.ndarray

    @property
    def pair(self) -> np.ndarray:
        """[n] the unordered pair."""
        return np.array([" ".join(sorted(names)) for names in zip(self.target, self.source, strict=True)])

    def where(self, mask: np.ndarray) -> "_Rows":
        columns = {name: getattr(self, name)[mask] for name in ("design", "value", "target", "source")}
        return _Rows(kinds=self.kinds, **columns)


def _design(
    target: np.ndarray,
    source: np.ndarray,
    scripts: Mapping[str, str],
    families: Mapping[str, str],
) -> tuple[np.ndarray, np.ndarray]:
    columns = [np.ones(len(target))]
    columns += [target == name for name in np.unique(target)] + [source == name for name in np.unique(source)]
    kinds = [-1] + [0] * len(np.unique(target)) + [1] * len(np.unique(source))
    features = [_shared(target, source, labels) for labels in (scripts, families) if labels]
    centred = [feature - feature.mean() for feature in features]
    columns += [feature / (feature.std() or 1.0) for feature in centred]
    return np.stack(columns, 1).astype(float), np.array(kinds + [2] * len(features))


def _shared(target: np.ndarray, source: np.ndarray, labels: Mapping[str, str]) -> np.ndarray:
    pairs = zip(target, source, strict=True)
    return np.array([t in labels and labels[t] == labels.get(s) for t, s in pairs], float)


def _predict(train: _Rows, design: np.ndarray) -> np.ndarray:
    """Ridge predictions [m] for rows of features [m, p]; the penalties have the least generalised cross-validation."""
    count, square = len(train.value), float(train.value @ train.value)
    gram, right = train.design.T @ train.design, train.design.T @ train.value
    best = (np.inf, right)
    for penalties in itertools.product(_PSEUDO_PAIRS, repeat=3):
        inverse = np.linalg.inv(gram + np.diag(np.append(penalties, 1e-6)[train.kinds]))
        weights = inverse @ right
        missed = square - 2 * weights @ right + weights @ gram @ weights
        score = missed / max(count - np.sum(inverse * gram), 1e-3) ** 2
        best = min(best, (float(score), weights), key=lambda found: found[0])
    return design @ best[1]


def _cross_validate(rows: _Rows, seed: int) -> tuple[Skill, float]:
    rng = np.random.default_rng(seed)
    _, pair = np.unique(rows.pair, return_inverse=True)
    parts = [_held_out(rows, rng.permutation(pair.max() + 1)[pair] % _FOLDS) for _ in range(_REPEATS)]
    value = np.tile(rows.value, _REPEATS)
    predicted, mean, by_target = (np.concatenate(part) for part in zip(*parts, strict=True))
    missed = np.sum((value - predicted) ** 2)
    skill = Skill(
        r2=float(1 - missed / np.sum((value - mean) ** 2)),
        spearman=_rank_correlation(value, predicted),
        centred_r2=float(1 - missed / np.sum((value - by_target) ** 2)),
        centred_spearman=_rank_correlation(value - by_target, predicted - by_target),
        pairs=len(rows.value),
    )
    return skill, float(np.sqrt(missed / len(value)))


def _held_out(rows: _Rows, fold: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n] each: prediction, overall mean and mean of the target, all from the other folds."""
    predicted, mean, by_target = np.zeros((3, len(fold)))
    for k in np.unique(fold):
        out, train = fold == k, rows.where(fold != k)
        predicted[out] = _predict(train, rows.design[out])
        mean[out] = train.value.mean()
        own = pd.Series(train.value).groupby(train.target).mean()
        by_target[out] = own.reindex(rows.target[out]).fillna(train.value.mean())
    return predicted, mean, by_target


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's ρ; NaN where one side is constant."""
    ranks = [pd.Series(x).rank().to_numpy() for x in (a, b)]
    if min(np.ptp(r) for r in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])
