"""The whole loop in minutes: a synthetic family of languages, three sizes, K = 1, 2 and 4.

    python -m experiments.study --config=configs/quickstart.py --workdir=DIR

a1 and a2 are sisters, b1 and b2 are sisters, and an a and a b are strangers: the recovered transfer matrix must say so.
"""

import itertools

from atlas.data import DataConfig, mixtures
from atlas.study import StudyConfig
from atlas.training import RunConfig, TrainConfig, vary
from configs.ladder import decoder

WINDOW = 64
LANGUAGES = ("a1", "a2", "b1", "b2")
SIZES = {"small": (16, 2), "middle": (32, 2), "large": (48, 2)}  # model width, layers
DIRICHLET_RUNS = 4


def get_config() -> StudyConfig:
    """The base run: the middle size on all four languages."""
    return StudyConfig(
        title="A synthetic family of languages",
        name="quickstart",
        data=DataConfig(source="synthetic", languages=LANGUAGES, window=WINDOW),
        model=decoder(*SIZES["middle"], WINDOW),
        train=TrainConfig(
            batch_size=16,
            steps=(80, 160, 320),
            warmup_steps=20,
            learning_rate=8e-3,
            evaluate_every=40,
            evaluation_windows=128,
        ),
    )


def get_sweep(config: StudyConfig) -> list[RunConfig]:
    """Monolingual and even runs of every size; pairs and unequal mixtures of the middle one."""

    def run(group: str, size: str, mixture: str, seed: int = 0) -> RunConfig:
        model = decoder(*SIZES[size], config.data.window, config.model.attention)
        return vary(config, {"name": f"{group}-{size}", "group": group, "mixture": mixture, "model": model, "seed": seed})

    return [
        *(run("monolingual", size, language) for size in SIZES for language in LANGUAGES),
        *(run("bilingual", "middle", f"uniform({a},{b})") for a, b in itertools.combinations(LANGUAGES, 2)),
        *(run("all", size, "uniform(*)") for size in SIZES),
        *(run("dirichlet", "middle", mixtures.dirichlet(LANGUAGES, seed), seed) for seed in range(DIRICHLET_RUNS)),
    ]
