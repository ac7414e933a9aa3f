"""The safetensors files of a directory: which tensors they hold, and each of them by itself.

A safetensors file is a header of names, types and places, and numbers. Nothing in it is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from models.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_EXECUTABLE = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FLOATS = ("F64", "F32", "F16", "BF16")
_LISTED = 3

Places = Mapping[str, Path]


def find_tensors(directory: Path) -> Places:
    """The file of every tensor.

    Raises:
      ValueError: a file is missing or broken.
    """
    if (directory / SINGLE).is_file():
        return dict.fromkeys(_names(directory / SINGLE), directory / SINGLE)
    if (directory / INDEX).is_file():
        return _indexed(directory)
    if found := [name for name in _EXECUTABLE if (directory / name).is_file()]:
        raise ValueError(f"{directory / found[0]} may execute code when read; convert it to {SINGLE}")
    raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}")


def _indexed(directory: Path) -> Places:
    path = directory / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path} has no weight_map from tensors to files")
    held: dict[str, Path] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ValueError(f"{path} names {file!r}, which is not a file of the same directory")
        if not (directory / file).is_file():
            raise ValueError(f"{directory} has no {file}, which {INDEX} names")
        held |= dict.fromkeys(_names(directory / file), directory / file)
    if missing := sorted(name for name, file in weight_map.items() if held.get(name) != directory / file):
        raise ValueError(f"{directory / weight_map[missing[0]]} has no tensor {listed(missing)}, which {INDEX} names")
    return held


def read_tensor(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor, in the type that it has in the file.

    Raises:
      ValueError: it has another shape, or is not of floating-point numbers that need no further key.
    """
    with safe_open(path, framework="numpy") as file:
        part = file.get_slice(name)
        if (found := tuple(part.get_shape())) != shape:
            raise ValueError(f"{path}: {name} has shape {found}, but config.json asks for {shape}")
        if part.get_dtype() not in _FLOATS:
            raise ValueError(f"{path}: {name} is of type {part.get_dtype()}; supported are {', '.join(_FLOATS)}")
        return file.get_tensor(name)


def listed(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
