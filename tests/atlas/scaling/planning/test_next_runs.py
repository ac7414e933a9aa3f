import numpy as np
import pandas as pd
import pytest

from atlas.scaling import fit_joint, load_runs, simulation
from atlas.scaling.joint.information import Information, PlannedRuns
from atlas.scaling.planning.next_runs import candidate_runs, goal_of, next_runs
from checked import UserError

pytestmark = pytest.mark.thorough  # the command runs in the README's test

L, TARGET, BUDGET = 6, "l2", 1e22
SHARES = {"l2": 0.05, "l0": 0.5, "l1": 0.45}


def study(seed: int):
    """One monolingual run a language and few pairs: transfer is poorly known."""
    law = simulation.truth(L, seed)
    plan = simulation.mixtures(L, 1, 0.4, 3, 0, np.random.default_rng(seed))
    table = simulation.table(law, plan, seed)
    runs = load_runs(table)
    fit = fit_joint(runs)
    return law, table, runs, fit, goal_of(fit, runs, TARGET, 2e10, 8e11, SHARES)


def trained(law: simulation.Truth, planned: PlannedRuns, seed: int) -> pd.DataFrame:
    """Rows of planned runs as training them would give."""
    rng, parts = np.random.default_rng(seed), []
    for i, (N, D) in enumerate(zip(planned.N, planned.D, strict=True)):
        steps = np.asarray(planned.checkpoints)[:, None] * D
        for t in np.flatnonzero(D):
            loss = law.loss(np.full(len(steps), N), steps, np.full(len(steps), t))
            columns = {f"tokens.{name}": steps[:, s] for s, name in enumerate(law.languages)}
            columns |= {f"unique_tokens.{name}": law.U[s] for s, name in enumerate(law.languages)}
            noisy = loss * np.exp(0.005 * rng.normal(size=len(steps)))
            parts.append(
                pd.DataFrame(columns | {"run": f"new{i}", "num_params": N, "language": f"l{t}", "loss": noisy})
            )
    return pd.concat(parts)


def chosen(table, candidates: PlannedRuns) -> PlannedRuns:
    cost = 6 * candidates.N * candidates.D.sum(1)
    index = [
        int(np.argmin(np.abs(cost / row.flops - 1) + [text != row.mixture for text in mixtures(candidates)]))
        for row in table.itertuples()
    ]
    return candidates.take(index)


def mixtures(candidates: PlannedRuns) -> list[str]:
    shares = candidates.D / candidates.D.sum(1, keepdims=True)
    return [",".join(f"l{s}:{share:.3g}" for s, share in enumerate(row) if share > 0) for row in shares]


def random_choice(candidates: PlannedRuns, rng: np.random.Generator) -> PlannedRuns:
    """As many runs as the budget affords, up to six, in random order."""
    left, index = BUDGET, []
    for i in rng.permutation(len(candidates)):
        cost = 6 * candidates.N[i] * candidates.D[i].sum()
        if cost <= left and len(index) < 6:
            left, index = left - cost, [*index, int(i)]
    return candidates.take(index)


@pytest.fixture(scope="module")
def first():
    return study(0)


def test_candidates_stay_within_what_the_runs_have_seen(first):
    _, _, runs, fit, goal = first
    found = candidate_runs(fit, runs, goal)
    total = found.D.sum(1)
    assert runs.N.min() <= found.N.min() and found.N.max() <= runs.N.max()
    assert total.max() <= runs.total_tokens.max() * 1.001
    assert 30 < len(found) <= 5 * 3 * 24 and len(found.checkpoints) == 10
    assert (found.D[:, fit.sources.index(TARGET)] > 0).any(axis=0)


def test_every_run_sharpens_the_prediction_more_than_random_ones(first):
    _, _, runs, fit, goal = first
    candidates = candidate_runs(fit, runs, goal)
    table, facts = next_runs(fit, goal, candidates, BUDGET)
    steps = [facts["deviation_before"], *table.deviation]
    assert (np.diff(steps) < 0).all() and steps[-1] < 0.7 * steps[0]
    assert table.flops.sum() <= BUDGET and 1 <= len(table) <= 6
    np.testing.assert_allclose(table.flops, 6 * table.params * table.tokens)
    assert (facts["loss"], facts["deviation_before"]) == tuple(map(float, fit.predict(*goal)))
    knowledge, rng = Information.of(fit), np.random.default_rng(0)
    after = knowledge.adding(chosen(table, candidates)).variance(*goal)[0]
    assert steps[-1] == pytest.approx(facts["loss"] * np.sqrt(after), rel=1e-6)
    random = [knowledge.adding(random_choice(candidates, rng)).variance(*goal)[0] for _ in range(8)]
    assert after < min(random)


def test_first_run_is_the_best_by_one_of_the_two_rules(first):
    _, _, runs, fit, goal = first
    candidates = candidate_runs(fit, runs, goal)
    cost = 6 * candidates.N * candidates.D.sum(1)
    gain = -Information.of(fit).expected_variance(candidates, *goal)[:, 0]
    gain += Information.of(fit).variance(*goal)[0]
    one = next_runs(fit, goal, candidates, BUDGET, count=1)[0].iloc[0]
    afforded = np.where(cost <= BUDGET, gain, -np.inf)
    assert one.flops == pytest.approx(cost[np.argmax(afforded)])
    assert one.mixture == mixtures(candidates)[int(np.argmax(afforded))]


def test_chosen_runs_lower_the_actual_error_more_than_random_ones():
    errors = {"before": [], "chosen": [], "random": []}
    for seed in range(4):
        law, table, runs, fit, goal = study(seed)
        candidates = candidate_runs(fit, runs, goal)
        truth = float(law.loss(goal.N, goal.D, fit.targets.index(TARGET)))
        plans = {"chosen": chosen(next_runs(fit, goal, candidates, BUDGET)[0], candidates)}
        plans["random"] = random_choice(candidates, np.random.default_rng(seed))
        for name, planned in plans.items():
            more = fit_joint(load_runs(pd.concat([table, trained(law, planned, seed)])))
            errors[name].append(np.log(more.predict(*goal)[0] / truth))
        errors["before"].append(np.log(fit.predict(*goal)[0] / truth))
    rms = {name: float(np.sqrt(np.mean(np.square(values)))) for name, values in errors.items()}
    assert rms["chosen"] < 0.8 * rms["random"] and rms["chosen"] < 0.6 * rms["before"]


def test_bad_goals_and_budgets(first):
    _, _, runs, fit, goal = first
    with pytest.raises(UserError, match="unknown target language 'xx'"):
        goal_of(fit, runs, "xx", 1e9, 1e10)
    with pytest.raises(UserError, match="positive parameters"):
        goal_of(fit, runs, TARGET, -1.0, 1e10)
    with pytest.raises(UserError, match="l2's must be positive"):
        goal_of(fit, runs, TARGET, 1e9, 1e10, {"l0": 1.0})
    candidates = candidate_runs(fit, runs, goal)
    with pytest.raises(UserError, match="afford no run"):
        next_runs(fit, goal, candidates, 1e10)


def test_a_goal_that_no_law_tells_is_refused(monkeypatch):
    _, _, runs, fit, goal = study(0)
    monkeypatch.setattr(type(fit), "predict", lambda *_: (np.float64(4.4), np.inf))
    with pytest.raises(UserError, match="l2 hardly an effective token"):
        next_runs(fit, goal, candidate_runs(fit, runs, goal))
