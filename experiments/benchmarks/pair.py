"""A target and a drafter for the decoding benchmark: trained on the spot, then the target made as large as wanted.

Both read templated English, so that a few minutes on a CPU teach them much the same law and drafts are accepted as
often as those of a good pair. Larger targets are a cost model: the trained one with more width, heads, feed-forward
units and layers, whose projections into what is read on are zero. Their law, and so the acceptance, is the trained
one's; their cost is that of their size, since weights are arguments that no compiler knows to be zero.
"""

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
from atlas.training import RunConfig, TrainConfig, run_id, run_sweep
from atlas.training.step import Skeleton
from checked.files import write_atomically
from models import Decoder, ModelConfig
from models.config import Architecture
from models.pretrained import Pretrained, save_pretrained
from models.run import load_run

CONTEXT = 2048
# M and L of the targets, of which the first is trained; heads are 32 wide, and two share keys.
SHAPES = {"1M": (128, 4), "5M": (256, 6), "30M": (512, 9), "100M": (768, 14)}
_DRAFT_SHAPE = (64, 2)
_TRAINING = {"target": (120, 4e-3), "draft": (300, 6e-3)}  # steps and learning rate
_TARGET_VOCABULARY, _DRAFT_VOCABULARY = 768, 640
_WINDOW = 128
_DOCUMENTS, _SENTENCES = 1200, 16
_HELD_OUT = 60
_LANGUAGE = "templates"
_WRITING = pathlib.Path(__file__).with_name("templates.json")


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
            model, config = pad(model, config, _model(*SHAPES[name]))
        save_pretrained(Pretrained(model, config, CONTEXT), directories[name])
        shutil.copy(run / "model" / tokenizers.FILE, directories[name])
    return directories, texts[-_HELD_OUT:]


def pad(model: Decoder, config: ModelConfig, larger: ModelConfig) -> tuple[Decoder, ModelConfig]:
    """A decoder of a larger shape that computes what the small one does.

    The residual stream's new places stay 0, since nothing writes to them: the norms' mean squares shrink by the
    ratio of the widths, which their scales and the epsilon make up for.

    larger: no size is below the model's own; its H / G and E are the same.
    """
    narrower = config.d_model / larger.d_model
    epsilon = config.architecture.norm_epsilon * narrower
    architecture = dataclasses.replace(config.architecture, norm_epsilon=epsilon)
    larger = dataclasses.replace(larger, architecture=architecture, vocab_size=config.vocab_size)
    small, fresh = Skeleton(config).split(model)[0], Skeleton(larger).init(jax.random.key(0))[0]
    params = {name: _padded(name, np.array(large), small[name], narrower) for name, large in fresh.items()}
    return Skeleton(larger).merge(params, {}), larger


def _padded(name: str, large: np.ndarray, small: jax.Array, narrower: float) -> jax.Array:
    """A parameter with the small one in its first corner, and 0 behind it where it writes to the residual stream."""
    if name.endswith(("embedding", "out", "down")):
        large[...] = 0
    large[tuple(map(slice, small.shape))] = small * narrower**0.5 if name.endswith("norm") else small
    return jnp.asarray(large)


def _model(M: int, L: int) -> ModelConfig:
    sizes = {"d_model": M, "layers": L, "heads": M // 32, "kv_heads": M // 64, "head_width": 32, "d_ff": 3 * M}
    return ModelConfig(**sizes, scan_layers=False, architecture=Architecture(family="llama"))


def _config(role: str, text: pathlib.Path) -> RunConfig:
    steps, learning_rate = _TRAINING[role]
    tokenizer, shape = (str(text / tokenizers.FILE), _DRAFT_SHAPE) if role == "draft" else ("bpe", SHAPES["1M"])
    return RunConfig(
        name=role,
        data=DataConfig(
            source="jsonl", input=str(text), languages=(_LANGUAGE,), tokenizer=tokenizer, vocab_size=_TARGET_VOCABULARY,
            window=_WINDOW,
        ),
        model=_model(*shape),
        train=TrainConfig(batch_size=16, steps=(steps,), learning_rate=learning_rate, evaluation_windows=16),
    )  # fmt: skip


def _document(seed: int) -> str:
    rng, writing = random.Random(seed), json.loads(_WRITING.read_text())
    words = {field: text.split() for field, text in writing["words"].items()}

    def choose(items: Sequence[str]) -> str:
        # Zipf's law: what is likeliest is the same for any model that has learnt it.
        return rng.choices(items, [1 / rank for rank in range(1, 1 + len(items))])[0]

    def sentence() -> str:
        drawn = {field: choose(some) for field, some in words.items()}
        return choose(writing["templates"]).format(other=choose(words["name"]), **drawn)

    return " ".join(sentence() for _ in range(_SENTENCES))


def _write_text(directory: pathlib.Path, texts: list[str]) -> None:
    splits = {"train": texts[: -2 * _HELD_OUT], "validation": texts[-2 * _HELD_OUT : -_HELD_OUT]}
    directory.mkdir(parents=True, exist_ok=True)
    for split, documents in (splits | {"test": texts[-_HELD_OUT:]}).items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        write_atomically(directory / f"{split}.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
