"""A study of any text: every language that a directory holds, alone, in pairs, in mixtures, at three sizes.

    python -m experiments.study --config=configs/own_text.py --config.data.input=DIR --workdir=WORKDIR
    python -m experiments.study --config=configs/own_text.py --config.data.input=DIR --config.data.source=text \
        --config.data.languages="('cym_Latn','bre_Latn')" --workdir=WORKDIR

DIR holds a directory for each language, with {train,validation,test}.jsonl.gz (one {"text": …} a line), *.txt
(data.source=text) or MADLAD-400's files (madlad). The languages are those that are there, or that data.languages names;
eight of them make 160 runs. Time: --estimate tells it beforehand, an hour and a half of one core for eight. Expect what
experiments/results/eight_languages/ has.
"""

import itertools

from atlas.data import DataConfig, languages_of
from atlas.training import RunConfig, Study, TrainConfig, chain, cross
from checked import UserError
from configs.design import decoder, design, grid

WINDOW = 128
SIZES = {"small": (16, 2), "middle": (32, 2), "large": (48, 3)}
POPULATION = 8
EPOCHS = 6  # of the longest run on little text
PAIRS = 45  # at most: all of ten languages
LOPSIDED = 0.8, 0.2  # shares of two languages; without uneven ones tau and the value of a share are confounded


def get_config() -> RunConfig:
    """The base run: the middle size on all languages."""
    return RunConfig(
        name="own",
        data=DataConfig(source="jsonl", input="DIR", window=WINDOW),
        model=decoder(SIZES["middle"], WINDOW, attention="gated"),
        train=TrainConfig(
            batch_size=16, steps=(150, 300, 600), warmup_steps=30, learning_rate=4e-3, evaluate_every=150,
            evaluation_windows=128,
        ),
    )  # fmt: skip


def get_sweep(base: RunConfig) -> Study:
    """The design of every study, lopsided pairs, pairs of the smallest size, second seeds, and runs on little text.

    The second seeds tell noise from misfit, and the runs that repeat little text tell lambda.
    """
    languages = languages_of(base.data)
    if len(languages) < 2:
        raise UserError(f"{base.data.input} holds text of {languages[0]} only; transfer needs two languages or more")
    pairs = _pairs(languages)
    small, middle = ({name: SIZES[name]} for name in ("small", "middle"))
    lopsided = (f"{a}:{LOPSIDED[i % 2]},{b}:{LOPSIDED[1 - i % 2]}" for i, (a, b) in enumerate(pairs))
    little = {"data.max_train_windows": base.train.steps[-1] * base.train.batch_size // EPOCHS}
    runs = chain(
        design(languages, SIZES, "middle", uneven=4 * len(languages), pairs=pairs),
        grid("lopsided", middle, list(lopsided)),
        grid("bilingual", small, [f"uniform({a},{b})" for a, b in pairs]),
        cross(grid("seeds", middle, [*languages, "uniform(*)"]), [{"seed": base.seed + 1}]),
        cross(grid("repeated", middle, languages), [little]),
    )
    return Study(f"{len(languages)} languages", base, runs, POPULATION)


def _pairs(languages: tuple[str, ...]) -> list[tuple[str, str]]:
    """All pairs, or as many as PAIRS allows, in which every language is about as often."""
    count = len(languages)

    def apart(pair: tuple[int, int]) -> int:
        return min(pair[1] - pair[0], count - pair[1] + pair[0])

    numbers = sorted(itertools.combinations(range(count), 2), key=apart)[: max(PAIRS, count)]
    return [(languages[a], languages[b]) for a, b in sorted(numbers)]
