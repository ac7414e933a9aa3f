"""Attention: dense, over selected tokens and over selected blocks, with k = T/16.

The peer is jax.nn.dot_product_attention, by cuDNN on a GPU and by XLA elsewhere. `streamed dense` is this
project's dense attention in linear memory. For the sparse paths `forward` is the output alone, and `training`
its gradient with the indexer's loss; `index` is the scores, `index+select` ends with the selected sets, and
`attend` is the rest of `forward`.

Inputs are structured like those of trained models, whose neighbouring queries select much the same keys:
queries and keys drift, x[t] = ρ·x[t-1] + sqrt(1 - ρ²)·noise. `overlap` is the mean Jaccard index of the sets of
neighbouring queries; 0.87 to 0.94 were measured on a trained model of another kind. White noise, like random
weights, makes neighbours share almost nothing, and says nothing about a trained model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from atlas.errors import UserError
from experiments.benchmarks.timing import Program, measure
from models.attention import block_tiles, blocks, reference, streamed, tiles
from models.attention.reference import IndexInputs, Selection

_BLOCK = 64
_CHUNK = 64
_SHORTEST = 128
_QUERY_DRIFT, _KEY_DRIFT = 0.999, 0.9


@dataclass(frozen=True)
class Shape:
    """Heads of a layer: H query heads, G key/value heads of E; J indexer heads of I."""

    heads: int
    kv_heads: int
    width: int
    indexer_heads: int
    indexer_width: int
    dtype: str


_CPU = Shape(8, 4, 64, 2, 32, "float32")
_ACCELERATOR = Shape(16, 8, 128, 4, 64, "bfloat16")


def run(lengths: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of `measure` with the columns length, pass, path and ratio (time of the peer over time of the path).

    Args:
      lengths: T; none for 2K to 32K on a CPU, 4K to 128K elsewhere.

    Returns:
      The rows, and what was measured: the shape and the overlap of neighbouring selections.

    Raises:
      UserError: a length is below 128.
    """
    on_cpu = jax.default_backend() == "cpu"
    for T in lengths:
        if T < _SHORTEST:
            raise UserError(f"--lengths: {T} is too short; give at least {_SHORTEST}")
    shape = _CPU if on_cpu else _ACCELERATOR
    lengths = lengths or [2**i for i in (range(11, 16) if on_cpu else range(12, 18))]
    rows = [row for T in lengths for row in _with_ratios(_add_attend(measure(_programs(shape, T))))]
    facts = {"batch": 1, "k": "T/16", "block": _BLOCK, "chunk": _CHUNK, "overlap": _overlap(shape, min(lengths))}
    return rows, vars(shape) | facts


def _programs(shape: Shape, T: int) -> list[Program]:
    q, k, v, index = _inputs(shape, T)
    segments, running, selection = jnp.zeros((1, T), jnp.int32), jnp.zeros(()), _selection(shape, T)
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)
    rest = {"segments_BT": segments, "running_variance": running, "selection": selection}
    sparse = {
        "token": functools.partial(streamed.sparse_attention, chunk=_CHUNK, **rest),
        "block": functools.partial(blocks.block_attention, block=_BLOCK, **rest),
    }
    peer = f"dense ({implementation})"

    def streamed_dense(q, k, v):
        return streamed.attend(q, k, v, segments, chunk=_CHUNK)[0]

    forwards = {peer: dense, "streamed dense": streamed_dense}
    programs = []
    for path, attend in forwards.items():
        programs.append(_program(T, "forward", path, attend, q, k, v))
        programs.append(_program(T, "training", path, _training(attend), q, k, v))
    for path, attend in sparse.items():
        programs.append(_program(T, "forward", path, lambda *a, attend=attend: attend(*a)[0], q, k, v, index))
        programs.append(_program(T, "training", path, _training(attend), q, k, v, index))
    parts = _token_parts(selection, T) | _block_parts(selection, T)
    return programs + [_program(T, kind, path, part, index) for (kind, path), part in parts.items()]


def _program(T: int, kind: str, path: str, function: Any, *arguments: Any) -> Program:
    return Program({"length": T, "pass": kind, "path": path}, function, arguments)


def _training(attend: Any) -> Any:
    """Gradients of the output's sum and, where there is one, of the indexer's loss."""

    def loss(arguments):
        out = attend(*arguments)
        o, statistics = out if isinstance(out, tuple) else (out, None)
        total = jnp.sum(o.astype(jnp.float32) ** 2)
        return total if statistics is None else total + jnp.sum(statistics.indexer_loss)

    return lambda *arguments: jax.value_and_grad(loss)(arguments)


def _token_parts(selection: Selection, T: int) -> dict[tuple[str, str], Any]:
    def tile_by_tile(index, part):
        query, key, gate, bias = index
        first_BT = jnp.zeros((1, T), jnp.int32)
        query, gate, first_BT = tiles.pad((query, gate, first_BT), _CHUNK)
        (key,) = tiles.pad((key,), tiles.key_block(T, _CHUNK))
        index = IndexInputs(query, key, gate, bias)

        def step(carry, start):
            return carry, part(index, start, tiles.make_tile(first_BT, start, _CHUNK))

        return tiles.over_tiles(step, None, query.shape[1], _CHUNK)[1]

    def score(index, start, tile):
        query, gate = (tiles.rows(a, start, _CHUNK) for a in (index.query, index.gate))

        def largest(extent):
            part = IndexInputs(query, index.key[:, :extent], gate, index.bias)
            return jnp.max(reference.index_scores(part, selection.scale), axis=-1)

        return tiles.at_extent(largest, tile, index.key.shape[1])

    def select(index, start, tile):
        return streamed.score_and_select(index, start, tile, jnp.zeros(()), selection).threshold

    return {
        ("index", "token"): functools.partial(tile_by_tile, part=score),
        ("index+select", "token"): functools.partial(tile_by_tile, part=select),
    }


def _block_parts(selection: Selection, T: int) -> dict[tuple[str, str], Any]:
    def score(index):
        firsts = index.query[0, ::_BLOCK], index.gate[0, ::_BLOCK]

        def largest(first):
            query, gate = first
            return jnp.max(
                block_tiles.row_scores(IndexInputs(query[None], index.key[0], gate[None], index.bias), selection)
            )

        at_once = block_tiles.tiles_at_once(T * index.bias.shape[0])
        return jax.lax.map(largest, firsts, batch_size=at_once)

    def select(index):
        return blocks.select_blocks(index, jnp.zeros((1, T), jnp.int32), jnp.zeros(()), selection, block=_BLOCK)[0]

    return {("index", "block"): score, ("index+select", "block"): select}


def _add_attend(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the rows of `attend`, which is what `forward` does after `index+select`."""
    found = {(row["pass"], row["path"]): row for row in rows}
    for path in ("token", "block"):
        whole, part = found["forward", path], found["index+select", path]
        if whole["runs"] and part["runs"]:
            times = {name: max(whole[name] - part[name], 0.0) for name in ("seconds", "cpu_seconds")}
            rows.append(whole | times | {"pass": "attend", "compile_seconds": None, "temp_bytes": None})
    return rows


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    peers = {row["pass"]: row for row in rows if row["path"].startswith("dense")}
    for row in rows:
        peer = peers.get(row["pass"])
        known = peer is not None and peer["runs"] and row["runs"]
        row["ratio"] = peer["seconds"] / row["seconds"] if known else None
        row["cpu_ratio"] = peer["cpu_seconds"] / row["cpu_seconds"] if known else None
    return rows


def _selection(shape: Shape, T: int) -> Selection:
    k = T // 16
    return Selection(shape.indexer_width**-0.5, temperature=0.25, k_rule="fixed", k_base=k, k_min=1, k_max=k)


def _inputs(shape: Shape, T: int) -> tuple[jax.Array, jax.Array, jax.Array, IndexInputs]:
    """Drifting queries and keys of one sequence; see the module."""
    keys = jax.random.split(jax.random.key(0), 6)
    E, I = shape.width, shape.indexer_width
    q_BTHE = _drift(keys[0], (T, shape.heads, E), _QUERY_DRIFT)
    k_BSGE, v_BSGE = (_drift(key, (T, shape.kv_heads, E), _KEY_DRIFT) for key in keys[1:3])
    index = IndexInputs(
        2 * _drift(keys[3], (T, shape.indexer_heads, I), _QUERY_DRIFT),
        _drift(keys[4], (T, I), _KEY_DRIFT),
        jax.nn.sigmoid(_drift(keys[5], (T, shape.indexer_heads), _QUERY_DRIFT)),
        jnp.zeros(shape.indexer_heads),
    )
    return *(a.astype(shape.dtype) for a in (q_BTHE, k_BSGE, v_BSGE)), index


@functools.partial(jax.jit, static_argnames=("shape", "drift"))
def _drift(key: jax.Array, shape: tuple[int, ...], drift: float) -> jax.Array:
    """Unit normal at every step, correlated by `drift` with the step before; a batch of one."""
    first, noise = jax.random.split(key)
    start = jax.random.normal(first, shape[1:])

    def step(x, e):
        x = drift * x + (1 - drift**2) ** 0.5 * e
        return x, x

    return jax.lax.scan(step, start, jax.random.normal(noise, shape))[1][None]


def _overlap(shape: Shape, T: int) -> float:
    """Mean Jaccard index of the token sets of neighbouring queries, over those that select k of more keys."""
    T = min(T, 4096)
    index = _inputs(shape, T)[3]
    chosen_BTS = reference.select_keys(index, jnp.zeros((1, T), jnp.int32), jnp.zeros(()), _selection(shape, T))[0]
    late_TS = chosen_BTS[0, T // 8 :]
    both = jnp.sum(late_TS[1:] & late_TS[:-1], axis=-1)
    return float(jnp.mean(both / jnp.sum(late_TS[1:] | late_TS[:-1], axis=-1)))
