"""The smallest whole study, as two populations, for trying a change.

    python -m experiments.study --config=configs/smoke.py --workdir=DIR

Time: two minutes of one CPU core, most of it compiling. Expect a report of all parts; it is far too small to conclude
anything from.
"""

from atlas.data import DataConfig
from atlas.training import RunConfig, Study, TrainConfig
from configs.design import decoder, design

WINDOW = 32
SIZES = {"small": (16, 1), "large": (32, 1)}


def get_config() -> RunConfig:
    """The base run."""
    return RunConfig(
        name="smoke",
        data=DataConfig(source="synthetic", languages=("a1", "a2", "b1"), window=WINDOW, synthetic_tokens=200_000),
        model=decoder(SIZES["small"], WINDOW),
        train=TrainConfig(batch_size=8, steps=(20, 40, 80), warmup_steps=5, learning_rate=1e-2, evaluation_windows=32),
    )


def get_sweep(base: RunConfig) -> Study:
    """Monolingual, bilingual, even and uneven runs."""
    return Study("Smoke test", base, design(base.data.languages, SIZES, "small", uneven=2), population=8)
