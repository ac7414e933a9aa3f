"""Held-out scores of a law: fit on some runs, predict the others, per language."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from atlas.errors import UserError, unknown
from atlas.scaling.estimates import r2
from atlas.scaling.joint.fit import fit_joint
from atlas.scaling.single.comparison import predict_others
from atlas.scaling.single.library import LAWS
from atlas.scaling.table.runs import Runs
from atlas.scaling.table.splits import split_runs

# name -> law of one language and what it takes for its tokens
_BASELINES: Mapping[str, tuple[str, str]] = {
    "chinchilla_total": ("chinchilla", "total"),
    "chinchilla_own": ("chinchilla", "own"),
} | {name: (name, law.tokens) for name, law in LAWS.items()}


def heldout(
    runs: Runs,
    split: str = "largest_n",
    law: str = "atlas",
    *,
    held: Iterable[str] = (),
    seed: int = 0,
    **options: Any,
) -> dict:
    """Fits a law without some runs and scores its predictions of them.

    R² is taken within each language and averaged, since pooling languages of different loss hides failures.

    Args:
      runs: the table; rows that evaluate a language which their run does not train are ignored.
      split, held, seed: what is held out; see `split_runs`.
      law: "atlas", "chinchilla_total", "chinchilla_own" (tokens of the mixture, or of the language), or a
        law of one language by name.
      options: for `fit_joint` or `fit`.

    Returns:
      {"split", "law", "r2", "are", "rmse_log", "n_train", "n_heldout" (rows), "runs" (ids held out),
      "languages": {language: {"r2", "are", "rmse_log", "n"}}}; are is the mean absolute relative error; r2 is
      NaN where the held-out losses of a language are all alike.

    Raises:
      UserError: unknown split or law, or nothing left to train on or to predict.
    """
    train, frame = _predicted(runs, split, law, held, seed, options)
    known = frame[np.isfinite(frame["predicted"])]
    scores = {
        name: _score(rows["loss"].to_numpy(), rows["predicted"].to_numpy())
        for name in runs.targets
        if len(rows := known[known["language"] == name])
    }
    if not scores:
        raise UserError(f"split {split!r} leaves no language both to train on and to predict")
    means = {key: _mean([score[key] for score in scores.values()]) for key in ("r2", "are", "rmse_log")}
    sizes = {"n_train": len(train), "n_heldout": len(known), "runs": list(frame["run"].unique())}
    return {"split": split, "law": law, **means, **sizes, "languages": scores}


def heldout_predictions(
    runs: Runs,
    split: str = "largest_n",
    law: str = "atlas",
    *,
    held: Iterable[str] = (),
    seed: int = 0,
    **options: Any,
) -> pd.DataFrame:
    """The rows that `heldout` scores: run, language, loss, predicted (NaN where training lacks the language)."""
    return _predicted(runs, split, law, held, seed, options)[1]


def _predicted(
    runs: Runs, split: str, law: str, held: Iterable[str], seed: int, options: Mapping[str, Any]
) -> tuple[Runs, pd.DataFrame]:
    """Rows trained on, and the rows held out with their predictions."""
    if law not in ("atlas", *_BASELINES):
        raise unknown("law", law, ("atlas", *_BASELINES))
    train, test = split_runs(runs, split, held=held, seed=seed)
    if law == "atlas":
        predicted, known = np.full(len(test), np.nan), np.isin(test.target, train.target)
        if known.any():
            predicted[known] = fit_joint(train, **options).predict_runs(test.where(known))[0]
    else:
        name, tokens = _BASELINES[law]
        predicted = predict_others(name, train, test, **({"tokens": tokens} | options))
    columns = {
        "run": np.asarray(test.run_ids)[test.run],
        "language": np.asarray(test.languages)[test.target],
        "loss": test.loss,
        "predicted": predicted,
    }
    return train, pd.DataFrame(columns)


def _score(loss: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    return {
        "r2": r2(loss, predicted),
        "are": float(np.mean(np.abs(predicted / loss - 1.0))),
        "rmse_log": float(np.sqrt(np.mean(np.log(predicted / loss) ** 2))),
        "n": len(loss),
    }


def _mean(values: list[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
