"""Attention to selected blocks on TPUs that are not here: that it compiles, and what bounds each of its kernels.

FLOPs are those of the matrix products, bytes what a kernel's grid brings to a chip and takes from it; a bound is the
longer of FLOPs over the chip's peak and bytes over its bandwidth. Nothing is run. What no bound holds: the exponentials
and sigmoids, and what a step of a grid costs by itself. The peer is splash attention, counted by the causal half of all
pairs, with the five products that any backward pass needs.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from atlas.training.chips import Chip, topology
from experiments.benchmarks.attention import ACCELERATOR, Shape, training
from models.attention import fused, kernels
from models.attention.keys import Attended, IndexInputs, Selection, in_documents

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_LENGTHS = (4096, 32768, 131072)
_BLOCK, _KEYS = 128, 2048
_SPLASH = 512  # queries and keys of its blocks, as `fused` sets them
_FIRSTS = 128  # first queries that are scored at a time
FORWARD = ("scores", "attention", "dense")  # the parts of inference
_HALF, _FULL = 2, 4  # bytes of bfloat16 and float32


class Part(NamedTuple):
    """FLOPs and bytes of one kernel, or of what XLA does between two."""

    name: str
    flops: float
    bytes: float


def run(lengths: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows by chip, length and part: gflop, megabytes, compute_ms, memory_ms and bound_ms; for `forward` and `training`
    their sums, `ratio`, the peer's bound over theirs, and of training's program compile_seconds and temp_bytes."""
    rows = []
    for name, slice_ in TOPOLOGIES.items():
        chip, devices = topology(slice_)
        for T in lengths or _LENGTHS:
            labels = {"chip": name, "length": T}
            rows += [labels | row for row in _rows(chip, ACCELERATOR, T)]
            for row in rows[-4:]:
                if row["part"].endswith("training"):
                    row |= _compiled(row["part"], ACCELERATOR, T, devices[0])
    return rows, ACCELERATOR._asdict() | {"batch": 1, "block": _BLOCK, "k": _KEYS}


def _rows(chip: Chip, shape: Shape, T: int) -> list[dict[str, Any]]:
    pairs = sum(min(tile + 1, _KEYS // _BLOCK) for tile in range(T // _BLOCK))
    ours, peer = parts(shape, T, pairs), dense(shape, T)
    rows = [_row(chip, part.name, [part]) for part in ours]
    for name, names in {"forward": FORWARD, "training": [part.name for part in ours + peer]}.items():
        splash = _row(chip, f"splash {name}", [part for part in peer if part.name in names])
        blocks = _row(chip, name, [part for part in ours if part.name in names])
        rows += [splash, blocks | {"ratio": splash["bound_ms"] / blocks["bound_ms"]}]
    return rows


def _row(chip: Chip, name: str, parts: list[Part]) -> dict[str, Any]:
    compute, memory = ([1e3 * part[i] / rate for part in parts] for i, rate in ((1, chip.flops), (2, chip.bandwidth)))
    return {
        "part": name,
        "gflop": sum(part.flops for part in parts) / 1e9,
        "megabytes": sum(part.bytes for part in parts) / 1e6,
        "compute_ms": sum(compute),
        "memory_ms": sum(memory),
        "bound_ms": sum(map(max, compute, memory)),
    }


def parts(shape: Shape, T: int, pairs: int) -> list[Part]:
    """Of `kernels.attend` with its gradients, for a row of T tokens whose tiles list so many blocks in all."""
    H, G, E, J, I, _ = shape
    W, P = _BLOCK, T // _BLOCK
    firsts = -(-P // _FIRSTS) * _FIRSTS
    area, M, X = pairs * W * W, 2 * H * E, 2 * J * I  # FLOPs of a product at each pair of query and key
    heads, index, row = W * H * E * _HALF, W * (J * I + J + 1) * _FULL, W * (H + 1) * _FULL
    k, key = W * G * E * _HALF, W * I * _FULL
    return [
        Part("scores", firsts * T * X, firsts / _FIRSTS * T * I * _FULL + P * P * _FULL),
        Part("attention", area * (2 * M + X), P * (2 * heads + index + row) + pairs * (2 * k + key)),
        Part("divergence", area * (M + X), P * (heads + index + row) + pairs * (k + key)),
        Part("delta", 0.0, P * (2 * heads + row)),
        Part("query gradients", area * (3 * M + 2 * X), P * 2 * (1.5 * heads + index + row) + pairs * (2 * k + key)),
        Part("key gradients", area * (4 * M + 2 * X), pairs * (2 * heads + index + 2 * row) + P * 2 * (2 * k + key)),
    ]


def dense(shape: Shape, T: int) -> list[Part]:
    """Of splash attention: the half of all pairs, and keys and values once for every block of queries of a head."""
    heads, E = shape.heads, shape.width
    product, read = float(T * T * heads * E), heads * T / _SPLASH * T / 2 * 2 * E * _HALF
    return [Part("dense", 2 * product, read), Part("dense gradients", 5 * product, 2 * read)]


def _compiled(part: str, shape: Shape, T: int, device: jax.Device) -> dict[str, Any]:
    """Seconds and temporary bytes of a training program for a device."""
    attend = _splash if part.startswith("splash") else blocks
    start = time.perf_counter()
    compiled = trace(attend, shape, T, SingleDeviceSharding(device)).lower().compile()
    seconds = time.perf_counter() - start
    return {"compile_seconds": seconds, "temp_bytes": compiled.memory_analysis().temp_size_in_bytes}


def trace(attend: Callable[..., Attended], shape: Shape, T: int, sharding: jax.sharding.Sharding) -> jax.stages.Traced:
    """Gradients with respect to q, k, v and the index, of a row of T tokens."""

    def spec(*size: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    H, G, E, J, I, dtype = shape
    index = IndexInputs(spec(1, T, J, I), spec(1, T, I), spec(1, T, J), spec(J))
    return jax.jit(training(attend)).trace(*(spec(1, T, n, E, dtype=dtype) for n in (H, G, G)), index)


def _splash(q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, index: IndexInputs) -> Attended:
    return fused.attend_splash(q_BTHE, k_BSGE, v_BSGE, in_documents(jnp.zeros(q_BTHE.shape[:2], jnp.int32)))


def blocks(q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, index: IndexInputs) -> Attended:
    reads = in_documents(jnp.zeros(q_BTHE.shape[:2], jnp.int32))._replace(index=index)
    selection = Selection(index.key.shape[2] ** -0.5, 0.25, "fixed", _KEYS, k_min=1, k_max=_KEYS, block=_BLOCK)
    return kernels.attend(q_BTHE, k_BSGE, v_BSGE, reads, selection)
