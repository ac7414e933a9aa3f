"""A synthetic study for a CPU over night: three families, four sizes, K = 1, 2, 3 and 6, to eight million tokens a run.

    python -m experiments.study --config=configs/mini.py --workdir=DIR

Time: not measured yet. Expect a transfer matrix that ranks members of a family above strangers.
"""

from atlas.data import DataConfig
from atlas.training import RunConfig, Study, TrainConfig
from configs.design import decoder, design

WINDOW = 128
SIZES = {"tiny": (32, 2), "small": (48, 3), "middle": (64, 4), "large": (96, 4)}
FAMILIES = (("a1", "a2", "a3"), ("a1", "b1", "c1"))


def get_config() -> RunConfig:
    """The base run: the middle size on all six languages."""
    languages = ("a1", "a2", "a3", "b1", "b2", "c1")
    return RunConfig(
        name="mini",
        data=DataConfig(source="synthetic", languages=languages, window=WINDOW, synthetic_tokens=4_000_000),
        model=decoder(SIZES["middle"], WINDOW),
        train=TrainConfig(
            batch_size=16,
            steps=(500, 1000, 2000, 4000),
            warmup_steps=50,
            learning_rate=4e-3,
            evaluate_every=500,
            checkpoint_every=500,
        ),
    )


def get_sweep(base: RunConfig) -> Study:
    """63 runs."""
    runs = design(base.data.languages, SIZES, "middle", uneven=12, trilingual=FAMILIES)
    return Study("Three synthetic families", base, runs)
