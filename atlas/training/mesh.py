"""Devices, processes and shardings: one mesh, one table from logical axis names to mesh axes."""

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atlas.training.config import MeshConfig
from checked import UserError

T = TypeVar("T")

AXES = ("run", "data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical parameter axis → mesh axis. What is absent is replicated.
RULES = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}


def initialize_distributed() -> None:
    """Joins the other processes where the environment names them; does nothing on a single machine.

    Looks for JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a SLURM step of several tasks, or a
    TPU pod.
    """
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        try:
            count, index = int(environment["JAX_NUM_PROCESSES"]), int(environment["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise UserError(f"JAX_COORDINATOR_ADDRESS is set: set whole numbers in {error} too") from error
        jax.distributed.initialize(environment["JAX_COORDINATOR_ADDRESS"], count, index)
    elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def first_process_first(make: Callable[[], T]) -> T:
    """Calls `make` on process 0 and then on the others, who find its files on the shared disk."""
    if jax.process_index() == 0:
        made = make()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_process_first")
    return made if jax.process_index() == 0 else make()


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh run × data × fsdp × tensor over `devices` (default: all of them).

    Axis types are Auto: jit propagates shardings, as pjit did. Raises UserError if the sizes do not fill the devices.
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
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parameter_sharding(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a population's parameter [R, (layers,) *axes] by RULES; an axis that does not divide is
    replicated."""
    names = ["run"] + [None] * (len(shape) - 1 - len(axes)) + [RULES.get(axis) for axis in axes]
    fits = [n if n and size % mesh.shape[n] == 0 else None for n, size in zip(names, shape, strict=True)]
    return NamedSharding(mesh, P(*fits))


def check_divisible(mesh: Mesh, batch_size: int, population: int) -> None:
    """Raises UserError where a batch or a population does not divide over its mesh axes."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise UserError(
            f"train.batch_size={batch_size} does not divide over data × fsdp = {parts} devices; use a multiple"
        )
    if population % mesh.shape["run"]:
        raise UserError(f"a population of {population} runs does not divide over mesh.run={mesh.shape['run']}")
