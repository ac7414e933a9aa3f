"""Drafts made on the host, as lists of target tokens: from text that a drafter writes, or from the text itself.

A proposer gives every row's drafts for the committed text. Whatever it proposes, verification by samples of the
target commits the same tokens; a proposer decides how many of them a step commits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention.cache import Cache
from models.decoding import slrs
from models.decoding.language_model import LanguageModel, Voice, prefill, read_program, right_padded
from models.decoding.sampling import first_largest, warp
from models.decoding.settings import Sampling
from models.decoding.tokenizers import ByteTokenizer, complete_prefix

_COST_LIMIT = 4096  # drafter passes that one block of string-level rejection sampling may need
_LEFT = 64  # bytes of committed text that a tokenizer gets to see before a draft


class Proposal(NamedTuple):
    """Drafts of every row, and the laws [m, V] that they were drawn from where the proposer knows them."""

    drafts: list[list[int]]
    laws: list[np.ndarray] | None = None


class Proposer(Protocol):
    """What the loop on the host asks for drafts."""

    def propose(self, texts: Sequence[Sequence[int]], active: Sequence[bool]) -> Proposal:
        """Drafts for rows of committed target tokens. Rows that are not active are done and get none."""


class Lookup:
    """Proposes what followed the latest earlier occurrence of the text's last tokens ("prompt lookup").

    >>> Lookup(length=3).propose([[5, 6, 7, 8, 9, 5, 6]], [True]).drafts
    [[7, 8, 9]]
    """

    def __init__(self, length: int, longest: int = 3):
        self.length, self.longest = length, longest

    def propose(self, texts: Sequence[Sequence[int]], active: Sequence[bool]) -> Proposal:
        return Proposal([self._draft(text) if busy else [] for text, busy in zip(texts, active, strict=True)])

    def _draft(self, text: Sequence[int]) -> list[int]:
        tokens_T = np.asarray(text)
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(tokens_T[:-1], n)
            (found,) = np.nonzero((windows == tokens_T[-n:]).all(axis=1))
            if found.size:
                start = found[-1] + n
                return tokens_T[start : start + self.length].tolist()
        return []


class Reading:
    """One row of a drafter: its tokens, the place in the text where they end, and the bytes that are held back.

    Held back is the beginning of a character whose end the target has not written yet.
    """

    def __init__(self, begin: Sequence[int], tokenizer: ByteTokenizer, text: bytes):
        self.tokens, self.end, self.held = list(begin), 0, 0
        self.spell(tokenizer, text)
        self.tokens = self.tokens or [0]

    def follow(self, drafts: Sequence[int], tokenizer: ByteTokenizer, text: bytes) -> None:
        """Takes in the committed text: the drafts that agree with it, and a spelling of what follows."""
        for token in drafts:
            data = tokenizer.token_bytes(token)
            if not data or text[self.end : self.end + len(data)] != data:
                break
            self.tokens.append(token)
            self.end += len(data)
        self.spell(tokenizer, text)

    def spell(self, tokenizer: ByteTokenizer, text: bytes) -> None:
        whole = self.end + complete_prefix(text[self.end :])
        left = text[max(0, self.end - _LEFT) : self.end]
        self.tokens += tokenizer.encode(text[self.end : whole], left=left)
        self.end, self.held = whole, len(text) - whole


class _TextDrafter:
    """A drafter with a vocabulary of its own, kept in step with the committed text by bytes.

    After every round it keeps what it has read as far as that agrees with the text, and spells only the rest.
    Alignment can fail in many ways (normalisers, other spellings); each costs drafts, none changes the text.
    """

    def __init__(self, target: ByteTokenizer, drafter: Voice, prompts: Sequence[Sequence[int]], capacity: int):
        self.target, self.drafter = target, drafter
        self.data = [target.decode(prompt) for prompt in prompts]
        self.known = [len(prompt) for prompt in prompts]
        own = drafter.tokenizer
        self.rows = [Reading(own.begin, own, data) for data in self.data]
        self.cache = prefill(drafter, [row.tokens for row in self.rows], capacity)
        self.drafts: list[list[int]] = [[] for _ in prompts]

    def _catch_up(self, texts: Sequence[Sequence[int]], active: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        """Takes in the committed text; the tokens that the drafter has to read [B, P] and how many count [B].

        The cache holds what was read before and, behind it, all drafts but the last. At least one token is read
        again, since its logits are wanted.
        """
        pending, read = [], []
        for b, (row, text) in enumerate(zip(self.rows, texts, strict=True)):
            before = len(row.tokens)
            if active[b] and len(text) > self.known[b]:
                self.data[b] += self.target.decode(text[self.known[b] :])
                self.known[b] = len(text)
                row.follow(self.drafts[b], self.drafter.tokenizer, self.data[b])
            agreed = _common(row.tokens[before:], self.drafts[b][:-1])
            read.append(min(before + agreed, len(row.tokens) - 1))
            pending.append(row.tokens[read[b] :])
        self.cache = self.cache._replace(length=np.array(read, np.int32))
        count_B = np.array(list(map(len, pending)), np.int32)
        # Few widths, so that few programs are compiled.
        return right_padded(pending, multiple=1 if count_B.max() <= 2 else 8), count_B

    def _retokenise(self, b: int, data: bytes) -> list[int]:
        """Target tokens of text that continues a row, or none if it contradicts the part of a character there."""
        held = self.data[b][self.rows[b].end :]
        if not data.startswith(held):
            return []
        data = data[len(held) :]
        return self.target.encode(data[: complete_prefix(data)], left=self.data[b][-_LEFT:])


class StringMatch(_TextDrafter):
    """String-level exact match (arXiv 2502.05202, Algorithm 2): the drafter's likeliest text, retokenised.

    Args:
      length: K, drafter tokens a round.
    """

    def __init__(
        self, target: ByteTokenizer, drafter: Voice, prompts: Sequence[Sequence[int]], capacity: int, length: int
    ):
        super().__init__(target, drafter, prompts, capacity)
        self.length = length

    def propose(self, texts: Sequence[Sequence[int]], active: Sequence[bool]) -> Proposal:
        pending_BP, count_B = self._catch_up(texts, active)
        write = _greedy_text(self.drafter.model, self.length)
        drafts_BK, self.cache = write(self.drafter.params, self.cache, pending_BP, count_B)
        self.drafts = np.asarray(drafts_BK).tolist()
        decode = self.drafter.tokenizer.decode
        return Proposal([self._retokenise(b, decode(ids)) if active[b] else [] for b, ids in enumerate(self.drafts)])


class StringRejection(_TextDrafter):
    """String-level rejection sampling (arXiv 2502.05202, Algorithm 3) with the exact law of the retokenised block.

    The number of drafter passes grows exponentially with the look-ahead: for drafters of few tokens.

    Args:
      length: drafter tokens a block.
      rows: how every row draws, drafts too.
    """

    def __init__(
        self,
        target: Voice,
        drafter: Voice,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        length: int,
        rows: Sequence[Sampling],
    ):
        super().__init__(target.tokenizer, drafter, prompts, capacity)
        self.length, self.vocab_size, self.settings = length, target.model.vocab_size, rows
        self.rngs = [np.random.default_rng(row.seed) for row in rows]

    def propose(self, texts: Sequence[Sequence[int]], active: Sequence[bool]) -> Proposal:
        pending_BP, count_B = self._catch_up(texts, active)
        self.cache = read_program(self.drafter.model)(self.drafter.params, pending_BP, self.cache)
        self.cache = self.cache.advance(count_B - 1)
        drafts: list[list[int]] = []
        laws: list[np.ndarray] = []
        for b, busy in enumerate(active):
            block = self._block(b) if busy else slrs.BlockLaw({(): 1.0}, 0)
            drawn = block.draw(self.rngs[b])
            drafts.append(list(drawn))
            laws.append(block.proposal(drawn, self.vocab_size))
        return Proposal(drafts, laws)

    def _block(self, b: int) -> slrs.BlockLaw:
        row = jax.tree.map(lambda a: a[b : b + 1], self.cache)
        law, own = _prefix_laws(self.drafter.model), self.settings[b]
        settings = (own.temperature, own.top_k, own.top_p)

        def draft_law(prefixes_NT: np.ndarray) -> np.ndarray:
            N = len(prefixes_NT)
            tokens_NC = np.concatenate([np.full((N, 1), self.rows[b].tokens[-1]), prefixes_NT], axis=1)
            # A power of two rows, so that few shapes are compiled.
            tokens_NC = np.pad(tokens_NC, ((0, (1 << (N - 1).bit_length()) - N), (0, 0)))
            return np.asarray(law(self.drafter.params, row, tokens_NC.astype(np.int32), *settings), np.float64)[:N]

        decode = self.drafter.tokenizer.decode
        stop = slrs.look_ahead(self.length, self.drafter.tokenizer.roles["eos"])
        return slrs.block_law(draft_law, lambda ids: self._retokenise(b, decode(ids)), stop, _COST_LIMIT)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


@functools.lru_cache(maxsize=32)
def _greedy_text(model: LanguageModel, length: int) -> Callable[..., tuple[jax.Array, Cache]]:
    """Compiles (params, cache, pending [B, P], count [B]) -> (drafts [B, K], cache with K - 1 of them behind)."""

    def write(params: nnx.State, cache: Cache, pending_BP: jax.Array, count_B: jax.Array):
        logits_BPV, cache = model.extend(params, pending_BP, cache)
        logits_BV = jnp.take_along_axis(logits_BPV, count_B[:, None, None] - 1, axis=1)[:, 0]
        first_B = first_largest(logits_BV)

        def step(carry: tuple[Cache, jax.Array], _: None):
            logits_B1V, reading = model.extend(params, carry[1][:, None], carry[0])
            token_B = first_largest(logits_B1V[:, 0])
            return (reading.advance(jnp.ones_like(count_B)), token_B), token_B

        (cache, _), later_KB = jax.lax.scan(step, (cache.advance(count_B), first_B), length=length - 1)
        return jnp.concatenate([first_B[None], later_KB]).T, cache

    return jax.jit(write, donate_argnums=1)


@functools.lru_cache(maxsize=32)
def _prefix_laws(model: LanguageModel) -> Callable[..., jax.Array]:
    """Compiles (params, cache of one row, tokens [N, C], temperature, top_k, top_p) -> laws [N, W] after each row."""

    def laws(params: nnx.State, cache: Cache, tokens_NC: jax.Array, *settings: float) -> jax.Array:
        shared = jax.tree.map(lambda a: jnp.broadcast_to(a, (tokens_NC.shape[0], *a.shape[1:])), cache)
        logits_NCW, _ = model.extend(params, tokens_NC, shared)
        return warp(logits_NCW[:, -1], *settings)

    return jax.jit(laws)
