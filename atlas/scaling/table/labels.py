"""What is known of pairs of languages before a joint fit: families, scripts, and transfer weights to start from."""

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from atlas.errors import UserError, unknown
from atlas.scaling.table import published
from atlas.scaling.transfer.scores import bilingual_transfer_scores, score_matrix, tau_from_score

Labels = dict[str, dict[str, str]]


def labels(languages: Sequence[str], source: str | os.PathLike = "published") -> Labels:
    """Families and scripts of languages, as `fit_joint` takes them; those without a label are left out.

    Args:
      languages: of a runs table.
      source: "published" for those of the languages that ATLAS names, "none", or a CSV file with a column language
        and one or both of family and script.

    >>> labels(["fr", "ru", "l0"])["scripts"]
    {'fr': 'Latn', 'ru': 'Cyrl'}
    """
    if str(source) == "none":
        return {"families": {}, "scripts": {}}
    tables = (published.families(), published.scripts()) if str(source) == "published" else _read(Path(source))
    found = ({name: table[name] for name in languages if name in table} for table in tables)
    return dict(zip(("families", "scripts"), found, strict=True))


def _read(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"no labels at {str(path)!r}; give 'published', 'none' or a CSV file")
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = ("language", "family", "script")
    for name in set(frame) - set(columns):
        raise unknown("column of a labels file", name, columns)
    if "language" not in frame or len(frame.columns) < 2:
        raise UserError(f"{str(path)!r} needs a column language, and family or script; it has {', '.join(frame)}")
    by_language = frame.set_index("language")
    empty = pd.Series(dtype=str)
    return tuple({k: v for k, v in by_language.get(name, empty).items() if v} for name in columns[1:])


def starting_tau(frame: pd.DataFrame) -> pd.DataFrame | None:
    """Transfer weights [target, source] that bilingual transfer scores imply, for `fit_joint` to start from.

    Scores of the runs table's own curves where it holds a monolingual and a 50/50 run of a pair, and the published
    ones elsewhere; τ = BTS/(2 − BTS), which is exact for the law in one epoch at equal N.

    Returns:
      NaN where nothing is known; None where nothing at all is.
    """
    try:
        measured = score_matrix(bilingual_transfer_scores(frame))
    except UserError:  # a table of one language, or without a language column
        return None
    languages = [name.removeprefix("tokens.") for name in frame if str(name).startswith("tokens.")]
    known = published.transfer_scores().reindex(index=languages, columns=languages)
    scores = measured.reindex(index=languages, columns=languages).fillna(known)
    return tau_from_score(scores) if scores.notna().to_numpy().any() else None
