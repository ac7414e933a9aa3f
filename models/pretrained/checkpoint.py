"""Directories in the layout of Hugging Face, read into a `Decoder` and written from one.

A safetensors file is a header of names, types and places, and numbers. Nothing in it is executed.
"""

import json
import math
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

from checked.files import read_json, write_atomically
from models.config import ModelConfig
from models.decoder import Decoder, array_shapes, build
from models.pretrained.names import NAMES, Source, is_stacked, stored_name
from models.pretrained.settings import read_config, read_max_length, write_config

# Tables of rotary positions, which old files hold beside the weights.
_DERIVED = "rotary_emb.inv_freq"
_SINGLE, _INDEX, _SHARDS = "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"
_EXECUTABLE = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FLOATS = ("F64", "F32", "F16", "BF16")
_LISTED = 3
_AT_ONCE = 1 << 22  # numbers that are read at once
_ALIGNMENT = 64  # bytes; jax copies what begins elsewhere
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Places = Mapping[str, Path]


@dataclass(frozen=True)
class Pretrained:
    """A decoder, as `Decoder(config)` makes it, its config, and the tokens that it was made to read at once."""

    model: Decoder
    config: ModelConfig
    max_length: int


def load_pretrained(directory: str | os.PathLike[str], dtype: str = "float32", *, stacked: bool = True) -> Pretrained:
    """A checkpoint of a family in `models.pretrained.settings.FORMATS`, with dense attention.

    Tensors are read piece by piece into where they stay: little more than the model is in memory.

    Args:
      directory: holds config.json and model.safetensors or its shards. Weights are floating-point numbers of 16, 32
        or 64 bits.
      dtype: of activations, as `ModelConfig.dtype`, and of parameters: "bfloat16", or else float32.
      stacked: as in `models.decoder.build`.

    Raises:
      ValueError: of one line. A file is missing or broken; the architecture or a setting is not supported; a
        tensor is missing, unknown, of another shape or type than config.json asks for, or holds no finite numbers.
    """
    directory = Path(directory)
    settings = read_json(directory / "config.json", "model", "give a directory in Hugging Face's layout")
    try:
        config = read_config(settings, dtype)
        max_length = read_max_length(settings)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    places, shapes = _find_tensors(directory), array_shapes(config)
    names = {key: NAMES[config.architecture.family][key] for key in shapes}
    layers = {key: range(config.layers) if is_stacked(key) else [None] for key in shapes}
    expected = {stored_name(key, source, layer) for key, source in names.items() for layer in layers[key]}
    _require_names(places, expected, directory, (config.vocab_size, config.d_model))
    param_dtype = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32

    def read(key: str, layer: int | None, shape: tuple[int, ...]) -> jax.Array:
        parameter, source = _aligned(shape, param_dtype), names[key]
        each = parameter if is_stacked(key) and layer is None else parameter[None]
        fused = [array_shapes(config)[name][1:] for name in source.fused] or [each.shape[1:]]
        before = sum(source.stored_shape(s)[0] for s in fused[: source.fused.index(key)]) if source.fused else 0
        total = sum(source.stored_shape(s)[0] for s in fused)
        for i, part in enumerate(each):
            name = stored_name(key, source, i if layer is None else layer)
            _read_tensor(places[name], name, part, source, before, total)
        return jnp.asarray(parameter)

    return Pretrained(build(config, read, stacked=stacked), config, max_length)


def save_pretrained(pretrained: Pretrained, directory: str | os.PathLike[str]) -> None:
    """Writes the layout that `load_pretrained` reads, and transformers too; parameters keep their dtype.

    The weights become one file, written beside its name and moved there; config.json is last.

    Raises:
      ValueError: Hugging Face knows no such model; see `write_config`.
    """
    model, config, directory = pretrained.model, pretrained.config, Path(directory)
    settings = json.dumps(write_config(config, pretrained.max_length), indent=2)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{_SINGLE}.{os.getpid()}"
    save_file(_stored(model, config), partial, {"format": "pt"})
    partial.replace(directory / _SINGLE)
    # What an older model left would be read by others, or mixed with this one.
    for stale in (directory / _INDEX, *directory.glob(_SHARDS)):
        stale.unlink(missing_ok=True)
    write_atomically(directory / "config.json", settings + "\n")


def _require_names(places: Places, expected: set[str], directory: Path, embedding: tuple[int, int]) -> None:
    if missing := sorted(expected - places.keys()):
        raise ValueError(f"{directory} has no tensor {_listed(missing)}")
    unknown = {name for name in places.keys() - expected if not name.endswith(_DERIVED)}
    if _HEAD in unknown:
        head, tied = (np.empty(embedding, np.float32) for _ in range(2))
        for name, part in ((_HEAD, head), (_EMBEDDING, tied)):
            _read_tensor(places[name], name, part, Source(name, None), 0, embedding[0])
        if not np.array_equal(head, tied):
            raise ValueError(f"{places[_HEAD]}: {_HEAD} is not the embedding, but config.json ties them")
        unknown.remove(_HEAD)
    if unknown:
        listed = _listed(sorted(unknown))
        raise ValueError(f"{directory} has tensors that config.json does not ask for: {listed}")


def _stored(model: Decoder, config: ModelConfig) -> dict[str, np.ndarray]:
    """Every tensor of the file."""
    stored = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        key, parameter = ".".join(map(str, path)), np.asarray(variable[...])
        source = NAMES[config.architecture.family][key]
        for layer, part in enumerate(parameter) if is_stacked(key) else [(None, parameter)]:
            stored[stored_name(key, source, layer)] = source.store(part)
    return stored


def _find_tensors(directory: Path) -> Places:
    """The file of every tensor: model.safetensors as transformers prefers it or, where there is none, its shards."""
    if (directory / _SINGLE).is_file():
        return dict.fromkeys(_names(directory / _SINGLE), directory / _SINGLE)
    if (directory / _INDEX).is_file():
        named = set(
            read_json(directory / _INDEX, "index of shards", "write the model again").get("weight_map", {}).values()
        )
        files = [directory / name for name in sorted(named)]
    else:
        files = sorted(directory.glob(_SHARDS))
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{directory} has no {_listed(missing)}, which {_INDEX} names")
    places: dict[str, Path] = {}
    for file in files:
        for name in _names(file):
            if name in places:
                raise ValueError(f"{directory} holds two models: {name} is in {places[name].name} and in {file.name}")
            places[name] = file
    if files:
        return places
    if found := [name for name in _EXECUTABLE if (directory / name).is_file()]:
        raise ValueError(f"{directory / found[0]} may execute code when read; convert it to {_SINGLE}")
    raise ValueError(f"{directory} has neither {_SINGLE} nor shards of it ({_SHARDS})")


def _read_tensor(path: Path, name: str, part: np.ndarray, source: Source, before: int, total: int) -> None:
    """Fills a parameter from the rows of a tensor behind the first `before` of `total`, some at a time.

    Tensors are floating-point numbers that need no further key.
    """
    rows, *rest = source.stored_shape(part.shape)
    with safe_open(path, framework="numpy") as file:
        stored = file.get_slice(name)
        if (found := tuple(stored.get_shape())) != (total, *rest):
            raise ValueError(f"{path}: {name} has shape {found}, but config.json asks for {(total, *rest)}")
        if stored.get_dtype() not in _FLOATS:
            raise ValueError(f"{path}: {name} is of type {stored.get_dtype()}; supported are {', '.join(_FLOATS)}")
        # As in the file, but for the order of dimensions: no copy of the parameter.
        view = part if source.inputs is None else part.reshape(-1, rows).T if rest else part.reshape(-1)
        step = max(1, _AT_ONCE // max(1, math.prod(rest)))
        for start in range(0, rows, step):
            end = min(start + step, rows)
            numbers = stored[before + start : before + end]
            if not np.isfinite(numbers).all():
                raise ValueError(f"{path}: {name} holds numbers that are not finite; the file is damaged")
            view[start:end] = numbers


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that jax takes over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


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
