"""The one error a user's mistake raises."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's: one line that names the thing and the fix; binaries print it and exit with code 2."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """An error for a name that does not exist, offering the nearest valid one.

    >>> str(unknown("language", "frr", ["fr", "de"]))
    "unknown language 'frr'; did you mean 'fr'? valid: de, fr"
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return UserError(f"unknown {kind} {name!r}{hint} valid: {', '.join(names)}")
