"""Decoding: plain and with drafts by a small model of another vocabulary, against the transformers library.

The peer, where torch and transformers are installed, reads the same weights and tokenizers, and its vocabularies are
sorted, which makes its sampling lossless. Prompts are continued one by one, as the peer can do no other; all write
the same number of tokens, none of which ends a text. Runs are made in turns. Sizes above the smallest are padded
targets (see `experiments.benchmarks.pair`): a cost model.

  tokens_per_second   of all prompts, the reading of the prompts included; median of the rounds
  steady_per_second   the same after the first tokens of a prompt came
  tokens_per_call     of the target; acceptance is the share of the drafted tokens
  first_seconds       to the first tokens, median over prompts and rounds
  compile_seconds     what the first round took longer than the median of the others
  speedup             tokens_per_second over that of the same library's plain decoding at the same temperature
  steady_speedup      the same for steady_per_second
  ratio               tokens_per_second over that of the peer's same method (its tli for all verifications of ours)
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from atlas.errors import unknown
from atlas.studies.voices import load_voice
from experiments.benchmarks.pair import SHAPES, make_pair
from experiments.benchmarks.run import Run
from models.decoding import Sampling, Voice, write

LENGTH = 4  # drafts a round, of those that do not adapt
_ROUNDS = 5
_PROMPTS, _PROMPT_TOKENS, _NEW = 2, 64, 64
_TEMPERATURES = (1.0, 1.5)  # of sampling; at the higher one the models agree less and fewer drafts are accepted
_OURS, _PEER = "atlas", "transformers"

Program = Callable[[list[int], int], Run]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to decode: run(prompt, seed); `labels` tell it from the others."""

    labels: dict[str, Any]
    run: Program


def run(sizes: list[str], workdir: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows by size, path and method; see the module.

    Args:
      sizes: of the target, names in `SHAPES`.
      workdir: keeps the trained pair; "" is a temporary directory.

    Raises:
      UserError: a size is not known.
    """
    for size in sizes:
        if size not in SHAPES:
            raise unknown("size", size, SHAPES)
    with tempfile.TemporaryDirectory() as temporary:
        directories, texts = make_pair(pathlib.Path(workdir or temporary), sizes)
        rows, facts = [], {"draft_length": LENGTH, "prompts": _PROMPTS, "prompt_tokens": _PROMPT_TOKENS}
        for size in sizes:
            rows += _measure_size(size, directories, texts)
        facts["peer"] = _peer_versions()
    return rows, facts | {"new_tokens": _NEW, "rounds": _ROUNDS}


def _measure_size(size: str, directories: dict[str, pathlib.Path], texts: list[str]) -> list[dict[str, Any]]:
    target, draft = load_voice(directories[size]), load_voice(directories["draft"])
    encoded = (target.tokenizer.encode_prompt(text)[:_PROMPT_TOKENS] for text in texts)
    prompts = [prompt for prompt in encoded if len(prompt) == _PROMPT_TOKENS][:_PROMPTS]
    contenders = [*_ours(target, draft), *_peers(directories[size], directories["draft"])]
    rounds: list[list[list[Run]]] = []
    for _ in tqdm(range(1 + _ROUNDS), desc=size, leave=False):
        rounds.append([[c.run(prompt, seed) for seed, prompt in enumerate(prompts)] for c in contenders])
    counts = {"size": size, "params": _params(target), "draft_params": _params(draft)}
    rows = [
        counts | contender.labels | _figures(cold, warm)
        for contender, cold, *warm in zip(contenders, *rounds, strict=True)
    ]
    return _with_ratios(rows)


def _ours(target: Voice, draft: Voice) -> list[Contender]:
    def contender(temperature: float, length: int | None = LENGTH, verify: str = "exact", method: str = "ar"):
        options = {"method": method, "verify": verify, "draft_length": length, "stop": ()}

        def program(prompt: list[int], seed: int) -> Run:
            sampling = Sampling(temperature=temperature, seed=seed)
            drafter = draft if method in ("tli", "slem") else None
            written = write(target, [prompt], _NEW, drafter=drafter, sampling=sampling, **options)
            counts = (written.calls[0], written.drafted[0], written.accepted[0])
            return Run(written.tokens[0], *counts, written.first_seconds, written.seconds, written.first_tokens)

        labels = {"temperature": temperature, "method": method, "verify": verify if method == "tli" else ""}
        adaptive = "" if method == "ar" else "adaptive" if length is None else str(length)
        return Contender({"path": _OURS} | labels | {"drafts": adaptive}, program)

    found = [contender(0.0, method=method) for method in ("ar", "tli", "slem", "lookup")]
    found.append(contender(0.0, None, method="tli"))
    for temperature in _TEMPERATURES:
        found.append(contender(temperature))
        found += [contender(temperature, verify=verify, method="tli") for verify in ("exact", "rejection", "block")]
        found.append(contender(temperature, None, verify="rejection", method="tli"))
    return found


def _peers(target: pathlib.Path, draft: pathlib.Path) -> list[Contender]:
    try:
        from experiments.benchmarks.assisted import Assisted
    except ImportError:
        return []
    peer = Assisted(target, draft, LENGTH)

    def contender(method: str, temperature: float) -> Contender:
        def program(prompt: list[int], seed: int) -> Run:
            return peer.write(prompt, _NEW, method, temperature, seed)

        verify, drafts = "rejection" if method == "tli" else "", "" if method == "ar" else str(LENGTH)
        labels = {"path": _PEER, "temperature": temperature, "method": method, "verify": verify, "drafts": drafts}
        return Contender(labels, program)

    greedy = [contender(method, 0.0) for method in ("ar", "slem", "lookup")]
    return greedy + [contender(method, temperature) for temperature in _TEMPERATURES for method in ("ar", "tli")]


def _peer_versions() -> str:
    try:
        from experiments.benchmarks.assisted import VERSIONS
    except ImportError:
        return "none: torch or transformers is not installed"
    return ", ".join(f"{name} {version}" for name, version in VERSIONS.items())


def _figures(cold: list[Run], warm: list[list[Run]]) -> dict[str, Any]:
    runs = [run for round_ in warm for run in round_]
    seconds = [sum(run.first_seconds + run.seconds for run in round_) for round_ in warm]
    tokens, first_tokens = sum(len(run.tokens) for run in runs), sum(run.first_tokens for run in runs)
    steady_seconds = statistics.median(sum(run.seconds for run in round_) for round_ in warm)
    return {
        "tokens_per_second": tokens / len(warm) / statistics.median(seconds),
        "steady_per_second": (tokens - first_tokens) / len(warm) / steady_seconds,
        "tokens_per_call": tokens / sum(run.calls for run in runs),
        "acceptance": sum(run.accepted for run in runs) / max(sum(run.drafted for run in runs), 1),
        "first_seconds": statistics.median(run.first_seconds for run in runs),
        "compile_seconds": max(sum(run.first_seconds + run.seconds for run in cold) - statistics.median(seconds), 0.0),
    }


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {(row["path"], row["temperature"], row["method"]): row for row in rows}
    for row in rows:
        plain = known[row["path"], row["temperature"], "ar"]
        row["speedup"] = row["tokens_per_second"] / plain["tokens_per_second"]
        row["steady_speedup"] = row["steady_per_second"] / plain["steady_per_second"]
        # The peer drafts over the intersection only when it samples, and by text only when it does not.
        method = "slem" if row["method"] == "tli" and not row["temperature"] else row["method"]
        peer = known.get((_PEER, row["temperature"], method)) if row["path"] == _OURS else None
        row["ratio"] = row["tokens_per_second"] / peer["tokens_per_second"] if peer else None
    return rows


def _params(voice: Voice) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(voice.params))
