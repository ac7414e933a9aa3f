"""The whole loop in minutes: a synthetic family of languages, three sizes, K = 1, 2 and 4.

    python -m experiments.study --config=configs/quickstart.py --workdir=DIR

a1 and a2 are sisters, b1 and b2 are sisters, and an a and a b are strangers: the recovered transfer matrix must say so.
3.5 minutes on two CPU cores; experiments/results/quickstart/ has the result.
"""

from atlas.data import DataConfig
from atlas.studies.scaling_study import StudyConfig
from atlas.training import RunConfig, TrainConfig
from configs.design import decoder, design

WINDOW = 64
SIZES = {"small": (16, 2), "middle": (32, 2), "large": (48, 2)}


def get_config() -> StudyConfig:
    """The base run: the middle size on all four languages."""
    return StudyConfig(
        title="A synthetic family of languages",
        name="quickstart",
        data=DataConfig(source="synthetic", languages=("a1", "a2", "b1", "b2"), window=WINDOW),
        model=decoder(*SIZES["middle"], WINDOW),
        train=TrainConfig(
            batch_size=16,
            steps=(80, 160, 320),
            warmup_steps=20,
            learning_rate=8e-3,
            evaluate_every=80,
            evaluation_windows=128,
        ),
    )


def get_sweep(config: StudyConfig) -> list[RunConfig]:
    """25 runs."""
    return design(config, SIZES, "middle", {}, uneven=4)
