"""Dense, gated, sparse and gated sparse attention at equal parameters and data, three seeds each.

    python -m experiments.compare_attention --config=configs/attention_comparison.py --workdir=DIR
    python -m experiments.compare_attention --config=configs/attention_comparison.py --config.data.source=jsonl \
        --config.data.input=DIR --config.data.languages="('de','en','es','ru')" --workdir=WORKDIR

The first command needs no text: it reads the synthetic languages. Three tenths of the windows are text, the others the
retrieval tasks of atlas.data.tasks; queries select an eighth of the window on average. Then a short run at every
learning rate of a sweep tells how far each kind can be pushed. Time and expected result:
experiments/results/attention_comparison/ has what the second command gave on real text, where and in what time.
"""

import dataclasses

from atlas.data import DataConfig
from atlas.data.tasks import TASKS
from atlas.studies.attention_comparison import RATES
from atlas.training import RunConfig, Study, TrainConfig, chain, cross, each
from checked import UserError
from models import ModelConfig, count_params
from models.config import ATTENTION_KINDS

WINDOW = 128
TEXT_SHARE = 0.3  # of the training windows; the others are tasks
LEARNING_RATES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)  # of the short runs


def get_config() -> RunConfig:
    """The dense base run; `get_sweep` varies attention, seed and learning rate."""
    return RunConfig(
        name="attention",
        data=DataConfig(
            source="synthetic", languages=("a1", "a2", "b1"), tasks=TASKS, window=WINDOW, synthetic_tokens=4_000_000
        ),
        model=ModelConfig(
            d_model=64, layers=2, heads=4, kv_heads=2, head_width=16, d_ff=256,
            indexer_heads=2, indexer_width=16, k_base=WINDOW // 8, k_min=WINDOW // 32, k_max=WINDOW // 4,
            scan_layers=False,  # two layers compile as fast unrolled, and run faster on a CPU
        ),
        train=TrainConfig(
            batch_size=8, steps=(1000,), warmup_steps=50, learning_rate=8e-3,
            evaluation_windows=128, checkpoint_every=250,
        ),
    )  # fmt: skip


def get_sweep(base: RunConfig) -> Study:
    """A run for every kind and seed, and a short one for every kind and learning rate.

    Text has TEXT_SHARE of the training windows, in equal shares of the languages, and the tasks have the others.
    """
    if not base.data.languages or not base.data.tasks:
        raise UserError("name the languages in data.languages and the tasks in data.tasks: their shares depend on both")
    kinds = [{"name": kind, "model.attention": kind, "model.d_ff": width(base.model, kind)} for kind in ATTENTION_KINDS]
    short = {"group": RATES, "train.steps": (80,), "train.checkpoint_every": 0}
    short["train.most_skipped"] = 1.0  # some are to diverge
    runs = chain(
        cross([{"group": "kinds"}], kinds, each("seed", range(base.seed, base.seed + 3))),
        cross(kinds, [short], each("train.learning_rate", LEARNING_RATES)),
    )
    parts = (base.data.languages, TEXT_SHARE), (base.data.tasks, 1 - TEXT_SHARE)
    shares = (f"{name}:{part / len(names)!r}" for names, part in parts for name in names)
    return Study("Attention kinds at equal parameters and data", base, cross(runs, [{"mixture": ",".join(shares)}]))


def width(dense: ModelConfig, kind: str) -> int:
    """The feed-forward width that gives another attention kind the parameters of the dense model.

    >>> {kind: width(get_config().model, kind) for kind in ATTENTION_KINDS}
    {'dense': 256, 'gated': 224, 'sparse': 239, 'gated_sparse': 207}
    """
    models = (dataclasses.replace(dense, attention=attention) for attention in ("dense", kind))
    wanted, have = (count_params(model)["non_embedding"] for model in models)
    found = dense.d_ff - round((have - wanted) / (3 * dense.layers * dense.d_model))
    if found < 1:
        raise UserError(f"model.d_ff={dense.d_ff}: {kind} attention adds more parameters than it holds; widen it")
    return found
