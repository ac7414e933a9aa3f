"""Directories in the layout of Hugging Face, read into a `Decoder` and written from one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import ModelConfig
from models.decoder import Decoder
from models.files import read_json
from models.pretrained import tensors
from models.pretrained.names import NAMES, Names, Source, is_stacked, stored_names
from models.pretrained.settings import read_config, read_max_length, writable, write_config

_PARAM_DTYPES = ("float32", "bfloat16")
# Tables of rotary positions, which old files hold beside the weights.
_DERIVED = "rotary_emb.inv_freq"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Pretrained:
    """A model with what its directory says of its use.

    Fields:
      model, config: the decoder, as `Decoder(config)` makes it, and its config.
      max_length: tokens that it was made to read at once.
      eos_ids, bos_id: tokens that end a text, and the one that begins it, None if there is none.
    """

    model: Decoder
    config: ModelConfig
    max_length: int
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None


def load_pretrained(
    directory: str | os.PathLike[str], dtype: str = "float32", param_dtype: str = "float32"
) -> Pretrained:
    """A Llama, Mistral, Qwen2, Qwen3, Gemma 2 or Gemma 3 checkpoint, with dense attention.

    Tensors are read one by one: at most the model and one parameter of all layers are in memory.

    Args:
      directory: holds config.json, model.safetensors (or its shards and their index) and, if there is one,
        generation_config.json. Weights are floating-point numbers of 16, 32 or 64 bits.
      dtype: of activations, as `ModelConfig.dtype`.
      param_dtype: of parameters, "float32" or "bfloat16": half the memory, for decoding.

    Raises:
      ValueError: of one line. A file is missing or broken; the architecture or a setting is not supported; a
        tensor is missing, unknown, or of another shape or type than config.json asks for.
    """
    directory = Path(directory)
    if param_dtype not in _PARAM_DTYPES:
        raise ValueError(f"param_dtype={param_dtype!r} must be one of {', '.join(_PARAM_DTYPES)}")
    settings = read_json(directory / "config.json")
    try:
        config = read_config(settings, dtype)
        max_length = read_max_length(settings)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    model = _read_model(config, tensors.find_tensors(directory), directory, jnp.dtype(param_dtype))
    return Pretrained(model, config, max_length, *_special_ids(directory, settings))


def save_pretrained(
    pretrained: Pretrained, directory: str | os.PathLike[str], *, shard_bytes: int = 5_000_000_000
) -> None:
    """Writes the layout that `load_pretrained` reads, and transformers too; parameters keep their dtype.

    Every file is written beside its name and moved there, config.json last. Shards hold about `shard_bytes`;
    so much is copied at once.

    Raises:
      ValueError: no other software knows the architecture, or the model is unstacked.
    """
    model, config, directory = pretrained.model, pretrained.config, Path(directory)
    if reason := writable(config):
        raise ValueError(f"{reason}, so it has no Hugging Face layout; keep it in a checkpoint of this project")
    if isinstance(model.layers, nnx.List):
        raise ValueError("an unstacked decoder only decodes; save the decoder that it was made of")
    directory.mkdir(parents=True, exist_ok=True)
    shards = _plan(model, config, shard_bytes)
    tensors.write_shards(directory, ({part.name: part.make() for part in shard} for shard in shards), len(shards))
    ids = {"eos_token_id": list(pretrained.eos_ids) or None, "bos_token_id": pretrained.bos_id}
    tensors.write_json(directory / "generation_config.json", ids)
    tensors.write_json(directory / "config.json", write_config(config, pretrained.max_length) | ids)


def _read_model(config: ModelConfig, places: tensors.Places, directory: Path, dtype: np.dtype) -> Decoder:
    names = NAMES[config.architecture.family]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    variables = nnx.to_flat_state(state)
    expected = {n for path, _ in variables for n in stored_names(_key(path), names[_key(path)], config.layers)}
    _require_names(places, expected, directory, (config.vocab_size, config.d_model))
    read = ((path, v.replace(_read_parameter(_key(path), names, v.shape, places, dtype))) for path, v in variables)
    return nnx.merge(graphdef, nnx.from_flat_state(list(read)))


def _read_parameter(
    key: str, names: Names, shape: tuple[int, ...], places: tensors.Places, dtype: np.dtype
) -> jax.Array:
    source, parameter = names[key], np.empty(shape, dtype)
    parts = parameter if is_stacked(key) else parameter[None]
    for part, name in zip(parts, stored_names(key, source, len(parts)), strict=True):
        stored = tensors.read_tensor(places[name], name, source.stored_shape(part.shape))
        part[...] = source.load(stored, part.shape)
    return jnp.asarray(parameter)


def _require_names(places: tensors.Places, expected: set[str], directory: Path, embedding: tuple[int, int]) -> None:
    if missing := sorted(expected - places.keys()):
        raise ValueError(f"{directory} has no tensor {tensors.listed(missing)}")
    unknown = {name for name in places.keys() - expected if not name.endswith(_DERIVED)}
    if _HEAD in unknown:
        head, tied = (tensors.read_tensor(places[name], name, embedding) for name in (_HEAD, _EMBEDDING))
        if not np.array_equal(head, tied):
            raise ValueError(f"{places[_HEAD]}: {_HEAD} is not the embedding, but config.json ties them")
        unknown.remove(_HEAD)
    if unknown:
        listed = tensors.listed(sorted(unknown))
        raise ValueError(f"{directory} has tensors that config.json does not ask for: {listed}")


def _special_ids(directory: Path, settings: dict[str, Any]) -> tuple[tuple[int, ...], int | None]:
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    said = settings | {key: value for key, value in generation.items() if value is not None}
    eos = said.get("eos_token_id")
    return tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]), said.get("bos_token_id")


def _key(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


class _Part(NamedTuple):
    """A tensor to write: its name and the parameter, or the layer of it, that it is made of."""

    name: str
    source: Source
    parameter: jax.Array
    layer: int | None

    @property
    def nbytes(self) -> int:
        return self.parameter.nbytes // (1 if self.layer is None else len(self.parameter))

    def make(self) -> np.ndarray:
        return self.source.store(np.asarray(self.parameter if self.layer is None else self.parameter[self.layer]))


def _plan(model: Decoder, config: ModelConfig, shard_bytes: int) -> list[list[_Part]]:
    """What goes into every shard."""
    shards: list[list[_Part]] = [[]]
    for part in _parts(model, config):
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + part.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(part)
    return shards


def _parts(model: Decoder, config: ModelConfig) -> Iterator[_Part]:
    names = NAMES[config.architecture.family]
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        source = names[_key(path)]
        for i, name in enumerate(stored_names(_key(path), source, config.layers)):
            yield _Part(name, source, variable[...], i if is_stacked(_key(path)) else None)
