"""Files that are whole or absent, and files that a person may have edited."""

import json
import os
import pathlib
import tempfile

from checked import UserError


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside it, then renames: a reader never sees half of it.

    Raises UserError where the directory cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write {str(path)!r}; give a directory that can be written") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_json(path: pathlib.Path, kind: str, remedy: str) -> dict:
    """The object in a JSON file that a person may have edited or moved.

    Args:
      path: the file.
      kind: what it is, for messages: "fit".
      remedy: what to do about one that is missing or broken: "fit the runs again".

    Raises:
      UserError: there is none, or it holds no JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"no {kind} at {str(path)!r}: {remedy}") from None
    except ValueError as error:
        raise UserError(f"{str(path)!r} is no {kind}: {error}; {remedy}") from None
    if not isinstance(document, dict):
        raise UserError(f"{str(path)!r} is no {kind}: it holds no JSON object; {remedy}")
    return document
