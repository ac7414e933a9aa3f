"""From dense to gated sparse attention: a trained model gets gates and an indexer, and a tenth of its steps more.

    python -m experiments.compare_attention --config=configs/attention_conversion.py --config.data.input=DIR \
        --workdir=WORKDIR

DIR holds en/{train,validation,test}.jsonl.gz, one {"text": …} a line. Beside it the dense model trains on in the same
way; `runs.csv` has the loss at step 0, as they were converted, and where branches of so many steps end. Time and
expected result: experiments/results/attention_conversion/.
"""

import dataclasses

from atlas.data import DataConfig
from atlas.training import RunConfig, Study, TrainConfig, cross, each
from configs.design import decoder

WINDOW, SIZE, SEEDS = 128, (64, 3), 3
STEPS = 1000  # of the dense model
LATER = (10, 25, 50, 100)  # and after it
SHARES = {"eighth": 8, "sixteenth": 16}  # of the window that a query selects on average: 1 key in so many
FURTHER = {
    "train.steps": LATER, "train.warmup_steps": 5, "train.cooldown_fraction": 0.8, "train.learning_rate": 2e-3,
    "train.evaluate_every": LATER[-1],
}  # fmt: skip


def get_config() -> RunConfig:
    """The dense model on English text."""
    return RunConfig(
        name="dense",
        data=DataConfig(source="jsonl", input="DIR", languages=("en",), window=WINDOW),
        model=dataclasses.replace(decoder(SIZE, WINDOW), attention="dense"),
        train=TrainConfig(
            batch_size=16, steps=(STEPS,), warmup_steps=50, learning_rate=4e-3, evaluation_windows=256,
            checkpoint_every=0,
        ),
    )  # fmt: skip


def get_sweep(base: RunConfig) -> Study:
    """The dense model, and from each of its seeds one that trains on and one a share of keys."""
    seeds = each("seed", range(base.seed, base.seed + SEEDS))
    kinds = [{"name": "dense_on"}]
    for name, part in SHARES.items():
        k = WINDOW // part
        kinds.append(
            {"name": f"sparse_{name}", "model.attention": "gated_sparse", "model.k_base": k}
            | {"model.k_min": k // 4, "model.k_max": 2 * k}
        )
    later = cross(kinds, [FURTHER | {"initialize": base.name}], seeds)
    return Study("From dense to gated sparse attention", base, [*cross([{"name": base.name}], seeds), *later])
