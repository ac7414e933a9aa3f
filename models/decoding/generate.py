"""Writing text: plain decoding, and drafts by a small model with the same or with another vocabulary.

Whatever drafts, the text obeys the law of the target alone. With `verify="exact"` (greedy decoding, or sampling
with noise that depends on the seed and the place only) it is even the very same text for every method, drafter
and draft length.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from models.decoding.draft_length import LENGTHS, DraftLength, measure
from models.decoding.intersection import intersection_rounds, make_overlap, start_draft
from models.decoding.language_model import Voice, prefill, right_padded
from models.decoding.progress import Progress, plain_rounds, start, verification_round
from models.decoding.proposers import Lookup, Proposal, Proposer, Reading, StringMatch, StringRejection
from models.decoding.settings import Sampling, require
from models.decoding.vocabulary import VocabularyMap

METHODS = ("auto", "ar", "tli", "slem", "slrs", "lookup")
VERIFICATIONS = ("exact", "rejection", "block")
_WITH_LAWS = ("tli", "slrs")  # methods that know the law of their drafts
_ROUNDS = 8  # of the device between two looks of the host
_BLOCK = 2  # drafter tokens of a block for slrs, whose cost grows exponentially with them
_WIDTHS = (0, 1, 2, 4, 8, 16)  # of drafts from the host; longer ones are cut
_SHARED = 0.9  # of the prompts' tokens, from which on `auto` drafts over the intersection

Loop = Iterator[Progress]


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written, row by row, and at what cost.

    Attributes:
      tokens: the new target tokens, a stop token included.
      method: the one that was used, where `auto` chose.
      calls, drafted, accepted: target calls after the prompt, draft tokens proposed and accepted, per row.
      first_seconds: until the first tokens were there, with the compilation that it took.
      seconds: after that.
      first_tokens: how many the first were, of all rows: more than one a row where drafts were accepted.
    """

    tokens: list[list[int]]
    method: str
    calls: list[int]
    drafted: list[int]
    accepted: list[int]
    first_seconds: float
    seconds: float
    first_tokens: int

    @property
    def tokens_per_call(self) -> float:
        return sum(map(len, self.tokens)) / max(sum(self.calls), 1)

    @property
    def acceptance(self) -> float:
        """Share of the proposed drafts that were accepted; 0 without drafts."""
        return sum(self.accepted) / max(sum(self.drafted), 1)


def write(
    target: Voice,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    drafter: Voice | None = None,
    method: str = "auto",
    verify: str = "exact",
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    draft_length: int | None = None,
    stop: Sequence[int] | None = None,
    on_tokens: Callable[[list[list[int]]], Sequence[bool]] | None = None,
) -> Written:
    """Continues a batch of prompts, which may differ in length.

    Args:
      prompts: target tokens, at least one a row.
      drafter: the model that drafts, for "tli", "slem" and "slrs".
      method: "ar" (no drafts); "tli" (token-level intersection; with one vocabulary this is speculative sampling);
        "slem" (string-level exact match); "slrs" (string-level rejection sampling, for drafters of few tokens);
        "lookup" (repeats of the text itself, no drafter); "auto": lookup without a drafter, else tli if the
        drafter knows nine tenths of the prompts' tokens, else slem.
      verify: "exact" compares drafts with the target's own samples. "rejection" and "block" accept more of them
        when sampling, but the text then depends on the drafter (its law does not); they need the law of the
        drafts, which only tli and slrs know.
      draft_length: K, drafts a round (of drafter tokens for slem and slrs). None adapts it to what was accepted
        and to costs measured at the start.
      stop: target ids that end a row; default the tokenizer's end of text.
      on_tokens: called with every row's new tokens so far, every few rounds; says which rows to end.

    Raises:
      ValueError: one line that names what is wrong.
    """
    _check(target, prompts, max_new_tokens, drafter, method, verify, draft_length)
    job = _Job(target, drafter, prompts, max_new_tokens, verify, sampling, draft_length, stop)
    method = job.resolve(method)
    began = first = time.perf_counter()
    first_tokens = 0
    for progress in job.steps(method):
        tokens = job.new_tokens(progress)
        counts = [np.asarray(x).tolist() for x in (progress.calls, progress.drafted, progress.accepted)]
        if not first_tokens:
            first, first_tokens = time.perf_counter(), sum(map(len, tokens))
        if on_tokens:
            job.ended = np.asarray(on_tokens(tokens), bool)
    return Written(tokens, method, *counts, first - began, time.perf_counter() - first, first_tokens)


class _Job:
    """One call of `write`: its programs' arguments, and the loops over them."""

    def __init__(self, target, drafter, prompts, max_new_tokens, verify, sampling, draft_length, stop):
        self.target, self.drafter, self.sampling = target, drafter, sampling
        self.prompts = [list(map(int, prompt)) for prompt in prompts]
        self.max_new_tokens, self.draft_length = max_new_tokens, draft_length
        stop = target.tokenizer.roles["eos"] if stop is None else stop
        self.settings = sampling.settings(len(prompts), stop)
        self.sampled = not sampling.is_greedy
        # A greedy law is one token: all verifications do the same.
        self.verify = verify if self.sampled else "exact"
        longest = max(draft_length or 0, _WIDTHS[-1])
        self.capacity = max(map(len, prompts)) + max_new_tokens + longest + 1
        self.ended = np.zeros(len(prompts), bool)

    def resolve(self, method: str) -> str:
        """The method that `auto` stands for, from the prompts alone."""
        if method != "auto":
            return method
        if self.drafter is None:
            return "lookup"
        if self.vocabulary.is_empty:
            return "slem"
        tokens = np.concatenate([np.asarray(prompt) for prompt in self.prompts])
        shared = np.mean(self.vocabulary.target_to_draft[tokens] >= 0)
        return "tli" if shared >= _SHARED else "slem"

    @functools.cached_property
    def vocabulary(self) -> VocabularyMap:
        models = (self.target, self.drafter)
        return VocabularyMap.build(*(m.tokenizer for m in models), *(m.model.vocab_size for m in models))

    def new_tokens(self, progress: Progress) -> list[list[int]]:
        tokens_BS, length_B = np.asarray(progress.tokens), np.asarray(progress.length)
        starts = map(len, self.prompts)
        return [row[a:b].tolist() for row, a, b in zip(tokens_BS, starts, length_B, strict=True)]

    def start(self) -> Progress:
        length_B = jnp.array([len(prompt) for prompt in self.prompts], jnp.int32)
        cache = prefill(self.target, self.prompts, self.capacity)
        return start(jnp.asarray(right_padded(self.prompts)), length_B, length_B + self.max_new_tokens, cache)

    def steps(self, method: str) -> Loop:
        """Yields the progress every few rounds. Meanwhile the caller may name rows to end, in `ended`."""
        if method == "ar":
            return self.plain(self.start())
        if method == "tli":
            return self.intersection(self.start())
        return self.proposed(self.start(), method)

    def plain(self, progress: Progress, rounds: int = 1) -> Loop:
        program = plain_rounds(self.target.model, self.sampled)
        while not np.asarray(progress.done).all():
            progress = program(self.target.params, progress, self.settings, rounds)
            yield progress
            progress = self.end(progress)
            rounds = _ROUNDS

    def intersection(self, progress: Progress) -> Loop:
        lengths, rounds = self.draft_lengths("tli"), 1
        overlap = make_overlap(self.vocabulary, fallback=(*self.drafter.tokenizer.roles["unk"], 0)[0])
        spelled = [self.spelled(prompt) for prompt in self.prompts]
        # The drafter may need more tokens than the target for the same text. Where its slots run out, its drafts
        # become useless, not wrong.
        capacity = 2 * self.capacity + max(map(len, spelled))
        draft = start_draft(self.drafter, spelled, overlap, capacity)
        while lengths.current and not np.asarray(progress.done).all():
            program = intersection_rounds(
                self.target.model, self.drafter.model, self.verify, lengths.current, self.sampled
            )
            counts = self.counts(progress)
            progress, draft = program(
                self.target.params, self.drafter.params, progress, draft, overlap, self.settings, rounds
            )
            lengths.update(*(self.counts(progress) - counts))
            yield progress
            progress = self.end(progress)
            rounds = _ROUNDS
        yield from self.plain(progress, _ROUNDS)

    def proposed(self, progress: Progress, method: str) -> Loop:
        lengths = self.draft_lengths(method)
        proposer = self.proposer(method, lengths.current)
        while lengths.current and not np.asarray(progress.done).all():
            counts, active = self.counts(progress), (~np.asarray(progress.done)).tolist()
            texts = [p + new for p, new in zip(self.prompts, self.new_tokens(progress), strict=True)]
            drafts_BK, n_B, q_BKV = self.as_arrays(proposer.propose(texts, active))
            program = verification_round(self.target.model, "exact" if q_BKV is None else self.verify, self.sampled)
            progress = program(self.target.params, progress, self.settings, drafts_BK, n_B, q_BKV)
            proposer.length = lengths.update(*(self.counts(progress) - counts))
            yield progress
            progress = self.end(progress)
        yield from self.plain(progress, _ROUNDS)

    def spelled(self, prompt: list[int]) -> list[int]:
        """A prompt in the drafter's tokens."""
        ids = self.vocabulary.target_to_draft[np.asarray(prompt)]
        if np.all(ids >= 0):
            return ids.tolist()
        own = self.drafter.tokenizer
        return Reading(own.begin, own, self.target.tokenizer.decode(prompt)).tokens

    def proposer(self, method: str, length: int) -> Proposer:
        if method == "lookup":
            return Lookup(length)
        # The drafter may need more tokens for a text than the target, up to one a byte.
        data = max(len(self.target.tokenizer.decode(prompt)) for prompt in self.prompts)
        capacity = data + 8 * self.max_new_tokens + self.capacity
        arguments = (self.prompts, capacity, length)
        if method == "slem":
            return StringMatch(self.target.tokenizer, self.drafter, *arguments)
        return StringRejection(self.target, self.drafter, *arguments, self.sampling.rows(len(self.prompts)))

    def draft_lengths(self, method: str) -> DraftLength:
        if self.draft_length or method == "slrs":
            return DraftLength(self.draft_length or _BLOCK)
        time_of = functools.partial(measure, batch=len(self.prompts), capacity=self.capacity)
        draft_cost = 0.0 if method == "lookup" else time_of(self.drafter, tokens=1)
        verify_costs = tuple(time_of(self.target, tokens=1 + n) for n in (0, LENGTHS[0], LENGTHS[-1]))
        return DraftLength(None, draft_cost, verify_costs)

    def as_arrays(self, proposal: Proposal) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Drafts [B, K], how many count [B], and their laws [B, K, V] where the verification needs them."""
        needed = self.verify != "exact" and proposal.laws is not None
        longest = max(int(needed), *map(len, proposal.drafts))
        K = next((width for width in _WIDTHS if width >= longest), _WIDTHS[-1])
        drafts_BK = right_padded([draft[:K] + [0] * (K - len(draft)) for draft in proposal.drafts])
        n_B = np.array([min(len(draft), K) for draft in proposal.drafts], np.int32)
        if not needed:
            return drafts_BK, n_B, None
        q_BKV = np.zeros((*drafts_BK.shape, self.target.model.vocab_size))
        for row_KV, law in zip(q_BKV, proposal.laws, strict=True):
            row_KV[: len(law)] = law[:K]
        return drafts_BK, n_B, q_BKV

    def end(self, progress: Progress) -> Progress:
        """Ends the rows that the caller named."""
        return progress._replace(done=progress.done | self.ended) if self.ended.any() else progress

    @staticmethod
    def counts(progress: Progress) -> np.ndarray:
        """New tokens and target calls of all rows, on the host: the programs consume their argument."""
        return np.array([np.asarray(x).sum() for x in (progress.length, progress.calls)])


def _check(
    target: Voice,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    drafter: Voice | None,
    method: str,
    verify: str,
    draft_length: int | None,
) -> None:
    require(method in METHODS, "method", method, f"must be one of {', '.join(METHODS)}")
    require(verify in VERIFICATIONS, "verify", verify, f"must be one of {', '.join(VERIFICATIONS)}")
    require(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "must be at least 1")
    require(draft_length is None or draft_length > 0, "draft_length", draft_length, "must be at least 1")
    if method in ("tli", "slem", "slrs"):
        require(drafter is not None, "drafter", drafter, f"method {method} needs a model that drafts")
    if method not in ("auto", *_WITH_LAWS):
        known = "method {} does not know the law of its drafts; use exact"
        require(verify == "exact", "verify", verify, known.format(method))
    require(len(prompts) > 0, "prompts", prompts, "must have at least one row")
    for row, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompts[{row}]", [], "is empty; begin with the end-of-text token or some text")
        V = target.model.vocab_size
        require(min(prompt) >= 0 and max(prompt) < V, f"prompts[{row}]", prompt, f"has ids outside 0 to {V - 1}")
        context, needed = target.model.context, len(prompt) + max_new_tokens
        fits = context is None or needed <= context
        require(fits, f"prompts[{row}]", f"{len(prompt)} tokens", f"and {max_new_tokens} new ones exceed {context}")
