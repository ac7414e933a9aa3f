"""A decoder as decoding sees it: a static description, parameters, and one way to read tokens."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention.cache import Cache
from models.decoder import Decoder
from models.decoding.tokenizers import ByteView

_SLOTS = 64  # capacities are multiples of it, so that few of them are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """The static part of a decoder; programs are compiled once for every instance.

    Attributes:
      graphdef: of a decoder with unstacked layers.
      vocab_size: V, the width of the logits; it may exceed the tokenizer's.
      context: the longest text that the model may read, in tokens; None is unlimited.
    """

    graphdef: nnx.GraphDef
    vocab_size: int
    context: int | None = None

    def init_cache(self, params: nnx.State, batch: int, capacity: int) -> Cache:
        """An empty cache for at least `capacity` tokens a row."""
        return nnx.merge(self.graphdef, params).init_cache(batch, -(-capacity // _SLOTS) * _SLOTS)

    def extend(self, params: nnx.State, tokens_BC: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads C more tokens of every row without committing them; see `Decoder.extend`."""
        return nnx.merge(self.graphdef, params).extend(tokens_BC, cache)


class Voice(NamedTuple):
    """All that it takes to write text: a model, its parameters, its tokenizer."""

    model: LanguageModel
    params: nnx.State
    tokenizer: ByteView


def make_voice(decoder: Decoder, tokenizer: ByteView, context: int | None = None) -> Voice:
    """A decoder with its tokenizer.

    Raises:
      ValueError: the tokenizer has ids that the decoder's embedding has no row for.
    """
    vocab_size = decoder.embedding.shape[0]
    needed = 1 + max([tokenizer.vocab_size - 1, *itertools.chain(*tokenizer.roles.values())])
    if needed > vocab_size:
        raise ValueError(
            f"the tokenizer has {needed} ids, but the model's embedding has {vocab_size} rows; "
            "use the tokenizer that the model was trained with"
        )
    graphdef, params = nnx.split(decoder.unstack())
    return Voice(LanguageModel(graphdef, vocab_size, context), params, tokenizer)


def right_padded(rows: list[list[int]], multiple: int = 1) -> np.ndarray:
    """Ragged rows as one int32 array, filled with 0 to a multiple of some width.

    >>> right_padded([[1, 2, 3], [4]], multiple=2).tolist()
    [[1, 2, 3, 0], [4, 0, 0, 0]]
    """
    width = -(-max(map(len, rows)) // multiple) * multiple
    padded = np.zeros((len(rows), width), np.int32)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def prefill(voice: Voice, rows: list[list[int]], capacity: int) -> Cache:
    """The cache of rows of which all tokens but the last are read.

    The last one is read together with the first draft, or by the first step of plain decoding.
    """
    cache = voice.model.init_cache(voice.params, len(rows), capacity)
    tokens_BC = right_padded([row[:-1] or [0] for row in rows], multiple=16)[:, : cache.capacity]
    cache = read_program(voice.model)(voice.params, tokens_BC, cache)
    return cache.advance(jnp.array([len(row) - 1 for row in rows], jnp.int32))


@functools.lru_cache(maxsize=8)
def read_program(model: LanguageModel) -> Callable[..., Cache]:
    """Compiles (params, tokens [B, C], cache) -> cache with the tokens written, not committed."""
    return jax.jit(lambda params, tokens_BC, cache: model.extend(params, tokens_BC, cache)[1], donate_argnums=2)


def read_pending(
    model: LanguageModel, params: nnx.State, cache: Cache, pending_BP: jax.Array, count_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """The logits after the first `count` tokens of every row [B, V], and the cache with these committed."""
    logits_BPV, cache = model.extend(params, pending_BP, cache)
    last_B11 = jnp.minimum(count_B, pending_BP.shape[1])[:, None, None] - 1
    return jnp.take_along_axis(logits_BPV, last_B11, axis=1)[:, 0], cache.advance(count_B)


def write_ahead(
    model: LanguageModel,
    params: nnx.State,
    cache: Cache,
    logits_BV: jax.Array,
    choose: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]],
    length: int,
) -> tuple[Any, Cache]:
    """Writes K = `length` tokens behind what the cache holds, none of them committed.

    Args:
      logits_BV: after the committed tokens.
      choose: (logits [B, V], which of the K) -> the token to go on with, int32 [B], and what to keep of the choice.

    Returns:
      What was kept, with K as the second axis, and the cache with all but the last of the tokens in its slots.
    """

    def step(carry: tuple[Cache, jax.Array], k: jax.Array) -> tuple[tuple[Cache, jax.Array], Any]:
        logits_B1V, reading = model.extend(params, carry[1][:, None], carry[0])
        token_B, kept = choose(logits_B1V[:, 0], k)
        return (reading.advance(jnp.ones_like(reading.length)), token_B), kept

    token_B, first = choose(logits_BV, 0)
    (reading, _), later = jax.lax.scan(step, (cache, token_B), jnp.arange(1, length))
    kept = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]).swapaxes(0, 1), first, later)
    return kept, reading._replace(length=cache.length)
