"""Expansions against the published multipliers and against the loss that they are to keep."""

import numpy as np
import pytest

from atlas.scaling.law import capacity
from atlas.scaling.planning.expansion import expansion_table, iso_loss
from atlas.scaling.transfer.capacity import CapacityExponents
from checked import UserError

# α and β as the two printed exponents alone imply them (.4527, .1471): the checked points of the curve use
# these.
ROUNDED = CapacityExponents(alpha=0.11 / 0.243, beta=0.04 / 0.272, phi=0.11, psi=-0.04)
R = np.array([2.0, 4.0, 8.0, 16.0])
TRUTH = {"alpha": 0.4, "beta": 0.28, "phi": 0.11, "psi": -0.04}


def test_published_multipliers():
    got = iso_loss(R)
    np.testing.assert_array_equal(np.round(got.params, 2), [1.18, 1.40, 1.66, 1.96])
    np.testing.assert_array_equal(np.round(got.tokens, 2), [1.66, 2.74, 4.54, 7.52])
    np.testing.assert_allclose(got.compute, [1.96, 3.84, 7.52, 14.72], rtol=2e-3)
    for values, exponent in ((got.params, 0.243), (got.tokens, 0.728), (got.compute, 0.970)):
        np.testing.assert_array_equal(np.round(np.log(values) / np.log(R), 3), exponent)
    assert iso_loss(4.0).tokens_per_language == pytest.approx(0.686, abs=5e-4)


def test_cheapest_point_is_the_minimum_of_the_curve():
    u = np.linspace(1e-3, 1 - 1e-3, 200_001)
    for r in R:
        curve = iso_loss(r, u)
        best, closed = np.argmin(curve.compute), iso_loss(r)
        assert curve.params[best] == pytest.approx(closed.params, rel=1e-3)
        assert curve.compute[best] == pytest.approx(closed.compute, rel=1e-8)
    np.testing.assert_allclose([iso_loss(r, law=ROUNDED).params for r in R], [1.183, 1.401, 1.657, 1.962], atol=6e-4)


def test_one_of_both_kept():
    table = expansion_table(R, ROUNDED)
    np.testing.assert_allclose(table.tokens_same_params, [1.978, 3.988, 8.221, 17.387], atol=2e-3)
    np.testing.assert_allclose(table.params_same_tokens[:3], [2.152, 6.266, 41.6], rtol=1e-3)
    assert np.isnan(table.params_same_tokens[3])


def test_iso_loss_keeps_the_loss():
    law = {"E": 0.7, "A": 500.0, "B": 120.0, **TRUTH}
    N, K = 3e8, 4
    capacity_term = law["A"] * K ** law["phi"] / N ** law["alpha"]
    # The tokens at which N is responsible for β/(α+β) of the reducible loss.
    D = (law["B"] * K ** law["psi"] * law["beta"] / (capacity_term * law["alpha"])) ** (1 / law["beta"])
    loss = capacity(N, K, D, **law)
    for u in (0.1, 0.5, 0.8):
        point = iso_loss(3.0, u, CapacityExponents(**TRUTH))
        moved = capacity(N * point.params, K * 3, D * point.tokens_per_language, **law)
        assert moved == pytest.approx(loss, rel=1e-12)
    assert iso_loss(1.0, law=CapacityExponents(**TRUTH)).compute == pytest.approx(1)


def test_bad_expansions():
    with pytest.raises(UserError, match="languages must be positive"):
        iso_loss(0.0)
    with pytest.raises(UserError, match="alpha and beta"):
        iso_loss(2.0, law=CapacityExponents(-0.1, 0.2, 0.1, 0.0))


def test_expansion_table_holds_the_published_figures():
    table = expansion_table([2, 4, 8, 16])
    np.testing.assert_array_equal(table.params.round(2), [1.18, 1.40, 1.66, 1.96])
    np.testing.assert_array_equal(table.tokens.round(2), [1.66, 2.74, 4.54, 7.52])
    assert np.isnan(table.params_same_tokens[3])
    np.testing.assert_allclose(table.compute, table.params * table.tokens)
