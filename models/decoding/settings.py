"""How tokens are drawn, as a user says it and as the programs read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.decoding.sampling import warp


class Settings(NamedTuple):
    """How the next token is drawn, row by row: arrays [B] as in `sampling.warp`, typed PRNG keys [B], and the
    ids that end a row [X]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    keys: jax.Array
    stop: jax.Array

    def law(self, logits_BCV: jax.Array) -> jax.Array:
        """The law of the token after each of C places; [B, C, V]."""
        return warp(logits_BCV, self.temperature[:, None], self.top_k[:, None], self.top_p[:, None])


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; every field is one value, or one a row.

    temperature: at least 0; 0 is greedy. top_k: 0 keeps all. top_p: in (0, 1]. seed: of a row's noise.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    seed: int | Sequence[int] = 0

    def __post_init__(self):
        require(np.min(self.temperature) >= 0, "temperature", self.temperature, "must be at least 0")
        require(np.min(self.top_k) >= 0, "top_k", self.top_k, "must be at least 0 (0 keeps all)")
        in_range = np.min(self.top_p) > 0 and np.max(self.top_p) <= 1
        require(in_range, "top_p", self.top_p, "must be above 0 and at most 1")

    @property
    def is_greedy(self) -> bool:
        return float(np.max(self.temperature)) == 0

    def rows(self, batch: int) -> list[Sampling]:
        """Every row's own."""
        columns = [np.broadcast_to(getattr(self, f.name), (batch,)).tolist() for f in dataclasses.fields(self)]
        return [Sampling(*row) for row in zip(*columns, strict=True)]

    def settings(self, batch: int, stop: Sequence[int]) -> Settings:
        """As arrays of a batch, with the ids that end a row."""
        spread = lambda values, dtype: jnp.broadcast_to(jnp.asarray(values, dtype), (batch,))  # noqa: E731
        keys_B = jax.vmap(jax.random.key)(spread(self.seed, jnp.uint32))
        # An id that no token has stands for "no stop".
        stop_X = jnp.array(list(stop) or [-1], jnp.int32)
        return Settings(
            spread(self.temperature, float), spread(self.top_k, jnp.int32), spread(self.top_p, float), keys_B, stop_X
        )


def require(condition: bool, name: str, value: object, constraint: str) -> None:
    """Raises a ValueError of one line that names the argument, its value and the constraint."""
    if not condition:
        raise ValueError(f"{name}={value!r} {constraint}")
