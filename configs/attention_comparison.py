"""Dense, gated, sparse and gated sparse attention at equal parameters and data, three seeds each.

    python -m experiments.compare_attention --config=configs/attention_comparison.py --workdir=DIR
    python -m experiments.compare_attention --config=configs/attention_comparison.py --config.data.source=jsonl \
        --config.data.input=DIR --config.data.languages="('de','en','es','ru')" --workdir=WORKDIR

The first command needs no text: it reads the synthetic languages. Three tenths of the windows are text, the others the
retrieval tasks of atlas.data.tasks; queries select an eighth of the window on average. Then a short run at every
learning rate of a sweep tells how far each kind can be pushed. experiments/results/attention_comparison/ has what the
second command gave on real text, where and in what time.
"""

import dataclasses

from atlas.data import DataConfig, mixtures
from atlas.data.tasks import TASKS
from atlas.errors import UserError
from atlas.studies.attention_comparison import RATES, ComparisonConfig
from atlas.training import RunConfig, TrainConfig, vary
from models import ModelConfig, count_params
from models.config import ATTENTION_KINDS

WINDOW = 128


def get_config() -> ComparisonConfig:
    """The dense base run; `get_sweep` varies attention, seed and learning rate."""
    return ComparisonConfig(
        title="Attention kinds at equal parameters and data",
        name="attention",
        data=DataConfig(
            source="synthetic",
            languages=("a1", "a2", "b1"),
            tasks=TASKS,
            window=WINDOW,
            synthetic_tokens=4_000_000,
        ),
        model=ModelConfig(
            d_model=64,
            layers=2,
            heads=4,
            kv_heads=2,
            head_width=16,
            d_ff=256,
            indexer_heads=2,
            indexer_width=16,
            k_base=WINDOW // 8,
            k_min=WINDOW // 32,
            k_max=WINDOW // 4,
            scan_layers=False,  # two layers compile as fast unrolled, and run faster on a CPU
        ),
        train=TrainConfig(
            batch_size=8,
            steps=(1000,),
            warmup_steps=50,
            learning_rate=8e-3,
            evaluation_windows=128,
            checkpoint_every=250,
        ),
    )


def get_sweep(config: ComparisonConfig) -> list[RunConfig]:
    """A run for every kind and seed, and for every kind and learning rate."""
    base = vary(config, {"mixture": mixture(config)})
    models = {kind: sized(config.model, kind) for kind in ATTENTION_KINDS}
    kinds = [
        vary(base, {"name": kind, "group": "kinds", "model": model, "seed": config.seed + seed})
        for kind, model in models.items()
        for seed in range(config.seeds)
    ]
    short = {"group": RATES, "train.steps": (config.rate_steps,), "train.checkpoint_every": 0}
    rates = [
        vary(base, short | {"name": f"{kind}-rate", "model": model, "train.learning_rate": rate})
        for kind, model in models.items()
        for rate in config.learning_rates
    ]
    return [*kinds, *rates]


def mixture(config: ComparisonConfig) -> str:
    """Equal shares of the languages, and of the tasks, in the proportion that `text_share` says."""
    languages, tasks = config.data.languages, config.data.tasks
    if not languages or not tasks:
        raise UserError("name the languages in data.languages and the tasks in data.tasks: their shares depend on both")
    if not 0 < config.text_share < 1:
        raise UserError(f"text_share={config.text_share}: must lie between 0 and 1")
    shares = {name: config.text_share * share for name, share in mixtures.uniform(languages).items()}
    shares |= {name: (1 - config.text_share) * share for name, share in mixtures.uniform(tasks).items()}
    return ",".join(f"{name}:{share!r}" for name, share in shares.items())


def sized(dense: ModelConfig, kind: str) -> ModelConfig:
    """The model with another attention kind, and a feed-forward width that gives it the parameters of the dense one.

    >>> dense = get_config().model
    >>> {kind: (sized(dense, kind).d_ff, count_params(sized(dense, kind))["non_embedding"]) for kind in ATTENTION_KINDS}
    {'dense': (256, 123008), 'gated': (224, 123200), 'sparse': (239, 122884), 'gated_sparse': (207, 123076)}
    """
    model = dataclasses.replace(dense, attention=kind)
    wanted, have = (count_params(m)["non_embedding"] for m in (dataclasses.replace(dense, attention="dense"), model))
    width = model.d_ff - round((have - wanted) / (3 * model.layers * model.d_model))
    if width < 1:
        raise UserError(f"model.d_ff={model.d_ff}: {kind} attention adds more parameters than it holds; widen it")
    return dataclasses.replace(model, d_ff=width)
