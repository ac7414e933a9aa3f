"""Kinds of attention of your own, by name: trained and evaluated like the library's, without a line changed in it."""

from collections.abc import Callable
from typing import Any

import jax

from checked import UserError
from models.attention.keys import Attended, Reads
from models.config import ATTENTION_KINDS, ATTENTION_NAMES

Attend = Callable[[jax.Array, jax.Array, jax.Array, Reads], Attended]

_ADDED: dict[str, Attend] = {}


def attention_kind(name: str) -> Callable[[Attend], Attend]:
    """Makes a function what `model.attention=name` is: (q [B, T, H, E], k and v [B, S, G, E], Reads) → Attended.

    Projections, rotary positions and the rest of the block are those of dense attention. Such models are not decoded.
    Runs are known by the name: a changed function takes a new one, or raises UserError.
    """

    def add(attend: Attend) -> Attend:
        known: Any = _ADDED.get(name, attend)
        if name in ATTENTION_KINDS or known.__code__ != attend.__code__:
            raise UserError(f"attention={name!r} is another function already; give this one a new name")
        _ADDED[name] = attend
        if name not in ATTENTION_NAMES:
            ATTENTION_NAMES.append(name)
        return attend

    return add


def added(name: str) -> Attend | None:
    """The function of a kind that was added, None for the library's own."""
    return _ADDED.get(name)
