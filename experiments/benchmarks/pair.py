"""A target and a drafter for the decoding benchmark: trained on the spot, then the target made as large as wanted.

Both read templated English, so that a few minutes on a CPU teach them much the same law and drafts are accepted as
often as those of a good pair. Larger targets are a cost model: the trained one with more width, heads, feed-forward
units and layers, whose projections into what is read on are zero. Their law, and so the acceptance, is the trained
one's; their cost is that of their size, since weights are arguments that no compiler knows to be zero.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
import random
import shutil
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atlas.data import DataConfig, tokenizers
from atlas.files import write_atomically
from atlas.studies.voices import load_run
from atlas.training import RunConfig, TrainConfig, run_id, run_sweep
from atlas.training.step import Skeleton
from models import Decoder, ModelConfig
from models.config import Architecture
from models.pretrained import Pretrained, save_pretrained

CONTEXT = 2048
# Of the targets: M, L, H, G, F; heads are 32 wide, and two of them share keys, in every one.
SHAPES = {
    "1M": (128, 4, 4, 2, 384),
    "5M": (256, 6, 8, 4, 768),
    "30M": (512, 9, 16, 8, 1536),
}
_DRAFT_SHAPE = (64, 2, 2, 1, 192)
_TRAINED = "1M"
_TRAINING = {"target": (120, 4e-3), "draft": (300, 6e-3)}  # steps and learning rate
_TARGET_VOCABULARY, _DRAFT_VOCABULARY = 768, 640
_WINDOW, _HEAD = 128, 32
_DOCUMENTS, _SENTENCES = 1200, 16
_HELD_OUT = 60
_LANGUAGE = "templates"

_WORDS = {
    "name": "Anna Boris Clara David Elena Frank Greta Henry Irina Jacob Karin Leon Marta Nils Olga Peter",
    "place": "harbour market station garden library bridge castle village school river museum theatre",
    "thing": "letter basket lantern ticket blanket camera violin ladder teapot compass mirror notebook",
    "kind": "small yellow broken heavy wooden silver ancient borrowed",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}
_TEMPLATES = (
    "On {day} morning {name} walked to the {place} and found a {kind} {thing}.",
    "{name} told {other} that the {thing} had been left at the {place} since {day}.",
    '"Have you seen the {kind} {thing}?" asked {name}. "It was at the {place}," answered {other}.',
    "By the time {name} reached the {place}, the {kind} {thing} was already gone.",
    "The keeper of the {place} gave {name} a {kind} {thing} and wished everyone a pleasant {day}.",
    "After a long conversation {name} and {other} decided to return to the {place} on {day}.",
    "Nobody at the {place} could remember who had brought the {kind} {thing}.",
    "{other} wrote in the visitors' book: the {thing} belongs to {name}, who lives behind the {place}.",
)


def make_pair(workdir: pathlib.Path) -> tuple[dict[str, pathlib.Path], list[str]]:
    """Directories in Hugging Face's layout of the drafter ("draft") and of targets, by size, and texts to begin with.

    Runs that `workdir` holds already are not trained again.
    """
    texts = [_document(i) for i in range(_DOCUMENTS)]
    _write_text(workdir / "text" / _LANGUAGE, texts)
    # The drafter's vocabulary is no part of the target's: it has seen other text, too.
    vocabulary = tokenizers.train("bpe", _DRAFT_VOCABULARY, (*texts[:_HELD_OUT], *[__doc__] * 3))
    vocabulary.save(workdir / "text")
    configs = {role: _config(role, workdir / "text") for role in _TRAINING}
    run_sweep(list(configs.values()), workdir)
    directories = {}
    for name in ("draft", *SHAPES):
        run = workdir / "runs" / run_id(configs["draft" if name == "draft" else "target"])
        directories[name] = workdir / "models" / name
        model, config = load_run(run)
        if name in SHAPES:
            model, config = pad(model, config, SHAPES[name])
        save_pretrained(Pretrained(model, config, CONTEXT), directories[name])
        shutil.copy(run / "model" / tokenizers.FILE, directories[name])
    return directories, texts[-_HELD_OUT:]


def pad(model: Decoder, config: ModelConfig, shape: tuple[int, ...]) -> tuple[Decoder, ModelConfig]:
    """A decoder of a larger shape that computes what the small one does.

    The residual stream's new places stay 0, since nothing writes to them: the norms' mean squares shrink by the
    ratio of the widths, which their scales and the epsilon make up for.

    Args:
      shape: M, L, H, G, F, none smaller than the model's own; H / G is the same.
    """
    M, L, H, G, F = shape
    narrower = config.d_model / M
    epsilon = config.architecture.norm_epsilon * narrower
    architecture = dataclasses.replace(config.architecture, norm_epsilon=epsilon)
    sizes = {"d_model": M, "layers": L, "heads": H, "kv_heads": G, "d_ff": F}
    larger = dataclasses.replace(config, architecture=architecture, **sizes)
    small, fresh = Skeleton(config).split(model)[0], Skeleton(larger).init(jax.random.key(0))[0]
    params = {name: _padded(name, np.array(large), small[name], narrower) for name, large in fresh.items()}
    return Skeleton(larger).merge(params, {}), larger


def _padded(name: str, large: np.ndarray, small: jax.Array, narrower: float) -> jax.Array:
    """A parameter with the small one in its first corner, and 0 behind it where it writes to the residual stream."""
    if name.endswith(("embedding", "out", "down")):
        large[...] = 0
    large[tuple(map(slice, small.shape))] = small * narrower**0.5 if name.endswith("norm") else small
    return jnp.asarray(large)


def _config(role: str, text: pathlib.Path) -> RunConfig:
    steps, learning_rate = _TRAINING[role]
    tokenizer = str(text / tokenizers.FILE) if role == "draft" else "bpe"
    M, L, H, G, F = _DRAFT_SHAPE if role == "draft" else SHAPES[_TRAINED]
    return RunConfig(
        name=role,
        data=DataConfig(
            source="jsonl", input=str(text), languages=(_LANGUAGE,), tokenizer=tokenizer, vocab_size=_TARGET_VOCABULARY,
            window=_WINDOW,
        ),
        model=ModelConfig(
            d_model=M, layers=L, heads=H, kv_heads=G, head_width=_HEAD, d_ff=F, scan_layers=False,
            architecture=Architecture(family="llama"),
        ),
        train=TrainConfig(batch_size=16, steps=(steps,), learning_rate=learning_rate, evaluation_windows=16),
    )  # fmt: skip


def _document(seed: int) -> str:
    rng = random.Random(seed)

    def choose(items: Sequence[str]) -> str:
        # Zipf's law: what is likeliest is the same for any model that has learnt it.
        return rng.choices(items, [1 / rank for rank in range(1, 1 + len(items))])[0]

    def sentence() -> str:
        drawn = {field: choose(words.split()) for field, words in _WORDS.items()}
        return choose(_TEMPLATES).format(other=choose(_WORDS["name"].split()), **drawn)

    return " ".join(sentence() for _ in range(_SENTENCES))


def _write_text(directory: pathlib.Path, texts: list[str]) -> None:
    splits = {"train": texts[: -2 * _HELD_OUT], "validation": texts[-2 * _HELD_OUT : -_HELD_OUT]}
    directory.mkdir(parents=True, exist_ok=True)
    for split, documents in (splits | {"test": texts[-_HELD_OUT:]}).items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        write_atomically(directory / f"{split}.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
