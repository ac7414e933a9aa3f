r"""A study for one accelerator: populations of runs trained as one step, bfloat16, sizes to three million parameters.

    python -m experiments.study --config=configs/atlas_mini.py --workdir=DIR
    python -m experiments.study --config=configs/atlas_mini.py --config.data.source=jsonl --config.data.input=DIR \
        --config.data.languages=de,en,es,fr,id,ru --workdir=WORKDIR

Time: not measured on an accelerator yet; on a CPU use configs/quickstart.py. Expect a transfer matrix that ranks
members of a family above strangers, with narrower intervals than there.
"""

import dataclasses

from atlas.data import DataConfig
from atlas.training import RunConfig, Study, TrainConfig
from configs.design import decoder, design

WINDOW = 256
SIZES = {"0.1M": (48, 3), "0.4M": (80, 4), "1M": (128, 5), "3M": (192, 6)}


def get_config() -> RunConfig:
    """The base run: one million parameters on all six languages."""
    languages = ("a1", "a2", "a3", "b1", "b2", "c1")
    return RunConfig(
        name="atlas_mini",
        data=DataConfig(source="synthetic", languages=languages, window=WINDOW, synthetic_tokens=16_000_000),
        model=dataclasses.replace(decoder(SIZES["1M"], WINDOW), dtype="bfloat16"),
        train=TrainConfig(
            batch_size=32,
            steps=(500, 1000, 2000, 4000),
            warmup_steps=100,
            learning_rate=3e-3,
            evaluate_every=500,
            checkpoint_every=1000,
        ),
    )


def get_sweep(base: RunConfig) -> Study:
    """Even triples of the first and of the last languages, pairs, and twelve uneven mixtures."""
    languages = base.data.languages
    runs = design(languages, SIZES, "1M", uneven=12, trilingual=(languages[:3], languages[-3:]))
    return Study("ATLAS in miniature", base, runs, population=16)
