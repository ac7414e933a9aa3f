"""Next-token loss of a decoder, in nats per token."""

import jax
import jax.numpy as jnp

from models import sharding
from models.attention.module import Metrics
from models.decoder import Decoder


def token_losses(
    model: Decoder, tokens_BS: jax.Array, separator: int, padding: int, *, train: bool = False, measure: bool = False
) -> tuple[jax.Array, jax.Array, Metrics]:
    """The loss of every token of windows that overlap by one token.

    The first T of a window's T+1 tokens are the input, the last T the targets. A separator opens a document,
    and attention stays within a document. Targets equal to `padding` have weight 0, and padding in the input
    is left out of the metrics. With `model.loss_chunk` the logits are made and consumed in chunks of about so
    many tokens, also in the backward pass, so that [B, T, V] never exists.

    Args:
      tokens_BS: int32 [B, T+1].
      train, measure: see `Decoder.hidden`; the first to train, the second to evaluate.

    Returns:
      Losses in nats float32 [B, T], weights float32 [B, T] (0 or 1), and the model's metrics; where devices share
      windows, of this one's part of them.
    """
    inputs_BT, targets_BT = tokens_BS[:, :-1], sharding.own(tokens_BS[:, 1:])
    segments_BT = document_segments(inputs_BT, separator, padding)
    x_BTM, metrics = model.hidden(inputs_BT, segments_BT, train=train, measure=measure)
    losses = _chunked_losses if model.loss_chunk else _losses
    weights_BT = (targets_BT != padding).astype(jnp.float32)
    return losses(model, x_BTM, targets_BT), weights_BT, metrics


def document_segments(inputs_BT: jax.Array, separator: int, padding: int) -> jax.Array:
    """The document of every input token, int32 [B, T]: a separator opens one; -1 marks padding.

    >>> document_segments(jnp.array([[5, 9, 5, 0]]), separator=9, padding=0).tolist()
    [[0, 1, 1, -1]]
    """
    segments_BT = jnp.cumsum(inputs_BT == separator, axis=1, dtype=jnp.int32)
    return jnp.where(inputs_BT == padding, -1, segments_BT)


def _losses(model: Decoder, x_BTM: jax.Array, targets_BT: jax.Array, head_VM: jax.Array | None = None) -> jax.Array:
    logits_BTV = model.logits(x_BTM, head_VM)
    # Logits are finite: without the care that jax.nn.logsumexp takes of others, and with a sum in place of a gather,
    # forward and backward take two thirds of the time on a CPU.
    largest_BT1 = jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True))
    normaliser_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV - largest_BT1), axis=-1)) + largest_BT1[..., 0]
    is_target_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    return normaliser_BT - jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1)


def _chunked_losses(model: Decoder, x_BTM: jax.Array, targets_BT: jax.Array) -> jax.Array:
    B, T, M = x_BTM.shape
    head_VM = model.whole_head()
    width = min(T, max(1, model.loss_chunk // B))
    chunks = -(-T // width)
    extra = ((0, 0), (0, chunks * width - T))
    x_BCWM = jnp.pad(x_BTM, (*extra, (0, 0))).reshape(B, chunks, width, M)
    targets_BCW = jnp.pad(targets_BT, extra).reshape(B, chunks, width)

    @jax.checkpoint
    def chunk_losses(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _losses(model, *chunk, head_VM)

    losses_CBW = jax.lax.map(chunk_losses, (x_BCWM.swapaxes(0, 1), targets_BCW.swapaxes(0, 1)))
    return losses_CBW.swapaxes(0, 1).reshape(B, chunks * width)[:, :T]
