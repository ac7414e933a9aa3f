"""Held-out scores of a law: fit on some runs, predict the others, per language."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from atlas.scaling.estimates import r2, relative_error
from atlas.scaling.joint.fit import fit_joint
from atlas.scaling.single.comparison import predict_others
from atlas.scaling.single.library import law_named
from atlas.scaling.table.runs import Runs
from atlas.scaling.table.splits import past_warm_up, split_runs
from checked import UserError

_CHINCHILLA = {"chinchilla_total": {"tokens": "total"}, "chinchilla_own": {"tokens": "own"}}


def heldout(
    runs: Runs,
    split: str = "largest_n",
    law: str = "atlas",
    *,
    seed: int = 0,
    warm_up: float | None = None,
    **options: Any,
) -> tuple[dict, pd.DataFrame]:
    """Fits a law without some runs and scores its predictions of them.

    R² is taken within each language and averaged, since pooling languages of different loss hides failures.

    Args:
      runs: the table; rows that evaluate a language which their run does not train are ignored.
      split, seed: what is held out, behind the warm-up of its runs; see `split_runs` and `past_warm_up`.
      law: "atlas", "chinchilla_total", "chinchilla_own" (tokens of the mixture, or of the language), or a
        law of one language by name.
      warm_up: part of each run whose rows are left out, see `fit`; the joint fit keeps those of the training runs.
      options: for `fit_joint` or `fit`.

    Returns:
      Scores: {"split", "law", "r2", "are", "rmse_log", "n_train", "n_heldout" (rows), "runs" (ids held out),
      "languages": {language: {"r2", "are", "rmse_log", "n"}}}; are is the mean absolute relative error; r2 is
      NaN where the held-out losses of a language are all alike. And the rows held out: run, language, loss,
      predicted (NaN where training lacks the language).

    Raises:
      UserError: unknown split or law, or nothing left to train on or to predict.
    """
    if law not in ("atlas", *_CHINCHILLA):
        law_named(law)
    train, test = split_runs(runs, split, seed=seed)
    test = past_warm_up(test, warm_up)
    if law != "atlas":
        options["warm_up"] = warm_up
    frame = test.evaluations()[["run", "language", "loss"]].assign(predicted=_predicted(train, test, law, options))
    known = frame[np.isfinite(frame["predicted"])]
    scores = {
        name: _score(rows["loss"].to_numpy(), rows["predicted"].to_numpy())
        for name in runs.targets
        if len(rows := known[known["language"] == name])
    }
    if not scores:
        raise UserError(f"split {split!r} leaves no language both to train on and to predict")
    means = pd.DataFrame(scores).T[["r2", "are", "rmse_log"]].mean().to_dict()
    sizes = {"n_train": len(train), "n_heldout": len(known), "runs": list(frame["run"].unique())}
    return {"split": split, "law": law, **means, **sizes, "languages": scores}, frame


def _predicted(train: Runs, test: Runs, law: str, options: Mapping[str, Any]) -> np.ndarray:
    """Losses [rows of test] by a fit of `train`; NaN where that lacks the language."""
    if law != "atlas":
        name = "chinchilla" if law in _CHINCHILLA else law
        return predict_others(name, train, test, **(_CHINCHILLA.get(law, {}) | options))
    predicted, known = np.full(len(test), np.nan), np.isin(test.target, train.target)
    if known.any():
        predicted[known] = fit_joint(train, **options).predict_runs(test.where(known))[0]
    return predicted


def _score(loss: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    return {
        "r2": r2(loss, predicted),
        "are": float(np.mean(relative_error(loss, predicted))),
        "rmse_log": float(np.sqrt(np.mean(np.log(predicted / loss) ** 2))) if np.all(loss > 0) else float("nan"),
        "n": len(loss),
    }
