"""Trained models with their tokenizers, ready to write: runs of ours and Hugging Face directories."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from atlas.data import tokenizers
from atlas.training.loop import MODEL, load_model, load_model_config
from atlas.training.step import Skeleton
from checked import UserError
from checked.files import read_json
from models import Decoder, ModelConfig
from models.decoding import ByteView, Voice, load_tokenizer, make_voice
from models.pretrained import load_pretrained


def load_voice(path: pathlib.Path | str, dtype: str = "float32") -> Voice:
    """A model that writes.

    Args:
      path: a finished run of ours (`WORKDIR/runs/RUN`), or a directory in Hugging Face's layout (config.json,
        safetensors, tokenizer.json) of an architecture that `models.pretrained` knows.
      dtype: of activations.

    Raises:
      UserError: the directory is neither, or its parts do not fit together.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(f"model directory {str(path)!r} does not exist; give a run (WORKDIR/runs/RUN) or a checkpoint")
    try:
        description = read_json(path / "config.json", "model", "give a run (WORKDIR/runs/RUN) or a checkpoint")
        if "config" in description and "weights" in description:
            data = description["config"]["data"]
            return make_voice(load_run(path, dtype)[0], _tokenizer(path, data["tokenizer"]), data["window"])
        pretrained = load_pretrained(path, dtype)
        return make_voice(pretrained.model, load_tokenizer(path), pretrained.max_length or None)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_run(path: pathlib.Path, dtype: str = "float32") -> tuple[Decoder, ModelConfig]:
    """The model of a finished run of ours, and its config; `dtype` of activations.

    Raises:
      UserError: the run has left no model.
    """
    run = path.parent.parent, path.name
    arrays = jax.tree.map(jnp.asarray, load_model(*run))
    rows = len(arrays["params"]["embedding"])
    config = dataclasses.replace(load_model_config(*run), vocab_size=rows, dtype=dtype)
    return Skeleton(config).merge(arrays["params"], arrays["buffers"]), config


def _tokenizer(path: pathlib.Path, name: str) -> ByteView:
    """The tokenizer of a run, with the separator that goes before and behind every document."""
    if name == "bytes":
        plain = tokenizers.ByteTokenizer()
        table, encoder = tuple(bytes([i]) for i in range(256)), lambda text, left: list(text)
    else:
        file = path / MODEL / tokenizers.FILE
        plain, loaded = tokenizers.from_file(file), load_tokenizer(file)
        table, encoder = loaded.table, loaded.encoder
    ends = {"bos": (plain.separator,), "eos": (plain.separator,), "pad": (plain.padding,), "unk": ()}
    table = (*table, *(None,) * (plain.padding + 1 - len(table)))
    return ByteView(table, encoder, roles=ends, begin=(plain.separator,))
