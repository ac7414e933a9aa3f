"""The whole loop in minutes: a synthetic family of languages, three sizes, K = 1, 2 and 4.

    python -m experiments.study --config=configs/quickstart.py --workdir=DIR

Time: three and a half minutes on two CPU cores. Expect a transfer matrix in which a1 and a2, and b1 and b2, which are
sisters, help each other more than strangers do; experiments/results/quickstart/ has one.
"""

from atlas.data import DataConfig
from atlas.training import RunConfig, Study, TrainConfig
from configs.design import decoder, design

WINDOW = 64
SIZES = {"small": (16, 2), "middle": (32, 2), "large": (48, 2)}


def get_config() -> RunConfig:
    """The base run: the middle size on all four languages."""
    return RunConfig(
        name="quickstart",
        data=DataConfig(source="synthetic", languages=("a1", "a2", "b1", "b2"), window=WINDOW),
        model=decoder(SIZES["middle"], WINDOW),
        train=TrainConfig(
            batch_size=16,
            steps=(80, 160, 320),
            warmup_steps=20,
            learning_rate=8e-3,
            evaluate_every=80,
            evaluation_windows=128,
        ),
    )


def get_sweep(base: RunConfig) -> Study:
    """25 runs."""
    return Study("A synthetic family of languages", base, design(base.data.languages, SIZES, "middle", uneven=4))
