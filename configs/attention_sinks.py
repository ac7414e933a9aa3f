"""Do attention sinks and spikes form: the first token's share of attention against steps and size.

    python -m experiments.compare_attention --config=configs/attention_sinks.py --config.data.input=DIR \
        --workdir=WORKDIR

DIR holds en/{train,validation,test}.jsonl.gz, one {"text": …} a line. Dense models of growing size, at twice the
learning rate of the studies; `sinks.csv` has the curve. Time and expected result: experiments/results/attention_sinks/.
"""

import dataclasses

from atlas.data import DataConfig
from atlas.training import RunConfig, Study, TrainConfig
from configs.design import decoder, shape

WINDOW = 256
SIZES = {"small": (32, 2), "middle": (64, 3), "large": (96, 4)}


def get_config() -> RunConfig:
    """The dense model of the middle size."""
    return RunConfig(
        name="middle",
        data=DataConfig(source="jsonl", input="DIR", languages=("en",), window=WINDOW),
        model=dataclasses.replace(
            decoder(SIZES["middle"], WINDOW), attention="dense", k_base=WINDOW // 8, k_min=WINDOW // 32,
            k_max=WINDOW // 4,
        ),
        train=TrainConfig(
            batch_size=8, steps=(1000,), warmup_steps=100, learning_rate=8e-3, evaluation_windows=32,
            evaluate_every=100, checkpoint_every=0,
        ),
    )  # fmt: skip


def get_sweep(base: RunConfig) -> Study:
    """One run of every size."""
    sizes = [
        {"name": name} | {f"model.{key}": value for key, value in shape(*size).items()} for name, size in SIZES.items()
    ]
    return Study("Attention sinks and spikes", base, sizes)
