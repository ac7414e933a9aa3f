"""Decoding: plain and with drafts by a small model of another vocabulary, against the transformers library.

The peer, where torch and transformers are installed, reads the same weights and tokenizers, and its vocabularies are
sorted, which makes its sampling lossless. Prompts are continued one by one, as the peer can do no other; all write
the same number of tokens, none of which ends a text. Runs are made in turns. Sizes above the smallest are padded
targets (see `experiments.benchmarks.pair`): a cost model.

Figures are those of `models.decoding.compare`, and

  speedup             tokens_per_second over that of the same library's plain decoding at the same temperature
  steady_speedup      the same for steady_per_second
  ratio               tokens_per_second over that of the peer's same method (its tli for all verifications of ours)
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from atlas.errors import unknown
from atlas.studies.voices import load_voice
from experiments.benchmarks.pair import SHAPES, make_pair
from models.decoding import Sampling, Voice, Written, compare, write

LENGTH = 4  # drafts a round, of those that do not adapt
_ROUNDS = 5
_PROMPTS, _PROMPT_TOKENS, _NEW = 2, 64, 64
_TEMPERATURES = (1.0, 1.5)  # of sampling; at the higher one the models agree less and fewer drafts are accepted
_OURS, _PEER = "atlas", "transformers"

# Ways to decode: a function of the prompt and the seed, by what tells it from the others.
_LABELS = ("path", "temperature", "method", "verify", "drafts")
Contenders = dict[tuple[str, float, str, str, str], Callable[[list[int], int], Written]]


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
    contenders = _ours(target, draft) | _peers(directories[size], directories["draft"])
    programs = {
        name: lambda run=run: [run(prompt, seed) for seed, prompt in enumerate(prompts)]
        for name, run in contenders.items()
    }
    figures = compare(programs, tqdm(range(1 + _ROUNDS), desc=size, leave=False))
    counts = {"size": size, "params": _params(target), "draft_params": _params(draft)}
    return _with_ratios([counts | dict(zip(_LABELS, name, strict=True)) | row for name, row in figures.items()])


def _ours(target: Voice, draft: Voice) -> Contenders:
    found: Contenders = {}

    def add(temperature: float, length: int | None = LENGTH, verify: str = "exact", method: str = "ar") -> None:
        def run(prompt: list[int], seed: int) -> Written:
            return write(
                target, [prompt], _NEW, drafter=draft if method in ("tli", "slem") else None, method=method,
                verify=verify, sampling=Sampling(temperature=temperature, seed=seed), draft_length=length, stop=(),
            )  # fmt: skip

        drafts = "" if method == "ar" else "adaptive" if length is None else str(length)
        found[_OURS, temperature, method, verify if method == "tli" else "", drafts] = run

    for method in ("ar", "tli", "slem", "lookup"):
        add(0.0, method=method)
    add(0.0, None, method="tli")
    for temperature in _TEMPERATURES:
        add(temperature)
        for verify in ("exact", "rejection", "block"):
            add(temperature, verify=verify, method="tli")
        add(temperature, None, verify="rejection", method="tli")
    return found


def _peers(target: pathlib.Path, draft: pathlib.Path) -> Contenders:
    try:
        from experiments.benchmarks.assisted import Assisted
    except ImportError:
        return {}
    peer, found = Assisted(target, draft, LENGTH), {}
    sampled = [(method, temperature) for temperature in _TEMPERATURES for method in ("ar", "tli")]
    for method, temperature in [("ar", 0.0), ("slem", 0.0), ("lookup", 0.0), *sampled]:
        verify, drafts = "rejection" if method == "tli" else "", "" if method == "ar" else str(LENGTH)
        found[_PEER, temperature, method, verify, drafts] = functools.partial(
            peer.write, new=_NEW, method=method, temperature=temperature
        )
    return found


def _peer_versions() -> str:
    try:
        from experiments.benchmarks.assisted import VERSIONS
    except ImportError:
        return "none: torch or transformers is not installed"
    return ", ".join(f"{name} {version}" for name, version in VERSIONS.items())


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
