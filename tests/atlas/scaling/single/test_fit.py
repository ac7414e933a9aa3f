import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pandas as pd
import pytest

from atlas.scaling import LAWS, Fit, Law, Parameter, bootstrap, fit, load_runs
from atlas.scaling.law import chinchilla
from atlas.scaling.single.fit import _astray
from checked import UserError

LAW = {"E": 1.7, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
PARAMETERS = (
    *(
        Parameter("E", positive=False),
        "A",
        Parameter("alpha", role="exponent"),
        "B",
        Parameter("beta", role="exponent"),
    ),
)
CHINCHILLA = pathlib.Path(os.environ.get("ATLAS_SHARED", "../shared")) / "runs" / "chinchilla.csv"


def study(sigma=0.0, seed=0, sizes=5, tokens=7, ratio=None):
    rng = np.random.default_rng(seed)
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, sizes), np.geomspace(3e9, 1e12, tokens)))
    D = N * ratio if ratio else D
    with jax.enable_x64(True):
        loss = np.asarray(chinchilla(N, D, *LAW.values())) * np.exp(sigma * rng.normal(size=N.size))
    return load_runs(pd.DataFrame({"num_params": N, "tokens": D, "loss": loss}))


def test_240_chinchilla_points_reach_the_known_optimum():
    if not CHINCHILLA.is_file():
        pytest.skip(f"the 240 points of Chinchilla are not at {CHINCHILLA}")
    law = fit("chinchilla", load_runs(CHINCHILLA))
    assert law.converged and law.starts_agreeing > 0.5
    assert law.objective <= 1.018274017801e-3 * (1 + 1e-9)
    expected = {"A": (477.826, 0.05), "B": (2143.42, 0.5), "E": (1.817218, 1e-5)}
    expected |= {"alpha": (0.347310, 1e-5), "beta": (0.367172, 1e-5)}
    for name, (value, tolerance) in expected.items():
        assert abs(law.parameters[name].value - value) <= tolerance, name
    # Standard errors of 4,000 resamples of points.
    for name, error in {"E": 0.02566, "alpha": 0.0154, "beta": 0.0206, "A": 124.5}.items():
        assert law.parameters[name].se == pytest.approx(error, rel=0.15), name


@pytest.mark.parametrize("objective", ["huber", "least_squares", "lad"])
def test_exact_data_give_the_law_back(objective):
    law = fit("chinchilla", study(), objective=objective)
    for name, value in LAW.items():
        assert law.parameters[name].value == pytest.approx(value, rel=1e-5), name
        assert law.parameters[name].identified
    assert law.warnings == ()


def test_intervals_cover_the_truth():
    runs = [study(sigma=0.005, seed=seed) for seed in range(20)]
    inside = [p.low <= LAW[name] <= p.high for r in runs for name, p in fit("chinchilla", r).parameters.items()]
    assert 0.75 <= np.mean(inside) <= 0.98


def test_document_names_the_coordinates_of_its_covariance():
    law = fit("chinchilla", study(sigma=0.005))
    document = json.loads(json.dumps(law.to_json(), allow_nan=False))
    found = document["covariance"]
    assert found["coordinates"] == ["log E", "log A", "log alpha", "log B", "log beta"]
    assert found["centre"]["N"] == pytest.approx(1e9) and found["freedom"] == law.freedom
    for i, estimate in enumerate(document["parameters"].values()):
        assert np.sqrt(found["matrix"][i][i]) == pytest.approx(estimate["se"] / estimate["value"], rel=1e-6)


def test_a_fit_from_json_predicts_as_the_fit_did(tmp_path):
    law = fit("chinchilla", study(sigma=0.005))
    plain = json.loads(json.dumps(law.to_json(), allow_nan=False))
    again = Fit.from_json(plain)
    for found, expected in (
        (again.predict(3e10, 1e12), law.predict(3e10, 1e12)),
        (again.interval(1e9, 1e10), law.interval(1e9, 1e10)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert again.values == pytest.approx(law.values) and again.to_json() == plain
    with pytest.raises(UserError, match="read from JSON has no runs"):
        bootstrap(again, 10)
    for key, value in (("law", "nolaw"), ("parameters", {}), ("covariance", None), ("reading", {"residual": "log"})):
        with pytest.raises(UserError, match=r"^[^\n]+$"):
            Fit.from_json(plain | {key: value})
    plain["parameters"]["alpha"]["value"] = float("nan")
    with pytest.raises(UserError, match="not finite numbers"):
        Fit.from_json(plain)


def test_raw_residuals_take_losses_of_any_sign():
    frame = study(sigma=0.0).frame.assign(loss=lambda t: t.loss - 2.5)
    shifted = Law(
        "shifted", "", lambda p, x: chinchilla(x["N"], x["D"], *(p[name] for name in LAW)), PARAMETERS, ("N", "D")
    )
    found = fit(shifted, load_runs(frame, signed=True), residual="raw")
    assert found.converged and found.values == pytest.approx(LAW | {"E": LAW["E"] - 2.5}, rel=1e-4)
    low, high = found.interval(1e9, 1e11)
    assert low <= found.predict(1e9, 1e11)[0] <= high
    with pytest.raises(UserError, match="give --residual=raw"):
        fit(shifted, load_runs(frame, signed=True))
    # Least squares of raw losses is what the guide's code does; the optimum is that of SciPy's curve_fit.
    squares = fit("chinchilla", study(sigma=0.01), residual="raw", objective="least_squares")
    assert squares.objective == pytest.approx(
        0.5 * np.sum((study(sigma=0.01).loss - squares.predict_runs(study())[0]) ** 2)
    )


def early(sigma=0.002, bump=0.3):
    """Curves of six sizes, whose first quarter lies above the law."""
    N, part = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 6), np.linspace(0.05, 1.0, 20)))
    D = 20 * N**0.9 * part * 10
    noise = np.exp(sigma * np.random.default_rng(0).normal(size=N.size) + bump * (part < 0.25))
    loss = (1.7 + 480.0 / N**0.35 + 2100.0 / D**0.37) * noise
    return load_runs(pd.DataFrame({"run": N.astype(str), "num_params": N, "tokens": D, "loss": loss}))


def test_early_rows_are_left_out_where_that_predicts_better():
    runs = early()
    found, all_rows = fit("chinchilla", runs), fit("chinchilla", runs, warm_up=0)
    assert all_rows.n_rows == 120 and found.n_rows < 120
    assert any(warning.startswith(f"left out {120 - found.n_rows} of 120 rows") for warning in found.warnings)
    truth = 1.7 + 480.0 / 1e11**0.35 + 2100.0 / 2e12**0.37
    error = [abs(float(law.predict(1e11, 2e12)[0]) / truth - 1) for law in (found, all_rows)]
    assert error[0] < 0.03 and error[0] < error[1]
    low, high = found.run_interval(1e11, 2e12)
    assert low < found.interval(1e11, 2e12)[0] and found.interval(1e11, 2e12)[1] < high
    assert fit("chinchilla", runs, warm_up=0.5).n_rows < 70


def bent(by):
    """Finals of seven sizes, noisy, under a law that bends away at the largest ones by `by` in log loss."""
    table = study(sigma=0.003, sizes=7).frame
    return load_runs(table.assign(loss=table["loss"] * np.exp(by * np.log10(table["num_params"] / 1e8) ** 2 / 4.0)))


def test_misfit_is_what_smaller_runs_miss_of_the_largest_beyond_noise():
    straight, off = (fit("chinchilla", bent(by)) for by in (0.0, 0.1))
    assert straight.misfit < 0.003 < 0.007 < off.misfit
    again = Fit.from_json(json.loads(json.dumps(off.to_json())))
    assert again.misfit == pytest.approx(off.misfit)
    widths = [np.log(high / low) for low, high in (off.run_interval(1e11, 2e12), again.run_interval(1e11, 2e12))]
    assert widths[0] == pytest.approx(widths[1]) and widths[0] > 2 * 1.645 * off.misfit
    # Two sizes predict no third, and a table without tokens says nothing of compute.
    assert fit("chinchilla", study(sizes=2)).misfit == 0.0


def test_exponents_of_three_sizes_are_drawn_to_published_ones():
    runs, name = early(bump=0.0), "exponents are drawn to 0.35"
    third = np.unique(runs.N)[2]
    three = runs.where(third >= runs.N)
    assert any(name in warning for warning in fit("chinchilla", three).warnings)
    for exact in (fit("chinchilla", runs), fit("chinchilla", three, warm_up=0.3)):
        assert not any(name in warning for warning in exact.warnings)


@pytest.mark.parametrize(("E", "says"), [(0.01, "E runs to 0: "), (1.7, "add runs")])
def test_a_fit_that_did_not_converge_says_what_would_mend_it(E, says):
    assert says in _astray(LAWS["chinchilla"], np.log([E, *list(LAW.values())[1:]]), study())


def test_a_cut_that_leaves_an_exponent_open_is_none():
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 2), np.geomspace(1e10, 1e12, 5)))
    loss = 1.7 + 480.0 / N**0.35 + 2100.0 / D**0.37
    found = fit(
        "chinchilla", load_runs(pd.DataFrame({"run": N.astype(str), "num_params": N, "tokens": D, "loss": loss}))
    )
    assert found.n_rows == 6 and not any("token counts" in warning for warning in found.warnings)


def test_what_a_prior_decides_is_not_identified():
    known = [
        dataclasses.replace(p, prior=(np.log(0.3), 0.02)) if p.name == "alpha" else p
        for p in LAWS["chinchilla"].parameters
    ]
    found = fit(dataclasses.replace(LAWS["chinchilla"], parameters=known), study(sigma=0.02))
    assert not found.parameters["alpha"].identified
    assert "alpha not identified: its prior decides it" in found.warnings
    assert not found.parameters["A"].identified and not found.parameters["E"].identified
    assert "A, E not identified: the prior of alpha decides it" in found.warnings


def test_intervals_of_six_rows_are_those_of_one_degree_of_freedom():
    law = fit("chinchilla", study(sigma=0.005).where(np.isin(np.arange(35), [0, 6, 10, 17, 28, 34])))
    assert law.freedom == 1.0
    beta = law.parameters["beta"]
    assert np.log(beta.high / beta.value) / (beta.se / beta.value) == pytest.approx(6.3138, rel=1e-4)


def test_outliers_move_huber_little():
    frame = study(sigma=0.002).frame
    frame.loc[3, "loss"] *= 1.2
    runs = load_runs(frame)
    robust, squares = (
        fit("chinchilla", runs, objective=o).parameters["alpha"].value for o in ("huber", "least_squares")
    )
    assert abs(robust - 0.35) < 0.5 * abs(squares - 0.35)


@pytest.mark.parametrize(
    "design, lost, known",
    [
        ({"sizes": 2, "tokens": 18}, {"E", "A", "alpha"}, {"beta"}),
        ({"tokens": 2, "sizes": 18}, {"E", "B", "beta"}, {"alpha"}),
        ({"ratio": 20.0}, {"A", "alpha", "B", "beta"}, set()),
    ],
)
def test_designs_that_cannot_tell_are_flagged(design, lost, known):
    law = fit("chinchilla", study(sigma=0.003, **design))
    assert {name for name, p in law.parameters.items() if not p.identified} >= lost
    assert all(law.parameters[name].identified for name in known)
    assert any("not identified" in warning for warning in law.warnings)
    if "sizes" in design:
        assert any(law.parameters[n].high > 100 * law.parameters[n].low for n in lost)
    json.dumps(law.to_json(), allow_nan=False)


def test_prediction_is_the_law_and_its_band_grows_outside_the_data():
    law = fit("chinchilla", study(sigma=0.005))
    natural = [law.parameters[name].value for name in LAW]
    with jax.enable_x64(True):
        expected = np.asarray(chinchilla(np.array([1e9, 1e13]), np.array([1e11, 1e16]), *natural))
    loss, deviation = law.predict([1e9, 1e13], [1e11, 1e16])
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert 0 < deviation[0] < deviation[1]


def test_the_caller_keeps_float32():
    fit("chinchilla", study()).predict(1e9, 1e10)
    assert jax.numpy.ones(1).dtype == np.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"law": "chinchila"}, "did you mean 'chinchilla'"),
        ({"objective": "l2"}, "unknown objective"),
        ({"delta": -1.0}, "delta must be a positive"),
        ({"tokens": "most"}, "unknown meaning of tokens"),
        ({"residual": "square"}, "unknown residual"),
        ({"law": "nowhere.py:moe"}, "no file 'nowhere.py' for the law 'moe'"),
        ({"law": "parallel"}, "needs column 'parallel_size', which the runs table lacks"),
    ],
)
def test_wrong_options_are_user_errors(change, message):
    options = {"law": "chinchilla", "runs": study()} | change
    with pytest.raises(UserError, match=message):
        fit(**options)


def test_too_few_rows_and_several_languages_are_user_errors():
    with pytest.raises(UserError, match="3 rows cannot determine the 5"):
        fit("chinchilla", study().where(np.arange(35) < 3))
    frame = study().frame.assign(language=["fr"] * 20 + ["de"] * 15)
    with pytest.raises(UserError, match='language == "fr"'):
        fit("chinchilla", load_runs(frame))


def test_a_descent_into_a_wall_has_not_converged():
    """The loss is no number below E = 1.9, and the runs ask for 1.7."""

    def loss(p, x):
        return p["E"] + 0.0 * (p["E"] - 1.9) ** 0.5 + p["A"] * x["N"] ** -p["alpha"] + p["B"] * x["D"] ** -p["beta"]

    def law(*of_E):
        return Law("walled", "a test", loss, [*of_E, *PARAMETERS[1:]], ["N", "D"])

    with pytest.raises(UserError, match="no finite loss at any start"):
        fit(law("E"), study(0.002))
    walled = fit(law(Parameter("E", starts=(2.0, 2.5))), study(0.002))
    assert not walled.converged and any("did not reach" in warning for warning in walled.warnings)


def test_the_noise_of_few_rows_is_not_what_is_left_of_them():
    found = [fit("chinchilla", study(0.01, seed, sizes=4, tokens=4)).diagnostics.sigma for seed in range(30)]
    assert 0.0075 <= np.median(found) <= 0.0125  # what their median size alone would tell is .006


def test_a_corner_is_of_the_huber_loss():
    with pytest.raises(UserError, match="lad has none"):
        fit("chinchilla", study(), objective="lad", delta=0.01)
