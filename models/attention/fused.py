"""Attention by fused kernels: to all keys of a document splash attention on TPUs and cuDNN on GPUs, which come with
JAX; to selected blocks our own on TPUs, in `kernels`.

Which one serves is decided while tracing, by the devices of the mesh, so that a program for chips that are not here
gets their kernel. It is said once, and so is what a kernel does not take, which XLA computes. Kernels for TPUs are
checked by interpretation and compiled for v5e, v5p and v6e; none has been run on a chip yet.
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

from models import sharding
from models.attention import kernels
from models.attention.keys import Attended, Reads, Selection, visible_keys
from models.attention.tiles import pad

_LOG = logging.getLogger(__name__)
_LANES = 128  # queries and keys of the smallest block that a TPU takes
_BLOCKS = (512, 256, _LANES)  # of queries and keys; the largest that divides the window
_MASKED = 8192  # longest window on a GPU: cuDNN takes documents as a mask of T² numbers a row
_CUDNN_WIDTH = 128  # widest head that cuDNN takes in training

Kernel = Callable[[jax.Array, jax.Array, jax.Array, Reads], Attended]


def kernel(q_BTHE: jax.Array, selection: Selection | None = None, softcap: float = 0.0) -> Kernel | None:
    """What attends q to all keys of its documents, or to the selected ones, on the devices of the current mesh; None
    where that is left to XLA."""
    kind = _device_kind()
    if kind.startswith("TPU"):
        name, attend, refusal = _for_tpu(q_BTHE, selection, softcap)
        refusal = _split() or refusal
    elif kind.startswith("NVIDIA"):
        name, attend, refusal = "cuDNN", attend_cudnn, _cudnn_refusal(q_BTHE, selection, softcap)
    else:
        return None
    return attend if _serves(name, refusal, "XLA does, as model.query_chunk says") else None


def decodes(q_BCHE: jax.Array, selection: Selection) -> bool:
    """Whether `kernels.extend` serves new queries to a cache on the devices of the current mesh."""
    if not _device_kind().startswith("TPU"):
        return False
    refusal = _split() or kernels.refusal_of_extension(q_BCHE, selection)
    return _serves("the kernel for decoding", refusal, "XLA does")


def _device_kind() -> str:
    return getattr(getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None), "device_kind", "cpu")


def _split() -> str:
    """Why XLA cannot run a kernel for TPUs as it is; empty if it can."""
    mesh = jax.sharding.get_abstract_mesh()
    split = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in mesh.manual_axes]
    return f"XLA cannot split it over {split[0]}" if split else ""


def _serves(name: str, refusal: str, otherwise: str) -> bool:
    if refusal:
        _say(f"{name} does not attend: {refusal}; {otherwise}", logging.WARNING)
    else:
        _say(f"{name} attends", logging.INFO)
    return not refusal


def _for_tpu(q_BTHE: jax.Array, selection: Selection | None, softcap: float) -> tuple[str, Kernel, str]:
    """The name of a kernel, the kernel, and why it does not take this."""
    if selection is None:
        attend, T = functools.partial(attend_splash, softcap=softcap), q_BTHE.shape[1]
        apart = sharding.parts() > 1 and T % _LANES
        return "splash attention", attend, f"devices have {T} tokens, not a multiple of {_LANES}" if apart else ""
    attend = functools.partial(kernels.attend, selection=selection)
    return "the kernel for selected blocks", attend, kernels.refusal(q_BTHE, selection)


def _cudnn_refusal(q_BTHE: jax.Array, selection: Selection | None, softcap: float) -> str:
    T = q_BTHE.shape[1]
    if selection is not None:
        return "keys are selected"
    if q_BTHE.dtype.itemsize != 2 or q_BTHE.shape[3] > _CUDNN_WIDTH or T > _MASKED or softcap:
        return f"windows are {T} tokens in {q_BTHE.dtype}, softcap {softcap:g}"
    return "" if _has_cudnn() else "it is not installed"


def _has_cudnn() -> bool:
    """Whether its kernels can be compiled: JAX's wheels bring it as `nvidia.cudnn`, machines as a library."""
    wheel = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn")
    return bool(wheel or ctypes.util.find_library("cudnn"))


@functools.cache
def _say(words: str, level: int) -> None:
    _LOG.log(level, words)


def attend_splash(
    q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, reads: Reads, softcap: float = 0.0, interpret: bool = False
) -> Attended:
    """`oracle.attend` without a selection or a window, on whole rows or the parts that devices have of them; interpret:
    on a CPU, for tests."""
    T, H = q_BTHE.shape[1:3]
    q_BHTE, k_BGSE, v_BGSE = (
        pad(a, _LANES).swapaxes(1, 2)
        for a in (q_BTHE * jnp.asarray(q_BTHE.shape[3] ** -0.5, q_BTHE.dtype), k_BSGE, v_BSGE)
    )
    # A document is named by the position of its first token; what is padded here reads itself.
    document_BT = pad(reads.first, _LANES, constant_values=-1)
    attend = _splash(q_BHTE.shape[2], H, softcap, interpret)
    o_BHTE = jax.vmap(lambda q, k, v, *documents: attend(q, k, v, segment_ids=splash.SegmentIds(*documents)))(
        q_BHTE, k_BGSE, v_BGSE, document_BT, sharding.across(document_BT)
    )
    return Attended(o_BHTE.swapaxes(1, 2)[:, :T].astype(v_BSGE.dtype))


def _splash(T: int, H: int, softcap: float, interpret: bool) -> Callable[..., jax.Array]:
    """Of T queries of this device; what it says of rows [H, queries, keys] is cut as the queries are."""
    block, parts = next(size for size in _BLOCKS if T % size == 0), sharding.parts()
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    whole = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T * parts, T * parts))] * H),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    return jax.tree.map(lambda a: sharding.own(a) if a.ndim > 1 else sharding.own(a[None])[0], whole)


def attend_cudnn(
    q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, reads: Reads, implementation: str = "cudnn"
) -> Attended:
    """`oracle.attend` without a selection, on whole rows."""
    mask_B1TS = visible_keys(reads, jnp.arange(k_BSGE.shape[1]))[:, None]
    return Attended(jax.nn.dot_product_attention(q_BTHE, k_BSGE, v_BSGE, mask=mask_B1TS, implementation=implementation))
