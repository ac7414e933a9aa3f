"""Accelerators by the names that users give them: what their makers publish of them, and some that are not here."""

import functools
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from checked import UserError, unknown

GIB = 2**30


class Chip(NamedTuple):
    """One chip: bfloat16 FLOP/s without sparsity; bytes of memory that a program may use; bytes/s of that memory, and
    those that arrive over the links of a slice or a node; the beginnings of JAX's names for it."""

    flops: float
    memory: float
    bandwidth: float
    links: float
    kinds: tuple[str, ...]


# cloud.google.com/tpu/docs/system-architecture-tpu-vm and the data sheets of NVIDIA's SXM modules; links one way.
CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 600e9, ("TPU v5p", "TPU v5")),
    "v6e": Chip(918e12, 31.25 * GIB, 1640e9, 400e9, ("TPU v6 lite", "TPU v6e")),
    "h100": Chip(989e12, 79.1 * GIB, 3350e9, 450e9, ("NVIDIA H100",)),
    "h200": Chip(989e12, 140.4 * GIB, 4800e9, 450e9, ("NVIDIA H200",)),
    "b200": Chip(2250e12, 179.1 * GIB, 8000e9, 900e9, ("NVIDIA B200",)),
}
_COMPILED_FOR = ("v5e", "v5p", "v6e", "h100", "h200")
# Limits of compute capability 9.0, as XLA's GpuTargetConfigProto spells them.
_HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f} cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{kind}" """


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None where the table has none, as for CPUs.

    >>> chip_of("TPU v5 lite").flops, chip_of("cpu")
    (197000000000000.0, None)
    """
    return next((chip for chip in CHIPS.values() if device_kind.startswith(chip.kinds)), None)


@functools.cache
def topology(name: str) -> tuple[Chip, list[jax.Device]]:
    """A chip, and devices to compile for that are not attached.

    name: of the chip and how many there are, "v5p:4x4x4" or "h100:8"; in front "2*" for so many slices or nodes.
    Raises UserError for a name that means nothing, and where the extra `compile` is not installed.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    if not match:
        raise UserError(f"topology {name!r} is not chip:count; give v5p:4x4x4, h100:8, or 2*v5p:4x4x4 for two slices")
    slices, kind, shape = int(match[1] or 1), match[2], match[3]
    if kind not in _COMPILED_FOR:
        raise unknown("chip", kind, _COMPILED_FOR)
    chip, gpu = CHIPS[kind], kind.startswith("h")
    if not importlib.util.find_spec("jax_cuda12_plugin" if gpu else "libtpu"):
        raise UserError(f"compiling for {kind} needs the extra compile: pip install 'atlas-scaling[compile]'")
    # The compilers look for hardware, for a file lock and for libraries that only running needs.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3"}
    quiet |= {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}  # of any host
    os.environ.update(quiet | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"})
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # programs of chips that are not here cannot be read back
    options: dict[str, Any]
    try:
        if gpu:
            config = _HOPPER.format(memory=chip.memory, bandwidth=chip.bandwidth, kind=chip.kinds[0])
            options = {"target_config": config, "topology": f"1x{slices}x{shape}"}
            return chip, topologies.get_topology_desc(kind, platform="cuda", **options).devices
        options = {"num_slices": slices} if slices > 1 else {}
        if set(shape.split("x")) == {"1"}:
            options["chips_per_host_bounds"] = [1, 1, 1]  # by default a host has several
        return chip, topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **options).devices
    except NotImplementedError:
        # Its plugin, which JAX looks for once, leaves itself out without a GPU, unless it was told before.
        raise UserError(f"topology {name!r}: start with JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment") from None
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {name!r}: {' '.join(str(error).split())}") from None
