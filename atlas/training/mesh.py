"""Devices, processes and shardings: one mesh, one table from logical axis names to mesh axes."""

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atlas.training.config import MeshConfig, RunConfig
from checked import UserError
from checked.environment import read_variable
from models.sharding import mesh_axes

T = TypeVar("T")
PyTree = Any

AXES = ("run", "data", "fsdp", "context", "tensor")


def initialize_distributed() -> None:
    """Joins the other processes where the environment names them; does nothing on a single machine.

    Looks for JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a SLURM step of several tasks, or a
    TPU pod.
    """
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        remedy = "JAX_COORDINATOR_ADDRESS is set and needs it"
        count, index = (read_variable(name, remedy) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(environment["JAX_COORDINATOR_ADDRESS"], count, index)
        return
    tasks = "SLURM_STEP_NUM_TASKS"
    several = tasks in environment and read_variable(tasks, "unset it where no step of SLURM runs") > 1
    if several or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def first_process_first(make: Callable[[], T]) -> T:
    """Calls `make` on process 0 and then on the others, who find its files on the shared disk."""
    if jax.process_index() == 0:
        made = make()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_process_first")
    return made if jax.process_index() == 0 else make()


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh run × data × fsdp × context × tensor over `devices` (default: all of them).

    Between slices, or hosts of GPUs that JAX calls so, the network is slow: data is split over them first, all else
    lies within. Axis types are Auto: jit propagates shardings, as pjit did.

    Raises:
      UserError: the sizes do not fill the devices, or data does not divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) == 1:
        rest = int(np.prod([s for s in sizes if s != -1]))
        sizes[sizes.index(-1)] = max(len(devices) // max(rest, 1), 1)
    if int(np.prod(sizes)) != len(devices) or min(sizes) < 1:
        shape = " × ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"mesh {shape} needs {int(np.prod(sizes))} devices, there are {len(devices)}; change config.mesh"
        )
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    data = AXES.index("data")
    if sizes[data] % len(slices):
        raise UserError(
            f"mesh.data={sizes[data]} must be a multiple of the {len(slices)} slices: it alone may span them"
        )
    sizes[data] //= len(slices)
    parts = [jax.make_mesh(sizes, AXES, devices=slices[number]).devices for number in sorted(slices)]
    return Mesh(np.concatenate(parts, axis=data), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_sharding(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a population's parameter [R, (layers,) *axes]; an axis that does not divide is replicated."""
    names = ["run"] + [None] * (len(shape) - 1 - len(axes)) + list(mesh_axes(axes))

    def parts(name: str | tuple[str, ...]) -> int:
        return math.prod(mesh.shape[axis] for axis in np.atleast_1d(name))

    fits = [n if n and size % parts(n) == 0 else None for n, size in zip(names, shape, strict=True)]
    return NamedSharding(mesh, P(*fits))


def over_devices(function: Callable, mesh: Mesh, in_specs: PyTree, out_specs: PyTree) -> Callable:
    """`jax.shard_map` of a function in which every device computes its own runs and windows; see `models.sharding`.

    Specs may name any axis. Splitting by tensor is left to XLA, inside the function too; where there is none, XLA has
    nothing to split.
    """
    manual = set(AXES) if mesh.shape["tensor"] == 1 else set(AXES) - {"tensor"}

    def own(spec: P) -> P:
        return P(*(axis if axis is None or manual.issuperset(np.atleast_1d(axis)) else None for axis in spec))

    in_specs, out_specs = (
        jax.tree.map(own, specs, is_leaf=lambda leaf: isinstance(leaf, P)) for specs in (in_specs, out_specs)
    )
    options = {"in_specs": in_specs, "out_specs": out_specs, "axis_names": manual, "check_vma": False}
    return jax.shard_map(function, mesh=mesh, **options)


def check_divisible(mesh: Mesh, config: RunConfig, population: int) -> None:
    """Raises UserError where a batch, a window, a model or a population does not divide over its mesh axes."""
    sizes, train, model = mesh.shape, config.train, config.model
    parts, matrices = sizes["data"] * sizes["fsdp"], sizes["fsdp"] * sizes["context"]
    if train.batch_size % (parts * max(train.microbatches, 1)):
        many = f"data × fsdp = {parts} devices" + f" × {train.microbatches} microbatches" * (train.microbatches > 1)
        raise UserError(
            f"train.batch_size={train.batch_size} does not divide over {many}; use a multiple, or split windows over "
            "mesh.context"
        )
    if model.d_model % matrices:
        over = f"mesh.fsdp={sizes['fsdp']}" + f" × mesh.context={sizes['context']}" * (sizes["context"] > 1)
        raise UserError(f"model.d_model={model.d_model} does not divide over {over}; use a divisor")
    unit = model.block if model.is_sparse and model.selection == "block" else 1
    if config.data.window % (sizes["context"] * unit):
        blocks = f" in blocks of {unit}" if unit > 1 else ""
        raise UserError(
            f"data.window={config.data.window} does not divide over mesh.context={sizes['context']}{blocks}; use a "
            "multiple"
        )
    if population % mesh.shape["run"]:
        raise UserError(f"a population of {population} runs does not divide over mesh.run={mesh.shape['run']}")
