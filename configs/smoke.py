"""The smallest whole study, for machines that check a change.

    python -m experiments.study --config=configs/smoke.py --workdir=DIR

Half a minute on two CPU cores; far too small to conclude anything from.
"""

import itertools

from atlas.data import DataConfig
from atlas.study import StudyConfig
from atlas.training import RunConfig, TrainConfig, vary
from configs.ladder import decoder

WINDOW = 32
LANGUAGES = ("a1", "a2", "b1")
WIDTHS = (16, 32)


def get_config() -> StudyConfig:
    """The base run."""
    return StudyConfig(
        title="Smoke test",
        name="smoke",
        population=7,
        data=DataConfig(source="synthetic", languages=LANGUAGES, window=WINDOW, synthetic_tokens=200_000),
        model=decoder(WIDTHS[0], 1, WINDOW),
        train=TrainConfig(batch_size=8, steps=(20, 40, 80), warmup_steps=5, learning_rate=1e-2, evaluation_windows=32),
    )


def get_sweep(config: StudyConfig) -> list[RunConfig]:
    """Monolingual, bilingual and even runs of two sizes, as populations."""
    languages = config.data.languages
    mixtures = (*languages, *(f"uniform({a},{b})" for a, b in itertools.combinations(languages, 2)), "uniform(*)")
    return [
        vary(config, {"name": f"{width}", "mixture": mixture, "model": decoder(width, 1, config.data.window, config.model.attention)})
        for width in WIDTHS
        for mixture in mixtures
    ]
