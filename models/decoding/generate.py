"""Writing text: plain decoding, and drafts by a small model with the same or with another vocabulary.

Whatever drafts, the text obeys the law of the target alone. With `verify="exact"` (greedy decoding, or sampling
with noise that depends on the seed and the place only) it is even the very same text for every method, drafter
and draft length.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from models.decoding.draft_length import MEASURED, DraftLength, measure
from models.decoding.intersection import Intersection
from models.decoding.language_model import Voice, prefill, right_padded
from models.decoding.proposers import LONGEST, Lookup, Nobody, Proposer, Reading, StringMatch, StringRejection
from models.decoding.rounds import Progress, compile_rounds, start
from models.decoding.sampling import Sampling, require
from models.decoding.vocabulary import VocabularyMap

METHODS = ("auto", "ar", "tli", "slem", "slrs", "lookup")
VERIFICATIONS = ("exact", "rejection", "block")
_ALONE = ("auto", "ar", "lookup")  # methods that need no drafter
_WITH_LAWS = ("tli", "slrs")  # methods that know the law of their drafts
_BLOCK = 2  # drafter tokens of a block for slrs, whose cost grows exponentially with them
_SHARED = 0.9  # of the prompts' tokens, from which on `auto` drafts over the intersection


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written, row by row, and at what cost.

    Attributes:
      tokens: the new target tokens, a stop token included.
      method: the one that was used, where `auto` chose.
      calls, drafted, accepted: target calls after the prompt, draft tokens proposed, and those that were committed,
        per row. A call commits a token of the target's own too, unless an accepted draft ends the row.
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
    job = _Job(target, drafter, [list(map(int, prompt)) for prompt in prompts], max_new_tokens, draft_length)
    job.check(method, verify)
    # A greedy law is one token: all verifications do the same.
    verify = "exact" if sampling.is_greedy else verify
    method = job.resolve(method)
    settings = sampling.settings(len(prompts), target.tokenizer.roles["eos"] if stop is None else stop)
    began = time.perf_counter()
    progress, first_seconds = job.start(), 0.0
    before = seen = progress.look()
    lengths = job.draft_lengths(method)
    proposer = job.proposer(method, verify, sampling)
    while not seen.done.all():
        if not lengths.current and not isinstance(proposer, Nobody):
            proposer = Nobody(len(prompts))
        texts = [row[:n] for row, n in zip(seen.tokens, seen.length, strict=True)]
        compiled, given = proposer.propose(lengths.current, texts, ~seen.done)
        program = compile_rounds(target.model, compiled, verify, not sampling.is_greedy)
        # The first tokens as soon as they are there.
        rounds = proposer.rounds if first_seconds else 1
        progress, proposer.state = program(target.params, given, progress, proposer.state, settings, rounds)
        before, seen = seen, progress.look()
        lengths.update((seen.length - before.length).sum(), (seen.calls - before.calls).sum())
        if not first_seconds:
            first_seconds, first_tokens = time.perf_counter() - began, sum(map(len, job.new_tokens(seen)))
        if on_tokens and (ended_B := np.array(on_tokens(job.new_tokens(seen)), bool)).any():
            progress = progress._replace(done=progress.done | ended_B)
            seen = seen._replace(done=seen.done | ended_B)
    counts = (x.tolist() for x in (seen.calls, seen.drafted, seen.accepted))
    seconds = time.perf_counter() - began - first_seconds
    return Written(job.new_tokens(seen), method, *counts, first_seconds, seconds, first_tokens)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a call of `write` is to do, and what follows from it before the first round."""

    target: Voice
    drafter: Voice | None
    prompts: list[list[int]]
    max_new_tokens: int
    draft_length: int | None

    def check(self, method: str, verify: str) -> None:
        """Raises what `write` says of its arguments."""
        new, length = self.max_new_tokens, self.draft_length
        require(method in METHODS, "method", method, f"must be one of {', '.join(METHODS)}")
        require(verify in VERIFICATIONS, "verify", verify, f"must be one of {', '.join(VERIFICATIONS)}")
        require(new > 0, "max_new_tokens", new, "must be at least 1")
        require(length is None or length > 0, "draft_length", length, "must be at least 1")
        require(
            self.drafter is not None or method in _ALONE,
            "drafter",
            self.drafter,
            f"method {method} needs a model that drafts",
        )
        knows_law = method in ("auto", *_WITH_LAWS)
        unknown = f"method {method} does not know the law of its drafts; use exact"
        require(verify == "exact" or knows_law, "verify", verify, unknown)
        require(len(self.prompts) > 0, "prompts", self.prompts, "must have at least one row")
        V, context = self.target.model.vocab_size, self.target.model.context or math.inf
        for row, prompt in enumerate(self.prompts):
            name, n = f"prompts[{row}]", len(prompt)
            require(n > 0, name, [], "is empty; begin with the end-of-text token or some text")
            require(0 <= min(prompt) <= max(prompt) < V, name, prompt, f"has ids outside 0 to {V - 1}")
            require(n + new <= context, name, f"{n} tokens", f"and {new} new ones exceed {context}")

    @property
    def capacity(self) -> int:
        """Slots that the target needs."""
        longest_draft = max(self.draft_length or 0, LONGEST)
        return max(map(len, self.prompts)) + self.max_new_tokens + longest_draft + 1

    def resolve(self, method: str) -> str:
        """The method that `auto` stands for, from the prompts alone."""
        if method != "auto":
            return method
        if self.drafter is None:
            return "lookup"
        shared = np.mean(self.vocabulary.target_to_draft[np.concatenate(self.prompts)] >= 0)
        return "tli" if shared >= _SHARED else "slem"

    @functools.cached_property
    def vocabulary(self) -> VocabularyMap:
        return VocabularyMap.build(self.target.tokenizer, self.drafter.tokenizer, self.target.model.vocab_size)

    def start(self) -> Progress:
        length_B = jnp.array(list(map(len, self.prompts)), jnp.int32)
        cache = prefill(self.target, self.prompts, self.capacity)
        return start(jnp.asarray(right_padded(self.prompts)), length_B, length_B + self.max_new_tokens, cache)

    def new_tokens(self, seen: Progress) -> list[list[int]]:
        starts = map(len, self.prompts)
        return [row[a:b].tolist() for row, a, b in zip(seen.tokens, starts, seen.length, strict=True)]

    def proposer(self, method: str, verify: str, sampling: Sampling) -> Proposer:
        if method == "ar":
            return Nobody(len(self.prompts))
        if method == "lookup":
            return Lookup()
        if method == "tli":
            spelled = [self.spelled(prompt) for prompt in self.prompts]
            capacity = 2 * self.capacity + max(map(len, spelled))
            return Intersection(self.drafter, self.vocabulary, spelled, capacity, verify, not sampling.is_greedy)
        room = 8 * self.max_new_tokens + self.capacity
        if method == "slem":
            return StringMatch(self.target, self.drafter, self.prompts, room)
        return StringRejection(self.target, self.drafter, self.prompts, room, sampling, verify != "exact")

    def spelled(self, prompt: list[int]) -> list[int]:
        """A prompt in the drafter's tokens."""
        ids = self.vocabulary.target_to_draft[np.asarray(prompt)]
        if np.all(ids >= 0):
            return ids.tolist()
        return Reading(self.drafter.tokenizer, self.target.tokenizer.decode(prompt)).tokens

    def draft_lengths(self, method: str) -> DraftLength:
        if method == "ar":
            return DraftLength(0)
        if self.draft_length or method == "slrs":
            return DraftLength(self.draft_length or _BLOCK)
        time_of = functools.partial(measure, batch=len(self.prompts), capacity=self.capacity)
        draft_cost = 0.0 if method == "lookup" else time_of(self.drafter, tokens=1)
        return DraftLength(None, draft_cost, [time_of(self.target, tokens=1 + n) for n in MEASURED])
