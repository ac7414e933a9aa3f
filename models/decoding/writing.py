"""Writing text: plain decoding, and drafts by a small model with the same or with another vocabulary.

Whatever drafts, the text obeys the law of the target alone. With `verify="exact"` (greedy decoding, or sampling
with noise that depends on the seed and the place only) it is even the very same text for every method, drafter
and draft length.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from models.attention.cache import Cache
from models.decoding.draft_length import MEASURED, DraftLength, measure
from models.decoding.intersection import Intersection
from models.decoding.language_model import Voice, prefill, slots_for, with_room
from models.decoding.proposers import LONGEST, Lookup, Nobody, Proposer, Reading, StringMatch, StringRejection
from models.decoding.rounds import Progress, Report, compile_rounds, start
from models.decoding.sampling import Sampling, Settings, require
from models.decoding.vocabulary import VocabularyMap

METHODS = ("auto", "ar", "tli", "slem", "slrs", "lookup")
VERIFICATIONS = ("exact", "rejection", "block")
_ALONE = ("auto", "ar", "lookup")  # methods that need no drafter
_WITH_LAWS = ("tli", "slrs")  # methods that know the law of their drafts
_BLOCK = 2  # drafter tokens of a block for slrs, whose cost grows exponentially with them
_ROOM = 64  # new tokens that the first cache has slots for: most texts need no second one
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


def write(target: Voice, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> Written:
    """Continues a batch of prompts; arguments and errors are those of `writing`."""
    run = writing(target, prompts, max_new_tokens, **options)
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def writing(
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
) -> Generator[list[list[int]], Sequence[bool] | None, Written]:
    """Continues a batch of prompts, which may differ in length.

    Yields every row's new tokens, every few rounds, and may be sent which rows to end.

    Args:
      prompts: target tokens, at least one a row.
      max_new_tokens: most tokens to write in a row.
      drafter: the model that drafts, for "tli", "slem" and "slrs".
      method: "ar" (no drafts); "tli" (token-level intersection; with one vocabulary this is speculative sampling);
        "slem" (string-level exact match); "slrs" (string-level rejection sampling, for drafters of few tokens);
        "lookup" (repeats of the text itself, no drafter); "auto": lookup without a drafter, else tli if the
        drafter knows nine tenths of the prompts' tokens, else slem.
      verify: "exact" compares drafts with the target's own samples. "rejection" and "block" accept more of them
        when sampling, but the text then depends on the drafter (its law does not); they need the law of the
        drafts, which only tli and slrs know.
      draft_length: K, drafts a round (of drafter tokens for slem and slrs), at most 16. None adapts it to what was
        accepted and to costs measured at the start.
      stop: target ids that end a row; default the tokenizer's end of text.

    Raises:
      ValueError: one line that names what is wrong, also if the target's logits are no numbers.
    """
    job = _Job(target, drafter, [list(map(int, prompt)) for prompt in prompts], max_new_tokens, draft_length)
    job.check(method, verify)
    # A greedy law is one token: all verifications do the same.
    verify = "exact" if sampling.is_greedy else verify
    settings = sampling.settings(len(prompts), target.tokenizer.roles["eos"] if stop is None else stop)
    run = _Run(job, job.resolve(method), verify, sampling, settings)
    while not run.done_B.all():
        run.advance()
        ended = yield run.new
        if ended:
            run.done_B = run.done_B | np.array(ended, bool)
    return run.written()


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
        require(length is None or 0 < length <= LONGEST, "draft_length", length, f"must be from 1 to {LONGEST}")
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
            fix = f"max_new_tokens of at most {context - n}" if n < context else f"a prompt of fewer than {context}"
            fits = f"tokens of {name} exceed the model's window of {context} tokens; give {fix}"
            require(n + new <= context, "max_new_tokens", new, f"and the {n} {fits}")

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

    def start(self, settings: Settings) -> Progress:
        cache = prefill(self.target, self.prompts, min(self.max_new_tokens, _ROOM) + LONGEST + 1)
        return start(self.prompts, self.max_new_tokens, cache, self.target.model.vocab_size, settings)

    def with_room(self, cache: Cache, texts: list[list[int]], rounds: int, drafts: int) -> Cache:
        """The target's cache with slots for all that some rounds may write."""
        written = max(map(len, texts)) + rounds * (drafts + 1)
        limit = max(map(len, self.prompts)) + self.max_new_tokens + drafts + 1
        return with_room(self.target, cache, min(written, limit))

    def proposer(self, method: str, verify: str, sampling: Sampling) -> Proposer:
        if method == "ar":
            return Nobody(len(self.prompts))
        if method == "lookup":
            return Lookup()
        if method == "tli":
            spelled = [self.spelled(prompt) for prompt in self.prompts]
            return Intersection(self.drafter, self.vocabulary, self.prompts, spelled, verify, not sampling.is_greedy)
        if method == "slem":
            return StringMatch(self.target, self.drafter, self.prompts)
        return StringRejection(self.target, self.drafter, self.prompts, sampling, verify != "exact")

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
        time_of = functools.partial(measure, batch=len(self.prompts), capacity=slots_for(1))
        draft_cost = 0.0 if method == "lookup" else time_of(self.drafter, tokens=1)
        return DraftLength(None, draft_cost, [time_of(self.target, tokens=1 + n) for n in MEASURED])


class _Run:
    """A batch on its way: what the device goes on with, and what the host knows of it.

    new: the new tokens of every row. done_B: rows that are done, or are not wanted any longer.
    """

    def __init__(self, job: _Job, method: str, verify: str, sampling: Sampling, settings: Settings):
        self._job, self._method, self._verify = job, method, verify
        self._sampled, self._settings, B = not sampling.is_greedy, settings, len(job.prompts)
        self._began, self._first_seconds, self._first_tokens = time.perf_counter(), 0.0, 0
        self._progress, self._texts = job.start(settings), list(map(list, job.prompts))
        self.new: list[list[int]] = [[] for _ in range(B)]
        self.done_B, self._counts = np.zeros(B, bool), np.zeros((4, B), int)
        self._lengths = job.draft_lengths(method)
        self._proposer = job.proposer(method, verify, sampling)

    def advance(self) -> None:
        """Some rounds more; of one proposer as many as it may make without the host."""
        if not self._lengths.current and not isinstance(self._proposer, Nobody):
            self._proposer = Nobody(len(self.new))
        proposer, target = self._proposer, self._job.target
        drafts = proposer.propose(self._lengths.current, self._texts, ~self.done_B)
        # The first tokens as soon as they are there.
        rounds = proposer.rounds if self._first_seconds else 1
        cache = self._job.with_room(self._progress.cache, self._texts, rounds, drafts.length)
        program = compile_rounds(
            target.model, drafts.drafter, drafts.length, self._verify, self._sampled, proposer.rounds
        )
        packed, self._progress, proposer.state = program(
            target.params, drafts.given, self._progress._replace(cache=cache), proposer.state, self._settings,
            self.done_B, rounds,
        )  # fmt: skip
        self._take_in(Report.unpack(packed))

    def _take_in(self, report: Report) -> None:
        before, self._counts, self.done_B = self._counts, report.counts, report.done
        if self._counts[3].any():
            raise ValueError("the target's logits are no finite numbers: its weights are damaged, or dtype too narrow")
        for row, text, tokens in zip(self.new, self._texts, report.tokens, strict=True):
            row += tokens
            text += tokens
        self._lengths.update(sum(map(len, report.tokens)), int((self._counts[0] - before[0]).sum()))
        if not self._first_seconds:
            self._first_seconds = time.perf_counter() - self._began
            self._first_tokens = sum(map(len, self.new))

    def written(self) -> Written:
        """What came of it."""
        seconds = time.perf_counter() - self._began - self._first_seconds
        calls, drafted, accepted = self._counts[:3].tolist()
        first = self._first_seconds
        return Written(self.new, self._method, calls, drafted, accepted, first, seconds, self._first_tokens)
