"""One run of a small Llama on the synthetic languages, which transformers can load.

    python -m experiments.train --config=configs/llama.py --workdir=DIR
    python -m experiments.export --run=DIR/runs/RUN --out=OUT
    python -m experiments.generate --target=OUT --prompt='…'

Time: about a minute of one CPU core for 0.6 million tokens. Expect the loss of every language in bits per byte: about 2
for a1 and a2. Other families: --config.model.architecture.family=qwen3, olmo2, smollm3, granite, qwen2 or mistral.
"""

from atlas.data import DataConfig
from atlas.training import RunConfig, TrainConfig
from models import ModelConfig
from models.config import Architecture


def get_config() -> RunConfig:
    """The run; every field can be overridden as --config.<field>=<value>."""
    return RunConfig(
        name="llama",
        mixture="uniform(*)",
        data=DataConfig(source="synthetic", languages=("a1", "a2"), tokenizer="bpe", vocab_size=512, window=128),
        model=ModelConfig(attention="dense", architecture=Architecture(family="llama", tied_head=False)),
        train=TrainConfig(batch_size=16, steps=(300,), checkpoint_every=50),
    )
