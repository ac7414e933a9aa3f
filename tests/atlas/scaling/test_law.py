import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas.scaling import law as laws


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_saturation_reproduces_published_values():
    D = np.array([1, 2, 4, 8, 16, 40.0])
    expected = [1, 1.9682, 3.7257, 6.6241, 10.5825, 15.1675]
    np.testing.assert_allclose(laws.saturation(D, 1.0, 1 / 15.387756), expected, atol=6e-5)
    D = np.array([0.5, 1, 2, 4, 1e9])
    np.testing.assert_allclose(laws.saturation(D, 1.0, 1.0), [0.5, 1, 1.6321, 1.9502, 2], atol=6e-5)


def test_saturation_limits():
    assert laws.saturation(0.0, 5.0, 0.1) == 0.0
    assert laws.saturation(7.0, 2.0, 0.0) == 7.0
    np.testing.assert_allclose(laws.saturation(7.0, 2.0, 1e-9), 7.0, rtol=1e-8)
    np.testing.assert_allclose(laws.saturation(1e9, 2.0, 0.1), 2.0 * 11.0, rtol=1e-12)
    assert laws.saturation(7.0, jnp.inf, 0.1) == 7.0


def test_saturation_has_slope_one_on_both_sides_of_one_epoch():
    slope = jax.grad(laws.saturation)
    for D in (1.0 - 1e-9, 1.0, 1.0 + 1e-9):
        np.testing.assert_allclose(slope(D, 1.0, 0.7), 1.0, atol=1e-8)


@pytest.mark.parametrize("D, U", [(0.0, 1.0), (0.0, jnp.inf), (1.0, 1.0), (3.0, jnp.inf), (3.0, 1.0)])
@pytest.mark.parametrize("lam", [0.0, 1e-7, 0.1])
def test_saturation_gradients_are_finite_and_right(D, U, lam):
    gradient = jax.grad(laws.saturation, (0, 1, 2))(D, U, lam)
    assert np.isfinite(gradient).all()
    if U == 1.0 and D == 3.0:
        step = 1e-6
        numeric = (laws.saturation(D, U, lam + step) - laws.saturation(D, U, lam - step)) / (2 * step)
        np.testing.assert_allclose(gradient[2], numeric, rtol=1e-5)


def test_guard_is_inactive_above_and_falls_slowly_below_zero():
    D, U = jnp.array([1.0, 9.0]), jnp.array([jnp.inf, jnp.inf])
    exact = laws.effective_tokens(D, U, jnp.array([1.0, 0.2]), 0.1)
    np.testing.assert_allclose(exact, 2.8, rtol=1e-12)
    low = laws.effective_tokens(D, U, jnp.array([1.0, -0.2]), 0.1, guard=1e-2)
    assert 0.0 < low < 2e-2
    assert jax.grad(lambda t: laws.effective_tokens(D, U, jnp.array([1.0, t]), 0.1, guard=1e-2))(-0.2) > 0.0
    np.testing.assert_allclose(laws.kept_positive(jnp.array([-1.0, 0.0]), 1e-3), [9.6e-7, 6.93e-4], rtol=1e-3)
    sides = [jax.grad(laws.kept_positive)(z, 1e-3) for z in (-1e-12, 1e-12)]
    np.testing.assert_allclose(sides, 0.5, rtol=1e-6)
    # Even all tokens against the target leave a loss that a person can read.
    assert laws.chinchilla(1.0, laws.effective_tokens(D, U, jnp.array([1.0, -9.0]), 0.1), 2.0, 0.0, 0.3, 2.0, 0.3) < 1e3


def test_substitution_is_the_sum_at_one_and_proportional_to_tokens():
    D, U, tau = jnp.array([1.0, 4.0, 5.0]), jnp.array([0.5, jnp.inf, jnp.inf]), jnp.array([1.0, 0.3, 0.1])
    worth = laws.effective_tokens(D, U, tau, 0.1, 0.6)
    np.testing.assert_allclose(laws.effective_tokens(D, U, tau, 0.1, 1.0), laws.effective_tokens(D, U, tau, 0.1))
    np.testing.assert_allclose(laws.effective_tokens(7 * D, 7 * U, tau, 0.1, 0.6), 7 * worth, rtol=1e-12)
    S = np.asarray(laws.saturation(D, U, 0.1))
    np.testing.assert_allclose(worth, np.sum(tau * S**0.6) ** (1 / 0.6), rtol=1e-12)
    alone = laws.effective_tokens(jnp.array([3.0, 0.0, 0.0]), U, tau, 0.0, 0.6)
    np.testing.assert_allclose(alone, 3.0, rtol=1e-12)
    assert laws.effective_share(D, U, -tau, 0.1, 0.6) == -laws.effective_share(D, U, tau, 0.1, 0.6)
    slope = jax.grad(lambda eta: laws.effective_tokens(jnp.array([3.0, 0.0, 1.0]), U, tau, 0.1, eta))(0.6)
    assert np.isfinite(slope)


def test_number_of_languages():
    D = jnp.array([[5.0, 0.0, 0.0], [2.0, 2.0, 2.0], [1.0, 1.0, 0.0]])
    np.testing.assert_allclose(laws.num_languages(D), [1.0, 3.0, 2.0], rtol=1e-12)


def test_atlas_reduces_to_chinchilla():
    law = (1.8, 480.0, 0.35, 2100.0, 0.37)
    D, U = jnp.array([1e9, 3e9]), jnp.full(2, jnp.inf)
    own = laws.atlas(1e8, D, U, *law, transfer=jnp.array([1.0, 0.0]), lam=0.1)
    np.testing.assert_allclose(own, laws.chinchilla(1e8, 1e9, *law), rtol=1e-12)
    total = laws.atlas(1e8, D, U, *law, transfer=jnp.ones(2), lam=0.1)
    np.testing.assert_allclose(total, laws.chinchilla(1e8, 4e9, *law), rtol=1e-12)
    cursed = laws.atlas(1e8, D[:1].repeat(2), U, *law, transfer=jnp.array([1.0, 0.0]), lam=0.1, phi=0.11)
    scaled = laws.chinchilla(1e8, 1e9, 1.8, 480.0 * 2**0.11, *law[2:])
    np.testing.assert_allclose(cursed, scaled, rtol=1e-12)


def test_bilingual_transfer_score_follows_from_tau():
    # At equal loss, sigma tokens of an even mixture are worth (1 + tau)/2 * sigma of the target's own.
    for tau, score in ((1 / 3, 0.5), (-0.1031, -0.23), (-4 / 9, -1.6)):
        half = jnp.array([0.5, 0.5])
        sigma = 1.0 / laws.effective_tokens(half, jnp.full(2, jnp.inf), jnp.array([1.0, tau]), 0.1)
        np.testing.assert_allclose(2.0 - sigma, score, atol=5e-4)


def test_data_constrained_is_chinchilla_without_repeats_or_excess_parameters():
    A, B, exponent = 521.0, 1488.0, 0.3526596
    N_optimal = (A / B) ** (1 / exponent) * 1e10
    np.testing.assert_allclose(N_optimal, 0.051 * 1e10, rtol=0.01)
    law = (1.87, A, exponent, B, exponent)
    few = laws.data_constrained(0.9 * N_optimal, 1e10, 1e10, *law, 15.39, 5.31)
    np.testing.assert_allclose(few, laws.chinchilla(0.9 * N_optimal, 1e10, *law), rtol=1e-12)
    many = laws.data_constrained(9 * N_optimal, 4e10, 1e10, *law, 15.39, 5.31)
    assert many > laws.chinchilla(9 * N_optimal, 4e10, *law)
