"""Which kinds of attention learn to retrieve, and in how many steps: a curriculum of needle, multikey and tracking.

    python -m experiments.compare_attention --config=configs/attention_retrieval.py --workdir=WORKDIR

Every stage continues the one before it, and is evaluated every 25 steps. No text is needed. What makes the tasks
learnable at this size: norms of queries and keys, and a second layer without rotary positions, in which what a key says
does not depend on where it stands. Time and expected result: experiments/results/attention_retrieval/.
"""

from collections.abc import Iterator

from atlas.data import DataConfig
from atlas.training import RunConfig, Study, TrainConfig, cross, each
from atlas.training.overlays import Overlay
from configs.attention_comparison import width
from models import ModelConfig
from models.config import Architecture

WINDOW, SEEDS = 64, 5
# By task: steps, and the mixture, which keeps what was learnt before.
STAGES = {
    "needle": (1500, "needle"),
    "multikey": (1000, "needle:0.2,multikey:0.8"),
    "tracking": (1500, "needle:0.1,multikey:0.3,tracking:0.6"),
}
KINDS = {
    "dense": {"attention": "dense"},
    "gated": {"attention": "gated"},
    "gated_sparse": {"attention": "gated_sparse"},
    "plain": {"attention": "gated_sparse", "local_share": 0.0},
}


def get_config() -> RunConfig:
    """The dense base run of the first stage."""
    return RunConfig(
        name="dense",
        data=DataConfig(
            source="synthetic", languages=("a1",), tasks=tuple(STAGES), window=WINDOW, synthetic_tokens=4_000_000
        ),
        model=ModelConfig(
            d_model=64, layers=2, heads=4, kv_heads=4, head_width=16, d_ff=128,
            k_base=WINDOW // 8, k_min=WINDOW // 32, k_max=WINDOW // 4, scan_layers=False,
            architecture=Architecture(family="qwen3", unrotated_layers=(1,)),
        ),
        train=TrainConfig(
            batch_size=16, warmup_steps=50, learning_rate=8e-3, evaluation_windows=64, evaluate_every=25,
            checkpoint_every=0,
        ),
    )  # fmt: skip


def get_sweep(base: RunConfig) -> Study:
    """Every stage of every kind and seed."""
    seeds = each("seed", range(base.seed, base.seed + SEEDS))
    return Study("Retrieval by a curriculum", base, cross(list(_stages(base)), seeds))


def _stages(base: RunConfig) -> Iterator[Overlay]:
    for kind, fields in KINDS.items():
        model = {f"model.{name}": value for name, value in fields.items()}
        model["model.d_ff"] = width(base.model, fields["attention"])
        before = ""
        for task, (steps, mixture) in STAGES.items():
            name = f"{kind}_{task}"
            stage = {"name": name, "group": task, "mixture": mixture, "train.steps": (steps,), "initialize": before}
            yield model | stage
            before = name
