import json

import numpy as np
import pandas as pd
import pytest

from atlas.errors import UserError
from atlas.scaling.planning.expansion import (
    PUBLISHED_EXPONENTS,
    CapacityExponents,
    expand,
    iso_loss,
    keep_params,
    keep_tokens,
)
from atlas.scaling.transfer.capacity import capacity_loss, capacity_rows, fit_capacity

# α and β as the two printed exponents alone imply them (.4527, .1471): the checked points of the curve use
# these.
ROUNDED = CapacityExponents(alpha=0.11 / 0.243, beta=0.04 / 0.272, phi=0.11, psi=-0.04)
R = np.array([2.0, 4.0, 8.0, 16.0])
TRUTH = {"alpha": 0.4, "beta": 0.28, "phi": 0.11, "psi": -0.04}
LEVELS = {
    "a": (0.7, 500.0, 120.0),
    "b": (0.8, 450.0, 150.0),
    "c": (0.6, 550.0, 100.0),
    "d": (0.75, 480.0, 130.0),
}


def simulate(noise=0.003, run_noise=0.0, sizes=(1e7, 5e7, 2e8, 1e9), counts=(1, 2, 4, 8, 16), seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for N in sizes:
        for K in counts:
            for total in (2e9, 2e10):
                offset = run_noise * rng.normal()
                for language, (E, A, B) in LEVELS.items():
                    offset = run_noise * rng.normal() if K == 1 else offset
                    for part in (0.25, 0.5, 1.0):
                        D = total * part / K
                        loss = capacity_loss({"E": E, "A": A, "B": B, **TRUTH}, N, K, D)
                        run = f"{N}-{K}-{total}-{language if K == 1 else ''}"
                        loss *= np.exp(offset + noise * rng.normal())
                        rows.append((run, language, N, K, D, loss))
    return pd.DataFrame(rows, columns=["run", "language", "num_params", "K", "tokens", "loss"])


def test_published_multipliers():
    got = expand(R)
    np.testing.assert_array_equal(np.round(got.params, 2), [1.18, 1.40, 1.66, 1.96])
    np.testing.assert_array_equal(np.round(got.tokens, 2), [1.66, 2.74, 4.54, 7.52])
    np.testing.assert_allclose(got.compute, [1.96, 3.84, 7.52, 14.72], rtol=2e-3)
    for values, exponent in ((got.params, 0.243), (got.tokens, 0.728), (got.compute, 0.970)):
        np.testing.assert_array_equal(np.round(np.log(values) / np.log(R), 3), exponent)
    assert expand(4.0).tokens_per_language == pytest.approx(0.686, abs=5e-4)


def test_cheapest_point_is_the_minimum_of_the_curve():
    u = np.linspace(1e-3, 1 - 1e-3, 200_001)
    for share in (PUBLISHED_EXPONENTS.optimal_share, 0.1, 0.6):
        for r in R:
            curve = iso_loss(r, u, share=share)
            best = np.argmin(curve.compute)
            closed = expand(r, share=share)
            assert curve.params[best] == pytest.approx(closed.params, rel=1e-3)
            assert curve.compute[best] == pytest.approx(closed.compute, rel=1e-8)
    np.testing.assert_allclose([expand(r, ROUNDED).params for r in R], [1.183, 1.401, 1.657, 1.962], atol=6e-4)


def test_one_of_both_kept():
    np.testing.assert_allclose(keep_params(R, ROUNDED).tokens, [1.978, 3.988, 8.221, 17.387], atol=2e-3)
    kept = keep_tokens(R, ROUNDED).params
    np.testing.assert_allclose(kept[:3], [2.152, 6.266, 41.6], rtol=1e-3)
    assert np.isnan(kept[3])
    np.testing.assert_allclose(keep_params(R).params, 1.0)
    np.testing.assert_allclose(keep_tokens(R, ROUNDED).tokens[:3], 1.0)


def test_iso_loss_keeps_the_loss():
    law = {"E": 0.7, "A": 500.0, "B": 120.0, **TRUTH}
    N, K, D = 3e8, 4, 5e9
    exponents = CapacityExponents(**TRUTH)
    loss = capacity_loss(law, N, K, D)
    share = law["A"] * K ** law["phi"] / N ** law["alpha"] / (loss - law["E"])
    for u in (0.1, 0.5, 0.8):
        point = iso_loss(3.0, u, exponents, share)
        moved = capacity_loss(law, N * point.params, K * 3, D * point.tokens_per_language)
        assert moved == pytest.approx(loss, rel=1e-12)
    # Off the optimum part of the saving is from moving there: r = 1 already saves.
    assert expand(1.0, exponents, share).compute < 1
    assert expand(1.0, exponents).compute == pytest.approx(1)


def test_bad_expansions():
    for call in (lambda: expand(0.0), lambda: expand(2.0, share=1.0), lambda: keep_params(2.0, share=-0.1)):
        with pytest.raises(UserError):
            call()
    with pytest.raises(UserError, match="alpha and beta"):
        expand(2.0, CapacityExponents(-0.1, 0.2, 0.1, 0.0))


def test_law_identities():
    law = {"E": 0.7, "A": 500.0, "B": 120.0, **TRUTH}
    assert capacity_loss(law, 1e8, 1, 1e9) == 0.7 + 500 / 1e8**0.4 + 120 / 1e9**0.28
    total = 6 * 1e9
    data_term = law["B"] * 6 ** (law["psi"] + law["beta"]) / total ** law["beta"]
    rest = law["E"] + law["A"] * 6 ** law["phi"] / 1e8 ** law["alpha"]
    assert capacity_loss(law, 1e8, 6, 1e9) == pytest.approx(rest + data_term, rel=1e-14)


def test_exact_data_give_the_truth():
    fit = fit_capacity(simulate(noise=0.0))
    for name, value in TRUTH.items():
        assert fit.parameters[name].value == pytest.approx(value, abs=2e-5), name
    assert fit.parameters["A[b]"].value == pytest.approx(450, rel=1e-3)
    assert fit.r2 > 0.999999
    assert all(parameter.identified for parameter in fit.parameters.values())


def test_noisy_recovery_with_honest_intervals():
    hits, fits = [], [fit_capacity(simulate(noise=0.004, run_noise=0.004, seed=seed)) for seed in range(15)]
    for fit in fits:
        for name, value in TRUTH.items():
            hits.append(fit.parameters[name].low <= value <= fit.parameters[name].high)
        assert abs(fit.parameters["phi"].value - 0.11) < 0.03
    assert 0.78 <= np.mean(hits) <= 0.99
    assert np.median([fit.rho for fit in fits]) == pytest.approx(0.5, abs=0.2)


def test_prediction_and_share():
    fit = fit_capacity(simulate(noise=0.0))
    E, A, B = LEVELS["a"]
    truth = capacity_loss({"E": E, "A": A, "B": B, **TRUTH}, 4e9, 50, 1e9)
    assert fit.predict(4e9, 50, 1e9, "a") == pytest.approx(truth, rel=1e-4)
    assert fit.share(4e9, 50, 1e9, "a") == pytest.approx(A * 50**0.11 / 4e9**0.4 / (truth - E), rel=1e-3)
    with pytest.raises(UserError, match="unknown language"):
        fit.predict(1e9, 1, 1e9, "zz")
    json.dumps(fit.to_json(), allow_nan=False)


def test_what_the_runs_cannot_tell_is_said():
    mono = fit_capacity(simulate(counts=(1,)))
    assert not mono.parameters["phi"].identified and not mono.parameters["psi"].identified
    assert any("same number of languages" in warning for warning in mono.warnings)
    one_size = fit_capacity(simulate(sizes=(1e8,)))
    assert not one_size.parameters["alpha"].identified
    assert any("model size" in warning for warning in one_size.warnings)
    with pytest.raises(UserError, match="too few"):
        fit_capacity(simulate().head(5))
    with pytest.raises(UserError, match="positive and finite"):
        fit_capacity(simulate().assign(loss=np.nan))


def test_rows_of_a_runs_table():
    frame = pd.DataFrame(
        {
            "run": list("pqrstu"),
            "language": ["a", "a", "a", "b", "a", "a"],
            "num_params": 1e7,
            "loss": 2.0,
            "phase": ["cooldown"] * 5 + ["trunk"],
            "tokens.a": [8.0, 4.0, 6.0, 8.0, 50.0, 8.0],
            "tokens.b": [np.nan, 4.1, 2.0, 0.0, 0.0, 0.0],
            "unique_tokens.a": 10.0,
        }
    )
    rows, notes = capacity_rows(frame)
    assert list(rows.run) == ["p", "q"]
    assert list(rows.K) == [1, 2] and list(rows.tokens) == [8.0, 4.0]
    assert len(notes) == 4 and any("4 epochs" in note for note in notes)
    with pytest.raises(UserError, match="tokens"):
        capacity_rows(frame[["run", "language", "num_params", "loss"]])
