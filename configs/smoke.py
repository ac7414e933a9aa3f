"""The smallest whole study, as two populations, for trying a change.

    python -m experiments.study --config=configs/smoke.py --workdir=DIR

Far too small to conclude anything from.
"""

from atlas.data import DataConfig
from atlas.studies.scaling_study import StudyConfig
from atlas.training import RunConfig, TrainConfig
from configs.design import decoder, design

WINDOW = 32
SIZES = {"small": (16, 1), "large": (32, 1)}


def get_config() -> StudyConfig:
    """The base run."""
    return StudyConfig(
        title="Smoke test",
        name="smoke",
        population=8,
        data=DataConfig(source="synthetic", languages=("a1", "a2", "b1"), window=WINDOW, synthetic_tokens=200_000),
        model=decoder(*SIZES["small"], WINDOW),
        train=TrainConfig(batch_size=8, steps=(20, 40, 80), warmup_steps=5, learning_rate=1e-2, evaluation_windows=32),
    )


def get_sweep(config: StudyConfig) -> list[RunConfig]:
    """Monolingual, bilingual, even and uneven runs."""
    return design(config, SIZES, "small", {}, uneven=2)
