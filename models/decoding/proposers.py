"""Who drafts: repeats of the text itself, or a small model whose text is retokenised, both on the host.

Whatever is proposed, verification keeps the target's law; a proposer decides how many tokens a round commits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.attention.cache import Cache
from models.decoding import slrs
from models.decoding.language_model import (
    LanguageModel,
    Params,
    Voice,
    prefill,
    read_pending,
    read_program,
    right_padded,
    with_room,
    write_ahead,
)
from models.decoding.rounds import Drafter, Drafts, given_drafts
from models.decoding.sampling import Sampling, first_largest, warp
from models.decoding.tokenizers import ByteView, complete_prefix

_COST_LIMIT = 4096  # drafter sequences that one block of string-level rejection sampling may need
_LEFT = 64  # bytes of committed text that a tokenizer gets to see before a draft
_WIDTHS = (0, 1, 2, 4, 8, 16)  # of drafts from the host; longer ones are cut
LONGEST = _WIDTHS[-1]


Texts = Sequence[Sequence[int]]


def pack(drafts: Sequence[Sequence[int]], laws: Sequence[np.ndarray] | None = None) -> Drafts:
    """Drafts of every row, and the laws [m, V] that they were drawn from, as arrays of few widths: few programs are
    compiled."""
    longest = max(laws is not None, *map(len, drafts))
    K = next((width for width in _WIDTHS if width >= longest), LONGEST)
    count_B = np.array([min(len(draft), K) for draft in drafts], np.int32)
    tokens_BK = np.zeros((len(drafts), K), np.int32)
    laws_BKV = None if laws is None else np.zeros((*tokens_BK.shape, laws[0].shape[1]))
    for b, n in enumerate(count_B):
        tokens_BK[b, :n] = drafts[b][:n]
        if laws is not None:
            laws_BKV[b, :n] = laws[b][:n]
    return Drafts(tokens_BK, count_B, laws_BKV)


class Proposal(NamedTuple):
    """What drafts in some rounds, its `given`, and how many tokens it drafts a round."""

    drafter: Drafter
    given: Any
    length: int


class Proposer:
    """A method of drafting, as the loop on the host sees it.

    rounds: how many may follow one proposal; more than one if drafting needs no host.
    state: the drafter's arrays on the device, which every round replaces.
    """

    rounds: int = 1
    state: Any = ()

    def propose(self, length: int, texts: Texts, active: Sequence[bool]) -> Proposal:
        """What drafts in the next rounds.

        Args:
          length: K, tokens to draft a round.
          texts: the committed target tokens of every row.
          active: rows that are not done; the others need no drafts.
        """
        drafts = self.draft(length, texts, active)
        return Proposal(given_drafts, drafts, drafts.tokens.shape[1])

    def draft(self, length: int, texts: Texts, active: Sequence[bool]) -> Drafts:
        """Drafts that the host makes for one round; arguments are those of `propose`."""
        raise NotImplementedError


class Nobody(Proposer):
    """Plain decoding: no drafts, and so as many rounds a proposal as is convenient."""

    rounds = 8

    def __init__(self, batch: int):
        self._given = jax.device_put(pack([[]] * batch))

    def propose(self, length: int, texts: Texts, active: Sequence[bool]) -> Proposal:
        return Proposal(given_drafts, self._given, 0)


class Lookup(Proposer):
    """Proposes what followed the latest earlier occurrence of the text's last tokens ("prompt lookup").

    >>> Lookup().draft(3, [[5, 6, 7, 8, 9, 5, 6]], [True]).tokens.tolist()
    [[7, 8, 9, 0]]
    """

    def __init__(self):
        self._rows: list[_Repeats] = []

    def draft(self, length: int, texts: Texts, active: Sequence[bool]) -> Drafts:
        self._rows = self._rows or [_Repeats() for _ in texts]
        rows = zip(self._rows, texts, active, strict=True)
        return pack([row.continuation(text, length) if busy else [] for row, text, busy in rows])


class _Repeats:
    """Where every short sequence of a growing text ended last: a round costs by what is new of the text."""

    _LONGEST_MATCH = 3

    def __init__(self):
        self._end: dict[tuple[int, ...], int] = {}
        self._known = 0

    def continuation(self, text: Sequence[int], length: int) -> Sequence[int]:
        """What followed the latest earlier occurrence of the longest end of the text that has one."""
        matches = range(1, self._LONGEST_MATCH + 1)
        for end in range(self._known + 1, len(text)):
            self._end |= {tuple(text[end - n : end]): end for n in matches if n <= end}
        self._known = len(text) - 1
        found = (self._end.get(tuple(text[-n:])) for n in reversed(matches) if n < len(text))
        end = next((end for end in found if end), len(text))
        return text[end : end + length]


class Reading:
    """One row of a drafter: its tokens, and the place in the text where they end.

    What the target wrote of a character whose end is missing is not read yet.
    """

    def __init__(self, tokenizer: ByteView, text: bytes):
        self._tokenizer, self.tokens, self.end = tokenizer, list(tokenizer.begin), 0
        self.follow((), text)
        self.tokens = self.tokens or [0]

    def follow(self, drafts: Sequence[int], text: bytes) -> None:
        """Takes in the committed text: the drafts that agree with it, and a spelling of what follows."""
        for token in drafts:
            data = self._tokenizer.token_bytes(token)
            if not data or not text.startswith(data, self.end):
                break
            self.tokens.append(token)
            self.end += len(data)
        whole = self.end + complete_prefix(text[self.end :])
        left = text[max(0, self.end - _LEFT) : self.end]
        self.tokens += self._tokenizer.encode(text[self.end : whole], left=left)
        self.end = whole


class _TextProposer(Proposer):
    """A drafter with a vocabulary of its own, kept in step with the committed text by bytes.

    After every round it keeps what it has read as far as that agrees with the text, and spells only the rest.
    Alignment can fail in many ways (normalisers, other spellings); each costs drafts, none changes the text.
    """

    def __init__(self, target: Voice, drafter: Voice, prompts: Sequence[Sequence[int]]):
        self.target, self.drafter = target, drafter
        self.data = [target.tokenizer.decode(prompt) for prompt in prompts]
        self.known = [len(prompt) for prompt in prompts]
        self.rows = [Reading(drafter.tokenizer, data) for data in self.data]
        self.cache = prefill(drafter, [row.tokens for row in self.rows], LONGEST)
        self.drafts: list[list[int]] = [[] for _ in prompts]

    def _catch_up(self, texts: Texts, active: Sequence[bool], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Takes in the committed text; the tokens that the drafter has to read [B, P] and how many count [B].

        The cache holds what was read before and, behind it, all drafts but the last. At least one token is read
        again, since its logits are wanted.
        """
        pending, read = [], []
        for b, (row, text) in enumerate(zip(self.rows, texts, strict=True)):
            before = len(row.tokens)
            if active[b] and len(text) > self.known[b]:
                self.data[b] += self.target.tokenizer.decode(text[self.known[b] :])
                self.known[b] = len(text)
                row.follow(self.drafts[b], self.data[b])
            agreed = _common(row.tokens[before:], self.drafts[b][:-1])
            read.append(min(before + agreed, len(row.tokens) - 1))
            pending.append(row.tokens[read[b] :])
        count_B = np.array(list(map(len, pending)), np.int32)
        # Few widths, so that few programs are compiled.
        pending_BP = right_padded(pending, multiple=1 if count_B.max() <= 2 else 8)
        cache = with_room(self.drafter, self.cache, max(read) + pending_BP.shape[1] + length)
        self.cache = cache._replace(length=np.array(read, np.int32))
        return pending_BP, count_B

    def _retokenise(self, b: int, drawn: Sequence[int]) -> list[int]:
        """A row's draft in target tokens, or none if it contradicts the part of a character that is there."""
        data, held = self.drafter.tokenizer.decode(drawn), self.data[b][self.rows[b].end :]
        if not data.startswith(held):
            return []
        data = data[len(held) :]
        return self.target.tokenizer.encode(data[: complete_prefix(data)], left=self.data[b][-_LEFT:])


class StringMatch(_TextProposer):
    """String-level exact match (arXiv 2502.05202, Algorithm 2): the drafter's likeliest text, retokenised."""

    def draft(self, length: int, texts: Texts, active: Sequence[bool]) -> Drafts:
        pending_BP, count_B = self._catch_up(texts, active, length)
        drafts_BK, self.cache = _greedy_text(self.drafter.model, length)(
            self.drafter.params, self.cache, pending_BP, count_B
        )
        self.drafts = np.asarray(drafts_BK).tolist()
        return pack([self._retokenise(b, ids) if active[b] else [] for b, ids in enumerate(self.drafts)])


class StringRejection(_TextProposer):
    """String-level rejection sampling (arXiv 2502.05202, Algorithm 3) with the exact law of the retokenised block.

    The number of drafter passes grows exponentially with the look-ahead, the draft length: for drafters of few tokens.

    Args:
      sampling: how every row draws, drafts too.
      with_laws: whether the verification needs the laws of the drafts.
    """

    def __init__(
        self, target: Voice, drafter: Voice, prompts: Sequence[Sequence[int]], sampling: Sampling, with_laws: bool
    ):
        super().__init__(target, drafter, prompts)
        self.sampling, self.with_laws = sampling, with_laws
        self.rngs = [np.random.default_rng(seed) for seed in sampling.seeds(len(prompts))]

    def draft(self, length: int, texts: Texts, active: Sequence[bool]) -> Drafts:
        pending_BP, count_B = self._catch_up(texts, active, length)
        self.cache = read_program(self.drafter.model)(self.drafter.params, pending_BP, self.cache)
        self.cache = self.cache.advance(count_B - 1)
        blocks = [self._block(b, length) if busy else slrs.BlockLaw({(): 1.0}) for b, busy in enumerate(active)]
        drawn = [block.draw(rng) for block, rng in zip(blocks, self.rngs, strict=True)]
        if not self.with_laws:
            return pack(drawn)
        V = self.target.model.vocab_size
        return pack(drawn, [block.proposal(tokens, V) for block, tokens in zip(blocks, drawn, strict=True)])

    def _block(self, b: int, length: int) -> slrs.BlockLaw:
        row = jax.tree.map(lambda a: a[b : b + 1], self.cache)
        law, own = _prefix_laws(self.drafter.model), self.sampling

        def draft_law(prefixes_NT: np.ndarray) -> np.ndarray:
            N = len(prefixes_NT)
            tokens_NC = np.concatenate([np.full((N, 1), self.rows[b].tokens[-1]), prefixes_NT], axis=1)
            # A power of two rows, so that few shapes are compiled.
            tokens_NC = np.pad(tokens_NC, ((0, (1 << (N - 1).bit_length()) - N), (0, 0))).astype(np.int32)
            laws = law(self.drafter.params, row, tokens_NC, own.temperature, own.top_k, own.top_p, own.min_p)
            return np.asarray(laws, np.float64)[:N]

        stop = self.drafter.tokenizer.roles["eos"]
        return slrs.block_law(draft_law, lambda ids: self._retokenise(b, ids), length, stop, _COST_LIMIT)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@functools.lru_cache(maxsize=32)
def _greedy_text(model: LanguageModel, length: int) -> Callable[..., tuple[jax.Array, Cache]]:
    """Compiles (params, cache, pending [B, P], count [B]) -> (drafts [B, K], cache with K - 1 of them behind)."""

    def write(params: Params, cache: Cache, pending_BP: jax.Array, count_B: jax.Array) -> tuple[jax.Array, Cache]:
        def choose(logits_BV: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
            token_B = first_largest(logits_BV)
            return token_B, token_B

        logits_BV, cache = read_pending(model, params, cache, pending_BP, count_B)
        return write_ahead(model, params, cache, logits_BV, choose, length)

    return jax.jit(write, donate_argnums=1)


@functools.lru_cache(maxsize=32)
def _prefix_laws(model: LanguageModel) -> Callable[..., jax.Array]:
    """Compiles (params, cache of one row, tokens [N, C], *settings of `warp`) -> laws [N, W] after each row."""

    def laws(params: Params, cache: Cache, tokens_NC: jax.Array, *settings: float) -> jax.Array:
        shared = jax.tree.map(lambda a: jnp.broadcast_to(a, (tokens_NC.shape[0], *a.shape[1:])), cache)
        logits_NCW, _ = model.extend(params, tokens_NC, shared)
        return warp(logits_NCW[:, -1], *settings)

    return jax.jit(laws)
