"""The capacity law of all languages, from simulated runs of the law."""

import json

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import load_runs
from atlas.scaling.law import capacity
from atlas.scaling.transfer.capacity import fit_capacity
from checked import UserError

TRUTH = {"alpha": 0.4, "beta": 0.28, "phi": 0.11, "psi": -0.04}
LEVELS = {"a": (0.7, 500.0, 120.0), "b": (0.8, 450.0, 150.0), "c": (0.6, 550.0, 100.0), "d": (0.75, 480.0, 130.0)}
LANGUAGES = (*LEVELS, *(f"unevaluated{i}" for i in range(12)))


def loss_of(language, N, K, D):
    E, A, B = LEVELS[language]
    return capacity(N, K, D, E=E, A=A, B=B, **TRUTH)


def simulate(noise=0.003, run_noise=0.0, sizes=(1e7, 5e7, 2e8, 1e9), counts=(1, 2, 4, 8, 16), seed=0):
    """Runs of K languages sampled evenly, those of fewer than four in as many mixtures as cover the four."""
    random, rows = np.random.default_rng(seed), []
    for N in sizes:
        for K in counts:
            for total in (2e9, 2e10):
                for first in range(0, 4, K):
                    mixture, shared = LANGUAGES[first : first + K], run_noise * random.normal()
                    row = {"run": f"{N}-{total}-{mixture}", "num_params": N}
                    for part in (0.25, 0.5, 1.0):
                        D = total * part / K
                        tokens = {f"tokens.{language}": D for language in mixture}
                        for language in sorted(LEVELS.keys() & mixture):
                            loss = loss_of(language, N, K, D) * np.exp(shared + noise * random.normal())
                            rows.append(row | tokens | {"language": language, "loss": loss})
    return load_runs(pd.DataFrame(rows))


@pytest.fixture(scope="module")
def exact():
    return fit_capacity(simulate(noise=0.0))


def test_law_identities():
    law = {"E": 0.7, "A": 500.0, "B": 120.0, **TRUTH}
    assert capacity(1e8, 1, 1e9, **law) == 0.7 + 500 / 1e8**0.4 + 120 / 1e9**0.28
    total = 6 * 1e9
    data_term = law["B"] * 6 ** (law["psi"] + law["beta"]) / total ** law["beta"]
    rest = law["E"] + law["A"] * 6 ** law["phi"] / 1e8 ** law["alpha"]
    assert capacity(1e8, 6, 1e9, **law) == pytest.approx(rest + data_term, rel=1e-14)


def test_exact_data_give_the_truth(exact):
    for name, value in TRUTH.items():
        assert exact.parameters[name].value == pytest.approx(value, abs=2e-5), name
    assert exact.parameters["A[b]"].value == pytest.approx(450, rel=1e-3)
    assert exact.r2 > 0.999999
    assert json.loads(json.dumps(exact.to_json(), allow_nan=False))["parameters"].keys() == exact.parameters.keys()
    assert all(parameter.identified for parameter in exact.parameters.values())


def test_noisy_recovery_with_honest_intervals():
    hits, fits = [], [fit_capacity(simulate(noise=0.004, run_noise=0.004, seed=seed)) for seed in range(15)]
    for fit in fits:
        for name, value in TRUTH.items():
            hits.append(fit.parameters[name].low <= value <= fit.parameters[name].high)
        assert abs(fit.parameters["phi"].value - 0.11) < 0.03
    assert 0.78 <= np.mean(hits) <= 0.99
    assert np.median([fit.rho for fit in fits]) == pytest.approx(0.5, abs=0.2)


def test_what_the_runs_cannot_tell_is_said():
    mono = fit_capacity(simulate(counts=(1,)))
    assert not mono.parameters["phi"].identified and not mono.parameters["psi"].identified
    assert any("same number of languages" in warning for warning in mono.warnings)
    one_size = fit_capacity(simulate(sizes=(1e8,)))
    assert not one_size.parameters["alpha"].identified
    assert any("model size" in warning for warning in one_size.warnings)
    with pytest.raises(UserError, match="too few"):
        fit_capacity(simulate().where(np.arange(len(simulate())) < 5))


def test_only_rows_to_which_the_law_applies_are_fitted():
    runs = simulate()
    extra = {"num_params": 1e7, "loss": 9.0, "tokens.a": 8.0, "unique_tokens.a": 10.0, "phase": "cooldown"}
    odd = [
        {"run": "uneven", "language": "a", "tokens.b": 2.0},
        {"run": "other", "language": "b"},
        {"run": "repeats", "language": "a", "tokens.a": 50.0},
        {"run": "trunk", "language": "a", "phase": "trunk"},
    ]
    table = pd.concat([runs.frame.assign(phase="cooldown"), pd.DataFrame([extra | row for row in odd])])
    fit, plain = fit_capacity(load_runs(table)), fit_capacity(runs)
    assert fit.n_rows == len(runs) and fit.parameters == plain.parameters
    assert [note for note in fit.warnings if "were left out" in note] == list(fit.warnings) and len(fit.warnings) == 4
    for part in ("do not sample", "not trained on", "4 epochs", "not cooled down"):
        assert any("1 rows" in note and part in note for note in fit.warnings), part
