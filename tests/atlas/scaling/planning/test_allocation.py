import dataclasses

import numpy as np
import pandas as pd
import pytest

from atlas.errors import UserError
from atlas.scaling import simulation
from atlas.scaling.joint.draws import JointDraws
from atlas.scaling.planning.allocation import CROSSOVER_FORMULAS, compute_optimal, crossover, expansion_table
from atlas.scaling.planning.mixtures import MixtureLaw, TrustRegion, optimal_mixture
from atlas.scaling.table.runs import load_runs

LAW = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37, "lambda": 0.1}
LAW_NAMES = ("E", "A", "alpha", "B", "beta", "lambda")
LANGUAGES = ("a", "b", "c")
WIDE = TrustRegion((1e7, 1e11), np.full(3, 1e-3), 0.02)


def parameters(tau=0.2, B=(300.0, 300.0, 300.0), phi=0.0) -> dict:
    values = {"E": 0.7, "A": 500.0, "alpha": 0.38, "beta": 0.3, "lambda": 0.1}
    found = {f"{name}[{lang}]": {"value": value} for name, value in values.items() for lang in LANGUAGES}
    found |= {f"B[{lang}]": {"value": b} for lang, b in zip(LANGUAGES, B, strict=True)}
    found |= {f"tau[{t}<-{s}]": {"value": tau} for t in LANGUAGES for s in LANGUAGES if s != t}
    return found | {"phi": {"value": phi}}


def test_expansion_table_holds_the_published_figures():
    table = expansion_table([2, 4, 8, 16])
    np.testing.assert_array_equal(table.params.round(2), [1.18, 1.40, 1.66, 1.96])
    np.testing.assert_array_equal(table.tokens.round(2), [1.66, 2.74, 4.54, 7.52])
    assert table.tokens_per_language[1] == pytest.approx(0.686, abs=1e-3)
    assert np.isnan(table.params_same_tokens[3])
    np.testing.assert_allclose(table.compute, table.params * table.tokens)


def test_crossover_formulas():
    table = crossover(2_034_422_912)
    assert list(table.consistent) == [True, True, False]
    np.testing.assert_allclose(table.flops, [2.22e21, 2.54e21, 2.35e22], rtol=5e-3)
    np.testing.assert_allclose(table.tokens / 1e9, [182, 209, 1925], rtol=5e-3)
    for formula in CROSSOVER_FORMULAS:
        inside = 1.758e21 <= formula.flops(2_034_422_912) <= 3.454e21
        assert inside == formula.consistent
    for N, first, second in ((1e9, 124, 131), (4.34e9, 274, 341), (8.45e9, 393, 526)):
        np.testing.assert_allclose(crossover(N).tokens[:2] / 1e9, [first, second], rtol=6e-3)


def test_crossover_of_a_language():
    np.testing.assert_allclose(crossover(2_034_422_912, "es").tokens[:2], 239e9)
    assert crossover(2_034_422_912, "es").tokens[2] > 1e12
    assert crossover(1e9, "es").tokens[0] < crossover(1e9, "zh").tokens[0]
    with pytest.raises(UserError, match="published crossover 'fr'"):
        crossover(2e9, "fr")
    with pytest.raises(UserError, match="positive"):
        crossover(-1.0)


@pytest.mark.parametrize("unique", [np.inf, 3e9, 3e7])
def test_compute_optimal_is_the_minimum(unique):
    best = compute_optimal(LAW, 1e20, unique)
    sizes = np.geomspace(1e6, 1e13, 200_001)
    tokens = 1e20 / 6 / sizes
    repeats = np.maximum(tokens / unique - 1, 0) if np.isfinite(unique) else 0 * tokens
    worth = np.minimum(tokens, unique)
    if np.isfinite(unique):
        worth = worth + unique * (1 - np.exp(-0.1 * repeats)) / 0.1
    loss = LAW["E"] + LAW["A"] / sizes ** LAW["alpha"] + LAW["B"] / worth ** LAW["beta"]
    assert best.loss <= loss.min() + 1e-12
    assert best.params == pytest.approx(sizes[loss.argmin()], rel=2e-3)
    assert 6 * best.params * best.tokens == pytest.approx(1e20)


def test_bad_allocations():
    with pytest.raises(UserError, match="positive"):
        compute_optimal(LAW, 0.0)
    with pytest.raises(UserError, match="lacks the parameter"):
        compute_optimal({"E": 1.0}, 1e20)


def test_mixture_matches_a_brute_force_search():
    law = MixtureLaw.from_parameters(parameters(B=(200.0, 400.0, 300.0)))
    unique = {"a": 1e9, "b": 1e12, "c": 1e11}
    plan = optimal_mixture(law, 1e20, WIDE, {"a": 1, "b": 2, "c": 1}, unique)
    rng = np.random.default_rng(0)
    shares = 0.02 + 0.94 * rng.dirichlet(np.ones(3), 20_000)
    N = np.exp(rng.uniform(np.log(1e7), np.log(1e11), 20_000))
    loss = law.loss(N, 1e20 / 6 / N[:, None] * shares, np.array(list(unique.values())))
    found = (loss @ [0.25, 0.5, 0.25]).min()
    assert plan.loss <= found + 1e-6
    assert plan.loss > found - 0.01
    assert plan.loss < plan.even_loss
    assert plan.table.share.sum() == pytest.approx(1)
    assert 6 * plan.params * plan.tokens == pytest.approx(1e20)


def test_symmetric_languages_get_even_shares():
    plan = optimal_mixture(MixtureLaw.from_parameters(parameters()), 1e20, WIDE)
    np.testing.assert_allclose(plan.table.share, 1 / 3, atol=1e-3)
    assert plan.loss == pytest.approx(plan.even_loss, abs=1e-4)


def test_floor_and_trust_region_bind_and_say_so():
    law = MixtureLaw.from_parameters(parameters(B=(900.0, 1.0, 1.0), tau=0.0))
    plan = optimal_mixture(law, 1e20, WIDE)
    assert plan.table.share[1:].min() == pytest.approx(0.02, abs=1e-3)
    assert any("floor" in warning for warning in plan.warnings)
    narrow = TrustRegion((1e7, 2e7), np.array([1e-3, 0.3, 1e-3]), 0.02)
    held = optimal_mixture(law, 1e20, narrow)
    assert held.table.share[1] == pytest.approx(0.3, abs=0.01)
    assert any("edge of what training covered: b" in warning for warning in held.warnings)
    assert any("largest size" in warning for warning in held.warnings)


def test_scarce_languages_are_not_repeated_forever():
    law = MixtureLaw.from_parameters(parameters())
    plan = optimal_mixture(law, 1e21, WIDE, unique_tokens={"a": 1e8})
    assert plan.table.share[0] < 0.15 and plan.table.epochs[1] == 0


def test_trust_region_from_runs():
    law = MixtureLaw.from_parameters(parameters(tau=0.0))
    rows = [
        {
            "run": f"{i}",
            "num_params": 1e8,
            "language": lang,
            "loss": 2.0,
            "tokens.a": 1e9 * share,
            "tokens.b": 1e9,
        }
        for i, share in enumerate((0.25, 1.0, 4.0))
        for lang in ("a", "b")
    ]
    trust = TrustRegion.of_runs(law, load_runs(pd.DataFrame(rows)), quantile=0.0)
    np.testing.assert_allclose(trust.effective_share[:2], [0.2, 0.2])
    assert trust.params == (1e8, 1e9)


def test_a_sure_law_has_no_regret():
    truth = simulation.truth(3, 0)
    levels = dict(zip(LAW_NAMES, (truth.E, truth.A, truth.alpha, truth.B, truth.beta, truth.lam), strict=True))
    law = MixtureLaw(truth.languages, truth.languages, levels, truth.tau, 0.0)
    trust = TrustRegion((1e7, 1e11), np.full(3, 1e-3), 0.02)
    alike = {name: np.repeat(values[None], 4, 0) for name, values in levels.items()}
    sure = JointDraws(law.targets, law.sources, alike, np.repeat(law.tau[None], 4, 0), np.zeros(4))
    plan = optimal_mixture(law, 1e22, trust, draws=sure)
    assert plan.band["regret_high"] < 1e-5
    assert plan.band["loss_low"] == pytest.approx(plan.loss, rel=1e-9)
    np.testing.assert_allclose(plan.table.share_low, plan.table.share, atol=0.01)
    # Where one draw makes a language hard, another share and size would have been better there.
    hard = dataclasses.replace(
        sure, levels=alike | {"B": alike["B"] * np.array([1.0, 1.0, 4.0, 4.0])[:, None] ** [1, 0, 0]}
    )
    doubted = optimal_mixture(law, 1e22, trust, draws=hard)
    there = dataclasses.replace(law, levels=levels | {"B": levels["B"] * [4.0, 1.0, 1.0]})
    here = there.loss(plan.params, plan.tokens * plan.table.share.to_numpy(), np.full(3, np.inf)).mean()
    regret = here - optimal_mixture(there, 1e22, trust).loss
    assert doubted.loss == plan.loss and regret > 1e-3
    assert doubted.band["regret_high"] == pytest.approx(regret, rel=1e-3)
    assert doubted.band["loss_high"] > 1.05 * plan.loss
    assert doubted.table.share_high[0] > plan.table.share[0] + 0.05
    with pytest.raises(UserError, match="other languages"):
        optimal_mixture(law, 1e22, trust, draws=dataclasses.replace(sure, targets=("x",)))


def test_bad_mixture_requests():
    law = MixtureLaw.from_parameters(parameters())
    for bad in ({"weights": {"z": 1}}, {"weights": {"a": -1}}, {"unique_tokens": {"a": 0}}):
        with pytest.raises(UserError):
            optimal_mixture(law, 1e20, WIDE, **bad)
    with pytest.raises(UserError, match="FLOPs"):
        optimal_mixture(law, -1, WIDE)
    with pytest.raises(UserError, match="no joint fit"):
        MixtureLaw.from_parameters({"E": {"value": 1.0}})
