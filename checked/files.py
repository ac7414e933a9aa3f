"""Files that are whole or absent, files that one process holds, and files that a person may have edited."""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

from checked import UserError

_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_REFUSALS = (*_FULL, os.strerror(errno.EROFS))  # of a disk, whatever is written
_FREE = "free some space and run the same command again"
_MOVE = "give a place that can be written"
_SEAL = "checksum"


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside it, then renames: a reader never sees half of it.

    Raises UserError where it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def check_writable(path: pathlib.Path, directory: bool = False) -> None:
    """Raises UserError where `write_atomically` could not write the file, or where no directory can be; writes nothing.

    That the disk has room for it cannot be known.
    """
    with disk_errors(path):
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # a name that is too long, or below a file, is told by what the system says of it
        if path.is_dir() and not directory:
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        place = next(p for p in ((path,) if directory else ()) + tuple(path.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=place):
            pass


@contextlib.contextmanager
def disk_errors(path: pathlib.Path) -> Iterator[None]:
    """Makes a UserError of every OSError, and of what libraries raise in its place where a disk is full or read-only.

    path: what is being written.
    """
    try:
        yield
    except Exception as error:
        refusal = refusal_of_disk(error)
        if isinstance(error, UserError) or not (refusal or isinstance(error, OSError)):
            raise
        why = refusal or getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {str(path)!r} ({why}); {_FREE if refusal in _FULL else _MOVE}") from error


def refusal_of_disk(error: Exception) -> str:
    """That a disk is full or read-only, in the system's words, where an error of whatever library is about that."""
    return next((words for words in _REFUSALS if words in str(error)), "")


@contextlib.contextmanager
def locked(path: pathlib.Path, what: str, wait: bool = False) -> Iterator[None]:
    """Holds `what` for this process alone by a file that names its holder: process, host and time.

    The system lets go when a process ends, however it does, so that a dead holder's file is no lock. File systems that
    know no locks are not guarded. wait: for the holder, in place of a UserError that names it.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", errors="replace")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = " ".join(file.read(200).split()) or "another process"
            raise UserError(f"{what} is held by {holder}; wait for it, or end it and run again") from None
        except OSError:
            yield
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with disk_errors(path):
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()} since {now}", file=file, flush=True)
        try:
            yield
        finally:
            file.truncate(0)


def digest_of_file(path: pathlib.Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(data: str | bytes) -> Any:
    """The value of a JSON text; a ValueError of one line says why it has none.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: it is nested too deeply
    """
    try:
        return json.loads(data)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError:
        raise ValueError("it holds a number of thousands of digits") from None


def write_sealed(path: pathlib.Path, document: dict[str, Any]) -> None:
    """Writes a JSON object that no person edits, with a checksum of its content."""
    document = json.loads(json.dumps(document))  # as it will be read: numbers that are keys become text
    write_atomically(path, json.dumps(document | {_SEAL: _seal(document)}, indent=1, ensure_ascii=False))


def read_sealed(path: pathlib.Path, kind: str, remedy: str) -> dict[str, Any]:
    """What `write_sealed` wrote, as `read_json`; raises UserError also where it has changed since."""
    document = read_json(path, kind, remedy)
    if document.pop(_SEAL, None) != _seal(document):
        raise UserError(f"{path} is not as it was written; {remedy}")
    return document


def _seal(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def read_json(path: pathlib.Path, kind: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file that a person may have edited or moved.

    Args:
      path: the file.
      kind: what it is, for messages: "fit".
      remedy: what to do about one that is missing or broken: "fit the runs again".

    Raises:
      UserError: there is none, or it holds no JSON object.
    """
    try:
        document = parse_json(path.read_bytes())
    except OSError:
        raise UserError(f"no {kind} at {str(path)!r}: {remedy}") from None
    except ValueError as error:
        raise UserError(f"{str(path)!r} is no {kind}: {error}; {remedy}") from None
    if not isinstance(document, dict):
        raise UserError(f"{str(path)!r} is no {kind}: it holds no JSON object; {remedy}")
    return document
