"""Finished runs of ours, read from wherever their directory lies."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from checked import UserError, overlay
from checked.files import read_json
from models import checkpoint
from models.config import ModelConfig
from models.decoder import Decoder, build

MODEL = "model"  # the directory in a run's that holds the trained arrays and the tokenizer


def read_description(path: Path) -> dict[str, Any]:
    """The config.json of a run or of a model in Hugging Face's layout; a UserError where there is none."""
    return read_json(
        path / "config.json", "model", "give a run (WORKDIR/runs/RUN) or a directory in Hugging Face's layout"
    )


def is_run(description: dict[str, Any]) -> bool:
    """Whether a config.json is that of a run of ours."""
    return "config" in description and "weights" in description


def model_config(path: Path) -> ModelConfig:
    """What a run's model was made of; what is younger than the run has its default."""
    return overlay(ModelConfig(), read_description(path)["config"]["model"])


def load_run(path: Path, dtype: str = "float32", *, stacked: bool = True) -> tuple[Decoder, ModelConfig]:
    """The model of a finished run, and its config.

    Args:
      dtype: of activations, and of parameters where it is narrower than theirs.
      stacked: as in `models.decoder.build`.

    Raises:
      UserError: the run has left no model, or a damaged one.
    """
    if not checkpoint.steps(path / MODEL):
        raise UserError(f"run {str(path)!r} has no trained model; train it to its end first")
    arrays = checkpoint.load(path / MODEL, 0)
    named = arrays["params"] | arrays.get("buffers", {})
    config = dataclasses.replace(model_config(path), vocab_size=len(named["embedding"]), dtype=dtype)
    narrow = jnp.promote_types(dtype, jnp.float32) == jnp.float32

    def read(name: str, layer: int | None, shape: tuple[int, ...]) -> Any:
        array = named[name] if layer is None else named[name][layer]
        return jnp.asarray(array, dtype if narrow and name in arrays["params"] else None)

    return build(config, read, stacked=stacked), config
