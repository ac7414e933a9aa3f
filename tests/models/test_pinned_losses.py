"""The losses of a few training steps, as they were before attention had one engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Decoder, token_losses

SEPARATOR, PADDING = 30, 31
GATED_SPARSE, UNROLLED = {"attention": "gated_sparse"}, {"scan_layers": False}
CASES = {
    # Of each step: nats per token, and the indexer's loss.
    "dense": ({}, [(4.040222, 0), (4.161677, 0), (4.107514, 0)]),
    "gated unrolled": ({"attention": "gated"} | UNROLLED, [(4.006648, 0), (4.004826, 0), (4.046658, 0)]),
    "dense tiles unrolled": ({"query_chunk": 8} | UNROLLED, [(4.040222, 0), (4.161677, 0), (4.107514, 0)]),
    "tokens": (
        GATED_SPARSE | {"k_rule": "inverse", "keep_first": 1, "local_share": 0.5},
        [(4.218434, 0.2507138), (4.197995, 0.2164364), (4.053352, 0.1803727)],
    ),
    "tokens in tiles, unrolled": (
        {"attention": "sparse", "query_chunk": 8} | UNROLLED,
        [(4.296288, 0.1164486), (4.070246, 0.1104276), (4.079434, 0.1098578)],
    ),
    "blocks": (
        GATED_SPARSE | {"selection": "block", "block": 4},
        [(4.219819, 0.1487495), (4.124427, 0.218442), (4.05232, 0.1910543)],
    ),
    "blocks unrolled": (
        {"attention": "sparse", "selection": "block", "block": 8, "k_rule": "fixed", "local_share": 0.75} | UNROLLED,
        [(4.238582, 0.2415391), (4.055794, 0.2244076), (3.982383, 0.1819578)],
    ),
}


@pytest.fixture(name="tokens_KBS")
def make_tokens():
    """Three batches of windows with separators, and with padding."""
    tokens = jax.random.randint(jax.random.key(7), (3, 3, 34), 0, SEPARATOR)
    return tokens.at[:, 1, jnp.array([5, 11])].set(SEPARATOR).at[:, 2, 25:].set(PADDING)


@pytest.mark.parametrize("case", CASES)
def test_training_losses_are_what_they_were(tiny, tokens_KBS, case):
    fields, expected = CASES[case]
    graphdef, params, state = nnx.split(
        Decoder(tiny(**{"local_share": 0.0} | fields), rngs=nnx.Rngs(0)), nnx.Param, ...
    )

    @jax.jit
    def step(params, state, tokens_BS):
        def loss(params):
            model = nnx.merge(graphdef, params, state)
            nats_BT, weights_BT, metrics = token_losses(model, tokens_BS, SEPARATOR, PADDING, train=True)
            losses = jnp.sum(nats_BT * weights_BT) / jnp.sum(weights_BT), metrics["indexer_loss"]
            return sum(losses), (losses, nnx.split(model, nnx.Param, ...)[2])

        gradient, (losses, state) = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient), state, losses

    found = []
    for tokens_BS in tokens_KBS:
        params, state, losses = step(params, state, tokens_BS)
        found.append(losses)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
