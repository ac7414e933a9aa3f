"""What each part of gated sparse attention buys: local keys, positions in the indexer, the budget, blocks, the window.

    python -m experiments.compare_attention --config=configs/attention_ablation.py --config.data.input=DIR \
        --workdir=WORKDIR

DIR holds en/{train,validation,test}.jsonl.gz, one {"text": …} a line. The runs of a group see the same batches where
their seeds are the same, and have the same parameters, by the feed-forward width; its first kind is dense. Time and
expected result: experiments/results/attention_ablation/.
"""

import dataclasses
from collections.abc import Sequence

from atlas.data import DataConfig
from atlas.training import RunConfig, Study, TrainConfig, chain, cross, each
from atlas.training.overlays import Overlay
from configs.attention_comparison import width
from configs.design import decoder, shape

WINDOW, SIZE, LARGER = 128, (32, 2), (64, 3)
SEEDS = 3  # of every kind
PLAIN, LOCAL, ROTARY = {"local_share": 0.0}, {"local_share": 0.5}, {"indexer_rotary_width": 16}
BLOCKS = {"selection": "block", "block": 8}
# Beside dense and gated: by name, the part of the window that a query selects on average, 1 in so many keys, and fields
# of the model.
PARTS = {
    "plain": (8, PLAIN),
    "local": (8, LOCAL),
    "rotary": (8, PLAIN | ROTARY),
    "both": (8, LOCAL | ROTARY),
    "local_16": (16, LOCAL),
    "blocks_local": (8, LOCAL | BLOCKS),
    "plain_4": (4, PLAIN),
    "local_quarter": (8, {"local_share": 0.25}),
    "rotary_half": (8, PLAIN | {"indexer_rotary_width": 8}),
    "both_16": (16, LOCAL | ROTARY),
    "blocks_plain": (8, PLAIN | BLOCKS),
    "blocks_both": (8, LOCAL | ROTARY | BLOCKS),
    "one_head": (8, LOCAL | {"indexer_heads": 1}),
    "four_heads": (8, LOCAL | {"indexer_heads": 4}),
    "sharp": (8, LOCAL | {"indexer_temperature": 0.0625}),
    "blunt": (8, LOCAL | {"indexer_temperature": 1.0}),
    "blocks_16": (8, LOCAL | BLOCKS | {"block": 16}),
    "blocks_32": (8, LOCAL | BLOCKS | {"block": 32}),
    "local_4": (4, LOCAL),
    "local_eighth": (8, {"local_share": 0.125}),
}
# What trains the indexer: of the learning rate of its own, and of steps at first in which every key is selected.
RATES = {"slow_indexer": 0.25, "fast_indexer": 4.0}
WARMING = 100
LONGER = ("plain", "local", "both")  # parts at the longer windows
WIDER = (*LONGER, "local_16", "blocks_local")  # and of the larger models


def get_config() -> RunConfig:
    """The dense base run on English text."""
    return RunConfig(
        name="ablation",
        data=DataConfig(source="jsonl", input="DIR", languages=("en",), window=WINDOW),
        model=dataclasses.replace(decoder(SIZE, WINDOW), attention="dense", kv_heads=2),
        train=TrainConfig(
            batch_size=16, steps=(500,), warmup_steps=50, learning_rate=4e-3,
            evaluation_windows=256, checkpoint_every=0,
        ),
    )  # fmt: skip


def get_sweep(base: RunConfig) -> Study:
    """Every part at the first window and size, a few of larger models, and a few at windows of 256 and 512 with as many
    tokens a step."""
    seeds = each("seed", range(base.seed, base.seed + SEEDS))
    runs = [cross([*_kinds(base, WINDOW, list(PARTS)), *_trained_otherwise(base)], seeds)]
    larger = dataclasses.replace(base, model=decoder(LARGER, WINDOW, attention="dense"))
    size = {f"model.{name}": value for name, value in shape(*LARGER).items() if name != "d_ff"}
    runs.append(cross(_kinds(larger, WINDOW, WIDER, "larger"), [size], seeds))
    for window in (2 * WINDOW, 4 * WINDOW):
        longer = {"data.window": window, "train.batch_size": base.train.batch_size * WINDOW // window}
        runs.append(cross(_kinds(base, window, LONGER), [longer], seeds))
    return Study("What the parts of gated sparse attention buy", base, chain(*runs), SEEDS)


def _trained_otherwise(base: RunConfig) -> list[Overlay]:
    """The part "local" with other rates of the indexer, and after steps that select every key."""
    local = _kinds(base, WINDOW, ["local"])[-1]
    runs = [local | {"name": name, "train.indexer_rate": rate} for name, rate in RATES.items()]
    steps = base.train.steps[-1]
    every_key = {f"model.{name}": WINDOW for name in ("k_base", "k_min", "k_max")}
    begun = local | every_key | {"name": "warming", "group": "warming", "train.steps": (WARMING,)}
    then = {"name": "warmed", "initialize": "warming", "train.steps": (steps - WARMING,), "train.warmup_steps": 0}
    return [*runs, begun | {"train.cooldown_fraction": 0.0}, local | then]


def _kinds(base: RunConfig, window: int, parts: Sequence[str], size: str = "") -> list[Overlay]:
    def kind(name: str, attention: str, **fields: object) -> Overlay:
        settings = {"attention": attention, "d_ff": width(base.model, attention)} | fields
        label = "_".join([name, *([size] if size else []), *([f"at_{window}"] if window != WINDOW else [])])
        return {"name": label, "group": size or f"window {window}"} | {f"model.{key}": v for key, v in settings.items()}

    def sparse(name: str) -> Overlay:
        part, fields = PARTS[name]
        k = window // part
        return kind(name, "gated_sparse", k_base=k, k_min=k // 4, k_max=2 * k, **fields)

    return [kind("dense", "dense"), kind("gated", "gated"), *map(sparse, parts)]
