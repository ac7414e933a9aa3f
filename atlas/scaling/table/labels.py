"""What is known of languages before a joint fit: their families and scripts."""

import os
from collections.abc import Sequence

import pandas as pd

from atlas.scaling.table import published
from atlas.scaling.table.reading import read_table
from checked import UserError, unknown

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
    tables = (published.families(), published.scripts()) if str(source) == "published" else _read(source)
    found = ({name: table[name] for name in languages if name in table} for table in tables)
    return dict(zip(("families", "scripts"), found, strict=True))


def _read(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, str]]:
    frame = read_table(path, "labels")
    columns = ("language", "family", "script")
    for name in set(frame) - set(columns):
        raise unknown("column of a labels file", name, columns)
    if "language" not in frame or len(frame.columns) < 2:
        raise UserError(f"{str(path)!r} needs a column language, and family or script; it has {', '.join(frame)}")
    by_language = frame.set_index("language")
    empty = pd.Series(dtype=str)
    families, scripts = ({k: v for k, v in by_language.get(name, empty).items() if v} for name in columns[1:])
    return families, scripts
