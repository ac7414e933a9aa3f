"""What a run writes down: JSON lines that resume exactly, and a progress bar."""

import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from atlas.files import write_atomically

Record = dict[str, Any]


class JsonLines:
    """A file of one JSON object a line, appended to; a run that resumes first drops what it will write again."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def append(self, *records: Record) -> None:
        """Adds records; not-finite numbers become null, because JSON has none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n" for record in records)

    def read(self) -> list[Record]:
        """All whole records; a line cut short by a crash is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def keep(self, condition: Callable[[Record], bool]) -> None:
        """Rewrites the file with only the records that meet the condition."""
        if self.path.exists():
            kept = [record for record in self.read() if condition(record)]
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Buffered:
    """Collects a population's records and writes them out in groups: one open per file and hundred steps, not per
    step."""

    def __init__(self, files: list[JsonLines], size: int = 100):
        self._files, self._size = files, size
        self._records: list[list[Record]] = [[] for _ in files]

    def append(self, records: Iterator[Record]) -> None:
        """Adds one record a file."""
        for pending, record in zip(self._records, records, strict=True):
            pending.append(record)
        if len(self._records[0]) >= self._size:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending."""
        for file, pending in zip(self._files, self._records, strict=True):
            if pending:
                file.append(*pending)
            pending.clear()
