"""What one run of a decoder did."""

from __future__ import annotations

from typing import NamedTuple


class Run(NamedTuple):
    """The new tokens; calls of the target, tokens drafted and accepted; seconds until the first token and after it."""

    tokens: list[int]
    calls: int
    drafted: int
    accepted: int
    first_seconds: float
    seconds: float
