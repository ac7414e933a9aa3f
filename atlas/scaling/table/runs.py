"""The runs table: one row per evaluation of one checkpoint on one language, read into plain NumPy arrays."""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from atlas.scaling.table.checks import suspicions
from checked import UserError, unknown

_TOKEN_NAMES = ("tokens", "num_tokens", "tokens_seen")
_NUMERIC = ("num_params", "loss", "tokens", "unique_tokens")
_ONLY_LANGUAGE = "all"  # the name of the language of a table that names none
COOLDOWN = "cooldown"  # of the column `phase`: the row ends a branch whose learning rate fell to zero


@dataclasses.dataclass(frozen=True)
class Runs:
    """Evaluations of training runs, as arrays.

    Attributes:
      N: [n] float64, parameters.
      D: [n, Ls] float64, training tokens seen per source language (0 where the run does not train on it).
      U: [n, Ls] float64, unique tokens per source language (infinite where nothing is known to repeat).
      target: [n] int, index into `languages` of the evaluated language.
      loss: [n] float64, in the table's own unit.
      run: [n] int, index into `run_ids`; rows of one run are correlated.
      languages: the Ls source languages; the evaluated ones come first, source-only ones after them.
      targets: the languages that have evaluations: the first of `languages`, whatever rows are selected.
      run_ids: the runs' names.
      frame: the rows kept, in the same order, with every column of the table.
      notes: what was dropped or assumed while reading, with counts.
    """

    N: np.ndarray
    D: np.ndarray
    U: np.ndarray
    target: np.ndarray
    loss: np.ndarray
    run: np.ndarray
    languages: tuple[str, ...]
    targets: tuple[str, ...]
    run_ids: tuple[str, ...]
    frame: pd.DataFrame
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def total_tokens(self) -> np.ndarray:
        """[n] training tokens over all languages."""
        return self.D.sum(1)

    @property
    def shares(self) -> np.ndarray:
        """[n, Ls] proportion of each source language in the tokens seen."""
        return self.D / self.total_tokens[:, None]

    @property
    def phase(self) -> np.ndarray:
        """[n] str, the learning-rate phase of each row; "" where the table names none."""
        if "phase" not in self.frame:
            return np.full(len(self), "")
        return self.frame["phase"].fillna("").to_numpy(str)

    @property
    def loss_unit(self) -> str:
        """The unit of the losses; "" where the table names none."""
        return next(iter(_units(self.frame)), "")

    def evaluations(self) -> pd.DataFrame:
        """A row each: run (its id), language (the evaluated one), num_params, tokens (of all), loss, phase."""
        return pd.DataFrame(
            {
                "run": np.asarray(self.run_ids)[self.run],
                "language": np.asarray(self.languages)[self.target],
                "num_params": self.N,
                "tokens": self.total_tokens,
                "loss": self.loss,
                "phase": self.phase,
            }
        )

    @property
    def continued(self) -> np.ndarray:
        """[n] whether a row is of a run that continues another one: its column `initialize` names the parent."""
        if "initialize" not in self.frame:
            return np.zeros(len(self), bool)
        return self.frame["initialize"].fillna("").astype(str).str.strip().to_numpy() != ""

    @property
    def epochs(self) -> np.ndarray:
        """[n] how often a row's run has seen the language that it repeats most, 0 where nothing is known to repeat."""
        return (self.D / self.U).max(1)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notes, and what makes these rows unfit to be fitted together."""
        found = list(self.notes)
        if len(phases := sorted(set(self.phase) - {""})) > 1:
            found.append(f"the table mixes learning-rate phases ({', '.join(phases)}): fit one of them at a time")
        if 0 < (count := int(self.continued.sum())) < len(self):
            found.append(
                f"{count} of {len(self)} rows are of runs that continue another one (column 'initialize'): "
                "laws are of runs from scratch; fit those alone"
            )
        return tuple(found)

    def comparable(self) -> "Runs":
        """The rows that laws are fitted to: runs from scratch, at the ends of cooldowns where the table tells them.

        A continued run starts ahead of the law, and the trunk of a run lies above what its tokens can reach. A table
        of one kind alone is kept whole.
        """
        runs = self if self.continued.all() else self.where(~self.continued)
        cooled = runs.phase == COOLDOWN
        return runs.where(cooled) if cooled.any() else runs

    def single_epoch(self) -> "Runs":
        """The rows of runs from scratch that repeat no language: there repetition does not blur transfer or capacity.

        Raises:
          UserError: there is none.
        """
        rows = (self.epochs <= 1) & ~self.continued
        if not rows.any():
            raise UserError(
                "every run repeats a language or continues another run: transfer and capacity need one epoch"
            )
        return self.where(rows)

    def unique_tokens(self) -> dict[str, float]:
        """Unique tokens by language: the most that any run which trains it had, infinite where none is stated.

        Runs that were capped on purpose, to measure repetition, say less than there is; a run that does not train a
        language says nothing of it.
        """
        known = np.where((self.D > 0) & np.isfinite(self.U), self.U, 0.0).max(0)
        return {name: float(U) if U > 0 else np.inf for name, U in zip(self.languages, known, strict=True)}

    def aligned(self, languages: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """D and U [n, L] with columns in the order of `languages`: 0 and infinite for one that the table lacks."""
        place = pd.Index(self.languages).get_indexer(languages)
        D, U = np.where(place < 0, 0.0, self.D[:, place]), np.where(place < 0, np.inf, self.U[:, place])
        return D, U

    def own(self, values: np.ndarray) -> np.ndarray:
        """[n] the column of `values` [n, Ls] that belongs to each row's evaluated language."""
        return values[np.arange(len(self)), self.target]

    def where(self, mask: np.ndarray | str) -> "Runs":
        """The rows that a boolean array [n], or a pandas query over the table's columns, selects.

        Raises:
          UserError: the query names an unknown column or cannot be read, or no row is left.
        """
        rows = self._query(mask) if isinstance(mask, str) else np.asarray(mask)
        if rows.dtype != bool or rows.shape != (len(self),):
            raise UserError(f"a selection is {len(self)} booleans or a query; got {rows.dtype} of shape {rows.shape}")
        if not rows.any():
            raise UserError(f"the filter {mask if isinstance(mask, str) else ''!r} keeps none of {len(self)} rows")
        frame = self.frame[rows].reset_index(drop=True)
        ids, run = np.unique(self.run[rows], return_inverse=True)
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[rows] for name in ("N", "D", "U", "target", "loss")},
            run=run,
            run_ids=tuple(self.run_ids[i] for i in ids),
            frame=frame,
        )

    def _query(self, query: str) -> np.ndarray:
        try:
            rows = self.frame.eval(query)
        except Exception as error:  # pandas raises errors of a dozen types for a bad query
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot apply the filter {query!r}: {reason}; columns: {_names(self.frame)}") from None
        if not isinstance(rows, pd.Series) or rows.dtype != bool:
            raise UserError(f"the filter {query!r} is not a condition, such as 'family == \"gpt\"'")
        return rows.to_numpy()


def load_runs(source: str | os.PathLike | pd.DataFrame) -> Runs:
    """Reads and checks a runs table.

    Columns: `num_params`, `loss`; `tokens` (also `num_tokens`, `tokens_seen`) or one `tokens.<language>` per
    training language (blank means 0); optionally `unique_tokens` or `unique_tokens.<language>`, `language`,
    `run` (absent: every row is a run of its own), `loss_unit`, `initialize` (the parent of a run that continues
    another one), and anything else, which is kept in `frame`.

    Args:
      source: a CSV or Parquet file, or a DataFrame.

    Raises:
      UserError: a column is missing, misspelt or not numeric; sizes, tokens or losses are not positive;
        losses of several units are mixed; nothing is left.

    >>> table = pd.DataFrame({"num_params": [1e6, 2e6], "tokens": [1e7, 4e7], "loss": [2.0, 1.5]})
    >>> runs = load_runs(table)
    >>> runs.D.shape, runs.languages
    ((2, 1), ('all',))
    """
    frame, notes = _canonical_names(read_table(source, "runs table")), []
    frame = _clean(frame, notes)
    evaluated = _language_of(frame)
    targets, languages = _languages(frame, evaluated, notes)
    target = pd.Index(languages).get_indexer(evaluated)
    D = _by_language(frame[_measured(frame) or ["tokens"]], "tokens", languages, target, 0.0)
    U = _unique_tokens(frame, languages, target, D)
    run, run_ids = pd.factorize((frame["run"] if "run" in frame else frame.index.to_series()).astype(str))
    notes += suspicions(frame, D, U, target, languages)
    return Runs(
        N=frame["num_params"].to_numpy(float),
        D=D,
        U=U,
        target=target,
        loss=frame["loss"].to_numpy(float),
        run=run,
        languages=languages,
        targets=targets,
        run_ids=tuple(run_ids),
        frame=frame,
        notes=tuple(notes),
    )


def _names(frame: pd.DataFrame) -> str:
    return ", ".join(map(str, frame.columns[:20]))


def read_table(source: str | os.PathLike | pd.DataFrame, kind: str = "table", **options: object) -> pd.DataFrame:
    """A table of a CSV or Parquet file, or a copy of a DataFrame; rows numbered from 0.

    Args:
      source: where it is from.
      kind: what it is, for messages.
      options: for `pandas.read_csv`.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    if isinstance(source, pd.DataFrame):
        return source.reset_index(drop=True)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no {kind} at {str(path)!r}; give a CSV or Parquet file")
    try:
        return pd.read_parquet(path) if path.suffix in (".parquet", ".pq") else pd.read_csv(path, **options)
    except ImportError:
        raise UserError(f"reading {str(path)!r} needs pyarrow; install it or save the table as CSV") from None
    except (ValueError, UnicodeDecodeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the {kind} {str(path)!r}: {reason}") from None


def _canonical_names(frame: pd.DataFrame) -> pd.DataFrame:
    """Settles aliases of `tokens` and names the nearest column for each one that is missing."""
    if frame.empty:
        raise UserError("the runs table has no rows")
    frame = frame.rename(columns=str)
    doubled = frame.columns[frame.columns.duplicated()]
    if len(doubled):
        raise UserError(f"the runs table has two columns named {doubled[0]!r}; keep one")
    alias = next((name for name in _TOKEN_NAMES if name in frame), "tokens")
    frame = frame.rename(columns={alias: "tokens"})
    for name in _required(frame):
        if name not in frame:
            raise UserError(f"the runs table has no column {name!r}{_hint(name, frame)} (columns: {_names(frame)})")
    return frame


def _hint(name: str, frame: pd.DataFrame) -> str:
    plain = {str(column).lower(): column for column in frame}
    near = difflib.get_close_matches(name, list(plain), n=1)
    return f"; did you mean to name {plain[near[0]]!r} so?" if near else ""


def _required(frame: pd.DataFrame) -> list[str]:
    return ["num_params", "loss"] + ([] if _measured(frame) else ["tokens"])


def _measured(frame: pd.DataFrame) -> list[str]:
    return [name for name in frame if name.startswith("tokens.")]


def _units(frame: pd.DataFrame) -> list[str]:
    return [str(unit) for unit in frame["loss_unit"].dropna().unique()] if "loss_unit" in frame else []


def _clean(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Numbers as float64, unusable rows dropped with a counted reason, impossible values refused."""
    numeric = [name for name in frame if name in _NUMERIC or name.startswith(("tokens.", "unique_tokens."))]
    frame = frame.assign(**{name: _numbers(frame[name]) for name in numeric})
    if len(units := _units(frame)) > 1:
        raise UserError(f"losses of several units in one table: {', '.join(units)}; keep one loss_unit")
    required = _required(frame)
    for name in required + (["language"] if "language" in frame else []):
        frame = _drop(frame, frame[name].isna(), f"{name!r} is missing", notes)
    for name in required:
        frame = _drop(frame, frame[name] == np.inf, f"{name!r} is infinite", notes)
        _refuse(frame, name, frame[name] <= 0, "must be positive")
    if measured := _measured(frame):
        for name in measured:
            _refuse(frame, name, (frame[name] < 0) | np.isinf(frame[name]), "must be finite and not negative")
        _refuse(frame, "tokens.<language>", frame[measured].sum(axis=1) <= 0, "must not all be 0")
    frame = _drop(frame, frame.duplicated(), "the row repeats another one exactly", notes)
    return frame.reset_index(drop=True)


def _numbers(column: pd.Series) -> pd.Series:
    values = pd.to_numeric(column, errors="coerce")
    wrong = values.isna() & column.notna()
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(f"column {column.name!r} is not numeric: {column.iloc[row]!r} in row {row}")
    return values.astype(float)


def _drop(frame: pd.DataFrame, bad: pd.Series, reason: str, notes: list[str]) -> pd.DataFrame:
    if not bad.any():
        return frame
    notes.append(f"dropped {int(bad.sum())} of {len(frame)} rows: {reason}")
    if bad.all():
        raise UserError(f"the runs table has no usable row: {reason} in all {len(frame)}")
    return frame[~bad]


def _refuse(frame: pd.DataFrame, name: str, bad: pd.Series, rule: str) -> None:
    if bad.any():
        row = int(frame.index[bad][0])
        value = f"{frame.at[row, name]:g}" if name in frame else "none"
        raise UserError(f"column {name!r} {rule}: row {row} has {value}; such rows: {int(bad.sum())}")


def _language_of(frame: pd.DataFrame) -> pd.Series:
    if "language" in frame:
        return frame["language"].astype(str)
    trained = [name.removeprefix("tokens.") for name in _measured(frame)]
    if len(trained) > 1:
        hint = _hint("language", frame)
        raise UserError(f"a table with several 'tokens.<language>' columns needs a 'language' column{hint}")
    return pd.Series((trained or [_ONLY_LANGUAGE]) * len(frame))


def _languages(frame: pd.DataFrame, language: pd.Series, notes: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The targets, and all languages, of which they are the first."""
    evaluated, trained = tuple(pd.unique(language)), [name.removeprefix("tokens.") for name in _measured(frame)]
    if not trained:
        return evaluated, evaluated
    for name in frame:
        if name.startswith("unique_tokens.") and name.removeprefix("unique_tokens.") not in trained:
            raise unknown("language in column unique_tokens.<language>:", name.removeprefix("unique_tokens."), trained)
    never = tuple(name for name in evaluated if name not in trained)
    if never == evaluated:
        raise UserError(f"no evaluated language ({evaluated[0]!r}, …) has a column such as 'tokens.{evaluated[0]}'")
    if never:
        notes.append(f"languages evaluated but never trained on: {', '.join(never)}")
    targets = tuple(name for name in trained if name in evaluated) + never
    only = tuple(name for name in trained if name not in evaluated)
    if only:
        notes.append(f"languages in mixtures without evaluations, kept as sources only: {', '.join(only)}")
    return targets, targets + only


def _by_language(
    frame: pd.DataFrame, kind: str, languages: tuple[str, ...], target: np.ndarray, absent: float
) -> np.ndarray:
    """[n, Ls] columns <kind>.<language>, and else <kind>, which is of the evaluated language."""
    values = np.full((len(frame), len(languages)), absent)
    if kind in frame:
        values[np.arange(len(frame)), target] = frame[kind].fillna(absent)
    for i, name in enumerate(languages):
        if f"{kind}.{name}" in frame:
            values[:, i] = frame[f"{kind}.{name}"].fillna(absent)
    return values


def _unique_tokens(frame: pd.DataFrame, languages: tuple[str, ...], target: np.ndarray, D: np.ndarray) -> np.ndarray:
    U = np.where(D > 0, _by_language(frame, "unique_tokens", languages, target, np.inf), np.inf)
    row, language = np.nonzero(U <= 0)
    if len(row):
        raise UserError(
            f"unique tokens of {languages[language[0]]!r} must be positive where it is trained on: "
            f"row {row[0]} has {U[row[0], language[0]]:g}"
        )
    return U
