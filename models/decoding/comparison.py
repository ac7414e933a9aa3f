"""How fast ways to write are, measured in turns."""

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from models.decoding.writing import Written

Name = TypeVar("Name", bound=Hashable)


def compare(
    programs: Mapping[Name, Callable[[], Sequence[Written]]], rounds: Iterable[object]
) -> dict[Name, dict[str, float]]:
    """Times programs that write in turns, so that a busy machine is busy for all of them.

    Args:
      programs: by name; each may write several times.
      rounds: one turn of all programs an element, at least two. The first is the warm-up, apart from the figures.

    Returns:
      By name:
        tokens_per_second   the reading of the prompts included; median of the rounds
        steady_per_second   the same after the first tokens of a prompt came
        tokens_per_call     of the target
        acceptance          share of the drafted tokens
        first_seconds       to the first tokens; median
        compile_seconds     what the first round took longer than the median of the others
    """
    turns = [{name: program() for name, program in programs.items()} for _ in rounds]
    return {name: _figures(*(turn[name] for turn in turns)) for name in programs}


def _figures(cold: Sequence[Written], *warm: Sequence[Written]) -> dict[str, float]:
    runs = [written for turn in warm for written in turn]
    tokens = sum(sum(map(len, written.tokens)) for written in runs)
    first_tokens = sum(written.first_tokens for written in runs)
    seconds = statistics.median(sum(w.first_seconds + w.seconds for w in turn) for turn in warm)
    steady_seconds = statistics.median(sum(w.seconds for w in turn) for turn in warm)
    return {
        "tokens_per_second": tokens / len(warm) / seconds,
        "steady_per_second": (tokens - first_tokens) / len(warm) / steady_seconds,
        **rates(runs),
        "first_seconds": statistics.median(w.first_seconds for w in runs),
        "compile_seconds": max(sum(w.first_seconds + w.seconds for w in cold) - seconds, 0.0),
    }


def rates(runs: Iterable[Written]) -> dict[str, float]:
    """Tokens a call of the target, and the share of the proposed drafts that were accepted; 0 without drafts."""
    counts = [(sum(map(len, w.tokens)), sum(w.calls), sum(w.drafted), sum(w.accepted)) for w in runs]
    tokens, calls, drafted, accepted = map(sum, zip(*counts, strict=True))
    return {"tokens_per_call": tokens / max(calls, 1), "acceptance": accepted / max(drafted, 1)}
