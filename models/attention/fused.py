"""Attention to all keys of a document by kernels that come with JAX: splash attention on TPUs, cuDNN on GPUs.

Which one serves is decided while tracing, by the devices of the mesh, so that a program for chips that are not here
gets their kernel. What a kernel does not take is said once, and computed otherwise. Splash attention is checked by
interpretation; neither kernel has been compiled for a chip, or run on one, yet.
"""

import ctypes.util
import functools
import importlib.util
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from models.attention.keys import Attended, Reads, visible_keys

_LOG = logging.getLogger(__name__)
_LANES = 128  # queries and keys of the smallest block that a TPU takes
_BLOCKS = (512, 256, _LANES)  # of queries and keys; the largest that divides the window
_MASKED = 8192  # longest window on a GPU: cuDNN takes documents as a mask of T² numbers a row
_CUDNN_WIDTH = 128  # widest head that cuDNN takes in training

Kernel = Callable[[jax.Array, jax.Array, jax.Array, Reads], Attended]


def kernel(q_BTHE: jax.Array, softcap: float = 0.0) -> Kernel | None:
    """What attends q to all keys of its documents, for the devices of the current mesh; None where nothing better than
    tiles is known."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    kind, T = getattr(device, "device_kind", "cpu"), q_BTHE.shape[1]
    if kind.startswith("TPU"):
        return functools.partial(attend_splash, softcap=softcap)
    if not kind.startswith("NVIDIA"):
        return None
    fits = q_BTHE.dtype.itemsize == 2 and q_BTHE.shape[3] <= _CUDNN_WIDTH and T <= _MASKED and not softcap
    if not fits:
        _say(f"cuDNN does not take windows of {T} in {q_BTHE.dtype} (softcap {softcap:g}): model.query_chunk decides")
    elif not _has_cudnn():
        _say("cuDNN is not installed: XLA attends, as model.query_chunk says")
    return attend_cudnn if fits and _has_cudnn() else None


def _has_cudnn() -> bool:
    """Whether its kernels can be compiled: JAX's wheels bring it as `nvidia.cudnn`, machines as a library."""
    wheel = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn")
    return bool(wheel or ctypes.util.find_library("cudnn"))


@functools.cache
def _say(words: str) -> None:
    _LOG.warning(words)


def attend_splash(
    q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, reads: Reads, softcap: float = 0.0, interpret: bool = False
) -> Attended:
    """`oracle.attend` without a selection or a window, on whole rows; interpret: on a CPU, for tests."""
    T, H = q_BTHE.shape[1:3]
    padding = -T % _LANES
    q_BHTE, k_BGSE, v_BGSE = (
        jnp.pad(a, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
        for a in (q_BTHE * jnp.asarray(q_BTHE.shape[3] ** -0.5, q_BTHE.dtype), k_BSGE, v_BSGE)
    )
    # A document is named by the position of its first token; what is padded here reads itself.
    document_BT = jnp.pad(reads.first, ((0, 0), (0, padding)), constant_values=-1)
    attend = _splash(T + padding, H, softcap, interpret)
    o_BHTE = jax.vmap(lambda q, k, v, document: attend(q, k, v, segment_ids=splash.SegmentIds(document, document)))(
        q_BHTE, k_BGSE, v_BGSE, document_BT
    )
    return Attended(o_BHTE.swapaxes(1, 2)[:, :T].astype(v_BSGE.dtype))


def _splash(T: int, H: int, softcap: float, interpret: bool) -> Callable[..., jax.Array]:
    block = next(size for size in _BLOCKS if T % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * H),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )


def attend_cudnn(
    q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, reads: Reads, implementation: str = "cudnn"
) -> Attended:
    """`oracle.attend` without a selection, on whole rows."""
    mask_B1TS = visible_keys(reads, jnp.arange(k_BSGE.shape[1]))[:, None]
    return Attended(jax.nn.dot_product_attention(q_BTHE, k_BSGE, v_BSGE, mask=mask_B1TS, implementation=implementation))
