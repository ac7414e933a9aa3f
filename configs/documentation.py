"""A study on real text: software documentation in six languages, three sizes, K = 1, 2, 3 and 6.

    python -m experiments.study --config=configs/documentation.py --config.data.input=DIR --workdir=WORKDIR

DIR holds <language>/{train,validation,test}.jsonl.gz for de, en, es, fr, id and ru, one {"text": …} a line. 56 runs
of up to 0.8 million byte tokens. Time and expected result: see experiments/results/documentation/.
"""

from atlas.data import DataConfig
from atlas.training import RunConfig, Study, TrainConfig, cross
from configs.design import decoder, design, grid

WINDOW = 128
SIZES = {"small": (32, 2), "middle": (48, 3), "large": (64, 4)}
TRIPLES = (("de", "en", "fr"), ("es", "id", "ru"))
REPEATED_WINDOWS = 1000  # unique windows of the runs that repeat: the longest sees each six times


def get_config() -> RunConfig:
    """The base run: the middle size on all six languages."""
    return RunConfig(
        name="documentation",
        data=DataConfig(source="jsonl", input="DIR", languages=("de", "en", "es", "fr", "id", "ru"), window=WINDOW),
        model=decoder(SIZES["middle"], WINDOW),
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


def get_sweep(base: RunConfig) -> Study:
    """The design of every study, and runs that repeat little text, which alone tell lambda."""
    languages = base.data.languages
    runs = design(languages, SIZES, "middle", uneven=8, trilingual=TRIPLES)
    little = [{"data.max_train_windows": REPEATED_WINDOWS}]
    repeated = cross(grid("repeated", {"middle": SIZES["middle"]}, languages), little)
    return Study("Documentation in six languages", base, [*runs, *repeated])
