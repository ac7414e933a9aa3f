"""Which kinds of attention learn to find a needle, and in how many steps: short documents first, then longer ones.

    python -m experiments.compare_attention --config=configs/attention_retrieval.py --workdir=WORKDIR

Every run is evaluated every 25 steps, and continued in windows four times as long; the models of these are then read at
four times their length. No text is needed. What makes the task learnable in every seed: documents that are short at
first, so that an answer comes every 32 tokens, norms of queries and keys, and a second layer without rotary positions.
Time and expected result: experiments/results/attention_retrieval/.
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
STAGES = {"short": (500, SHORTEST), "longer": (300, 4 * SHORTEST)}  # steps, and the window
KINDS = {
    "dense": {"attention": "dense"},
    "gated": {"attention": "gated"},
    "gated_sparse": {"attention": "gated_sparse"},
    "plain": {"attention": "gated_sparse", "local_share": 0.0},
    "converted": {"attention": "gated_sparse"},  # begins as the dense model that has learnt it
}


def get_config() -> RunConfig:
    """The dense base run of the first stage."""
    return RunConfig(
        name="dense",
        data=DataConfig(
            source="synthetic", languages=("a1",), tasks=("needle",), window=SHORTEST, synthetic_tokens=4_000_000
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
    return Study("Finding a needle", base, cross(list(_stages(base)), seeds))


def _stages(base: RunConfig) -> Iterator[Overlay]:
    for kind, fields in KINDS.items():
        converted = kind == "converted"
        before = "dense_short" if converted else ""
        model = fields | {"d_ff": base.model.d_ff if converted else width(base.model, fields["attention"])}
        for stage, (steps, window) in STAGES.items():
            name, k = f"{kind}_{stage}", window // 8
            of_window = {"k_base": k, "k_min": k // 4, "k_max": 2 * k}
            yield {f"model.{field}": value for field, value in (model | of_window).items()} | {
                "name": name, "group": stage, "initialize": before, "mixture": "needle", "data.window": window,
                "train.steps": (steps,), "train.batch_size": TOKENS // window,
            }  # fmt: skip
            before = name
