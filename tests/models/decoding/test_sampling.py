import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from models.decoding.sampling import choose, gumbel, warp

V = 7
_warp = jax.jit(warp)


def sorted_warp(logits, temperature, top_k, top_p):
    """One row in float64, by a stable sort."""
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    weight = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-weight, kind="stable")
    kept = order[: top_k or None]
    before = np.cumsum(weight[kept]) - weight[kept]
    kept = kept[(before < top_p * weight[kept].sum()) | (top_p >= 1)]
    law = np.zeros(len(logits))
    law[kept] = weight[kept]
    return law / law.sum()


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.int64, (3, V), elements=st.integers(-5, 0)),
    hnp.arrays(np.float64, 3, elements=st.sampled_from([0.0, 0.5, 1.0])),
    hnp.arrays(np.int32, 3, elements=st.integers(0, V + 1)),
    hnp.arrays(np.float64, 3, elements=st.sampled_from([1e-6, 1 / np.pi, 2 / np.pi, 0.9 + 1e-9, 1.0])),
)
def test_warp_is_a_stable_sort(exponents, temperature, top_k, top_p):
    """Many ties; each row of a batch has its own settings. No share of powers of two is one of these top_p."""
    logits = exponents * np.log(2.0)
    with jax.enable_x64(True):
        actual = _warp(logits, temperature, top_k, top_p)
    for row in range(3):
        expected = sorted_warp(logits[row], temperature[row], top_k[row], top_p[row])
        np.testing.assert_allclose(actual[row], expected, rtol=1e-12)


@pytest.mark.parametrize("min_p, kept", [(0.0, 4), (0.25, 3), (0.26, 2), (0.5, 2), (1.0, 1)])
def test_min_p_is_a_share_of_the_largest(min_p, kept):
    law = _warp(jnp.log(jnp.array([[1.0, 8.0, 2.0, 4.0]])), 1.0, 0, 1.0, min_p)[0]
    weights = np.array([1.0, 8.0, 2.0, 4.0]) * np.isin(np.arange(4), [1, 3, 2, 0][:kept])
    np.testing.assert_allclose(law, weights / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("top_p, kept", [(0.5, 2), (0.51, 3), (0.25, 1), (1.0, 4)])
def test_top_p_stops_as_soon_as_the_share_is_held(top_p, kept):
    law = _warp(jnp.zeros((1, 4)), 1.0, 0, top_p)[0]
    np.testing.assert_array_equal(law, np.float32([1 / kept] * kept + [0] * (4 - kept)))


def test_top_p_holds_a_share_of_what_top_k_left():
    law = _warp(jnp.log(jnp.array([[4.0, 3.0, 2.0, 1.0]])), 1.0, 2, 0.5)[0]
    np.testing.assert_array_equal(law, [1, 0, 0, 0])


def test_a_row_without_top_p_keeps_what_float32_sums_do_not_see():
    logits = jnp.array([[0.0, -1.0, -30.0], [0.0, -1.0, -30.0]])
    law = _warp(logits, 1.0, 0, jnp.array([0.5, 1.0]))
    assert law[0].tolist() == [1, 0, 0] and law[1, 2] > 0


def test_settings_do_not_compile_again():
    def warps(logits_BV, *settings):
        nonlocal traces
        traces += 1
        return warp(logits_BV, *settings)

    traces, compiled = 0, jax.jit(warps)
    for setting in [(0.0, 0, 1.0), (0.7, 3, 0.5), (2.0, 1, 0.1)]:
        compiled(jnp.zeros((2, V)), *setting)
    assert traces == 1


@pytest.mark.parametrize("temperature, top_k", [(0.0, 0), (1e-30, 0), (1.0, 1)])
def test_greedy_is_the_first_largest_logit(temperature, top_k):
    logits = jnp.array([[-3.0, 2.0, -jnp.inf, 2.0 - 1e-6, 1.0], [0.0, 7.0, 7.0, -1.0, 7.0]])
    law = np.asarray(_warp(logits, temperature, top_k, 1.0))
    assert law[0].tolist() == [0, 1, 0, 0, 0]
    expected = [0, 1 / 3, 1 / 3, 0, 1 / 3] if temperature == 1e-30 else [0, 1, 0, 0, 0]
    np.testing.assert_allclose(law[1], expected, rtol=1e-6)


def test_extreme_logits_stay_finite_and_tiny_tokens_are_kept():
    law = _warp(jnp.array([[1e30, -1e30, 0.0], [0.0, -80.0, -jnp.inf]], jnp.float32), 1.0, 0, 1.0)
    np.testing.assert_array_equal(law[0], [1, 0, 0])
    assert 0 < law[1, 1] < 1e-30 and law[1, 2] == 0


def test_settings_broadcast_over_positions_and_low_precision_is_computed_in_float32():
    logits = jax.random.normal(jax.random.key(0), (2, 3, V)).astype(jnp.bfloat16)
    law = _warp(logits, jnp.array([[0.0], [0.7]]), jnp.array([[0], [3]]), 1.0)
    assert law.shape == (2, 3, V) and law.dtype == jnp.float32
    np.testing.assert_array_equal(law[0], jax.nn.one_hot(jnp.argmax(logits[0], axis=-1), V))
    np.testing.assert_array_equal(np.sum(law[1] > 0, axis=-1), 3)


def test_noise_depends_on_key_and_position_only():
    keys = jax.random.split(jax.random.key(3), 4)
    positions = jnp.array([[5, 6, 7], [0, 5, 9], [5, 5, 1 << 20], [2, 3, 4]])
    noise = gumbel(keys, positions, V)
    assert noise.shape == (4, 3, V) and noise.dtype == jnp.float32
    for row, column in np.ndindex(4, 3):
        alone = gumbel(keys[row : row + 1], positions[row : row + 1, column : column + 1], V)
        np.testing.assert_array_equal(alone[0, 0], noise[row, column])
    np.testing.assert_array_equal(noise[2, 0], noise[2, 1])
    assert len(np.unique(noise)) == 11 * V


def test_noise_is_gumbel_and_resolves_rare_tokens():
    noise = np.asarray(gumbel(jax.random.key(0)[None], jnp.arange(2000)[None], 100)).ravel()
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > 0.01
    # With 23 bits, the largest of 2e5 draws would be one of 84 values at equal distance.
    assert len(np.unique(np.sort(noise)[-1000:])) == 1000


def test_choice_follows_the_law():
    law = jnp.array([0.5, 0.0, 0.25, 0.2, 0.05])
    noise = gumbel(jax.random.key(1)[None], jnp.arange(100_000)[None], 5)[0]
    count = np.bincount(jax.jit(choose)(law, noise), minlength=5)
    assert count[1] == 0
    assert stats.chisquare(count[[0, 2, 3, 4]], 1e5 * np.asarray(law)[[0, 2, 3, 4]]).pvalue > 0.01


def test_choice_from_one_token_ignores_the_noise():
    law = jnp.eye(3)
    noise = jnp.array([[-50.0, 30.0, 30.0], [30.0, -50.0, 30.0], [30.0, 30.0, -50.0]])
    assert choose(law, noise).tolist() == [0, 1, 2]


def test_broken_laws_give_an_existing_token():
    assert choose(jnp.full((1, 3), jnp.nan), jnp.zeros((1, 3))).tolist() == [2]
