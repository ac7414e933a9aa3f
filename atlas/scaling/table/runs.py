"""The runs table: one row per evaluation of one checkpoint on one language, read into plain NumPy arrays."""

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import pandas as pd

from atlas.scaling.table.checks import suspicions
from atlas.scaling.table.reading import read_runs
from checked import UserError, unknown

_NUMERIC = ("num_params", "loss", "tokens", "unique_tokens")
NEEDS = ("num_params", "tokens")  # of the laws that say nothing else
_ONLY_LANGUAGE = "all"  # the name of the language of a table that names none
COOLDOWN = "cooldown"  # of the column `phase`: the row ends a branch whose learning rate fell to zero


@dataclasses.dataclass(frozen=True)
class Runs:
    """Evaluations of training runs, as arrays.

    Attributes:
      N: [n] float64, parameters; NaN in a table without them.
      D: [n, Ls] float64, training tokens seen per source language (0 where the run does not train on it); NaN in a
        table without them.
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
    def unmixed(self) -> tuple[str, ...]:
        """Runs that evaluate several languages while the table's tokens do not tell on which of them they trained."""
        if "tokens" not in self.frame or _measured(self.frame):
            return ()
        several = pd.Series(self.target).groupby(self.run).nunique().to_numpy() > 1
        return tuple(self.run_ids[i] for i in np.flatnonzero(several))

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """The notes, what looks wrong in these rows, and what makes them unfit to be fitted together."""
        found = [*self.notes, *suspicions(self.frame, self.D, self.U, self.target, self.languages)]
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
        of one kind alone is kept whole. Runs of which no row is left are counted in a note.
        """
        continued, cooled = self.continued & ~self.continued.all(), self.phase == COOLDOWN
        rows = ~continued & cooled if (~continued & cooled).any() else ~continued
        kept, gone = self.where(rows), ~np.isin(self.run, self.run[rows])
        notes = []
        for lost, why in (
            (gone & continued, "continue another one (column 'initialize'): laws are of runs from scratch"),
            (gone & ~continued, f"have no row of phase {COOLDOWN!r}, as others have; name theirs, or fit them alone"),
        ):
            if lost.any():
                runs = len(np.unique(self.run[lost]))
                notes.append(f"left out {int(lost.sum())} of {len(self)} rows, of {runs} runs that {why}")
        return dataclasses.replace(kept, notes=(*kept.notes, *notes))

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


def load_runs(
    source: str | os.PathLike | pd.DataFrame,
    columns: Mapping[str, str] | None = None,
    *,
    needs: Sequence[str] = NEEDS,
    signed: bool = False,
) -> Runs:
    """Reads and checks a runs table.

    Columns: `num_params`, `loss`; `tokens` (of the evaluated language) or one `tokens.<language>` per training language
    (blank means 0); optionally `unique_tokens` or `unique_tokens.<language>`, `language`, `run` (absent or blank: the
    row is a run of its own), `loss_unit`, `initialize` (the parent of a run that continues another one), and anything
    else, which is kept in `frame`. Usual other names are understood, which a note then says; see
    `atlas.scaling.table.reading`.

    Args:
      source: a CSV file (parted by commas, semicolons or tabs), a Parquet file, or a DataFrame.
      columns: our name → the table's, or an expression over its columns, such as {"num_params": "billions * 1e9"}.
      needs: columns that must be there beside the loss: those that the law to be fitted reads.
      signed: whether losses may be 0 or negative, for laws of raw residuals.

    Raises:
      UserError: a column is missing, misspelt, ambiguous or not numeric; sizes, tokens or losses are not positive;
        losses of several units are mixed; nothing is left.

    >>> table = pd.DataFrame({"N": [1e6, 2e6], "tokens": [1e7, 4e7], "loss": [2.0, 1.5]})
    >>> runs = load_runs(table)
    >>> runs.D.shape, runs.languages, runs.notes
    ((2, 1), ('all',), ("read 'N' as num_params",))
    """
    frame = read_runs(source, columns, needs)
    notes = frame.attrs["notes"]
    frame = _clean(frame, _required(frame, needs), signed, notes)
    evaluated = _language_of(frame)
    targets, languages = _languages(frame, evaluated, notes)
    target = pd.Index(languages).get_indexer(evaluated)
    known = [name for name in frame if name == "tokens" or name.startswith("tokens.")]
    D = _by_language(frame[_measured(frame) or known], "tokens", languages, target, 0.0 if known else np.nan)
    run, run_ids = pd.factorize(_run_names(frame, notes))
    runs = Runs(
        N=frame["num_params"].to_numpy(float) if "num_params" in frame else np.full(len(frame), np.nan),
        D=D,
        U=_unique_tokens(frame, languages, target, D),
        target=target,
        loss=frame["loss"].to_numpy(float),
        run=run,
        languages=languages,
        targets=targets,
        run_ids=tuple(run_ids),
        frame=frame,
    )
    if runs.unmixed:
        notes.append(
            f"{len(runs.unmixed)} runs, such as {runs.unmixed[0]}, evaluate several languages: 'tokens' are taken as "
            "those of the language that a row evaluates; columns tokens.<language> give a mixture"
        )
    return dataclasses.replace(runs, notes=tuple(notes))


def _run_names(frame: pd.DataFrame, notes: list[str]) -> pd.Series:
    alone = pd.Series([f"row {i}" for i in frame.index])
    if "run" not in frame:
        # Models of one size by other tokens may be named alike and still be runs of their own: a person must say.
        if "model" in frame and frame["model"].duplicated().any():
            notes.append(
                "no column 'run': each row counts as a run of its own; where the rows of a 'model' are checkpoints of "
                "one run, give --columns=run=model"
            )
        return alone
    names = frame["run"].astype(str).str.strip()
    blank = frame["run"].isna() | (names == "")
    if blank.any():
        notes.append(f"{int(blank.sum())} of {len(frame)} rows have no run id: each counts as a run of its own")
    return names.where(~blank, alone)


def _names(frame: pd.DataFrame) -> str:
    return ", ".join(map(str, frame.columns[:20]))


def _hint(name: str, frame: pd.DataFrame) -> str:
    if any(column.endswith("__MIN") for column in frame):
        return "; a chart exported from W&B has no sizes: export its table of runs"
    plain = {str(column).lower(): column for column in frame}
    near = difflib.get_close_matches(name, list(plain), n=1)
    say = f"did you mean --columns={name}={plain[near[0]]}?" if near else f"say which it is: --columns={name}=ITS_NAME"
    return f"; {say}"


def _required(frame: pd.DataFrame, needs: Sequence[str]) -> list[str]:
    """The columns that must hold a number in every row; UserError for one that is not there."""
    required = [name for name in needs if name != "tokens" or not _measured(frame)] + ["loss"]
    for name in required:
        if name not in frame:
            raise UserError(f"the runs table has no column {name!r}{_hint(name, frame)} (columns: {_names(frame)})")
    return required


def _measured(frame: pd.DataFrame) -> list[str]:
    return [name for name in frame if name.startswith("tokens.")]


def _units(frame: pd.DataFrame) -> list[str]:
    return [str(unit) for unit in frame["loss_unit"].dropna().unique()] if "loss_unit" in frame else []


def _clean(frame: pd.DataFrame, required: list[str], signed: bool, notes: list[str]) -> pd.DataFrame:
    """Numbers as float64, unusable rows dropped with a counted reason, impossible values refused."""
    numeric = [n for n in frame if n in (*_NUMERIC, *required) or n.startswith(("tokens.", "unique_tokens."))]
    frame = frame.assign(**{name: _numbers(frame[name]) for name in numeric})
    if len(units := _units(frame)) > 1:
        raise UserError(f"losses of several units in one table: {', '.join(units)}; keep one loss_unit")
    for name in required + (["language"] if "language" in frame else []):
        frame = _drop(frame, frame[name].isna(), f"{name!r} is missing", notes)
    for name in required:
        frame = _drop(frame, np.isinf(frame[name]) & (frame[name] > 0), f"{name!r} is infinite", notes)
        if name in _NUMERIC and not (signed and name == "loss"):
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
        raise UserError(f"column {column.name!r} is not numeric: {column.iloc[row]!r} in row {row}; write 1.5e9")
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
