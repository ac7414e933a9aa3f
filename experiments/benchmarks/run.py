"""What one run of a decoder did."""

from __future__ import annotations

from typing import NamedTuple


class Run(NamedTuple):
    """The new tokens; calls of the target, tokens drafted and accepted; seconds until the first tokens came and after.

    `first_tokens` is how many came first: the target's own and the drafts that its first call accepted.
    """

    tokens: list[int]
    calls: int
    drafted: int
    accepted: int
    first_seconds: float
    seconds: float
    first_tokens: int
