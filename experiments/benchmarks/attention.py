"""Attention: dense, over selected tokens and over selected blocks, with k = T/16.

The peer is jax.nn.dot_product_attention, by cuDNN on a GPU and by XLA on a CPU, and on a TPU splash attention, beside
which our kernels for selected blocks stand there (`kernel`). `streamed dense` is this project's dense attention in
linear memory. For the sparse paths `forward` is the output alone, and `training`
its gradient with the indexer's loss; `index+select` ends with the selected sets, and `attend` is the rest of
`forward`.

`memory` reads the temporary memory of training from compiled programs, in an accelerator's heads and with k = 2048 by
the paper's rule: gradients with respect to queries, keys, values and all that the indexer scores with.

Inputs are structured like those of trained models, whose neighbouring queries select much the same keys:
queries and keys drift, x[t] = ρ·x[t-1] + sqrt(1 - ρ²)·noise. `overlap` is the mean Jaccard index of the sets of
neighbouring queries; 0.87 to 0.94 were measured on a trained model of another kind. White noise, like random
weights, makes neighbours share almost nothing, and says nothing about a trained model.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks.timing import Program, compile_program, measure
from models.attention import fused, kernels, streamed, tiles
from models.attention.indexer import index_scores
from models.attention.keys import Attended, IndexInputs, Reads, Selection, in_documents
from models.attention.selection import select_blocks, select_tokens

_BLOCK = 64
_CHUNK = 64
_LANES = 128  # tokens of the blocks that kernels for TPUs take
_BLOCKS = {"token": 0, "block": _BLOCK}  # of the sparse paths; see `Selection`
_QUERY_DRIFT, _KEY_DRIFT = 0.999, 0.9


class Shape(NamedTuple):
    """Heads of a layer: H query heads, G key/value heads of E; J indexer heads of I."""

    heads: int
    kv_heads: int
    width: int
    indexer_heads: int
    indexer_width: int
    dtype: str


_CPU = Shape(8, 4, 64, 2, 32, "float32")
ACCELERATOR = Shape(16, 8, 128, 4, 64, "bfloat16")


def run(lengths: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of `measure` with the columns length, pass, path and ratio (time of the peer over time of the path).

    Args:
      lengths: T, 128 or more; none for 2K to 32K on a CPU, 4K to 128K elsewhere.

    Returns:
      The rows, and what was measured: the shape and the overlap of neighbouring selections.
    """
    on_cpu = jax.default_backend() == "cpu"
    shape = _CPU if on_cpu else ACCELERATOR
    lengths = lengths or [2**i for i in (range(11, 16) if on_cpu else range(12, 18))]
    rows = [row for T in lengths for row in _with_ratios(_add_attend(measure(_programs(shape, T))))]
    facts = {"batch": 1, "k": "T/16", "block": _BLOCK, "chunk": _CHUNK, "overlap": _overlap(shape, min(lengths))}
    return rows, shape._asdict() | facts


def memory(lengths: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows with the columns length, path, temp_bytes and per_token (bytes), which is constant where memory is linear in
    the length; without lengths for 4K to 128K. Nothing is run."""
    rows = []
    for path, block in _BLOCKS.items():
        paper = Selection(ACCELERATOR.indexer_width**-0.5, 0.25, "paper", 2048, k_min=256, k_max=4096, block=block)
        attend = training(functools.partial(attend_sparsely, selection=paper))
        for T in lengths or [2**i for i in range(12, 18)]:
            inputs = jax.eval_shape(functools.partial(_inputs, ACCELERATOR, T))
            size = compile_program(Program({}, attend, inputs))[1]["temp_bytes"]
            rows.append({"length": T, "path": path, "temp_bytes": size, "per_token": size / T})
    return rows, ACCELERATOR._asdict() | {"batch": 1, "tile": _CHUNK}


def attend_sparsely(
    q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, index: IndexInputs, selection: Selection
) -> Attended:
    """Attention to selected keys of rows that are one document each, after a step with a variance of 1."""
    reads = _reads(q_BTHE.shape[1])._replace(index=index, running_variance=jnp.ones(()))
    return streamed.attend(q_BTHE, k_BSGE, v_BSGE, reads, selection, chunk=_CHUNK)


def _by_kernel(
    q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, index: IndexInputs, selection: Selection
) -> Attended:
    return kernels.attend(q_BTHE, k_BSGE, v_BSGE, _reads(q_BTHE.shape[1])._replace(index=index), selection)


def training(attend: Callable[..., Attended]) -> Callable[..., Any]:
    """Gradients of the output's sum of squares and, where there is one, of the indexer's loss."""

    def loss(arguments):
        out = attend(*arguments)
        indexer = 0.0 if out.indexer_loss is None else jnp.sum(out.indexer_loss)
        return jnp.sum(out.output.astype(jnp.float32) ** 2) + indexer

    return lambda *arguments: jax.value_and_grad(loss)(arguments)


def _programs(shape: Shape, T: int) -> list[Program]:
    *inputs, index = _inputs(shape, T)
    peer, programs = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla"), []

    def add(path: str, attend: Callable[..., Attended], *arguments: jax.Array | IndexInputs) -> None:
        for kind, function in {"forward": lambda *a: attend(*a).output, "training": training(attend)}.items():
            programs.append(Program({"length": T, "pass": kind, "path": path}, function, arguments))

    if peer == "splash":
        add("dense (splash)", lambda *qkv: fused.attend_splash(*qkv, _reads(T)), *inputs)
        add("kernel", functools.partial(_by_kernel, selection=_selection(shape, T, _LANES)), *inputs, index)
    else:
        dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=peer)
        add(f"dense ({peer})", lambda *qkv: Attended(dense(*qkv)), *inputs)
    add("streamed dense", lambda *qkv: streamed.attend(*qkv, _reads(T), chunk=_CHUNK), *inputs)
    for path, block in _BLOCKS.items():
        selection = _selection(shape, T, block)
        add(path, functools.partial(attend_sparsely, selection=selection), *inputs, index)
        select = functools.partial(_selected, selection=selection)
        programs.append(Program({"length": T, "pass": "index+select", "path": path}, select, (index,)))
    return programs


def _reads(T: int) -> Reads:
    return in_documents(jnp.zeros((1, T), jnp.int32))


def _selected(index: IndexInputs, selection: Selection) -> Any:
    """What comes before attention to selected keys: the lists of blocks, or the thresholds of `streamed`'s tiles."""
    T, tiling = index.key.shape[1], tiles.Tiling(_CHUNK)
    if selection.block:
        return select_blocks(_reads(T)._replace(index=index), selection)[0]
    query, gate, position, first = (tiles.pad(a, _CHUNK) for a in (index.query, index.gate, *_reads(T)[:2]))

    def step(_, start):
        tile = Reads(tiling.cut(position, start), tiling.cut(first, start))

        def select(extent):
            rows = IndexInputs(tiling.cut(query, start), index.key[:, :extent], tiling.cut(gate, start), index.bias)
            return select_tokens(index_scores(rows, selection.scale), tile, selection)[1]

        return None, tiles.at_extent(select, tile, T)

    return tiles.over_tiles(step, None, query.shape[1], tiling)[1]


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
        peer = peers.get(row["pass"], {"runs": 0})
        for ratio, time in {"ratio": "seconds", "cpu_ratio": "cpu_seconds"}.items():
            row[ratio] = peer[time] / row[time] if peer["runs"] and row["runs"] else None
    return rows


def _selection(shape: Shape, T: int, block: int) -> Selection:
    scale, k = shape.indexer_width**-0.5, T // 16
    return Selection(scale, temperature=0.25, k_rule="fixed", k_base=k, k_min=1, k_max=k, block=block)


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
    selection = _selection(shape, T, 0)
    chosen_BTS, *_ = select_tokens(index_scores(index, selection.scale), _reads(T), selection)
    late_TS = chosen_BTS[0, T // 8 :]
    both = jnp.sum(late_TS[1:] & late_TS[:-1], axis=-1)
    return float(jnp.mean(both / jnp.sum(late_TS[1:] | late_TS[:-1], axis=-1)))
