import dataclasses
import pathlib

import jax
import numpy as np
import pandas as pd
import pytest

from atlas.scaling import JointLaw, load_runs, simulation
from atlas.scaling.planning.fit_file import Fitted
from atlas.scaling.planning.mixtures import TrustRegion, optimal_mixture, plan_mixture
from checked import UserError

LANGUAGES = ("a", "b", "c")
COMMITTED = pathlib.Path(__file__).parents[4] / "experiments" / "results"
WIDE = TrustRegion((1e7, 1e11), np.full(3, 1e-3))


def joint_law(tau=0.2, B=(300.0, 300.0, 300.0), phi=0.0) -> JointLaw:
    levels = [np.full(3, 0.7), np.full(3, 500.0), np.full(3, 0.38), np.array(B), np.full(3, 0.3)]
    return JointLaw(LANGUAGES, LANGUAGES, *levels, np.full((3, 1), 0.1), np.where(np.eye(3), 1.0, tau), phi)


def table(unique: dict[str, list[float]]) -> pd.DataFrame:
    """Three runs, on a alone, on both and on b alone, that had `unique` tokens."""
    shares = ((1e9, 0.0), (5e8, 5e8), (0.0, 1e9))
    rows = [
        {"run": str(i), "num_params": 1e8, "language": name, "loss": 2.0, "tokens.a": a, "tokens.b": b}
        | {f"unique_tokens.{lang}": values[i] for lang, values in unique.items()}
        for i, (a, b) in enumerate(shares)
        for name, seen in (("a", a), ("b", b))
        if seen
    ]
    return pd.DataFrame(rows)


def test_mixture_matches_a_brute_force_search():
    law = joint_law(B=(200.0, 400.0, 300.0))
    unique = {"a": 1e9, "b": 1e12, "c": 1e11}
    plan = optimal_mixture(law, 1e20, WIDE, {"a": 1, "b": 2, "c": 1}, unique)
    rng = np.random.default_rng(0)
    shares = 0.02 + 0.94 * rng.dirichlet(np.ones(3), 20_000)
    N = np.exp(rng.uniform(np.log(1e7), np.log(1e11), 20_000))
    loss = np.asarray(law.loss(N, 1e20 / 6 / N[:, None] * shares, np.array(list(unique.values()))))
    found = (loss @ [0.25, 0.5, 0.25]).min()
    assert plan.loss <= found + 1e-6
    assert plan.loss > found - 0.01
    assert plan.loss < plan.even_loss
    assert plan.table.share.sum() == pytest.approx(1)
    assert 6 * plan.params * plan.tokens == pytest.approx(1e20)


def test_symmetric_languages_get_even_shares():
    plan = optimal_mixture(joint_law(), 1e20, WIDE)
    np.testing.assert_allclose(plan.table.share, 1 / 3, atol=1e-3)
    assert plan.loss == pytest.approx(plan.even_loss, abs=1e-4)


def test_floor_and_trust_region_bind_and_say_so():
    law = joint_law(B=(900.0, 1.0, 1.0), tau=0.0)
    plan = optimal_mixture(law, 1e20, WIDE)
    assert plan.table.share[1:].min() == pytest.approx(0.02, abs=1e-3)
    assert any("floor" in warning for warning in plan.warnings)
    narrow = TrustRegion((1e7, 2e7), np.array([1e-3, 0.3, 1e-3]))
    held = optimal_mixture(law, 1e20, narrow)
    assert held.table.share[1] == pytest.approx(0.3, abs=0.01)
    assert any("edge of what training covered: b" in warning for warning in held.warnings)
    assert any("largest size" in warning for warning in held.warnings)


def test_scarce_languages_are_not_repeated_forever():
    law = joint_law()
    plan = optimal_mixture(law, 1e21, WIDE, unique_tokens={"a": 1e8})
    assert plan.table.share[0] < 0.15 and plan.table.epochs[1] == 0


def test_trust_region_covers_all_but_stray_rows():
    law = joint_law(tau=0.0)
    rows = [
        {"run": str(i), "num_params": 1e8, "language": lang, "loss": 2.0, "tokens.a": 1e9 * share, "tokens.b": 1e9}
        for i, share in enumerate((0.25, 1.0, 4.0))
        for lang in ("a", "b")
    ]
    trust = TrustRegion.of_runs(law, load_runs(pd.DataFrame(rows)))
    np.testing.assert_allclose(trust.effective_share, [0.2, 0.2, 1e-3], rtol=0.05)
    assert trust.params == (1e8, 1e8)  # one size does not tell how loss falls with N
    rows = [row | {"num_params": 1e8 * (1 + int(row["run"]))} for row in rows]
    assert TrustRegion.of_runs(law, load_runs(pd.DataFrame(rows))).params == (1e8, 3e9)


def test_a_plan_of_runs_repeats_what_they_had():
    """Unique tokens are what a run that trains the language had, not infinite where another one does not train it."""
    law, runs = joint_law(), load_runs(table({"a": [2e7, 1e7, np.nan], "b": [np.nan, 3e9, 3e9]}))
    plan = plan_mixture(law, runs).table.set_index("language")
    np.testing.assert_allclose(plan.epochs, plan.tokens / [2e7, 3e9, np.inf])
    assert (plan.epochs[:2] > 0).all()
    more = plan_mixture(law, runs, unique_tokens={"a": 1e12}).table.set_index("language")
    assert more.share["a"] > plan.share["a"] + 0.02


def test_a_plan_far_beyond_the_runs_is_where_the_search_ends():
    """Where it had ended short of: the even mixture was better, and one start of 32 had come so far."""
    found = Fitted(str(COMMITTED / "quickstart"))
    law, runs = found.joint_law(), found.runs()
    plan = plan_mixture(law, runs, 6e3 * float((runs.N * runs.total_tokens).max()))
    assert plan.loss < plan.even_loss - 1e-3 and not any("starts found" in warning for warning in plan.warnings)


def test_no_share_is_planned_of_what_no_run_trained():
    law = joint_law(B=(900.0, 900.0, 900.0), tau=0.9)
    two = dataclasses.replace(
        law,
        targets=LANGUAGES[:2],
        tau=law.tau[:2],
        **{n: getattr(law, n)[:2] for n in ("E", "A", "alpha", "B", "beta", "lam")},
    )
    free = optimal_mixture(two, 1e22, TrustRegion((1e7, 1e11), np.full(2, 1e-3)), unique_tokens={"a": 1e8, "b": 1e8})
    kept = TrustRegion((1e7, 1e11), np.full(2, 1e-3), np.array([True, True, False]))
    held = optimal_mixture(two, 1e22, kept, unique_tokens={"a": 1e8, "b": 1e8})
    assert free.table.share[2] > 0.3 and held.table.share[2] == 0.0


def test_regret_is_of_losses_where_the_region_cannot_be_met(three):
    law, _ = three
    draws = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf) * x for x in (0.99, 1.0, 1.01)]), law)
    plan = optimal_mixture(law, 1e22, TrustRegion((1e7, 1e11), np.full(3, 5.0)), draws=draws)
    assert 0 <= plan.band["regret_high"] <= plan.band["loss_high"] - plan.band["loss_low"]
    assert any("below what training covered" in warning for warning in plan.warnings)


@pytest.fixture(scope="module")
def three():
    truth = simulation.truth(3, 0)
    return truth.law, TrustRegion((1e7, 1e11), np.full(3, 1e-3))


def test_a_sure_law_has_no_regret(three):
    law, trust = three
    sure = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], 4, 0), law)
    plan = optimal_mixture(law, 1e22, trust, draws=sure)
    assert plan.band["loss_low"] == pytest.approx(plan.loss) == plan.band["loss_high"]
    assert plan.band["regret_high"] < 1e-5
    np.testing.assert_allclose(plan.table.share_low, plan.table.share, atol=0.01)
    # Where one draw makes a language hard, another share and size would have been better there.
    hard = dataclasses.replace(sure, B=sure.B * np.array([1.0, 1.0, 4.0, 4.0])[:, None] ** [1, 0, 0])
    doubted = optimal_mixture(law, 1e22, trust, draws=hard)
    there = dataclasses.replace(law, B=law.B * [4.0, 1.0, 1.0])
    D = plan.tokens * plan.table.share.to_numpy()
    here = np.asarray(there.loss(plan.params, D, np.full(3, np.inf))).mean()
    regret = here - optimal_mixture(there, 1e22, trust).loss
    assert doubted.loss == plan.loss and regret > 1e-3
    assert doubted.band["regret_high"] == pytest.approx(regret, rel=1e-3)
    assert doubted.band["loss_high"] > 1.05 * plan.loss
    assert doubted.table.share_high[0] > plan.table.share[0] + 0.05
    with pytest.raises(UserError, match="other languages"):
        optimal_mixture(law, 1e22, trust, draws=dataclasses.replace(sure, targets=("x",)))


def test_bad_mixture_requests():
    law = joint_law()
    for bad in ({"weights": {"z": 1}}, {"weights": {"a": -1}}, {"unique_tokens": {"a": 0}}):
        with pytest.raises(UserError):
            optimal_mixture(law, 1e20, WIDE, **bad)
    with pytest.raises(UserError, match="FLOPs"):
        optimal_mixture(law, -1, WIDE)
