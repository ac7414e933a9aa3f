"""Transfer of language pairs that were not measured, from the pairs that were, with the skill of the guess.

Most of a transfer matrix is how hard each target is (83 % of the published one's variance), so a completion
that only learns target effects scores well and says nothing about which source to choose. Skill is therefore
stated twice: of the scores, and of the scores less what the target's other pairs already say.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import pandas as pd

from atlas.scaling.law import JointLaw
from checked import UserError

_FOLDS, _REPEATS = 5, 5  # of cross-validation: four fifths to learn from, dealt often enough for a steady mean
# Pairs without effect that an effect of a target, a source or a feature is drawn to 0 by.
_PSEUDO_PAIRS = (0.3, 1.0, 3.0, 10.0, 100.0)
_MEAN_PENALTY = 1e-6  # keeps the system solvable and moves no prediction
_LEAST_FREEDOM = 1e-3  # of the residuals: where effects take all of it, the criterion is no number
_LEAST_PAIRS = _FOLDS + 1  # else a fold is empty, or nothing but single pairs
_TARGET, _SOURCE, _LABEL, _MEAN = range(4)  # kinds of effects, each with its own penalty; the mean has next to none


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
    scores: pd.DataFrame, scripts: Mapping[str, str] | None = None, families: Mapping[str, str] | None = None
) -> Completion:
    """Fills the gaps of a transfer matrix by ridge regression.

    Features: an effect of the target and of the source, same script and same family. How far effects are drawn to 0 is
    chosen by generalised cross-validation; skill is measured by cross-validation over unordered pairs, since one
    bilingual run gives both directions.

    Args:
      scores: [target, source], NaN where not measured; the diagonal is ignored.
      scripts, families: of the languages; one without an entry shares neither with any other.

    Raises:
      UserError: fewer than six measured pairs.

    >>> from atlas.scaling import published
    >>> found = complete(published.measured_scores(), published.scripts(), published.families())
    >>> found.skill.pairs
    72
    """
    names = np.meshgrid(scores.index.astype(str), scores.columns.astype(str), indexing="ij")
    target, source = (name.ravel() for name in names)
    other = target != source
    pairs = pd.DataFrame({"target": target, "source": source, "value": scores.to_numpy(float).ravel()})[other]
    known = pairs.value.notna().to_numpy()
    unordered = [" ".join(sorted(names)) for names in zip(target[other][known], source[other][known], strict=True)]
    pair, found = pd.factorize(np.array(unordered), sort=True)
    if len(found) < _LEAST_PAIRS:
        raise UserError(
            f"{len(found)} measured pairs cannot tell how to complete the others; {_LEAST_PAIRS} or more can"
        )
    design = _design(pairs, [labels for labels in (scripts, families) if labels])
    skill, error = _cross_validate(design[known], pairs[known], pair)
    filled = np.full(scores.size, np.nan)
    filled[other] = np.where(known, pairs.value, _predict(design[known], pairs.value[known], design))
    measured = scores.notna() & other.reshape(scores.shape)
    return Completion(pd.DataFrame(filled.reshape(scores.shape), scores.index, scores.columns), measured, error, skill)


def _design(pairs: pd.DataFrame, features: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """Features of ordered pairs, a row each; columns are named by the kind of their effect."""
    columns, kinds = [np.ones(len(pairs))], [_MEAN]
    for kind, side in ((_TARGET, pairs.target), (_SOURCE, pairs.source)):
        columns += [side == name for name in np.unique(side)]
        kinds += [kind] * side.nunique()
    for labels in features:
        shared = (pairs.target.map(labels) == pairs.source.map(labels)).to_numpy(float)
        columns.append((shared - shared.mean()) / (shared.std() or 1.0))
        kinds.append(_LABEL)
    return pd.DataFrame(np.stack(columns, 1).astype(float), pairs.index, kinds)


def _predict(train: pd.DataFrame, value: pd.Series, design: pd.DataFrame) -> np.ndarray:
    """Ridge predictions for the rows of a design; the penalties have the least generalised cross-validation."""
    known, value = train.to_numpy(), value.to_numpy()
    gram, right, square = known.T @ known, known.T @ value, float(value @ value)
    best = (np.inf, right)
    for penalties in itertools.product(_PSEUDO_PAIRS, repeat=3):
        inverse = np.linalg.inv(gram + np.diag(np.append(penalties, _MEAN_PENALTY)[train.columns]))
        weights = inverse @ right
        missed = square - 2 * weights @ right + weights @ gram @ weights
        score = missed / max(len(value) - np.sum(inverse * gram), _LEAST_FREEDOM) ** 2
        best = min(best, (float(score), weights), key=lambda found: found[0])
    return design.to_numpy() @ best[1]


def _cross_validate(design: pd.DataFrame, pairs: pd.DataFrame, pair: np.ndarray) -> tuple[Skill, float]:
    """Skill and root mean squared error; pair: [n] which unordered pair each row is of."""
    rng, parts = np.random.default_rng(0), []
    for _ in range(_REPEATS):
        fold = rng.permutation(pair.max() + 1)[pair] % _FOLDS
        parts += [_predict_others(design, pairs, fold == k) for k in range(_FOLDS)]
    found = pd.concat(parts)
    missed = np.sum((found.value - found.predicted) ** 2)
    both = found[["value", "predicted"]]
    skill = Skill(
        r2=float(1 - missed / np.sum((found.value - found["mean"]) ** 2)),
        spearman=float(both.corr("spearman").iat[0, 1]),
        centred_r2=float(1 - missed / np.sum((found.value - found.by_target) ** 2)),
        centred_spearman=float(both.sub(found.by_target, axis=0).corr("spearman").iat[0, 1]),
        pairs=len(pairs),
    )
    return skill, float(np.sqrt(missed / len(found)))


def _predict_others(design: pd.DataFrame, pairs: pd.DataFrame, out: np.ndarray) -> pd.DataFrame:
    """The pairs that are `out`, with prediction, overall mean and mean of the target from the others."""
    known, mean = pairs[~out], pairs.value[~out].mean()
    by_target = pairs.target[out].map(known.groupby("target").value.mean()).fillna(mean)
    predicted = _predict(design[~out], known.value, design[out])
    return pairs[out].assign(predicted=predicted, mean=mean, by_target=by_target)
