"""Directories in the layout of Hugging Face, read into a `Decoder` and written from one.

A safetensors file is a header of names, types and places, and numbers. Nothing in it is executed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from checked.files import read_json
from models.config import ModelConfig
from models.decoder import Decoder
from models.pretrained.names import NAMES, Names, is_stacked, stored_names
from models.pretrained.settings import read_config, read_max_length, write_config

# Tables of rotary positions, which old files hold beside the weights.
_DERIVED = "rotary_emb.inv_freq"
_SINGLE = "model.safetensors"
_EXECUTABLE = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FLOATS = ("F64", "F32", "F16", "BF16")
_LISTED = 3
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Places = Mapping[str, Path]


@dataclass(frozen=True)
class Pretrained:
    """A decoder, as `Decoder(config)` makes it, its config, and the tokens that it was made to read at once."""

    model: Decoder
    config: ModelConfig
    max_length: int


def load_pretrained(directory: str | os.PathLike[str], dtype: str = "float32") -> Pretrained:
    """A Llama, Mistral, Qwen2, Qwen3, Gemma 2 or Gemma 3 checkpoint, with dense attention.

    Tensors are read one by one: at most the model and one parameter of all layers are in memory.

    Args:
      directory: holds config.json and model.safetensors or its shards. Weights are floating-point numbers of 16, 32
        or 64 bits; parameters are float32.
      dtype: of activations, as `ModelConfig.dtype`.

    Raises:
      ValueError: of one line. A file is missing or broken; the architecture or a setting is not supported; a
        tensor is missing, unknown, or of another shape or type than config.json asks for.
    """
    directory = Path(directory)
    settings = read_json(directory / "config.json", "model", "give a directory in Hugging Face's layout")
    try:
        config = read_config(settings, dtype)
        max_length = read_max_length(settings)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    return Pretrained(_read_model(config, _find_tensors(directory), directory), config, max_length)


def save_pretrained(pretrained: Pretrained, directory: str | os.PathLike[str]) -> None:
    """Writes the layout that `load_pretrained` reads, and transformers too; parameters keep their dtype.

    The weights become one file, written beside its name and moved there; config.json is last.

    Raises:
      ValueError: the model is no Llama with dense attention; see `write_config`.
    """
    model, config, directory = pretrained.model, pretrained.config, Path(directory)
    settings = json.dumps(write_config(config, pretrained.max_length), indent=2)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{_SINGLE}.{os.getpid()}"
    save_file(_stored(model, config), partial, {"format": "pt"})
    partial.replace(directory / _SINGLE)
    (directory / "config.json").write_text(settings + "\n", encoding="utf-8")


def _read_model(config: ModelConfig, places: Places, directory: Path) -> Decoder:
    names = NAMES[config.architecture.family]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    variables = nnx.to_flat_state(state)
    expected = {n for path, _ in variables for n in stored_names(_key(path), names[_key(path)], config.layers)}
    _require_names(places, expected, directory, (config.vocab_size, config.d_model))
    read = ((path, v.replace(_read_parameter(_key(path), names, v.shape, places))) for path, v in variables)
    return nnx.merge(graphdef, nnx.from_flat_state(list(read)))


def _read_parameter(key: str, names: Names, shape: tuple[int, ...], places: Places) -> jax.Array:
    source, parameter = names[key], np.empty(shape, np.float32)
    parts = parameter if is_stacked(key) else parameter[None]
    for part, name in zip(parts, stored_names(key, source, len(parts)), strict=True):
        stored = _read_tensor(places[name], name, source.stored_shape(part.shape))
        part[...] = source.load(stored, part.shape)
    return jnp.asarray(parameter)


def _require_names(places: Places, expected: set[str], directory: Path, embedding: tuple[int, int]) -> None:
    if missing := sorted(expected - places.keys()):
        raise ValueError(f"{directory} has no tensor {_listed(missing)}")
    unknown = {name for name in places.keys() - expected if not name.endswith(_DERIVED)}
    if _HEAD in unknown:
        head, tied = (_read_tensor(places[name], name, embedding) for name in (_HEAD, _EMBEDDING))
        if not np.array_equal(head, tied):
            raise ValueError(f"{places[_HEAD]}: {_HEAD} is not the embedding, but config.json ties them")
        unknown.remove(_HEAD)
    if unknown:
        listed = _listed(sorted(unknown))
        raise ValueError(f"{directory} has tensors that config.json does not ask for: {listed}")


def _key(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _stored(model: Decoder, config: ModelConfig) -> dict[str, np.ndarray]:
    """Every tensor of the file."""
    stored = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        key, parameter = _key(path), np.asarray(variable[...])
        source = NAMES[config.architecture.family][key]
        names = stored_names(key, source, config.layers)
        stored |= zip(names, map(source.store, parameter if is_stacked(key) else [parameter]), strict=True)
    return stored


def _find_tensors(directory: Path) -> Places:
    """The file of every tensor: model.safetensors or, where there is none, its shards model-*.safetensors."""
    files = [directory / _SINGLE] if (directory / _SINGLE).is_file() else sorted(directory.glob("model*.safetensors"))
    if files:
        return {name: file for file in files for name in _names(file)}
    if found := [name for name in _EXECUTABLE if (directory / name).is_file()]:
        raise ValueError(f"{directory / found[0]} may execute code when read; convert it to {_SINGLE}")
    raise ValueError(f"{directory} has neither {_SINGLE} nor shards of it (model-*.safetensors)")


def _read_tensor(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor, in the type that it has in the file: floating-point numbers that need no further key."""
    with safe_open(path, framework="numpy") as file:
        part = file.get_slice(name)
        if (found := tuple(part.get_shape())) != shape:
            raise ValueError(f"{path}: {name} has shape {found}, but config.json asks for {shape}")
        if part.get_dtype() not in _FLOATS:
            raise ValueError(f"{path}: {name} is of type {part.get_dtype()}; supported are {', '.join(_FLOATS)}")
        return file.get_tensor(name)


def _listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
