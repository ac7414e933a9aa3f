"""A decoder as decoding sees it: a static description, parameters, and one way to read tokens."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention.cache import Cache
from models.decoder import Decoder
from models.decoding.tokenizers import ByteView

# Caches have this many slots, or twice, four times as many …: a text costs by what is written of it, and few sizes are
# compiled. Of the smallest, a small model's step does not feel the half.
_SLOTS = 256
# Tokens that a prompt is read by at once: many, whose scores against all slots still fit the caches of a CPU, and few,
# for what is left of it.
_WIDE, _NARROW = 256, 32

Params = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """The static part of a decoder; programs are compiled once for every instance.

    Attributes:
      graphdef, structure: of a decoder with unstacked layers, and of its state.
      vocab_size: V, the width of the logits; it may exceed the tokenizer's.
      context: the longest text that the model may read, in tokens; None is unlimited.
    """

    graphdef: nnx.GraphDef
    structure: Any
    vocab_size: int
    context: int | None = None

    def init_cache(self, params: Params, batch: int, capacity: int) -> Cache:
        """An empty cache for `capacity` tokens a row."""
        return self._decoder(params).init_cache(batch, capacity)

    def extend(self, params: Params, tokens_BC: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads C more tokens of every row without committing them; see `Decoder.extend`."""
        return self._decoder(params).extend(tokens_BC, cache)

    def _decoder(self, params: Params) -> Decoder:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.structure, params))


class Voice(NamedTuple):
    """All that it takes to write text: a model, its parameters (flat, since every call passes them), its tokenizer."""

    model: LanguageModel
    params: Params
    tokenizer: ByteView


def make_voice(decoder: Decoder, tokenizer: ByteView, context: int | None = None) -> Voice:
    """A decoder with its tokenizer, of which other special ids beyond the decoder's embedding are forgotten.

    Raises:
      ValueError: text, or what begins and ends it, has ids without a row in the decoder's embedding.
    """
    rows = decoder.embedding.shape[0]
    written = (i for i, data in enumerate(tokenizer.table) if data is not None)
    needed = 1 + max([*written, *tokenizer.begin, *tokenizer.roles["bos"], *tokenizer.roles["eos"]], default=0)
    if needed > rows:
        raise ValueError(
            f"the tokenizer has {needed} ids, but the model's embedding has {rows} rows; "
            "use the tokenizer that the model was trained with"
        )
    graphdef, state = nnx.split(decoder.unstack())
    params, structure = jax.tree.flatten(state)
    return Voice(LanguageModel(graphdef, structure, rows, context), tuple(params), tokenizer.below(rows))


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


def slots_for(tokens: int) -> int:
    """Slots of a cache for so many tokens.

    >>> slots_for(3), slots_for(256), slots_for(257), slots_for(4000)
    (256, 256, 512, 4096)
    """
    return max(_SLOTS, 1 << (tokens - 1).bit_length())


def prefill(voice: Voice, rows: list[list[int]], room: int) -> Cache:
    """The cache of rows of which all tokens but the last are read, with room for some more.

    The last one is read together with the first draft, or by the first step of plain decoding.
    """
    length_B = np.array(list(map(len, rows)), np.int32)
    tokens_BS = right_padded(rows, slots_for(int(length_B.max()) + room))
    return _prefill(voice.model)(voice.params, tokens_BS, length_B - 1)


def with_room(voice: Voice, cache: Cache, tokens: int) -> Cache:
    """The cache, or a larger copy of it, with slots for rows of so many tokens."""
    capacity = slots_for(tokens)
    return cache if capacity <= cache.capacity else _grow(voice.model)(voice.params, cache, capacity)


def log_probabilities(voice: Voice, prompts: list[list[int]], texts: list[list[int]]) -> list[list[float]]:
    """The natural logarithm of the probability of every token that follows a prompt, by the model itself."""
    rows = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    tokens_BS = right_padded(rows, slots_for(max(map(len, rows))))
    longest = max(map(len, rows))
    scores_BS = np.asarray(_scores(voice.model)(voice.params, tokens_BS, longest))
    return [row[len(p) : len(p) + len(t)].tolist() for row, p, t in zip(scores_BS, prompts, texts, strict=True)]


@functools.lru_cache(maxsize=8)
def _scores(model: LanguageModel) -> Callable[..., jax.Array]:
    """Compiles (params, tokens [B, S], n) -> the log probability of each of the first n tokens, float32 [B, S].

    By few tokens at a time, whose logits still fit into memory.
    """

    def score(params: Params, tokens_BS: jax.Array, n: jax.Array) -> jax.Array:
        next_BS = jnp.roll(tokens_BS, -1, axis=1)

        def piece(i: jax.Array, carry: tuple[Cache, jax.Array]) -> tuple[Cache, jax.Array]:
            cache, scores_BS = carry
            tokens_BC, next_BC = (
                jax.lax.dynamic_slice_in_dim(a, i * _NARROW, _NARROW, axis=1) for a in (tokens_BS, next_BS)
            )
            logits_BCV, cache = model.extend(params, tokens_BC, cache)
            chosen_BC = jnp.take_along_axis(jax.nn.log_softmax(logits_BCV), next_BC[..., None], axis=-1)[..., 0]
            scores_BS = jax.lax.dynamic_update_slice_in_dim(
                scores_BS, chosen_BC.astype(jnp.float32), i * _NARROW, axis=1
            )
            return cache.advance(jnp.full_like(cache.length, _NARROW)), scores_BS

        empty = model.init_cache(params, *tokens_BS.shape), jnp.zeros(tokens_BS.shape, jnp.float32)
        return jnp.roll(jax.lax.fori_loop(0, -(-n // _NARROW), piece, empty)[1], 1, axis=1)

    return jax.jit(score)


@functools.lru_cache(maxsize=8)
def read_program(model: LanguageModel) -> Callable[..., Cache]:
    """Compiles (params, tokens [B, C], cache) -> cache with the tokens written, not committed."""
    return jax.jit(lambda params, tokens_BC, cache: model.extend(params, tokens_BC, cache)[1], donate_argnums=2)


@functools.lru_cache(maxsize=8)
def _prefill(model: LanguageModel) -> Callable[..., Cache]:
    """Compiles (params, tokens [B, S], length [B]) -> cache of S slots that has read the first `length` tokens.

    By pieces, so that memory is linear in the text, and by a number of them that is not compiled: prompts of all
    lengths share a program.
    """

    def read(params: Params, tokens_BS: jax.Array, length_B: jax.Array) -> Cache:
        cache = model.init_cache(params, *tokens_BS.shape)
        longest = jnp.max(length_B)

        def by(width: int, cache: Cache, pieces: jax.Array) -> Cache:
            def piece(_: jax.Array, cache: Cache) -> Cache:
                tokens_BC = jax.lax.dynamic_slice_in_dim(tokens_BS, cache.length[0], width, axis=1)
                return model.extend(params, tokens_BC, cache)[1].advance(jnp.full_like(length_B, width))

            return jax.lax.fori_loop(0, pieces, piece, cache)

        cache = by(_WIDE, cache, longest // _WIDE)
        cache = by(_NARROW, cache, -(-(longest % _WIDE) // _NARROW))
        return cache._replace(length=length_B)

    return jax.jit(read)


@functools.lru_cache(maxsize=8)
def _grow(model: LanguageModel) -> Callable[..., Cache]:
    """Compiles (params, cache, capacity) -> the same cache with more slots."""

    def grow(params: Params, cache: Cache, capacity: int) -> Cache:
        empty = model.init_cache(params, cache.length.shape[0], capacity)
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice(a, b, (0,) * b.ndim), empty, cache)

    return jax.jit(grow, static_argnums=2)


def read_pending(
    model: LanguageModel, params: Params, cache: Cache, pending_BP: jax.Array, count_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """The logits after the first `count` tokens of every row [B, V], and the cache with these committed."""
    logits_BPV, cache = model.extend(params, pending_BP, cache)
    last_B11 = jnp.minimum(count_B, pending_BP.shape[1])[:, None, None] - 1
    return jnp.take_along_axis(logits_BPV, last_B11, axis=1)[:, 0], cache.advance(count_B)


def write_ahead(
    model: LanguageModel,
    params: Params,
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
