"""Writes a finished run in Hugging Face's layout, which transformers loads with the same logits.

    python -m experiments.train --config=configs/llama.py --workdir=DIR
    python -m experiments.export --run=DIR/runs/RUN --out=OUT

The run's model is of a family that Hugging Face knows (--config.model.architecture.family: llama, qwen3, …), with
dense attention; our own block and sparse attention are refused.
"""

from absl import flags

from experiments._app import require, run
from models.decoding import export

_RUN = flags.DEFINE_string("run", "", "directory of the run")
_OUT = flags.DEFINE_string("out", "", "directory to write; a model that it holds is replaced")


def main(_) -> None:
    require(run=_RUN.value, out=_OUT.value)
    export(_RUN.value, _OUT.value)
    print(f"AutoModelForCausalLM.from_pretrained({_OUT.value!r}) is the model of {_RUN.value}")


if __name__ == "__main__":
    run(main)
