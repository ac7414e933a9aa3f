r"""A study for one accelerator: populations of runs trained as one step, bfloat16, sizes to three million parameters.

    python -m experiments.study --config=configs/atlas_mini.py --workdir=DIR
    python -m experiments.study --config=configs/atlas_mini.py --config.data.source=jsonl --config.data.input=DIR \
        --config.data.languages="('de','en','es','fr','id','ru')" --workdir=WORKDIR

Its time on an accelerator has not been measured yet; on a CPU use configs/mini.py.
"""

from atlas.data import DataConfig
from atlas.studies.scaling_study import StudyConfig
from atlas.training import RunConfig, TrainConfig
from configs.design import decoder, design

WINDOW = 256
SIZES = {"0.1M": (48, 3), "0.4M": (80, 4), "1M": (128, 5), "3M": (192, 6)}


def get_config() -> StudyConfig:
    """The base run: one million parameters on all six languages."""
    languages = ("a1", "a2", "a3", "b1", "b2", "c1")
    model = decoder(*SIZES["1M"], WINDOW)
    model.dtype = "bfloat16"
    return StudyConfig(
        title="ATLAS in miniature",
        name="atlas_mini",
        population=16,
        data=DataConfig(source="synthetic", languages=languages, window=WINDOW, synthetic_tokens=16_000_000),
        model=model,
        train=TrainConfig(
            batch_size=32,
            steps=(500, 1000, 2000, 4000),
            warmup_steps=100,
            learning_rate=3e-3,
            evaluate_every=500,
            checkpoint_every=1000,
        ),
    )


def get_sweep(config: StudyConfig) -> list[RunConfig]:
    """Even triples of the first and of the last languages, pairs, and twelve uneven mixtures."""
    languages = config.data.languages
    return design(config, SIZES, "1M", {"trilingual": (languages[:3], languages[-3:])}, uneven=12)
