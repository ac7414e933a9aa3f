"""Held-out scores of a law: fit on some runs, predict the others, per language."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from atlas.errors import UserError, unknown
from atlas.scaling.joint.fit import fit_joint
from atlas.scaling.single.fit import fit
from atlas.scaling.single.library import LAWS
from atlas.scaling.table.runs import Runs

SPLITS = ("largest_n", "largest_d", "top_compute", "mixture", "random", "guide", "smallest_n")
_FRACTION = 0.2  # of the runs, as in ATLAS's own protocol
_WARM_UP = 1e10  # tokens before which the guide drops checkpoints
_TAIL = 0.7  # part of the target's run after which the guide predicts it

# name -> law of one language and what it takes for its tokens
BASELINES: Mapping[str, tuple[str, str]] = {
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

    Whole runs are held out, never single rows: checkpoints of a run are too much alike. R² is taken within
    each language and averaged, since pooling languages of different loss hides failures. Split "guide" is
    the protocol of A Hitchhiker's Guide to Scaling Law Estimation (arXiv 2410.11840): fit the smaller models
    after the warm-up, predict the last 30 % of the largest one's run.

    Args:
      runs: the table; rows that evaluate a language which their run does not train are ignored.
      split: what is held out: "largest_n" (runs of the largest model), "largest_d" (the fifth of the runs
        with the most tokens), "top_compute" (with the most N·D), "mixture" (`held`, or every run that is
        neither monolingual, bilingual nor uniform), "random" (a fifth of the runs), "guide", "smallest_n" (runs
        of the smallest model: scaling down).
      law: "atlas", "chinchilla_total", "chinchilla_own" (tokens of the mixture, or of the language), or a
        law of one language by name.
      held: ids of the runs to hold out by split "mixture".
      seed: of the random split.
      options: for `fit_joint` or `fit`.

    Returns:
      {"split", "law", "r2", "are", "rmse_log", "n_train", "n_heldout" (rows), "runs" (ids held out),
      "languages": {language: {"r2", "are", "rmse_log", "n"}}}; are is the mean absolute relative error; r2 is
      NaN where the held-out losses of a language are all alike.

    Raises:
      UserError: unknown split or law, or nothing left to train on or to predict.
    """
    train, _, frame = _predicted(runs, split, law, held, seed, options)
    known = frame[np.isfinite(frame["predicted"])]
    scores = {
        name: _score(rows["loss"].to_numpy(), rows["predicted"].to_numpy())
        for name in runs.targets
        if len(rows := known[known["language"] == name])
    }
    if not scores:
        raise UserError(f"split {split!r} leaves no language both to train on and to predict")
    means = {key: _mean([score[key] for score in scores.values()]) for key in ("r2", "are", "rmse_log")}
    sizes = {
        "n_train": len(train),
        "n_heldout": len(known),
        "runs": list(frame["run"].unique()),
    }
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
    return _predicted(runs, split, law, held, seed, options)[2]


def split_runs(runs: Runs, split: str, *, held: Iterable[str] = (), seed: int = 0) -> tuple[Runs, Runs]:
    """The rows to train on and those to predict; see `heldout`."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    runs = _trained(runs)
    out = _held_rows(runs, split, set(held), seed)
    train = ~out
    if split == "guide":
        train &= after_warm_up(runs)
        out &= runs.total_tokens >= _TAIL * runs.total_tokens[out].max()
    if not out.any() or not train.any():
        raise UserError(f"split {split!r} holds out {int(out.sum())} of {len(runs)} rows; both parts need some")
    return runs.where(train), runs.where(out)


def after_warm_up(runs: Runs, tokens: float = _WARM_UP, fraction: float = 0.1) -> np.ndarray:
    """[n] whether a row lies behind the warm-up: its first `tokens`, or `fraction` of its run if that is less.

    The guide's cut (arXiv 2410.11840): early checkpoints fit no power law and spoil those that do.
    """
    seen = runs.total_tokens
    return seen > np.minimum(tokens, fraction * _by_run(runs, seen)[runs.run])


def _predicted(runs: Runs, split: str, law: str, held: Iterable[str], seed: int, options: Mapping[str, Any]):
    """Rows trained on, rows held out, and the latter with their predictions."""
    if law not in ("atlas", *BASELINES):
        raise unknown("law", law, ("atlas", *BASELINES))
    train, test = split_runs(runs, split, held=held, seed=seed)
    frame = pd.DataFrame(
        {
            "run": np.asarray(test.run_ids)[test.run],
            "language": np.asarray(runs.languages)[test.target],
            "loss": test.loss,
            "predicted": _predict(law, train, test, options),
        }
    )
    return train, test, frame


def _trained(runs: Runs) -> Runs:
    """The rows that evaluate a language which their run trains."""
    return runs.where(runs.own(runs.D) > 0)


def _held_rows(runs: Runs, split: str, held: set[str], seed: int) -> np.ndarray:
    """[n] whether a row's run is held out."""
    for name in held - set(runs.run_ids):
        raise unknown("run", name, runs.run_ids)
    count = len(runs.run_ids)
    if split in ("largest_n", "guide"):
        sizes = _by_run(runs, runs.N)
        chosen = sizes > 0.99 * sizes.max()
    elif split == "smallest_n":
        chosen = _by_run(runs, runs.N) < 1.01 * runs.N.min()
    elif split == "largest_d":
        chosen = _top(_by_run(runs, runs.total_tokens))
    elif split == "top_compute":
        chosen = _top(_by_run(runs, runs.N * runs.total_tokens))
    elif split == "random":
        chosen = _top(np.random.default_rng(seed).random(count))
    elif held:
        chosen = np.isin(runs.run_ids, list(held))
    else:
        chosen = _by_run(runs, _is_uneven(runs.shares)) > 0
    return chosen[runs.run]


def _by_run(runs: Runs, values: np.ndarray) -> np.ndarray:
    """[number of runs] largest value over the rows of each run."""
    largest = np.full(len(runs.run_ids), -np.inf)
    np.maximum.at(largest, runs.run, values)
    return largest


def _top(values: np.ndarray) -> np.ndarray:
    return values >= np.quantile(values, 1.0 - _FRACTION, method="higher")


def _is_uneven(shares: np.ndarray) -> np.ndarray:
    """Whether a mixture [n, Ls] is neither of one or two languages nor even, to 5 % of its largest share."""
    present = shares > 0
    smallest = np.min(np.where(present, shares, np.inf), 1)
    return (present.sum(1) > 2) & (smallest < 0.95 * shares.max(1))


def _predict(law: str, train: Runs, test: Runs, options: Mapping[str, Any]) -> np.ndarray:
    """[n] losses; NaN for languages that the training part lacks."""
    predicted = np.full(len(test), np.nan)
    known = np.unique(train.target)
    rows = np.isin(test.target, known)
    if not rows.any():
        return predicted
    if law == "atlas":
        predicted[rows] = fit_joint(train, **options).predict_runs(test.where(rows))[0]
        return predicted
    name, tokens = BASELINES[law]
    options = {"tokens": tokens} | options
    for language in known:
        rows = test.target == language
        if rows.any():
            series = fit(name, train.where(train.target == language), **options)
            predicted[rows] = series.predict_runs(test.where(rows))[0]
    return predicted


def _score(loss: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    spread = np.sum((loss - loss.mean()) ** 2)
    return {
        "r2": float(1.0 - np.sum((loss - predicted) ** 2) / spread) if spread > 0 else float("nan"),
        "are": float(np.mean(np.abs(predicted / loss - 1.0))),
        "rmse_log": float(np.sqrt(np.mean(np.log(predicted / loss) ** 2))),
        "n": len(loss),
    }


def _mean(values: list[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
