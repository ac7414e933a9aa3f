"""Splits of a table into runs to fit and runs to predict, and the cut of their warm-up."""

import dataclasses

import numpy as np

from atlas.scaling.table.runs import COOLDOWN, Runs
from checked import UserError, unknown

SPLITS = ("largest_n", "largest_d", "top_compute", "mixture", "random", "guide", "smallest_n")
_FRACTION = 0.2  # of the runs, as in ATLAS's own protocol
_GUIDE_TOKENS, _GUIDE_PART = 1e10, 0.1  # tokens before which the guide drops checkpoints, and part of a shorter run
WARM_UP = 0.3  # part of a run's tokens: published families are predicted better up to here, and hardly beyond
_TAIL = 0.7  # part of the target's run after which the guide predicts it
_SAME_SIZE = 0.01  # relative: sizes so near count as one
_UNEVEN = 0.95  # of the largest share, below which a mixture is not even: whole windows are dealt out


def split_runs(runs: Runs, split: str, *, seed: int = 0) -> tuple[Runs, Runs]:
    """The rows to train on and those to predict.

    Whole runs are held out, never single rows: checkpoints of a run are too much alike. Rows that evaluate a language
    which their run does not train are left out of both. Split "guide" is the protocol of A Hitchhiker's Guide to
    Scaling Law Estimation (arXiv 2410.11840): fit the smaller models after the warm-up, predict the last 30 % of the
    largest one's run.

    Args:
      runs: the table.
      split: what is held out: "largest_n" (runs of the largest model), "largest_d" (the fifth of the runs
        with the most tokens), "top_compute" (with the most N·D), "mixture" (every run that is neither
        monolingual, bilingual nor uniform), "random" (a fifth of the runs), "guide", "smallest_n" (runs of the
        smallest model: scaling down).
      seed: of the random split.

    Raises:
      UserError: unknown split, or a part without rows.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    runs = runs.where(~(runs.own(runs.D) <= 0))
    out = held_rows(runs, split, seed)
    train = ~out
    if split == "guide":
        train &= _after_guides_warm_up(runs)
        out &= runs.total_tokens >= _TAIL * runs.total_tokens[out].max()
    if not out.any() or not train.any():
        raise UserError(f"split {split!r} holds out {int(out.sum())} of {len(runs)} rows; both parts need some")
    return runs.where(train), runs.where(out)


def _after_guides_warm_up(runs: Runs) -> np.ndarray:
    """[n] whether a row lies behind the warm-up: the first 10 billion tokens, or the first tenth of a shorter run.

    The guide's cut (arXiv 2410.11840): early checkpoints fit no power law and spoil those that do.
    """
    seen = runs.total_tokens
    return seen > np.minimum(_GUIDE_TOKENS, _GUIDE_PART * _by_run(runs, seen)[runs.run])


def past_warm_up(runs: Runs, part: float | None = None) -> Runs:
    """The rows behind the first `part` of the tokens of their run, and a note of how many were left out.

    A run's first rows lie off the law that its later ones follow, and are many. Ends of cooldowns are always kept, and
    so is the last row of a run.

    Args:
      runs: the table.
      part: of a run's tokens, 0 or more and below 1; 0 keeps all, as a table without tokens is; default WARM_UP.

    Raises:
      UserError: it is no such number.
    """
    part = WARM_UP if part is None else part
    if not 0.0 <= part < 1.0:
        raise UserError(f"the warm-up is a part of each run, 0 or more and below 1; got {part:g}")
    seen = runs.total_tokens
    if np.isnan(seen).any():
        return runs
    early = ~late_rows(runs, part) & (runs.phase != COOLDOWN)
    if not early.any():
        return runs
    note = f"left out {int(early.sum())} of {len(runs)} rows: the first {part:.0%} of their runs (warm_up=0 keeps them)"
    kept = runs.where(~early)
    return dataclasses.replace(kept, notes=(*kept.notes, note))


def late_rows(runs: Runs, part: float) -> np.ndarray:
    """[n] whether a row lies behind the first `part` of the tokens of its run."""
    return runs.total_tokens >= part * _by_run(runs, runs.total_tokens)[runs.run]


def held_rows(runs: Runs, split: str, seed: int = 0) -> np.ndarray:
    """[n] whether a row's run is held out."""
    if split in ("largest_n", "guide"):
        sizes = _by_run(runs, runs.N)
        chosen = sizes > (1.0 - _SAME_SIZE) * sizes.max()
    elif split == "smallest_n":
        chosen = _by_run(runs, runs.N) < (1.0 + _SAME_SIZE) * runs.N.min()
    elif split == "largest_d":
        chosen = _top(_by_run(runs, runs.total_tokens))
    elif split == "top_compute":
        chosen = _top(_by_run(runs, runs.N * runs.total_tokens))
    elif split == "random":
        chosen = _top(np.random.default_rng(seed).random(len(runs.run_ids)))
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
    """Whether a mixture [n, Ls] is neither of one or two languages nor even."""
    present = shares > 0
    smallest = np.min(np.where(present, shares, np.inf), 1)
    return (present.sum(1) > 2) & (smallest < _UNEVEN * shares.max(1))
