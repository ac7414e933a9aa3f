"""Files that are whole or absent."""

import os
import pathlib
import tempfile


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside it, then renames: a reader never sees half of it."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
