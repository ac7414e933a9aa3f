"""Token-level intersection: a drafter over the tokens that two vocabularies share, wholly on the device.

Timor et al. (arXiv 2502.05202), Algorithm 4. The drafter draws from its law on the shared tokens, q', which is a
law over target tokens, so that any verification of `models.decoding.verification` applies. Where the target
writes a token that the drafter does not know, the drafter reads its spelling, from a table. With one vocabulary
all tokens are shared, and this is speculative sampling (arXiv 2211.17192).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.attention.cache import Cache
from models.decoding import sampling, verification
from models.decoding.language_model import LanguageModel, Params, Voice, prefill, read_pending, with_room, write_ahead
from models.decoding.proposers import Proposal, Proposer, Texts
from models.decoding.rounds import Drafts, Judge, Progress, place_noise, round_keys
from models.decoding.sampling import Settings
from models.decoding.vocabulary import VocabularyMap

_ROUNDS = 8  # of the device between two looks of the host


class DraftState(NamedTuple):
    """The drafter's cache, and the tokens that it has not read yet, int32 [B, P], of which `count` [B] count."""

    cache: Cache
    pending: jax.Array
    count: jax.Array


class Intersection(Proposer):
    """The proposer of such drafts: it only says what to compile.

    Args:
      prompts, spelled: in the target's tokens, and in the drafter's.
    """

    rounds = _ROUNDS

    def __init__(
        self, drafter: Voice, vocabulary: VocabularyMap, prompts: list[list[int]], spelled: list[list[int]],
        verify: str, sampled: bool,
    ):  # fmt: skip
        self._voice, self._drafter = drafter, functools.partial(_Drafter, drafter.model, verify, sampled)
        self._given, self._lengths = (drafter.params, jax.device_put(vocabulary)), vocabulary.lengths
        # The drafter reads each new token by its pieces: so many tokens of every row, up to a place of the text.
        self._read, self._known = list(map(len, spelled)), list(map(len, prompts))
        self._pending = 1 + vocabulary.pieces.shape[1]
        pending_BP = np.zeros((len(prompts), self._pending), np.int32)
        pending_BP[:, 0] = [row[-1] for row in spelled]
        self.state = DraftState(prefill(drafter, spelled, 1), pending_BP, np.ones(len(prompts), np.int32))

    def propose(self, length: int, texts: Texts, active: object) -> Proposal:
        for b, text in enumerate(texts):
            self._read[b] += int(self._lengths[text[self._known[b] :]].sum())
            self._known[b] = len(text)
        room = max(self._read) + (self.rounds + 1) * (length + self._pending)
        self.state = self.state._replace(cache=with_room(self._voice, self.state.cache, room))
        return Proposal(self._drafter(length), self._given, length)


@dataclasses.dataclass(frozen=True)
class _Drafter:
    """Draws `length` drafts a round; see `models.decoding.rounds.Drafter`."""

    model: LanguageModel
    verify: str
    sampled: bool
    length: int

    def __call__(
        self,
        given: tuple[Params, VocabularyMap],
        state: DraftState,
        progress: Progress,
        settings: Settings,
        judge: Judge,
    ) -> tuple[Progress, DraftState]:
        (params, vocabulary), K = given, self.length
        noise_BKX = self._noise(vocabulary, progress, settings)

        def choose(logits_BW: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
            logits_BX = verification.project(logits_BW, vocabulary.draft_ids)
            if self.sampled:
                law_BX = settings.law(logits_BX)
                chosen_B = sampling.choose(law_BX, noise_BKX[:, k])
            else:
                law_BX, chosen_B = None, sampling.first_largest(logits_BX)
            return vocabulary.draft_ids[chosen_B], (chosen_B, law_BX)

        logits_BW, cache = self._read(params, state)
        (chosen_BK, law_BKX), cache = write_ahead(self.model, params, cache, logits_BW, choose, K)
        laws = None
        if self.verify != "exact":
            laws = verification.scatter(law_BKX, vocabulary.target_ids, len(vocabulary.target_to_draft))
        drafts = Drafts(vocabulary.target_ids[chosen_BK], jnp.full_like(progress.length, K), laws)
        progress, n_B, next_B = judge(drafts)
        # A row that is done must not run out of slots.
        cache = cache.advance(jnp.where(progress.done, 0, jnp.minimum(n_B, K - 1)))
        return progress, _follow(cache, vocabulary.draft_ids[chosen_BK[:, -1:]], n_B == K, next_B, vocabulary)

    def _noise(self, vocabulary: VocabularyMap, progress: Progress, settings: Settings) -> jax.Array | None:
        """Noise for K drafts [B, K, X].

        To be compared with samples of the target they use the samples' own noise, which makes agreement likely
        (arXiv 2408.07978). To be accepted or rejected they must not know the noise of the verification.
        """
        if not self.sampled:
            return None
        if self.verify == "exact":
            shape_KV = (self.length, len(vocabulary.target_to_draft))
            return place_noise(progress.length, shape_KV, settings)[..., vocabulary.target_ids]
        keys_B = round_keys(progress, settings)
        steps_BK = jnp.broadcast_to(jnp.arange(2, 2 + self.length), (keys_B.shape[0], self.length))
        return sampling.gumbel(keys_B, steps_BK, len(vocabulary.target_ids))

    def _read(self, params: Params, state: DraftState) -> tuple[jax.Array, Cache]:
        """The logits after the pending tokens [B, W], and the cache with them committed."""

        def read(width: int) -> tuple[jax.Array, Cache]:
            return read_pending(self.model, params, state.cache, state.pending[:, :width], state.count)

        # Mostly one or two tokens are pending: the target's own, and the last draft where all were accepted.
        P = state.pending.shape[1]
        widths = sorted({min(w, P) for w in (1, 2, P)})
        choice = jnp.searchsorted(jnp.array(widths), jnp.max(state.count))
        return jax.lax.switch(choice, [functools.partial(read, width) for width in widths])


def _follow(
    cache: Cache, last_B1: jax.Array, all_B: jax.Array, next_B: jax.Array, vocabulary: VocabularyMap
) -> DraftState:
    """The drafter's side after a verification.

    Pending is the spelling of the target's own token, behind the last draft where all were accepted: that one was
    drawn but not read.
    """
    pieces_BM, lengths_B = vocabulary.pieces[next_B], vocabulary.lengths[next_B]
    behind_BP = jnp.concatenate([last_B1, pieces_BM], axis=1)
    pending_BP = jnp.where(all_B[:, None], behind_BP, jnp.pad(pieces_BM, ((0, 0), (0, 1))))
    return DraftState(cache, pending_BP, lengths_B + all_B)
