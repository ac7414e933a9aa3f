"""Ahead of time: what a run would need of chips that are not here, and what would bound its speed on them."""

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atlas.training.chips import GIB, Chip, topology
from atlas.training.config import FLOPS_PER_PARAMETER_TOKEN, RunConfig, shape_of
from atlas.training.executable import Text, flops
from atlas.training.mesh import make_mesh
from atlas.training.program import Program, program_of
from atlas.training.step import Skeleton
from checked import UserError, overlay
from models import count_params
from models.sharding import BATCH_AXES

PROGRAMS = ("step", "evaluate", "decode")
SPARE = 0.1  # share of a chip's memory that a run should leave: fragments, and what the runtime itself takes
_LOSS_CHUNK, _QUERY_CHUNK = 4096, 256  # tokens a device, queries: small against the rest, and large enough for a chip
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
_EXHAUSTED = re.compile(r"Used ([\d.]+)([KMGT]) of")


def report(
    config: RunConfig, topology_name: str, population: int = 1, programs: Sequence[str] = PROGRAMS, suggest: bool = True
) -> dict[str, Any]:
    """Compiles a run for chips that are not attached.

    Args:
      config: of the run; the vocabulary is that of its model, since no tokenizer is read.
      topology_name: see `chips.topology`.
      programs: which of PROGRAMS to compile: the training step; the evaluation of a chunk; one more token of one row a
        device through the cache.
      suggest: where the step does not fit, tries what needs less memory.

    Returns:
      Plain values in bytes, seconds and FLOPs, a chip where nothing else is said; "fits" is the step's, with SPARE.

    Raises:
      UserError: a topology, a mesh or a batch that cannot be.
    """
    chip, devices = topology(topology_name)
    mesh = make_mesh(config.mesh, devices)
    program, counts = _program(config, population, mesh), count_params(config.model)
    tokens = population * config.train.batch_size * config.data.window
    compiled = {name: _compile(name, config, program, population, mesh) for name in PROGRAMS if name in programs}
    step = compiled["step"]
    fits = step["peak"] <= (1 - SPARE) * chip.memory
    found = {
        "topology": topology_name,
        "chips": len(devices),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "attention": config.model.attention,
        "parameters": counts,
        "tokens_per_step": tokens,
        "memory": chip.memory,
        "held": {name: _held(getattr(program.like, name)) for name in ("params", "optimizer")},
        "programs": compiled,
        "fits": fits,
    }
    if "flops" in step:
        found["roofline"] = _roofline(
            step, chip, len(devices), FLOPS_PER_PARAMETER_TOKEN * counts["non_embedding"] * tokens, tokens
        )
    if not fits and suggest:
        found["change"] = _change(config, topology_name, population, step["peak"] / chip.memory)
    return found


def _program(config: RunConfig, population: int, mesh: Mesh) -> Program:
    ids = (0, 1, config.model.vocab_size)  # which ids open documents and pad them changes nothing of a program
    return program_of(shape_of(config), ids, max(len(config.data.languages), 1), population, mesh)


def _compile(name: str, config: RunConfig, program: Program, population: int, mesh: Mesh) -> dict[str, Any]:
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = {"step": _step, "evaluate": _evaluate, "decode": _decode}[name](config, program, population, mesh)
        row: dict[str, Any] = {"flops": flops(traced.jaxpr)}
        try:
            executable = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if not (used := _EXHAUSTED.search(str(error))):
                raise
            return row | {"peak": float(used[1]) * _UNITS[used[2]], "compile_seconds": time.perf_counter() - start}
    row["compile_seconds"] = time.perf_counter() - start
    memory, text = executable.memory_analysis(), Text(executable.as_text())
    row["arguments"], row["temporaries"] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    row["peak"] = row["arguments"] + row["temporaries"] + memory.output_size_in_bytes - memory.alias_size_in_bytes
    row |= {"largest": text.largest(), "collectives": text.collectives(), "traffic": text.traffic()}
    return row


def _step(config: RunConfig, program: Program, population: int, mesh: Mesh) -> jax.stages.Traced:
    rows = (population, config.train.batch_size)
    tokens, languages = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=program.batch_sharding)
        for shape in ((*rows, config.data.window + 1), rows)
    )
    cooldown = (jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P())),) * 2
    return program.step.trace(program.like, tokens, languages, cooldown)


def _evaluate(config: RunConfig, program: Program, population: int, mesh: Mesh) -> jax.stages.Traced:
    shape = (1, config.train.batch_size, config.data.window + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=program.evaluation_sharding)
    scored = jax.ShapeDtypeStruct((*shape[:2], config.data.window), bool, sharding=program.evaluation_sharding)
    return program.evaluate.trace(program.like.params, program.like.buffers, tokens, scored)


def _decode(config: RunConfig, program: Program, population: int, mesh: Mesh) -> jax.stages.Traced:
    """One more token of one row a device of a single run."""
    skeleton, rows = Skeleton(config.model), mesh.shape["data"] * mesh.shape["fsdp"]
    by_row = NamedSharding(mesh, P(BATCH_AXES))

    def of_one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P(*leaf.sharding.spec[1:])
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=NamedSharding(mesh, spec))

    def put(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_row)

    params, buffers = jax.tree.map(of_one, (program.like.params, program.like.buffers))
    cache = jax.eval_shape(
        lambda *arrays: skeleton.merge(*arrays).init_cache(rows, config.data.window), params, buffers
    )
    tokens = put(jax.ShapeDtypeStruct((rows, 1), jnp.int32))
    extend = jax.jit(lambda params, buffers, *inputs: skeleton.merge(params, buffers).extend(*inputs), donate_argnums=3)
    return extend.trace(params, buffers, tokens, jax.tree.map(put, cache))


def _held(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(tree))


def _roofline(step: dict[str, Any], chip: Chip, chips: int, useful: float, tokens: int) -> dict[str, Any]:
    """Seconds that arithmetic, memory and links need at least; the longest bounds a step."""
    seconds = {"compute": step["flops"] / chips / chip.flops}
    if "traffic" in step:
        seconds["memory"] = step["traffic"] / chip.bandwidth
        seconds["links"] = sum(kind["bytes"] for kind in step["collectives"].values()) / chip.links
    bound = max(seconds, key=seconds.__getitem__)
    longest = seconds[bound]
    return {
        "seconds": seconds,
        "bound": bound,
        "useful_flops": useful,
        "step_seconds": longest,
        "tokens_per_second": tokens / longest,
        "mfu": useful / (longest * chips * chip.flops),
    }


def _change(config: RunConfig, topology_name: str, population: int, excess: float) -> dict[str, Any] | None:
    """What saves memory, one after another until the step fits; what cannot be is left out."""
    devices = topology(topology_name)[1]
    sizes, slices = make_mesh(config.mesh, devices).shape, len({getattr(d, "slice_index", 0) for d in devices})
    changes: dict[str, Any] = {}
    for further in savings(config, sizes, slices, excess):
        try:
            found = report(overlay(config, changes | further), topology_name, population, ("step",), suggest=False)
        except UserError:
            continue
        changes |= further
        if found["fits"]:
            return changes | {"peak": found["programs"]["step"]["peak"]}
    return None


def savings(config: RunConfig, sizes: Mapping[str, int], slices: int, excess: float) -> Iterator[dict[str, Any]]:
    """What saves memory, the cheapest in time first, each beside those before it.

    sizes: of the mesh's axes. slices: that data alone may span. excess: peak over memory. Windows are split last: where
    a device has one at a time and it is still too long, or where there are fewer of them than devices.
    """
    model, fsdp = config.model, sizes["data"] * sizes["fsdp"] // slices
    if sizes["data"] > slices:
        yield {"mesh.data": slices, "mesh.fsdp": fsdp}
    recompute: dict[str, Any] = {} if model.remat == "full" else {"model.remat": "full"}
    recompute |= {} if model.loss_chunk else {"model.loss_chunk": _LOSS_CHUNK}
    if recompute:
        yield recompute
    rows, parts = config.train.batch_size // (fsdp * slices), max(config.train.microbatches, 1)
    enough = [n for n in range(parts + 1, rows + 1) if rows % n == 0 and n >= min(2 * parts * excess, rows)]
    if enough:
        yield {"train.microbatches": enough[0]}
    if not model.query_chunk:
        yield {"model.query_chunk": _QUERY_CHUNK}
    for n in range(2, fsdp + 1):
        if fsdp % n == 0 and n >= min(2 * excess, fsdp):
            mesh = {"mesh.data": slices, "mesh.fsdp": fsdp // n, "mesh.context": n * sizes["context"]}
            yield mesh | {"train.microbatches": n * rows}
            return


def shapes(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The first run of every distinct shape, in their order."""
    found: dict[tuple, RunConfig] = {}
    for run in runs:
        found.setdefault((run.model, run.train, run.mesh, run.data.window), run)
    return list(found.values())
