import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas.training.config import TrainConfig
from atlas.training.step import NO_COOLDOWN, Skeleton, TrainState, TrainStep
from models import token_losses
from tests.atlas.training.worker import MODEL

SEPARATOR, PADDING, LANGUAGES = 256, 257, 3
MEASURED = {"first_token_attention", "first_token_selected", "sink_rate", "selection_recall", "selection_overlap"}
CONFIG = TrainConfig(warmup_steps=1, learning_rate=1e-2)
COOLDOWN = tuple(jnp.int32(bound) for bound in NO_COOLDOWN)


@pytest.fixture(scope="module")
def one() -> TrainStep:
    return TrainStep(Skeleton(MODEL), CONFIG, SEPARATOR, PADDING, LANGUAGES)


@pytest.fixture(scope="module")
def state(one: TrainStep) -> TrainState:
    return jax.jit(one.init)(jnp.int32(0))


@pytest.fixture(scope="module")
def tokens_BS() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (4, 17), 0, 64)


LANGUAGE_B = jnp.array([0, 2, 2, 0], jnp.int32)


def test_split_and_merge_are_inverse(one, state):
    params, buffers = one.skeleton.split(one.skeleton.merge(state.params, state.buffers))
    jax.tree.map(np.testing.assert_array_equal, (params, buffers), (state.params, state.buffers))
    assert set(params) == set(one.skeleton.axes)
    assert buffers


def test_step_learns_and_counts_windows(one, state, tokens_BS):
    step, after = jax.jit(one), state
    losses = []
    for _ in range(20):
        after, metrics = step(after, tokens_BS, LANGUAGE_B, COOLDOWN)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert after.windows.tolist() == [40, 0, 40]
    assert (int(after.step), int(after.skipped)) == (20, 0)


def test_loss_is_the_mean_over_targets_that_are_not_padding(one, state, tokens_BS):
    padded_BS = tokens_BS.at[:, 9:].set(PADDING)
    _, metrics = jax.jit(one)(state, padded_BS, LANGUAGE_B, COOLDOWN)
    model = one.skeleton.merge(state.params, state.buffers)
    nats_BT, _, _ = jax.jit(token_losses, static_argnums=(2, 3))(model, padded_BS, SEPARATOR, PADDING)
    np.testing.assert_allclose(metrics["loss"], nats_BT[:, :8].mean(), rtol=1e-6)


def test_not_finite_step_is_skipped_and_counted(one, state, tokens_BS):
    broken = dataclasses.replace(
        state, params=state.params | {"embedding": jnp.full_like(state.params["embedding"], jnp.inf)}
    )
    after, metrics = jax.jit(one)(broken, tokens_BS, LANGUAGE_B, COOLDOWN)
    assert not np.isfinite(metrics["loss"])
    for part in ("params", "buffers", "optimizer", "windows"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(broken, part))
    assert (int(after.step), int(after.skipped)) == (1, 1)


def test_indexer_loss_does_not_move_the_model(one, state, tokens_BS, monkeypatch):
    """Ten times the indexer's loss changes the indexer's update only, clipping included."""
    after, _ = jax.jit(one)(state, tokens_BS, LANGUAGE_B, COOLDOWN)

    def louder(*args, **kwargs):
        nats, weights, aux = token_losses(*args, **kwargs)
        return nats, weights, aux | {"indexer_loss": 10 * aux["indexer_loss"]}

    monkeypatch.setattr("atlas.training.step.token_losses", louder)
    louder_after, _ = jax.jit(one)(state, tokens_BS, LANGUAGE_B, COOLDOWN)
    moved = {name for name, value in after.params.items() if not np.array_equal(value, louder_after.params[name])}
    assert all(".indexer." in name for name in moved)


def test_weight_decay_leaves_vectors_alone(one, state, tokens_BS):
    without = dataclasses.replace(CONFIG, weight_decay=0.0)
    steps = one, TrainStep(Skeleton(MODEL), without, SEPARATOR, PADDING, LANGUAGES)
    decayed, plain = (jax.jit(step)(state, tokens_BS, LANGUAGE_B, COOLDOWN)[0].params for step in steps)
    np.testing.assert_array_equal(plain["layers.norm"], decayed["layers.norm"])
    lost = CONFIG.learning_rate * CONFIG.weight_decay * state.params["layers.attention.out"]
    np.testing.assert_allclose(plain["layers.attention.out"] - decayed["layers.attention.out"], lost, atol=1e-6)


def test_evaluation_sums_nats_by_chunk(one, state, tokens_BS):
    nats_BT, weights_BT, _ = token_losses(
        one.skeleton.merge(state.params, state.buffers), tokens_BS, SEPARATOR, PADDING
    )
    scored_CBT = jnp.stack([weights_BT > 0, jnp.zeros_like(weights_BT, bool).at[1, 3].set(True)])
    windows = jnp.stack([tokens_BS, tokens_BS]), scored_CBT
    nats_C, metrics = jax.jit(one.evaluate)(state.params, state.buffers, *windows)
    np.testing.assert_allclose(nats_C, [jnp.sum(nats_BT * weights_BT), nats_BT[1, 3]], rtol=1e-5)
    assert metrics.keys() >= MEASURED and all(np.isfinite(value) for value in metrics.values())


def test_a_training_step_measures_no_probabilities(one, state, tokens_BS):
    assert not MEASURED & jax.eval_shape(one, state, tokens_BS, LANGUAGE_B, COOLDOWN)[1].keys()


def test_samples_are_drawn_from_what_the_whole_text_makes_likely(one, state, tokens_BS):
    """Every token with its own key, from the logits that the model gives after all tokens before it."""
    writing = TrainStep(one.skeleton, dataclasses.replace(CONFIG, sample_tokens=5), SEPARATOR, PADDING, LANGUAGES)
    key, text = jax.random.key(1), jnp.asarray(tokens_BS[0, :9])
    drawn = jax.jit(writing.sample)(state.params, state.buffers, text, key)
    logits_of = jax.jit(lambda text: one.skeleton.merge(state.params, state.buffers)(text[None])[0][0, -1])
    for token, own in zip(drawn, jax.random.split(key, 5), strict=True):
        assert token == jax.random.categorical(own, logits_of(text))
        text = jnp.append(text, token)
