"""Which keys a query may read, and the seam between that question and how the keys are attended.

Segments are int32 [B, T], constant within a document and changing between neighbours; a negative segment marks
padding, which is computed like any document but left out of every statistic and of the indexer's loss.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class IndexInputs(NamedTuple):
    """What the indexer scores with.

    query [B, T, J, I]; key [B, S, I], one for all indexer heads; gate [B, T, J], the head weights in (0, 1);
    bias [J].
    """

    query: jax.Array
    key: jax.Array
    gate: jax.Array
    bias: jax.Array


class Reads(NamedTuple):
    """What each query may read: the keys at positions `first` to `position`, of which a `Selection` may choose some.

    position, first: int32 [B, T]. index, running_variance: what a selection chooses by; the second is the mean
    variance of the scores in *earlier* steps, a scalar.
    """

    position: jax.Array
    first: jax.Array
    index: IndexInputs | None = None
    running_variance: jax.Array | None = None


@dataclass(frozen=True)
class Selection:
    """How keys are selected; the fields are those of `ModelConfig`. `scale` is the resolved factor on the indexer's
    products; `block` is 0 where single tokens are selected."""

    scale: float
    temperature: float
    k_rule: str
    k_base: int
    k_min: int
    k_max: int
    keep_first: int = 0
    keep_local: int = 0
    block: int = 0

    @property
    def most(self) -> int:
        """The most keys that the k rule gives a query."""
        return self.k_base if self.k_rule == "fixed" else self.k_max


class Attended(NamedTuple):
    """What attention gives back, per query.

    output [B, T, H, E] in v's dtype. With a selection also: indexer_loss [B, T] in nats; selected int32 [B, T], the
    number of keys; and, unless the k rule is fixed, variance [B, T] of the scores that k rests on. Only output and
    loss have gradients: the first to q, k and v, the second to the index.
    """

    output: jax.Array
    indexer_loss: jax.Array | None = None
    selected: jax.Array | None = None
    variance: jax.Array | None = None


def document_start(segments_BT: jax.Array) -> jax.Array:
    """True at the first token of every document; [B, T]."""
    changed_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    return jnp.pad(changed_BT, ((0, 0), (1, 0)), constant_values=True)


def in_documents(segments_BT: jax.Array) -> Reads:
    """Each query of whole sequences reads what its document has shown so far.

    >>> in_documents(jnp.array([[0, 0, 1, 1]])).first.tolist()
    [[0, 0, 2, 2]]
    """
    position_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32), segments_BT.shape)
    return Reads(position_BT, jax.lax.cummax(jnp.where(document_start(segments_BT), position_BT, 0), axis=1))


def in_window(reads: Reads, window: jax.Array | int | None) -> Reads:
    """Of what a query reads only the latest `window` keys, itself included; None changes nothing."""
    if window is None:
        return reads
    return reads._replace(first=jnp.maximum(reads.first, reads.position - window + 1))


def visible_keys(reads: Reads, position_S: jax.Array) -> jax.Array:
    """True where a query sees a key; [B, T, S].

    Args:
      position_S: positions of the keys, [S] or [B, S].

    >>> visible_keys(in_documents(jnp.array([[0, 0, 1]])), jnp.arange(3)).astype(int).tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    position_S = position_S[..., None, :]
    return (reads.first[:, :, None] <= position_S) & (position_S <= reads.position[:, :, None])


def kept_keys(reads: Reads, position_S: jax.Array, keep_first: int, keep_local: int) -> jax.Array | None:
    """The keys that are always selected, if visible: a document's first and a query's latest; [B, T, S].

    None if nothing is kept.
    """
    if not keep_first and not keep_local:
        return None
    near_start = position_S - reads.first[:, :, None] < keep_first
    return near_start | (reads.position[:, :, None] - position_S < keep_local)
