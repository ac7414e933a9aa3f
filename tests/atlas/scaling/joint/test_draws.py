import json

import jax
import numpy as np
import pytest

from atlas.scaling import fit_joint, load_runs, simulation
from atlas.scaling.joint.draws import joint_draws, refitted
from atlas.scaling.planning.mixtures import TrustRegion, optimal_mixture
from checked import UserError

pytestmark = pytest.mark.thorough  # test_answers has a quick study that draws its laws

L = 6


@pytest.fixture(scope="module")
def study():
    truth = simulation.truth(L, 1)
    runs = load_runs(simulation.table(truth, simulation.mixtures(L, 5, 1, 8, 0, np.random.default_rng(1)), 1))
    return truth, runs, fit_joint(runs)


def test_joint_draws_have_the_posteriors_mean_and_spread(study):
    _, _, found = study
    draws = joint_draws(found, 4000)
    scale = np.sqrt(np.diagonal(found.record.covariance, axis1=1, axis2=2))
    assert draws.tau.shape == (4000, L, L) and draws.E.shape == (4000, L) and draws.phi.shape == (4000,)
    off = ~np.eye(L, dtype=bool)
    np.testing.assert_allclose(draws.tau.std(0)[off], scale[:, 6 : 6 + L][off], rtol=0.08)
    np.testing.assert_allclose(
        draws.tau.mean(0)[off], found.record.theta[:, 6:][off], atol=0.08 * scale[:, 6 : 6 + L].max()
    )
    np.testing.assert_allclose(np.log(draws.beta).std(0), scale[:, 4], rtol=0.08)
    assert draws.phi.std() == pytest.approx(scale[0, 6 + L], rel=0.08)
    np.testing.assert_array_equal(draws.language("l2")["E"], draws.E[:, 2])
    # B at one token and beta move together, as their estimates do.
    assert np.corrcoef(np.log(draws.B[:, 0]), draws.beta[:, 0])[0, 1] > 0.9


def test_drawn_laws_agree_with_the_runs(study):
    _, runs, found = study
    draws, rows = joint_draws(found, 30), runs.where(runs.run % 3 == 0)
    D, U = rows.aligned(found.sources)
    fitted = np.asarray(found.law.loss(rows.N, D, U, rows.target))
    drawn = (jax.tree.map(lambda leaf, i=i: leaf[i], draws) for i in range(30))
    off = np.stack([np.asarray(law.loss(rows.N, D, U, rows.target)) for law in drawn]) / fitted - 1
    _, deviation = found.predict_runs(rows)
    assert abs(np.mean(off)) < 0.3 * np.std(off)
    assert np.std(off) == pytest.approx(np.mean(deviation / fitted), rel=0.5)


def test_regret_of_a_mixture_covers_what_the_truth_shows(study):
    truth, runs, found = study
    trust = TrustRegion.of_runs(found.law, runs)
    plan = optimal_mixture(found.law, 1e22, trust, draws=joint_draws(found, 24))
    best = optimal_mixture(truth.law, 1e22, TrustRegion(trust.params, np.full(L, 1e-3)))
    D = plan.tokens * plan.table.share.to_numpy()
    real = np.asarray(truth.law.loss(plan.params, D, np.full(L, np.inf))).mean()
    assert plan.band["loss_low"] < plan.loss < plan.band["loss_high"]
    assert 0 <= plan.band["regret_median"] <= plan.band["regret_high"] < 0.1
    assert abs(real - plan.loss) < 3 * (plan.band["loss_high"] - plan.band["loss_low"])
    assert real - best.loss < 3 * plan.band["regret_high"] + 0.01
    assert (plan.table.share_low <= plan.table.share_high).all()
    assert plan.band["params_low"] <= plan.band["params_high"] <= trust.params[1] * 1.001


def test_a_fit_is_made_again_by_its_own_options(study):
    _, runs, _ = study
    families, pair = {"l0": "one", "l1": "one"}, {"tau_prior": "pairs", "lambda_kind": "shared"}
    found = fit_joint(runs, families, **pair)
    document = json.loads(json.dumps(found.to_json()))
    assert (
        refitted(document, runs).options
        == found.options
        == {"families": families, "scripts": {}, "mixing": "sum"} | pair
    )
    with pytest.raises(UserError, match="other parameters than"):
        refitted(document | {"options": fit_joint(runs).options | {"lambda_kind": "source"}}, runs)
    for options in ({"families": ["l0"]}, {"tau_prior": 3}, {"speed": "high"}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is none that a fit leaves"):
            refitted(document | {"options": options}, runs)


def test_a_study_is_refitted_only_if_it_is_the_same(study):
    _, runs, found = study
    document = found.to_json()
    assert refitted(document, runs).objective == pytest.approx(found.objective, rel=1e-9)
    with pytest.raises(UserError, match="300 rows"):
        refitted(document | {"n_rows": 300}, runs)
    with pytest.raises(UserError, match="of the chinchilla law"):
        refitted(document | {"law": "chinchilla"}, runs)
    moved = {"E[l0]": document["parameters"]["E[l0]"] | {"value": 9.0}}
    with pytest.raises(UserError, match="other parameters than"):
        refitted(document | {"parameters": document["parameters"] | moved}, runs)
