"""Files that are whole or absent."""

import os
import pathlib
import tempfile

from atlas.errors import UserError


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
