import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from models.decoding.draft_length import expected_tokens
from models.decoding.sampling import warp
from models.decoding.verification import block, draw, exact, project, rejection, scatter

V = 4
VERIFICATIONS = pytest.mark.parametrize("verify", [rejection, block], ids=["rejection", "block"])


@st.composite
def laws(draw_from, rows, width=V):
    """Laws with ties, zeros and equal rows."""
    weight = draw_from(hnp.arrays(np.float64, (rows, width), elements=st.sampled_from([0, 1, 2, 3, 50])))
    weight[np.arange(rows), draw_from(hnp.arrays(np.int64, rows, elements=st.integers(0, width - 1)))] += 1
    return weight / weight.sum(axis=-1, keepdims=True)


@jax.jit
def outcome_laws(outcome):
    """The counts [B, C] and the laws of the next token after every count [C, B, V]."""
    rows, counts = outcome.count.shape
    following = [outcome.next_law(jnp.full(rows, n)) for n in range(counts)]
    return outcome.count, jnp.stack(following)


_counts = jax.jit(lambda verify, *arguments: verify(*arguments).count, static_argnums=0)


def mean_accepted(verify, p_CV, q_KV):
    """The expected number of accepted drafts, over all drafts, of laws that do not depend on the context."""
    T = len(q_KV)
    drafts = np.stack(np.meshgrid(*[np.arange(V)] * T, indexing="ij"), axis=-1).reshape(-1, T)
    weight = np.prod(q_KV[np.arange(T), drafts], axis=-1)
    rows = len(drafts)
    p, q = np.broadcast_to(p_CV, (rows, T + 1, V)), np.broadcast_to(q_KV, (rows, T, V))
    with jax.enable_x64(True):
        count = np.asarray(_counts(verify, p, q, drafts, np.full(rows, T)))
    np.testing.assert_allclose(count.sum(axis=1), 1, rtol=1e-12)
    assert count.min() >= 0
    return weight @ count @ np.arange(T + 1)


@settings(max_examples=60, deadline=None)
@given(laws(2), laws(1))
def test_one_draft_is_accepted_with_the_overlap_of_the_laws(p, q):
    overlap = np.minimum(p[0], q[0]).sum()
    for verify in (rejection, block):
        np.testing.assert_allclose(mean_accepted(verify, p, q), overlap, rtol=1e-12, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(laws(4), laws(3))
def test_block_accepts_at_least_as_many_drafts_as_rejection(p, q):
    assert mean_accepted(block, p, q) >= mean_accepted(rejection, p, q) - 1e-12


def test_block_accepts_more_drafts_than_rejection():
    """The motivating example of the paper: two tokens, two drafts, 10/9 and 11/9 accepted."""
    p, q = np.array([[1 / 3, 2 / 3, 0, 0]] * 3), np.array([[2 / 3, 1 / 3, 0, 0]] * 2)
    np.testing.assert_allclose(mean_accepted(rejection, p, q), 10 / 9)
    np.testing.assert_allclose(mean_accepted(block, p, q), 11 / 9)


@jax.jit
def project_and_scatter(logits_BW, draft_ids_X, target_ids_X):
    return scatter(warp(project(logits_BW, draft_ids_X), 1.0, 0, 1.0), target_ids_X, V)


@settings(max_examples=60, deadline=None)
@given(laws(1), laws(1, width=5), st.permutations(range(5)), st.integers(1, 4))
def test_intersection_accepts_at_least_as_much_as_the_union(p, q, order, shared):
    """Shared tokens are target tokens 0..shared-1, in any place of the drafter; all of q may be elsewhere."""
    draft_ids, q = np.array(order[:shared]), (q + 1e-6) / np.sum(q + 1e-6)
    proposal = np.asarray(project_and_scatter(jnp.log(q), draft_ids, np.arange(shared)))
    np.testing.assert_allclose(proposal.sum(), 1, rtol=1e-5)
    union = np.minimum(p[0, :shared], q[0, draft_ids]).sum()
    assert np.minimum(p, proposal).sum() >= union - 1e-6


@VERIFICATIONS
@pytest.mark.parametrize(
    "p, q, accepted", [(0.0, 0.5, 0), (0.0, 0.0, 0), (0.5, 0.5, 1), (0.5, 0.0, 1), (1e-30, 1, 1e-30)]
)
def test_boundaries_of_acceptance(verify, p, q, accepted):
    p_BCV = jnp.array([[[p, 1 - p], [0.5, 0.5]]], jnp.float32)
    outcome = jax.jit(verify)(p_BCV, jnp.array([[[q, 1 - q]]], jnp.float32), jnp.array([[0]]), jnp.array([1]))
    count, following = outcome_laws(outcome)
    assert count[0].tolist() == [1 - accepted, np.float32(accepted)]
    assert np.isfinite(following).all()


@VERIFICATIONS
def test_float32_rounding_leaves_no_nan(verify):
    """Laws that differ by rounding: nothing may be left of the residual, and nearly everything is accepted."""
    p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (64, 5, 50)))
    q = p[:, :4] * (1 + 1e-7 * jax.random.normal(jax.random.key(1), (64, 4, 50)))
    drafts = jnp.argmax(p[:, :4], axis=-1)
    count, following = outcome_laws(jax.jit(verify)(p, q, drafts, jnp.full(64, 4)))
    np.testing.assert_allclose(count.sum(axis=1), 1, rtol=1e-5)
    assert np.min(count[:, 4]) > 0.999
    np.testing.assert_allclose(following.sum(axis=-1), 1, rtol=1e-5)


@VERIFICATIONS
def test_draws_follow_the_outcome(verify):
    """Three rows of 0, 1 and 2 drafts, 40,000 draws each, over the pair (accepted drafts, next token)."""
    draws = 40_000
    p = jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (3, 3, V)))
    q = jax.nn.softmax(2 * jax.random.normal(jax.random.key(1), (3, 2, V)))
    outcome = jax.jit(verify)(p, q, jnp.array([[0, 1], [2, 3], [3, 0]]), jnp.arange(3))
    keys = jax.random.split(jax.random.key(2), (draws, 3))
    n, token = map(np.asarray, jax.jit(jax.vmap(draw, in_axes=(0, None)))(keys, outcome))
    count, following = (np.asarray(x, np.float64) for x in outcome_laws(outcome))
    joint = count.T[..., None] * following
    for row in range(3):
        law = joint[:, row].ravel()
        seen = np.bincount(n[:, row] * V + token[:, row], minlength=3 * V)
        assert seen[law == 0].sum() == 0
        likely = law > 0
        expected = law[likely] / law.sum() * draws
        assert stats.chisquare(seen[likely], expected).pvalue > 0.01
        # The same draws tell a law apart that differs by 5 % of the mass.
        assert stats.chisquare(seen[likely], 0.95 * expected + 0.05 * draws / likely.sum()).pvalue < 1e-4


def test_draws_of_a_row_do_not_depend_on_its_batch():
    p = jax.nn.softmax(jax.random.normal(jax.random.key(0), (8, 3, V)))
    q = jax.nn.softmax(jax.random.normal(jax.random.key(1), (8, 2, V)))
    arguments = p, q, jnp.argmax(q, axis=-1), jnp.full(8, 2)
    keys = jax.random.split(jax.random.key(4), 8)
    verify_and_draw = jax.jit(lambda keys, *arguments: draw(keys, rejection(*arguments)))
    together = np.array(verify_and_draw(keys, *arguments))
    for row in range(8):
        alone = verify_and_draw(keys[row : row + 1], *(x[row : row + 1] for x in arguments))
        np.testing.assert_array_equal(np.array(alone)[:, 0], together[:, row])


@pytest.mark.parametrize(
    "samples, drafts, n_draft, accepted, token",
    [
        ([1, 2, 3], [1, 2], 2, 2, 3),
        ([1, 2, 3], [1, 2], 1, 1, 2),
        ([1, 2, 3], [1, 2], 0, 0, 1),
        ([1, 2, 3], [0, 2], 2, 0, 1),
        ([1, 2, 3], [1, 0], 2, 1, 2),
    ],
)
def test_exact_accepts_up_to_the_first_difference(samples, drafts, n_draft, accepted, token):
    n, following = exact(jnp.array([samples]), jnp.array([drafts]), jnp.array([n_draft]))
    assert (n.tolist(), following.tolist()) == ([accepted], [token])


def test_empty_intersection_is_refused():
    with pytest.raises(ValueError, match="empty intersection"):
        project(jnp.zeros((2, 5)), jnp.zeros((0,), jnp.int32))


def test_projection_ignores_padding_and_scatter_adds_duplicates():
    logits = jnp.log(jnp.array([[[0.1, 0.2, 0.3, 0.4]]])).repeat(2, axis=1)
    padded = jnp.pad(logits, ((0, 0), (0, 0), (0, 3)), constant_values=9.0)
    q = warp(project(padded, jnp.array([3, 0, 1])), 1.0, 0, 1.0)
    np.testing.assert_allclose(scatter(q, jnp.array([5, 2, 5]), 6), [[[0, 0, 1 / 7, 0, 0, 6 / 7]] * 2], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(laws(1), laws(1))
def test_expected_tokens_is_that_of_rejection(p, q):
    acceptance = np.minimum(p, q).sum()
    tokens = 1 + mean_accepted(rejection, p.repeat(4, axis=0), q.repeat(3, axis=0))
    np.testing.assert_allclose(expected_tokens(acceptance, 3), tokens, rtol=1e-12)
    if acceptance < 1:
        np.testing.assert_allclose(tokens, (1 - acceptance**4) / (1 - acceptance), rtol=1e-9)
