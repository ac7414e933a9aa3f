"""How much faster drafts make a model: against plain decoding of the same model, with the same cache and warm-up."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from models.decoding.generate import Written, write
from models.decoding.language_model import Voice


def tokens_per_second(written: Written) -> float:
    """New tokens of all rows a second, the reading of the prompt included."""
    return sum(map(len, written.tokens)) / (written.first_seconds + written.seconds)


def compare(
    target: Voice,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    methods: dict[str, dict[str, Any]],
    repeats: int = 3,
    plain: dict[str, Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Times methods of `write` and plain decoding in turns, so that a busy machine is busy for all of them.

    Args:
      methods: options of `write` by a name of the caller's.
      plain: options of plain decoding, such as the sampling.

    Returns:
      By name, and for "plain": tokens_per_second, first_seconds (time to first token), tokens_per_call, acceptance
      (medians of warm runs), compile_seconds (what the first run took longer), and speedup, the ratio of the
      tokens a second to those of plain decoding.
    """
    runs: dict[str, Callable[[], Written]] = {
        "plain": lambda: write(target, prompts, max_new_tokens, method="ar", **(plain or {}))
    }
    for name, options in methods.items():
        runs[name] = lambda options=options: write(target, prompts, max_new_tokens, **options)
    cold = {name: run() for name, run in runs.items()}
    warm: dict[str, list[Written]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            warm[name].append(run())
    figures = {name: _figures(cold[name], warm[name]) for name in runs}
    for row in figures.values():
        row["speedup"] = row["tokens_per_second"] / figures["plain"]["tokens_per_second"]
    return figures


def _figures(cold: Written, warm: Sequence[Written]) -> dict[str, float]:
    median = lambda value: statistics.median(map(value, warm))  # noqa: E731
    whole = lambda written: written.first_seconds + written.seconds  # noqa: E731
    return {
        "tokens_per_second": median(tokens_per_second),
        "first_seconds": median(lambda written: written.first_seconds),
        "tokens_per_call": median(lambda written: written.tokens_per_call),
        "acceptance": median(lambda written: written.acceptance),
        "compile_seconds": max(whole(cold) - median(whole), 0.0),
    }
