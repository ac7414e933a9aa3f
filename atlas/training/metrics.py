"""What a run writes down: files of one JSON object a line, which resume exactly."""

import contextlib
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from checked.files import write_atomically

Record = dict[str, Any]


def append(path: pathlib.Path, *records: Record) -> None:
    """Adds records; not-finite numbers become null, because JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            file.write(json.dumps(finite) + "\n")


def read(path: pathlib.Path) -> list[Record]:
    """All whole records, none where there is no file; a line cut short by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def keep(path: pathlib.Path, condition: Callable[[Record], bool]) -> None:
    """Rewrites the file with only the records that meet the condition: a run that resumes writes the others again."""
    if path.exists():
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in read(path) if condition(record)))
