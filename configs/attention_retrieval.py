"""Which kinds of attention learn to retrieve, and in how many steps: a curriculum of needle, multikey and tracking.

    python -m experiments.compare_attention --config=configs/attention_retrieval.py --workdir=WORKDIR

Every stage continues the one before it, and is evaluated every 25 steps. No text is needed. What makes the tasks
learnable at this size: documents that are short at first, so that one token of thirty is an answer to learn from, norms
of queries and keys, and a second layer without rotary positions, in which what a key says does not depend on where it
stands. Time and expected result: experiments/results/attention_retrieval/.
"""

from collections.abc import Iterator

from atlas.data import DataConfig
from atlas.data.tasks import SHORTEST
from atlas.training import RunConfig, Study, TrainConfig, cross, each
from atlas.training.overlays import Overlay
from configs.attention_comparison import width
from models import ModelConfig
from models.config import Architecture

SEEDS, TOKENS = 5, 2048  # a step
LONGER = 4 * SHORTEST
# Steps, the window, and the mixture, which keeps what was learnt before.
STAGES = {
    "needle": (500, SHORTEST, "needle"),
    "multikey": (500, SHORTEST, "needle:0.2,multikey:0.8"),
    "tracking": (1000, SHORTEST, "needle:0.1,multikey:0.3,tracking:0.6"),
    "longer": (500, LONGER, "needle:0.2,multikey:0.3,tracking:0.5"),
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
            source="synthetic", languages=("a1",), tasks=("needle", "multikey", "tracking"), window=SHORTEST,
            synthetic_tokens=4_000_000,
        ),
        model=ModelConfig(
            d_model=64, layers=2, heads=4, kv_heads=4, head_width=16, d_ff=128, scan_layers=False,
            architecture=Architecture(family="qwen3", unrotated_layers=(1,)),
        ),
        train=TrainConfig(
            warmup_steps=50, learning_rate=8e-3, evaluation_windows=64, evaluate_every=25, checkpoint_every=0,
        ),
    )  # fmt: skip


def get_sweep(base: RunConfig) -> Study:
    """Every stage of every kind and seed."""
    seeds = each("seed", range(base.seed, base.seed + SEEDS))
    return Study("Retrieval by a curriculum", base, cross(list(_stages(base)), seeds))


def _stages(base: RunConfig) -> Iterator[Overlay]:
    for kind, fields in KINDS.items():
        before, model = "", fields | {"d_ff": width(base.model, fields["attention"])}
        for task, (steps, window, mixture) in STAGES.items():
            name, k = f"{kind}_{task}", window // 8
            of_window = {"k_base": k, "k_min": k // 4, "k_max": 2 * k}
            yield {f"model.{field}": value for field, value in (model | of_window).items()} | {
                "name": name, "group": task, "initialize": before, "mixture": mixture, "data.window": window,
                "train.steps": (steps,), "train.batch_size": TOKENS // window,
            }  # fmt: skip
            before = name
