"""Temporary memory of a layer's attention in training, read from compiled programs: nothing is run.

Gradients of the output and of the indexer's loss with respect to queries, keys, values and all that the indexer
scores with, in the heads of an accelerator's model: 16 heads of 128, 8 key/value heads, bfloat16, k = 2048 by the
paper's rule. `per_token` is constant where memory is linear in the length.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.attention import attend_sparsely, training
from models.attention.keys import IndexInputs, Selection

_H, _G, _E, _J, _I = 16, 8, 128, 4, 64
_SELECTION = functools.partial(
    Selection, scale=_I**-0.5, temperature=0.25, k_rule="paper", k_base=2048, k_min=256, k_max=4096
)
_PATHS = {"token": _SELECTION(), "block": _SELECTION(block=64)}


def run(lengths: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows with the columns length, path, temp_bytes and per_token (bytes); without lengths for 4K to 128K."""
    lengths = lengths or [2**i for i in range(12, 18)]
    facts = {"heads": _H, "kv_heads": _G, "width": _E, "indexer_heads": _J, "indexer_width": _I, "batch": 1}
    return [_row(path, T) for path in _PATHS for T in lengths], facts | {"dtype": "bfloat16", "tile": 64}


def _row(path: str, T: int) -> dict[str, Any]:
    half, full = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    keys = half((1, T, _G, _E))
    index = IndexInputs(full((1, T, _J, _I)), full((1, T, _I)), full((1, T, _J)), full((_J,)))
    attend = functools.partial(attend_sparsely, selection=_PATHS[path])
    compiled = jax.jit(training(attend)).lower(half((1, T, _H, _E)), keys, keys, index).compile()
    size = compiled.memory_analysis().temp_size_in_bytes
    return {"length": T, "path": path, "temp_bytes": size, "per_token": size / T}
