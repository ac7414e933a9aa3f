"""What looks wrong in a runs table without being impossible: counted warnings, for the fit to repeat."""

import difflib
import re

import numpy as np
import pandas as pd

_OPTIONAL = ("run", "language", "unique_tokens", "loss_unit", "phase", "initialize")
_PREFIX = re.compile(r"(unique_?)?tokens?([._\- ])(.+)", re.IGNORECASE)
_MOST_EPOCHS = 1000.0  # beyond which U is more likely in another unit than D
_MOST_TOKENS = 1e15  # more than all text there is
_LEAST = 1e3  # parameters or tokens: no model is smaller, no run shorter
_MOST_BILLIONS = 1e4  # of either: a table that reaches beyond counts single ones, of which a first batch has few
_MOST_LOSS = 6.5  # in the median: nats and bits of tokens lie below, perplexities above
_UNIT_FACTOR = 1.3  # between losses of alike runs; nats are 0.69 bits, and bytes a fraction of tokens
_SAMPLE = 200_000  # rows on which searches for pairs of rows look
_ONE_SIZE = 1.01  # ratio of num_params within a run, beyond which it is several models
_LEAST_ROWS = 12  # of a language, for its losses to show two groups


def suspicions(frame: pd.DataFrame, D: np.ndarray, U: np.ndarray, target: np.ndarray, languages: tuple[str, ...]):
    """Warnings [list of str] about a table that was read.

    Args:
      frame: its rows, columns by their canonical names.
      D, U: [n, Ls] tokens and unique tokens (infinite where unknown) by language.
      target: [n] index of the evaluated language.
      languages: the Ls languages.
    """
    return [
        *_unread_columns(frame, languages),
        *_unfinished(frame),
        *_several_sizes(frame),
        *_unlikely_units(frame, D, target),
        *_untrained(D, languages),
        *_odd_unique_tokens(frame, D, U, languages),
        *_contradictions(frame),
        *_mixed_units(frame, D, target, languages),
    ]


def _unread_columns(frame: pd.DataFrame, languages: tuple[str, ...]) -> list[str]:
    """Columns that resemble one which the table lacks."""
    notes = []
    for name in frame:
        plain = str(name).strip().lower().replace(" ", "_").replace("-", "_")
        near = difflib.get_close_matches(plain, [known for known in _OPTIONAL if known not in frame], n=1, cutoff=0.8)
        match = _PREFIX.fullmatch(str(name))
        if match and (match[2] == "." or match[3] in languages):
            near = [("unique_tokens." if match[1] else "tokens.") + match[3]]
        if near and near[0] not in frame:
            notes.append(f"column {name!r} is not read; did you mean {near[0]!r}?")
    return notes


def _several_sizes(frame: pd.DataFrame) -> list[str]:
    """Runs of several sizes, whose ids must be names of something else."""
    if not {"run", "num_params"} <= {*frame}:
        return []
    sizes = frame.groupby("run").num_params
    odd = (ratio := sizes.max() / sizes.min())[ratio > _ONE_SIZE].index
    if not len(odd):
        return []
    return [
        f"{len(odd)} runs, such as {odd[0]}, have rows of several sizes: rows of one run are taken to share its noise"
    ]


def _unfinished(frame: pd.DataFrame) -> list[str]:
    """Runs that a table exported from W&B says have crashed or go on."""
    if "State" not in frame or (odd := frame["State"] != "finished").sum() == 0:
        return []
    return [
        f"{int(odd.sum())} rows are of runs that have not finished; --where='State == \"finished\"' leaves them out"
    ]


def _unlikely_units(frame: pd.DataFrame, D: np.ndarray, target: np.ndarray) -> list[str]:
    """Questions about sizes, tokens and losses that look like thousands, billions or perplexities of something."""
    notes = []
    sizes = frame["num_params"].to_numpy() if "num_params" in frame else np.array([])
    for name, values in (("num_params", sizes), ("tokens", D[D > 0])):
        if values.size and values.min() < _LEAST and values.max() < _MOST_BILLIONS:
            notes.append(
                f"{name} begin at {values.min():.3g}: are they in millions or billions? "
                f"--columns='{name}={name}*1e9' says so"
            )
    trained = frame["loss"][~(D[np.arange(len(D)), target] <= 0)]
    if "loss_unit" not in frame and trained.median() > _MOST_LOSS:
        notes.append(f"losses reach {trained.max():.3g}: are they perplexities? --columns='loss=log(loss)' says so")
    return notes


def _untrained(D: np.ndarray, languages: tuple[str, ...]) -> list[str]:
    never = [name for name, total in zip(languages, D.sum(0), strict=True) if total == 0]
    return [f"no run trains on {', '.join(never)}: tokens are 0 or blank in every row"] if never else []


def _odd_unique_tokens(frame: pd.DataFrame, D: np.ndarray, U: np.ndarray, languages: tuple[str, ...]) -> list[str]:
    notes = []
    for i, name in enumerate(languages):
        trained, known = D[:, i] > 0, np.isfinite(U[:, i])
        if not known.any():
            continue
        if unknown := int((trained & ~known).sum()):
            notes.append(
                f"unique tokens of {name!r} are missing in {unknown} of the {int(trained.sum())} rows that train "
                "on it: taken as never repeated there"
            )
        values = U[known, i]
        epochs = D[known, i] / values
        if epochs.max() > _MOST_EPOCHS:
            notes.append(
                f"{name!r} is repeated up to {epochs.max():.3g} times (tokens / unique tokens): "
                "check that unique tokens are counted in the unit of tokens"
            )
        if values.max() > _MOST_TOKENS:
            notes.append(f"unique tokens of {name!r} reach {values.max():.3g}, more than all text there is")
        notes += _varying(frame, known, U[:, i], name)
    return notes


def _varying(frame: pd.DataFrame, known: np.ndarray, U: np.ndarray, language: str) -> list[str]:
    if "run" not in frame:
        return []
    span = pd.Series(U[known]).groupby(frame["run"].to_numpy()[known]).agg(["min", "max"])
    moved = span[span["max"] > 1.001 * span["min"]]
    if moved.empty:
        return []
    return [
        f"unique tokens of {language!r} change within {len(moved)} runs, such as {moved.index[0]}: "
        "they are what the run could see, not what it has seen"
    ]


def _contradictions(frame: pd.DataFrame) -> list[str]:
    """Rows of one evaluation with several losses."""
    if "run" not in frame:
        return []
    part = frame.iloc[:_SAMPLE]
    # A text column, such as a second test set, may tell rows apart; another measurement does not.
    key = [n for n in part if n.startswith(("tokens", "num_params")) or not pd.api.types.is_float_dtype(part[n])]
    repeated = part.duplicated(key)
    # A loss alike to the last digit is one evaluation, however its rows are numbered.
    read = ("run", "language", "num_params", "loss", "tokens", "unique_tokens")
    numbers = {name for name in part if pd.api.types.is_numeric_dtype(part[name])}
    copied = part.duplicated([n for n in part if str(n).split(".")[0] in read or n not in numbers]) & ~repeated
    found = (
        (repeated, "repeat another one but for the loss"),
        (copied, "repeat another one in all that laws read, the loss too"),
    )
    return [
        f"{int(rows.sum())} rows {how}, such as of run {part['run'][rows].iloc[0]}: both were kept"
        for rows, how in found
        if rows.any()
    ]


def _mixed_units(frame: pd.DataFrame, D: np.ndarray, target: np.ndarray, languages: tuple[str, ...]) -> list[str]:
    """Losses of alike rows, or around a smooth trend, that fall into two groups far apart."""
    if {"loss_unit", "initialize"} & set(frame) or "num_params" not in frame:
        return []
    own = D[np.arange(len(D)), target]
    rows = pd.DataFrame({"N": frame["num_params"], "own": own, "target": target})
    rows["loss"] = np.log(frame["loss"].where(frame["loss"] > 0))
    rows = rows[(rows.own > 0) & rows.loss.notna()].iloc[:_SAMPLE]
    for t, part in rows.groupby("target"):
        factor = _between_groups(part)
        if factor > _UNIT_FACTOR:
            return [
                f"losses of {languages[t]!r} fall into groups a factor {factor:.2f} apart at alike sizes and tokens: "
                "are they all in one unit (nats or bits, per token or per byte)?"
            ]
    return []


def _between_groups(rows: pd.DataFrame) -> float:
    """Ratio between the two groups of residuals around a quadratic trend in log N and log D; 1 if there is one."""
    if len(rows) < _LEAST_ROWS:
        return 1.0
    x, y = (np.log(rows[name].to_numpy()) - np.log(rows[name]).mean() for name in ("N", "own"))
    design = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], 1)
    loss = rows.loss.to_numpy()
    residual = np.sort(loss - design @ np.linalg.lstsq(design, loss, rcond=None)[0])
    least = max(3, len(rows) // 10)
    gaps = np.diff(residual)[least - 1 : len(residual) - least]
    cut = least + int(np.argmax(gaps))
    low, high = residual[:cut], residual[cut:]
    apart = high.mean() - low.mean()
    # Two groups: the gap between them is most of their distance.
    return float(np.exp(apart)) if gaps.max() > 0.5 * apart else 1.0
