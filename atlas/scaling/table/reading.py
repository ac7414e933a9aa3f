"""From a file as it comes to columns with names and types: separators, aliases, what is text and what is a number."""

import gzip
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from checked import UserError, unknown

# Other people's names for what the laws read, the likeliest first. One letter counts as it is written, as do W&B's
# Name and ID; anything else whatever its case and whether spaces, dots, slashes or hyphens part its words.
_ALIASES = {
    "num_params": (
        *("N", "params", "parameters", "num_parameters", "n_params", "n_parameters", "param_count", "model_size"),
        *("model_params", "num_params_non_embedding", "non_embedding_params", "nonembedding_params"),
        "non_vocab_parameters",
    ),
    "tokens": (
        *("D", "num_tokens", "n_tokens", "tokens_seen", "total_tokens", "train_tokens", "training_tokens"),
        *("num_train_tokens", "tokens_trained", "token_count"),
    ),
    "loss": (
        *("val_loss", "valid_loss", "validation_loss", "eval_loss", "test_loss", "final_loss", "cross_entropy"),
        *("train_loss", "training_loss"),
    ),
    "unique_tokens": ("U", "num_unique_tokens", "unique_train_tokens"),
    "run": ("run_id", "ID", "run_name", "Name"),
    "language": ("lang", "eval_language"),
    "step": ("global_step", "train_step"),
    "learning_rate": ("lr",),
}
_AS_WRITTEN = {"N", "D", "U", "ID", "Name"}
_FALLBACK = {"train_loss", "training_loss"}  # of a table without a validation loss; beside one it is no second reading
_TEXT = ("run", "language", "model", "family", "phase", "initialize", "loss_unit")
_MISSING = ("", "nan", "na", "n/a", "null", "none", "<na>")  # where a number is expected, in lower case
_DECIMAL_COMMA = r"^\s*([+-]?\d+),(\d+(?:[eE][+-]?\d+)?)\s*$"  # of tables that semicolons part
_ID = r"[+-]?0\d+"  # digits that are no number: 0 in front means something


def read_table(source: str | os.PathLike | pd.DataFrame, kind: str = "table") -> pd.DataFrame:
    """A table of a CSV or Parquet file, or a copy of a DataFrame; rows numbered from 0.

    All columns of a CSV file are text, blank ones "". Its separator is whichever of comma, semicolon and tab its first
    line has most of.

    Args:
      source: where it is from.
      kind: what it is, for messages.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    if isinstance(source, pd.DataFrame):
        return source.reset_index(drop=True)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no {kind} at {str(path)!r}; give a CSV or Parquet file")
    try:
        if path.suffix in (".parquet", ".pq"):
            return pd.read_parquet(path)
        separator = _separator(path)
        frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        return frame.replace(_DECIMAL_COMMA, r"\1.\2", regex=True) if separator == ";" else frame
    except ImportError:
        raise UserError(f"reading {str(path)!r} needs pyarrow; install it or save the table as CSV") from None
    except (ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].removeprefix("Error tokenizing data. C error: ")
        raise UserError(f"cannot read the {kind} {str(path)!r}: {reason}") from None


def _separator(path: Path) -> str:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        header = re.sub(r'"[^"]*"', "", file.readline())
    return max(",;\t", key=header.count)


def read_runs(
    source: str | os.PathLike | pd.DataFrame, columns: Mapping[str, str] | None = None, extra: Sequence[str] = ()
) -> pd.DataFrame:
    """A runs table whose columns have their own names and types, beside the columns as they came.

    Args:
      source: as for `read_table`.
      columns: our name → the table's name, or an expression over the table's columns such as "params * 1e9".
      extra: columns that a law reads besides those that every table may have.

    Returns:
      The rows. What was understood under another name is in `attrs["notes"]`, a list of str.

    Raises:
      UserError: no rows, a name twice or unknown, or several columns that could be meant.

    >>> read_runs(pd.DataFrame({"N": [1e6], "D": [2e7], "val loss": [2.5]})).attrs["notes"]
    ["read 'N' as num_params, 'D' as tokens, 'val loss' as loss"]
    """
    frame = read_table(source, "runs table")
    notes = list(frame.attrs.get("notes", ()))
    if frame.empty:
        raise UserError("the runs table has no rows")
    frame = frame.rename(columns=lambda name: str(name).strip())
    if len(doubled := frame.columns[frame.columns.duplicated()]):
        raise UserError(f"the runs table has two columns named {doubled[0]!r}; keep one")
    given = dict(columns or {})
    known = tuple(dict.fromkeys((*_ALIASES, *_TEXT, *extra)))
    for name in given:
        if name not in known and not name.startswith(("tokens.", "unique_tokens.")):
            raise unknown("column of a runs table", name, known)
    found = _understood([*frame, *given])
    named = found | {name: theirs for name, theirs in given.items() if theirs in frame}
    frame = frame.assign(**{name: frame[theirs] for name, theirs in named.items()}).apply(_typed)
    frame = frame.assign(**{name: _computed(frame, text) for name, text in given.items() if name not in named})
    if found:
        notes.append("read " + ", ".join(f"{theirs!r} as {name}" for name, theirs in found.items()))
    frame.attrs["notes"] = notes
    return frame


def _typed(column: pd.Series) -> pd.Series:
    """A column that came as text: numbers or truth values where all of it are, else text whose blanks are missing."""
    if not pd.api.types.is_object_dtype(column) and not pd.api.types.is_string_dtype(column):
        return column
    text = column.astype(str).str.strip()
    blank = column.isna() | text.str.lower().isin(_MISSING)
    if column.name not in _TEXT and not blank.all() and not text.str.fullmatch(_ID).any():
        numbers = pd.to_numeric(text.where(~blank), errors="coerce")
        if numbers.notna().equals(~blank):
            return numbers
        if text.isin(("True", "False")).all():
            return text == "True"
    return column.where(column.notna() & (text != ""), None)


def _computed(frame: pd.DataFrame, text: str) -> pd.Series:
    """What an expression over the table's columns gives."""
    try:
        return frame.eval(text)
    except Exception:  # pandas raises errors of a dozen types for a bad expression
        raise unknown("column, or expression of columns,", text, frame.columns) from None


def _understood(names: Sequence[str]) -> dict[str, str]:
    """Our name → the table's, for each of ours that the table has under another name only."""
    found = {}
    plain = {_plain(name): name for name in reversed(names)}
    for ours, aliases in _ALIASES.items():
        if ours in names or any(name.startswith(f"{ours}.") for name in names):
            continue
        theirs = [alias if alias in _AS_WRITTEN else plain.get(alias, "") for alias in (ours, *aliases)]
        theirs = [name for name in dict.fromkeys(theirs) if name in names]
        first = [name for name in theirs if _plain(name) not in _FALLBACK] or theirs
        if len(first) > 1 and ours in ("num_params", "tokens", "loss"):
            raise UserError(f"{ours} could be {' or '.join(map(repr, first))}: choose with --columns={ours}={first[0]}")
        if first:
            found[ours] = first[0]
    return found


def _plain(name: str) -> str:
    """A name without case and separators, nor what W&B puts in front.

    >>> _plain("config.Model-Size"), _plain("val/loss")
    ('model_size', 'val_loss')
    """
    return re.sub(r"^(config|summary)_", "", re.sub(r"[\s./\-_]+", "_", name).lower().strip("_"))
