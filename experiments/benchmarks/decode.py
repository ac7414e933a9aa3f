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

import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
from tqdm import tqdm

from experiments.benchmarks.pair import SHAPES, make_pair
from models.decoding import VERIFICATIONS, Sampling, Voice, Written, compare, load, write

LENGTH = 4  # drafts a round, of those that do not adapt
_ROUNDS = 5
_PROMPTS, _PROMPT_TOKENS, _NEW = 2, 64, 64
_TEMPERATURES = (1.0, 1.5)  # of sampling; at the higher one the models agree less and fewer drafts are accepted
_OURS, _PEER = "atlas", "transformers"

# A way to decode, in its columns; "" is what does not concern it.
_LABELS = ("path", "temperature", "method", "verify", "drafts")
Way = tuple[str, float, str, str, str]
Writer = Callable[[list[int], int], Written]  # of a prompt and a seed


def run(workdir: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows by size, path and method; see the module. `workdir` keeps the trained pair for another time."""
    try:
        from experiments.benchmarks import assisted

        versions = ", ".join(f"{name} {version}" for name, version in assisted.VERSIONS.items())
    except ImportError:
        assisted, versions = None, "none: torch or transformers is not installed"
    rows, facts = [], {"draft_length": LENGTH, "prompts": _PROMPTS, "prompt_tokens": _PROMPT_TOKENS, "peer": versions}
    with tempfile.TemporaryDirectory() as temporary:
        directories, texts = make_pair(pathlib.Path(workdir or temporary))
        for size in SHAPES:
            rows += _measure_size(size, directories, texts, assisted)
    return rows, facts | {"new_tokens": _NEW, "rounds": _ROUNDS}


def _measure_size(
    size: str, directories: dict[str, pathlib.Path], texts: list[str], assisted: ModuleType | None
) -> list[dict[str, Any]]:
    target, draft = load(directories[size]), load(directories["draft"])
    encoded = (target.tokenizer.encode_prompt(text)[:_PROMPT_TOKENS] for text in texts)
    prompts = [prompt for prompt in encoded if len(prompt) == _PROMPT_TOKENS][:_PROMPTS]
    writers = {way: _writer(target, draft, way) for way in _ways()}
    if assisted:
        peer = assisted.Assisted(directories[size], directories["draft"], LENGTH)
        for way in _peer_ways():
            _, temperature, method, *_ = way
            writers[way] = functools.partial(peer.write, new=_NEW, method=method, temperature=temperature)
    programs = {
        way: lambda write=writer: [write(prompt, seed) for seed, prompt in enumerate(prompts)]
        for way, writer in writers.items()
    }
    figures = compare(programs, tqdm(range(1 + _ROUNDS), desc=size, leave=False))
    counts = {"size": size, "params": _params(target), "draft_params": _params(draft)}
    return _with_ratios([counts | dict(zip(_LABELS, way, strict=True)) | row for way, row in figures.items()])


def _ways() -> Iterator[Way]:
    fixed, adaptive = str(LENGTH), "adaptive"
    yield _OURS, 0.0, "ar", "", ""
    yield _OURS, 0.0, "tli", "exact", fixed
    yield _OURS, 0.0, "slem", "", fixed
    yield _OURS, 0.0, "lookup", "", fixed
    yield _OURS, 0.0, "tli", "exact", adaptive
    for temperature in _TEMPERATURES:
        yield _OURS, temperature, "ar", "", ""
        for verify in VERIFICATIONS:
            yield _OURS, temperature, "tli", verify, fixed
        yield _OURS, temperature, "tli", "rejection", adaptive


def _peer_ways() -> Iterator[Way]:
    yield _PEER, 0.0, "ar", "", ""
    yield _PEER, 0.0, "slem", "", str(LENGTH)
    yield _PEER, 0.0, "lookup", "", str(LENGTH)
    for temperature in _TEMPERATURES:
        yield _PEER, temperature, "ar", "", ""
        yield _PEER, temperature, "tli", "rejection", str(LENGTH)


def _writer(target: Voice, draft: Voice, way: Way) -> Writer:
    _, temperature, method, verify, drafts = way
    drafter = draft if method in ("tli", "slem") else None
    length = LENGTH if drafts.isdigit() else None
    options = {"drafter": drafter, "method": method, "verify": verify or "exact", "draft_length": length, "stop": ()}
    return lambda prompt, seed: write(target, [prompt], _NEW, sampling=Sampling(temperature, seed=seed), **options)


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
