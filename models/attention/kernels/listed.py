"""Attention to listed blocks with its gradients, in the arrays of the model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from models import sharding
from models.attention.kernels import backward, forward, scores
from models.attention.kernels.pieces import Cotangents, How, Keys, Queries, Saved
from models.attention.keys import Attended, Reads, Selection
from models.attention.selection import list_length
from models.attention.tiles import pad, take_rows

_LANES = 128  # of a TPU's vectors: a block is a whole number of them
_SUBLANES = 8  # of a TPU's vectors: queries of an extension are filled up to them
_FEW = 16  # new tokens of a row that are read as an extension; more are a prompt
_TOGETHER = 512  # keys at a time: a step has a cost of its own, that of about 10⁸ FLOPs
_KEY_BYTES = 16 * 2**20  # of keys and values on their way
_TILE_BYTES = 128 * 40 * 128 * 2  # of a tile's queries: those of 40 heads of 128 were compiled, and none larger
_LISTED = 2**16  # entries of all lists, which wait beside the scalar unit


def refusal(q_BTHE: jax.Array, selection: Selection) -> str:
    """What keeps the kernels from serving these queries on a TPU; empty if nothing does."""
    B, T, H, E = q_BTHE.shape
    W = selection.block
    if not W:
        return "single tokens are selected, not blocks"
    if W % _LANES:
        return f"blocks are {W} tokens, not a multiple of {_LANES}"
    if q_BTHE.dtype not in (jnp.float32, jnp.bfloat16):
        return f"queries are {q_BTHE.dtype}"
    if W * H * E * q_BTHE.dtype.itemsize > _TILE_BYTES:
        return f"{W} queries of {H} heads of {E} are more than {_TILE_BYTES} bytes"
    if B * -(-T // W) * list_length(selection, T * sharding.parts()) > _LISTED:
        return f"{B} rows of {T} tokens list more than {_LISTED} blocks; train.microbatches makes fewer rows"
    return ""


def refusal_of_extension(q_BCHE: jax.Array, selection: Selection) -> str:
    """What keeps `extend` from serving these queries on a TPU; empty if nothing does."""
    if q_BCHE.shape[1] > _FEW:
        return f"{q_BCHE.shape[1]} new tokens are more than {_FEW}"
    return refusal(q_BCHE, selection)


def attend(
    q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, reads: Reads, selection: Selection, interpret: bool = False
) -> Attended:
    """`oracle.attend` with a selection of blocks, on rows or whole tiles of them, in float32 or bfloat16; interpret: on
    a CPU."""
    B, T, H, E = q_BTHE.shape
    W, G, index = selection.block, k_BSGE.shape[2], reads.index
    lists_BPA, variance_BT = scores.select_blocks(reads, selection, interpret)
    together = _together(W, k_BSGE, lists_BPA.shape[2])
    how = How(W, H // G, G, E, selection.temperature, together, interpret)
    lists_BPA = jnp.pad(lists_BPA, ((0, 0), (0, 0), (0, -lists_BPA.shape[2] % together)), constant_values=-1)

    def rows(a_BTx: jax.Array) -> jax.Array:
        return pad(a_BTx.reshape(*a_BTx.shape[:2], -1), W)

    queries = Queries(
        rows(q_BTHE * E**-0.5),
        pad(index.query * selection.scale, W).transpose(0, 2, 1, 3),
        pad(index.gate, W).transpose(0, 2, 1),
        *(pad(a, W, mode="edge")[:, None] for a in reads[:2]),
    )
    keys = Keys(rows(k_BSGE), rows(v_BSGE), rows(index.key))
    o_BTM, loss_B1T, selected_B1T = _attend(how, queries, keys, index.bias, lists_BPA)
    return Attended(o_BTM[:, :T].reshape(B, T, H, E), loss_B1T[:, 0, :T], selected_B1T[:, 0, :T], variance_BT)


def extend(
    q_BCHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, lists_BPA: jax.Array, reads: Reads, block: int,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """`cache.attend` of a few new queries at consecutive positions, [B, C, H, E], to the blocks that their tiles list.

    Keys and values are read where they lie, listed blocks alone.
    """
    B, C, H, E = q_BCHE.shape
    G, n = k_BSGE.shape[2], -(-(C - 1) // block) + 1
    tile_BC = reads.position // block
    tile_Bn = tile_BC[:, :1] + jnp.arange(n, dtype=jnp.int32)
    own_BnC = tile_BC[:, None] == tile_Bn[..., None]
    lists_BnA = jnp.where(jnp.any(own_BnC, axis=2)[..., None], take_rows(lists_BPA, tile_Bn), -1)
    together = _together(block, k_BSGE, lists_BPA.shape[2])
    lists_BnA = jnp.pad(lists_BnA, ((0, 0), (0, 0), (0, -lists_BnA.shape[2] % together)), constant_values=-1)

    def of_tiles(a_BnCx: jax.Array) -> jax.Array:
        return pad(a_BnCx.reshape(B * n, *a_BnCx.shape[2:]), _SUBLANES)

    q_BCM = (q_BCHE * E**-0.5).reshape(B, C, H * E)
    first_BnC = jnp.broadcast_to(reads.first[:, None], own_BnC.shape)
    queries = Queries(
        of_tiles(jnp.broadcast_to(q_BCM[:, None], (B, n, C, H * E))),
        None,
        None,
        *(of_tiles(a_BnC)[:, None] for a_BnC in (jnp.where(own_BnC, reads.position[:, None], -1), first_BnC)),
    )
    how = How(block, H // G, G, E, 1.0, together, interpret)
    o_RCM = forward.extension(how, queries, Keys(k_BSGE, v_BSGE, None), lists_BnA.reshape(B * n, 1, -1))
    o_BnCM = o_RCM[:, :C].reshape(B, n, C, H * E)
    return jnp.sum(jnp.where(own_BnC[..., None], o_BnCM, 0), axis=1).reshape(B, C, H, E)


def _together(block: int, k_BSGE: jax.Array, entries: int) -> int:
    """How many entries of a list are read at a time."""
    G, E = k_BSGE.shape[2:]
    in_flight = 4 * block * G * E * k_BSGE.dtype.itemsize  # keys and values of a block, and the next ones
    return max(1, min(entries, _TOGETHER // block, _KEY_BYTES // in_flight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, queries: Queries, keys: Keys, bias_J: jax.Array, lists_BPA: jax.Array) -> Any:
    return _forward(how, queries, keys, bias_J, lists_BPA)[0]


def _forward(how: How, queries: Queries, keys: Keys, bias_J: jax.Array, lists_BPA: jax.Array) -> tuple[Any, Any]:
    found = forward.attention(how, queries, keys, bias_J, lists_BPA)
    saved = Saved(found.normaliser, found.index_normaliser)
    loss_B1T = forward.divergence(how, queries, keys, bias_J, lists_BPA, saved)
    return (found.output, loss_B1T, found.selected), (queries, keys, bias_J, lists_BPA, saved, found.output)


def _backward(how: How, residuals: Any, cotangents: Any) -> Any:
    queries, keys, bias_J, lists_BPA, saved, o_BTM = residuals
    do_BTM, dloss_B1T, _ = cotangents
    product_BTM, B = do_BTM.astype(jnp.float32) * o_BTM, len(o_BTM)
    product_BPCGRE = product_BTM.reshape(B, -1, how.block, how.groups, how.ratio, how.width)
    delta_BGPRC = jnp.sum(product_BPCGRE, axis=-1).transpose(0, 3, 1, 4, 2)
    tile = queries, saved, Cotangents(do_BTM, delta_BGPRC.reshape(B, how.groups, -1), dloss_B1T)
    dq, dbias_J = backward.of_queries(how, tile, keys, bias_J, lists_BPA)
    return dq, backward.of_keys(how, tile, keys, bias_J, lists_BPA), dbias_J, None


_attend.defvjp(_forward, _backward)
