"""Published fits that any fitter must reproduce: Epoch AI's Chinchilla points and the guide's own cells."""

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import bootstrap, fit, load_runs
from tests.atlas.scaling import published_runs


@pytest.fixture(scope="module")
def points():
    return load_runs(published_runs.path("chinchilla.csv"))


@pytest.mark.parametrize(
    "options, A, B, E, alpha, beta, objective",
    [
        ({"delta": 1e-3}, 477.8259, 2143.4174, 1.817218, 0.347310, 0.367172, 1.018274017801e-3),
        ({"delta": 1e-5}, 481.386, 2081.380, 1.816684, 0.347738, 0.365761, 1.128310563e-5),
        ({"objective": "lad"}, 481.386, 2081.380, 1.816684, 0.347738, 0.365761, 1.128310563e-5),
        ({"objective": "least_squares"}, 593.322, 4875.64, 1.864550, 0.360253, 0.405883, 5.7309434959e-3),
    ],
)
def test_240_points_reach_the_optimum_of_every_objective(points, options, A, B, E, alpha, beta, objective):
    law = fit("chinchilla", points, **options)
    assert law.converged and law.starts_agreeing > 0.5
    assert law.objective <= objective * (1 + 1e-9)
    for name, value, tolerance in (("A", A, 1e-5), ("B", B, 1e-5), ("E", E, 1e-6)):
        assert law.values[name] == pytest.approx(value, rel=tolerance), name
    assert (law.values["alpha"], law.values["beta"]) == pytest.approx((alpha, beta), abs=1e-6)


@pytest.mark.parametrize("delta", [1e-4, 1e-2])
def test_other_corners_reach_an_optimum_that_all_starts_share(points, delta):
    law = fit("chinchilla", points, delta=delta)
    assert law.converged and law.starts_agreeing == 1.0 and law.diagnostics.decrement < 1e-12


def test_five_outliers_move_the_law_as_published():
    table = pd.read_csv(published_runs.path("chinchilla_all245.csv"))
    law = fit("chinchilla", load_runs(table))
    assert law.n_rows == 245 and law.objective <= 1.826010523e-3 * (1 + 1e-9)
    expected = {"A": 495.726, "B": 12845.6, "E": 1.891338, "alpha": 0.349313, "beta": 0.453049}
    assert law.values == pytest.approx(expected, rel=1e-5)


def test_resamples_of_points_give_the_published_errors(points):
    found = bootstrap(fit("chinchilla", points), 4000, seed=42)
    assert found.converged == 1.0
    published = {"A": 124.522, "B": 1293.284, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}
    assert found.se == pytest.approx(published, rel=0.01)
    rows = [
        (349.556, 2356.248, 1.79333, 0.328633, 0.371855),
        (487.836, 1509.950, 1.80358, 0.348965, 0.349989),
        (728.411, 2507.01, 1.86166, 0.372424, 0.375040),
    ]
    order = [found.names.index(name) for name in ("A", "B", "E", "alpha", "beta")]
    # The notebook's BFGS stops short of the third optimum: B is 1.7e-4 off.
    np.testing.assert_allclose(found.values[:3, order], rows, rtol=2e-4)


def guide_cell(family: str, kind: str, sizes: int, transform=lambda loss: loss):
    """A cell of the guide's code and its ARE in %: the k smallest models, without the last checkpoint of all."""
    rows = pd.read_csv(published_runs.path("families.csv.gz"), low_memory=False)
    rows = rows[(rows["family"] == family) & rows["loss_kind"].str.startswith(kind)]
    rows = rows.assign(loss=transform(rows["loss"]), row=np.arange(len(rows)))
    known = np.sort(rows["num_params"].unique())
    target = rows[rows["num_params"] == known[-1]]
    test = target[target["tokens_seen"] >= 0.7 * target["tokens_seen"].max()]
    train = rows[rows["num_params"].isin(known[:-1][:sizes]) & (rows["tokens_seen"] > 1e10)]
    train = train[train["tokens_seen"] < train["tokens_seen"].max()]
    table = train[["num_params", "tokens_seen", "loss", "row"]].assign(run=train["model"])
    law = fit("chinchilla", load_runs(table), objective="least_squares", residual="raw", warm_up=0)
    predicted, _ = law.predict(test["num_params"], test["tokens_seen"])
    return law, 100.0 * float(np.mean(np.abs(predicted / test["loss"] - 1.0)))


@pytest.mark.parametrize(
    "family, kind, transform, published",
    [
        ("gpt3", "val", lambda loss: loss, {3: 23.22, 4: 5.64, 5: 5.10, 6: 0.92, 7: 2.72}),
        ("OPT", "val", np.exp, {3: 5.92, 4: 8.66, 5: 7.42}),
        ("t5-pile", "val", lambda loss: loss, {3: 9.16}),
    ],
)
@pytest.mark.thorough
def test_cells_of_the_guide(family, kind, transform, published):
    found = {}
    for sizes in published:
        law, found[sizes] = guide_cell(family, kind, sizes, transform)
        assert law.converged, sizes
    assert found == pytest.approx(published, abs=0.02)


def test_two_sizes_are_not_identified():
    law, _ = guide_cell("OPT", "val", 2, np.exp)
    assert not any(law.parameters[name].identified for name in ("E", "A", "alpha"))
    assert any("2 distinct model sizes" in warning for warning in law.warnings)
