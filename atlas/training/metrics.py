"""What a run writes down: files of one JSON object a line, which resume exactly.

Every line ends in a checksum of the rest of it, so that damage to a log is found like damage to a checkpoint.
"""

import importlib.util
import json
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from checked import UserError
from checked.files import disk_errors, write_atomically

Record = dict[str, Any]

_SUM = ', "crc32": '


def append(path: pathlib.Path, *records: Record) -> None:
    """Adds records; not-finite numbers become null, because JSON has none. Raises UserError where the disk is full."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, records))


def read(path: pathlib.Path) -> list[Record]:
    """All records, none where there is no file; a last line that a crash cut short is left out.

    Raises UserError for any other line that is not as it was written.
    """
    *lines, _cut = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [_record(line, path, number) for number, line in enumerate(lines, start=1)]


def keep(path: pathlib.Path, condition: Callable[[Record], bool]) -> None:
    """Rewrites the file with only the records that meet the condition: a run that resumes writes the others again."""
    if path.exists():
        write_atomically(path, "".join(_line(record) for record in read(path) if condition(record)))


class Boards:
    """What `append` writes once more, as scalars for TensorBoard: of each phase in `tensorboard/PHASE` beside the log.

    Raises UserError where tensorboardX is not installed.
    """

    def __init__(self) -> None:
        if not importlib.util.find_spec("tensorboardX"):
            raise UserError("train.tensorboard needs tensorboardX: pip install 'atlas-scaling[tensorboard]'")
        self._writers: dict[pathlib.Path, Any] = {}

    def add(self, directory: pathlib.Path, *records: Record) -> None:
        """Adds records of the run in a directory; what a run that resumes writes again replaces what it had written."""
        from tensorboardX import SummaryWriter

        for record in records:
            place = directory / "tensorboard" / record["phase"]
            if place not in self._writers:
                # Files are named by the second, and one that is opened again within it would be lost.
                suffix = f".{time.time_ns()}"
                self._writers[place] = SummaryWriter(str(place), purge_step=record["step"], filename_suffix=suffix)
            for name, value in _scalars(record):
                self._writers[place].add_scalar(name, value, record["step"], record.get("time"))

    def close(self) -> None:
        """Writes what is waiting."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def _scalars(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("step", "time"):
            yield prefix + name, value


def _line(record: Record) -> str:
    text = json.dumps({key: _finite(value) for key, value in record.items()})
    return f"{text[:-1]}{_SUM}{zlib.crc32(text.encode())}}}\n"


def _record(line: bytes, path: pathlib.Path, number: int) -> Record:
    text, _, crc = line.rpartition(_SUM.encode())
    if crc != b"%d}" % zlib.crc32(text + b"}"):
        raise UserError(
            f"{path} line {number} is not as training wrote it; delete the file and run the same command again, "
            "which trains what it told"
        )
    return json.loads(text + b"}")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
