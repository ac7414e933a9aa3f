r"""The plan of the ATLAS paper on MADLAD-400 (arXiv 2510.22037, Table B.1): 774 runs in nine groups.

    python -m experiments.sweep --config=configs/atlas_paper.py --list
    python -m experiments.sweep --config=configs/atlas_paper.py --workdir=DIR \
        --config.data.input=gs://BUCKET/madlad-400 --shard=0/774

Listing takes seconds. Training it is the paper's own budget: sizes to 8B on sequences of 2048 for 30,000 steps;
nobody has run it with this code. Where the paper counts without naming, this file chooses and says so:

- Table B.1 multiplies its 11 partial scales as 10; the largest (46) is left out.
- 90 bilingual runs are the ordered pairs of 10 languages; both orders are one 50/50 mixture, so the second differs by
  seed.
- The 15 target pairs are English with ten languages and five others; the tenth English partner is taken to be Swahili.
- The UniMax mixtures cover the 50 languages of capacity mixture 50v0 with at most 10 epochs, the paper's 420 not
  being listed.
- The 84 finetunes are taken to be the 12 languages of mixture 12v0 at the seven minimal scales.
"""

import itertools

from atlas.data import DataConfig
from atlas.scaling import published
from atlas.training import RunConfig, SweepConfig, TrainConfig, run_id, vary
from models import shape_config
from models.config import count_params

FULL = (0, 1, 2, 4, 6, 8, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 42, 46)
PART = (0, 4, 8, 12, 16, 20, 24, 28, 34, 42)
MINIMAL = (0, 8, 16, 24, 34, 42, 46)
PAIR_SCALE = 34

MONOLINGUAL = ("en", "fr", "ru", "zh", "hi", "sw", "yo")
PAIRS = ("en", "fr", "ru", "zh", "hi", "de", "es", "pt", "ja", "vi")
TARGET_PAIRS = [("en", other) for other in (*PAIRS[1:], "sw")] + [
    ("es", "pt"),
    ("fr", "zh"),
    ("hi", "ru"),
    ("de", "ja"),
    ("hi", "vi"),
]

# Sequences a step by total parameters (Appendix B).
BATCH_SIZES = ((150e6, 256), (1e9, 512), (2e9, 1024), (float("inf"), 2048))


def get_config() -> SweepConfig:
    """The base run: scale 0 on the 50 evaluation languages."""
    languages = tuple(_capacity_mixtures()["50v0"])
    return SweepConfig(
        name="atlas_paper",
        mixture="unimax(*;epochs=10)",
        data=DataConfig(
            source="madlad",
            input="gs://BUCKET/madlad-400",
            languages=languages,
            tokenizer="unigram",
            window=2048,
        ),
        model=shape_config(0),
        train=TrainConfig(
            steps=(3_000, 10_000, 30_000),
            warmup_steps=1000,
            cooldown_fraction=0.1,
            learning_rate=2e-4,
            checkpoint_every=500,
            evaluation_windows=10_000,
        ),
    )


def get_sweep(config: SweepConfig) -> list[RunConfig]:
    """All 774 runs; a finetune names the UniMax run that it continues."""

    def run(group: str, scale: int, mixture: str, **changes: object) -> RunConfig:
        shape = shape_config(scale)
        total = count_params(shape)["total"]
        batch_size = next(size for limit, size in BATCH_SIZES if total < limit)
        base = {"name": f"{group}-{scale}", "group": group, "mixture": mixture}
        return vary(config, base | {"model": shape, "train.batch_size": batch_size} | changes)

    def own_vocabulary(language: str) -> dict[str, object]:
        return {"data.languages": (language,)}

    unimax = {scale: run("unimax", scale, "unimax(*;epochs=10)") for scale in FULL}
    mixtures = _capacity_mixtures()
    return [
        *(run("monolingual", s, lang, **own_vocabulary(lang)) for lang, s in itertools.product(MONOLINGUAL, FULL)),
        *unimax.values(),
        *(run("multilingual_vocabulary", s, lang) for lang, s in itertools.product(MONOLINGUAL, PART)),
        *(run("pair_monolingual", PAIR_SCALE, lang, seed=1) for lang in mixtures["50v0"]),
        *(
            run(
                "pair_bilingual",
                PAIR_SCALE,
                f"uniform({','.join(sorted(pair))})",
                seed=1 + (pair[0] > pair[1]),
            )
            for pair in itertools.permutations(PAIRS, 2)
        ),
        *(run("target_bilingual", s, f"uniform({','.join(p)})") for p, s in itertools.product(TARGET_PAIRS, PART)),
        *(run("capacity", s, f"uniform({','.join(m)})") for m, s in itertools.product(mixtures.values(), PART)),
        *(
            run("finetune_all_languages", PAIR_SCALE, lang, initialize=run_id(unimax[PAIR_SCALE]))
            for lang in mixtures["50v0"]
        ),
        *(
            run("finetune_sizes", scale, lang, initialize=run_id(unimax[scale]))
            for lang, scale in itertools.product(mixtures["12v0"], MINIMAL)
        ),
    ]


def _capacity_mixtures() -> dict[str, list[str]]:
    rows = published.table("capacity_mixtures")
    return {row.mixture: row.languages.split() for row in rows.itertuples()}
