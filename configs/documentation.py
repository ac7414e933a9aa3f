"""A study on real text: software documentation in six languages, three sizes, K = 1, 2, 3 and 6.

    python -m experiments.study --config=configs/documentation.py --config.data.input=DIR --workdir=WORKDIR

DIR holds <language>/{train,validation,test}.jsonl.gz for de, en, es, fr, id and ru, one {"text": …} a line. 56 runs of up to 0.8 million
byte tokens; experiments/results/documentation/ has what it gave, where and in what time.
"""

import itertools

from atlas.data import DataConfig, mixtures
from atlas.study import StudyConfig
from atlas.training import RunConfig, TrainConfig, vary
from configs.ladder import decoder

WINDOW = 128
LANGUAGES = ("de", "en", "es", "fr", "id", "ru")
TRIPLES = (("de", "en", "fr"), ("es", "id", "ru"))
SIZES = {"small": (32, 2), "middle": (48, 3), "large": (64, 4)}  # model width, layers
DIRICHLET_RUNS = 8
REPEATED_WINDOWS = 1000  # unique windows of the runs that repeat: the longest sees each eight times


def get_config() -> StudyConfig:
    """The base run: the middle size on all six languages."""
    return StudyConfig(
        title="Documentation in six languages",
        name="documentation",
        data=DataConfig(source="jsonl", input="DIR", languages=LANGUAGES, window=WINDOW),
        model=decoder(*SIZES["middle"], WINDOW),
        train=TrainConfig(
            batch_size=16,
            steps=(100, 200, 400),
            warmup_steps=20,
            learning_rate=4e-3,
            evaluate_every=100,
            checkpoint_every=200,
            evaluation_windows=128,
        ),
    )


def get_sweep(config: StudyConfig) -> list[RunConfig]:
    """Monolingual, bilingual, K = 3, K = 6, unequal and repeated runs."""

    def run(group: str, size: str, mixture: str, **changes: object) -> RunConfig:
        model = decoder(*SIZES[size], config.data.window, config.model.attention)
        base = {"name": f"{group}-{size}", "group": group, "mixture": mixture, "model": model}
        return vary(config, base | changes)

    pairs = list(itertools.combinations(LANGUAGES, 2))
    uneven = [mixtures.dirichlet(LANGUAGES, seed) for seed in range(DIRICHLET_RUNS)]
    return [
        *(run("monolingual", size, language) for size in SIZES for language in LANGUAGES),
        *(run("bilingual", "middle", f"uniform({a},{b})") for a, b in pairs),
        *(run("trilingual", size, f"uniform({','.join(triple)})") for size in SIZES for triple in TRIPLES),
        *(run("all", size, "uniform(*)") for size in SIZES),
        *(run("dirichlet", "middle", mixture, seed=seed) for seed, mixture in enumerate(uneven)),
        *(
            run("repeated", "middle", language, **{"data.max_train_windows": REPEATED_WINDOWS})
            for language in LANGUAGES
        ),
    ]
