"""The laws, a file each, listed here; and how a law is found by its name."""

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Mapping

from atlas.scaling.single.library import (
    annealing,
    chinchilla,
    data_constrained,
    farseer,
    mixture_of_experts,
    multilingual_share,
    optimum,
    overfitting,
    parallel,
    vocabulary,
)
from atlas.scaling.single.specification import Law
from checked import UserError, unknown

_FILES = (
    *(chinchilla, data_constrained, overfitting, multilingual_share, farseer, annealing),
    *(parallel, vocabulary, mixture_of_experts, optimum),
)
LAWS: Mapping[str, Law] = {law.name: law for file in _FILES for law in file.LAWS}


@functools.cache
def law_named(name: str) -> Law:
    """A law of the library, or one that a file of the user's defines: "my_laws.py:moe".

    Raises:
      UserError: there is none of this name, or the file cannot be run.
    """
    path, colon, own = name.rpartition(":")
    if not colon:
        if name not in LAWS:
            raise unknown("law", name, LAWS)
        return LAWS[name]
    if not pathlib.Path(path).is_file():
        raise UserError(f"no file {path!r} for the law {own!r}; give --law=FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"{path!r} cannot be run: {type(error).__name__}: {error}") from error
    laws = {key: value for key, value in vars(module).items() if isinstance(value, Law)}
    if own not in laws:
        raise unknown(f"law in {path!r}:", own, laws)
    return dataclasses.replace(laws[own], name=name)
