"""A model and a small one that drafts for it, with tokenizers of their own.

    python -m experiments.train --config=configs/pair.py:target --workdir=DIR/target
    python -m experiments.train --config=configs/pair.py:draft --workdir=DIR/draft
    python -m experiments.generate --target=DIR/target/runs/RUN --draft=DIR/draft/runs/RUN --prompt='…' --compare

Both read the same text, synthetic unless --config.data.source and --config.data.input say otherwise. Time: half an hour
for both on two busy CPU cores. Expect texts that are those of the target alone; what drafts save depends on how well
the two agree, and so on how long they were trained: experiments/results/decoding/ has an example.
"""

from atlas.data import DataConfig
from atlas.training import RunConfig, TrainConfig
from checked import unknown
from models import ModelConfig

WINDOW = 128
# Width, layers and tokens of the vocabulary. The drafter's shorter tokens are mostly tokens of the target too.
SIZES = {"target": (128, 4, 1024), "draft": (64, 2, 512)}


def get_config(role: str = "target") -> RunConfig:
    """The run of one of the two: `target` or `draft`."""
    if role not in SIZES:
        raise unknown("part of the pair", role, list(SIZES))
    width, layers, vocab_size = SIZES[role]
    return RunConfig(
        name=role,
        mixture="uniform(*)",
        data=DataConfig(
            source="synthetic", languages=("a1", "a2"), tokenizer="bpe", vocab_size=vocab_size, window=WINDOW
        ),
        model=ModelConfig(
            d_model=width,
            layers=layers,
            heads=width // 32,
            kv_heads=width // 64,
            head_width=32,
            d_ff=4 * width,
            attention="gated",
            scan_layers=False,
        ),
        train=TrainConfig(batch_size=16, steps=(800,), warmup_steps=50, learning_rate=4e-3, checkpoint_every=200),
    )
