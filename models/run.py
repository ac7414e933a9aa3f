"""Finished runs of ours, read from wherever their directory lies."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from checked import UserError, overlay
from checked.files import digest_of_file, read_json, read_sealed
from models import checkpoint
from models.config import ModelConfig
from models.decoder import Decoder, build

MODEL = "model"  # the directory in a run's that holds the trained arrays and the tokenizer
DONE = "done.json"  # lists what a finished run has left
_AGAIN = "delete it, and the command that trained the run trains it again"


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


def left_by(path: Path) -> dict[str, list]:
    """Size and SHA-256 of each file that a finished run has left, by name, as its `done.json` lists them."""
    return read_sealed(path / DONE, "record of a finished run", _AGAIN)["files"]


def compare(path: Path, left: list) -> None:
    """Raises UserError for a file that is not as `left_by` lists it: its size, or its size and hash."""
    found = [path.stat().st_size, digest_of_file(path) if len(left) > 1 else ""] if path.is_file() else []
    if left != found[: len(left)]:
        raise UserError(f"{path} is not as training left it; {_AGAIN}")


def load_arrays(path: Path) -> dict[str, dict[str, Any]]:
    """The parameters and buffers of a finished run; UserError where there are none, or damaged ones."""
    if not checkpoint.steps(path / MODEL):
        raise UserError(f"run {str(path)!r} has no trained model; train it to its end first")
    for name, left in left_by(path).items():
        if name.startswith((f"{MODEL}/", "config.json")):
            compare(path / name, left)
    return checkpoint.load(path / MODEL, 0)


def load_run(path: Path, dtype: str = "float32", *, stacked: bool = True) -> tuple[Decoder, ModelConfig]:
    """The model of a finished run, and its config.

    Args:
      dtype: of activations, and of parameters where it is narrower than theirs.
      stacked: as in `models.decoder.build`.

    Raises:
      UserError: the run has left no model, or a damaged one.
    """
    arrays = load_arrays(path)
    named = arrays["params"] | arrays.get("buffers", {})
    config = dataclasses.replace(model_config(path), vocab_size=len(named["embedding"]), dtype=dtype)
    narrow = jnp.promote_types(dtype, jnp.float32) == jnp.float32

    def read(name: str, layer: int | None, shape: tuple[int, ...]) -> Any:
        array = named[name] if layer is None else named[name][layer]
        return jnp.asarray(array, dtype if narrow and name in arrays["params"] else None)

    return build(config, read, stacked=stacked), config
