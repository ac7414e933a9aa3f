r"""The plan of the ATLAS paper on MADLAD-400 (arXiv 2510.22037, Table B.1): 774 runs in nine groups.

    python -m experiments.sweep --config=configs/atlas_paper.py --list
    python -m experiments.compile --config=configs/atlas_paper.py:46 --topology=v5p:4x4x4
    python -m experiments.sweep --config=configs/atlas_paper.py --workdir=DIR \
        --config.data.input=gs://BUCKET/madlad-400 --shard=0/774

Time: listing takes seconds. Training is the paper's own budget, sizes to 8B on sequences of 2048 for 30,000 steps;
nobody has run it with this code. Expect 774 runs. Where the paper counts without naming, this file chooses and says so:

- Table B.1 multiplies its 11 partial scales as 10; the largest (46) is left out.
- 90 bilingual runs are the ordered pairs of 10 languages; both orders are one 50/50 mixture, so the second differs by
  seed.
- The 15 target pairs are English with ten languages and five others; the tenth English partner is taken to be Swahili.
- The UniMax mixtures cover the 50 languages of capacity mixture 50v0 with at most 10 epochs, the paper's 420 not
  being listed.
- The 84 finetunes are taken to be the 12 languages of mixture 12v0 at the seven minimal scales.
"""

import itertools
from collections.abc import Sequence

from atlas.data import DataConfig
from atlas.scaling import published
from atlas.training import RunConfig, Study, TrainConfig, align, chain, cross, each
from atlas.training.overlays import Overlay
from checked import UserError, overlay
from models import ModelConfig, count_params, shape

FULL = (0, 1, 2, 4, 6, 8, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 42, 46)
PART = (0, 4, 8, 12, 16, 20, 24, 28, 34, 42)
MINIMAL = (0, 8, 16, 24, 34, 42, 46)
PAIR_SCALE = 34

MONOLINGUAL = ("en", "fr", "ru", "zh", "hi", "sw", "yo")
PAIRS = ("en", "fr", "ru", "zh", "hi", "de", "es", "pt", "ja", "vi")
TARGET_PAIRS = [("en", other) for other in (*PAIRS[1:], "sw")]
TARGET_PAIRS += [("es", "pt"), ("fr", "zh"), ("hi", "ru"), ("de", "ja"), ("hi", "vi")]

# Sequences a step by total parameters (Appendix B).
BATCH_SIZES = ((150e6, 256), (1e9, 512), (2e9, 1024), (float("inf"), 2048))


def get_config(scale: str = "0") -> RunConfig:
    """The base run: a scale, `atlas_paper.py:46`, on the UniMax mixture of the 50 evaluation languages."""
    if not scale.isdecimal():
        raise UserError(f"configs/atlas_paper.py:{scale}: give the number of a scale, as in atlas_paper.py:46")
    mixtures = _capacity_mixtures()
    languages = tuple(sorted({*itertools.chain(*mixtures.values(), MONOLINGUAL, PAIRS)}))
    base = RunConfig(
        name="atlas_paper",
        mixture=f"unimax({','.join(mixtures['50v0'])};epochs=10)",
        data=DataConfig(
            source="madlad",
            input="gs://BUCKET/madlad-400",
            languages=languages,
            tokenizer="unigram",
            window=2048,
            max_train_windows=30_000 * 2048,  # all that the largest run reads: `prepare` need not go on
        ),
        train=TrainConfig(
            steps=(3_000, 10_000, 30_000),
            warmup_steps=1000,
            cooldown_fraction=0.1,
            learning_rate=2e-4,
            checkpoint_every=500,
            evaluation_windows=10_000,
        ),
    )
    return overlay(base, {**_scale(int(scale)), "name": base.name})


def get_sweep(base: RunConfig) -> Study:
    """All 774 runs; a finetune names the UniMax run that it continues."""
    mixtures = _capacity_mixtures()
    even = [f"uniform({','.join(languages)})" for languages in mixtures.values()]
    own_vocabulary = [{"mixture": language, "data.languages": (language,)} for language in MONOLINGUAL]
    pairs = [
        {"mixture": f"uniform({','.join(sorted(pair))})", "seed": 1 + (pair[0] > pair[1])}
        for pair in itertools.permutations(PAIRS, 2)
    ]
    targets = [f"uniform({','.join(pair)})" for pair in TARGET_PAIRS]
    runs = chain(
        _group("monolingual", own_vocabulary, FULL),
        _group("unimax", [{}], FULL),
        _group("multilingual_vocabulary", each("mixture", MONOLINGUAL), PART),
        _group("pair_monolingual", cross(each("mixture", mixtures["50v0"]), [{"seed": 1}]), [PAIR_SCALE]),
        _group("pair_bilingual", pairs, [PAIR_SCALE]),
        _group("target_bilingual", each("mixture", targets), PART),
        _group("capacity", each("mixture", even), PART),
        _finetunes("finetune_all_languages", mixtures["50v0"], [PAIR_SCALE]),
        _finetunes("finetune_sizes", mixtures["12v0"], MINIMAL),
    )
    return Study("The plan of the ATLAS paper", base, runs)


def _group(group: str, sweep: Sequence[Overlay], scales: Sequence[int]) -> list[Overlay]:
    return cross([{"name": group, "group": group}], sweep, [_scale(scale) for scale in scales])


def _finetunes(group: str, languages: Sequence[str], scales: Sequence[int]) -> list[Overlay]:
    parents = align([_scale(scale) for scale in scales], [{"initialize": f"unimax-{scale}"} for scale in scales])
    return cross([{"name": group, "group": group}], each("mixture", languages), parents)


def _scale(scale: int) -> Overlay:
    total = count_params(ModelConfig(**shape(scale)))["total"]
    batch_size = next(size for limit, size in BATCH_SIZES if total < limit)
    fields = {f"model.{key}": value for key, value in shape(scale).items()}
    return {"name": str(scale), "train.batch_size": batch_size} | fields


def _capacity_mixtures() -> dict[str, list[str]]:
    rows = published.table("capacity_mixtures")
    return {row.mixture: row.languages.split() for row in rows.itertuples()}
