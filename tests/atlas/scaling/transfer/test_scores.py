import numpy as np
import pandas as pd
import pytest

from atlas.scaling.table.curves import loss_curve
from atlas.scaling.table.runs import load_runs
from atlas.scaling.transfer.scores import (
    bilingual_transfer_score,
    bilingual_transfer_scores,
    latest_scores,
    score_from_tau,
    tau_from_score,
)
from checked import UserError


def law(effective: np.ndarray, N: float = 1e8) -> np.ndarray:
    return 0.7 + 400 / N**0.4 + 300 / effective**0.3


def curves(tau: float, last: float = 1e11, points: int = 24):
    tokens = np.geomspace(1e8, last, points)
    return loss_curve(tokens, law(tokens)), loss_curve(tokens, law(tokens * (1 + tau) / 2))


def table(tau: dict, points=12, noise=0.0, seeds=(0,), phase=("trunk",), last=1e10, offset=0.0) -> pd.DataFrame:
    """Monolingual and 50/50 runs of the languages that tau[(target, source)] names."""
    rng = np.random.default_rng(1)
    languages = sorted({language for pair in tau for language in pair})
    rows = []
    mixes = [(a,) for a in languages] + [(a, b) for a in languages for b in languages if a < b]
    for mix in mixes:
        for seed in seeds:
            shift = offset * rng.normal()
            for stage in phase:
                for total in np.geomspace(last / 100, last, points):
                    for target in mix:
                        share = 1 / len(mix)
                        other = [lang for lang in mix if lang != target]
                        effective = total * share * (1 + sum(tau[target, o] for o in other))
                        loss = law(effective) * (0.97 if stage == "cooldown" else 1)
                        rows.append(
                            {
                                "run": f"{'-'.join(mix)}-{seed}-{stage}",
                                "num_params": 1e8,
                                "language": target,
                                "phase": stage,
                                "seed": seed,
                                "loss": loss * np.exp(shift + noise * rng.normal()),
                                **{f"tokens.{lang}": total * share if lang in mix else 0.0 for lang in languages},
                            }
                        )
    return pd.DataFrame(rows)


def test_published_anchors_of_the_score():
    # A step-like bilingual curve that reaches the anchor's loss after exactly sigma tokens.
    for sigma, score in zip([42, 63, 84, 105, 126], [1, 0.5, 0, -0.5, -1], strict=True):
        mono = loss_curve([1e9, 42e9, 200e9], [3.0, 2.0, 1.0])
        bilingual = loss_curve([1e9, sigma * 1e9, 400e9], [3.0, 2.0, 1.0])
        got = bilingual_transfer_score(mono, bilingual, [42e9], noise=0.01).score[0]
        assert got == pytest.approx(score, abs=1e-9)


def test_tau_and_score_invert_each_other():
    tau = np.array([-0.6, -0.1031, 0.0, 0.3333, 1.0])
    np.testing.assert_allclose(tau_from_score(score_from_tau(tau)), tau)
    np.testing.assert_allclose(tau_from_score(np.array([0.5, -0.23, -1.6])), [0.3333, -0.1031, -0.4444], atol=5e-5)


@pytest.mark.parametrize("tau", [-0.3, 0.0, 0.25, 0.9])
def test_score_of_the_exact_law_is_its_tau_at_every_anchor(tau):
    scores = bilingual_transfer_score(*curves(tau), [1e9, 5e9, 2e10], noise=0.01)
    np.testing.assert_allclose(scores.score, score_from_tau(tau), atol=2e-3)
    assert (scores.censored == "").all()


def test_outside_the_data_only_bounds():
    mono, bilingual = curves(0.2, last=1e10)
    at_end = bilingual_transfer_score(mono, bilingual, [1e10, 1e12], noise=1e-9)
    assert list(at_end.censored) == ["at most", "no anchor"]
    assert np.isnan(at_end.score).all()
    assert at_end.high[0] == pytest.approx(1.0, abs=1e-6)
    assert at_end.low[0] == -np.inf
    low_start = loss_curve(mono.tokens[5:], bilingual.loss[5:] * 0.2)
    start = bilingual_transfer_score(mono, low_start, [mono.tokens[6]], noise=1e-9)
    assert start.censored[0] == "at least"
    assert start.low[0] == pytest.approx(2 - mono.tokens[5] / mono.tokens[6], abs=1e-6)


def test_interval_covers_under_the_stated_noise():
    rng = np.random.default_rng(0)
    tokens, tau, hits = np.geomspace(1e8, 1e11, 25), 0.2, []
    for _ in range(200):
        noisy = [law(d) * np.exp(0.003 * rng.normal(size=25)) for d in (tokens, tokens * (1 + tau) / 2)]
        row = bilingual_transfer_score(*(loss_curve(tokens, loss) for loss in noisy), [1e10], noise=0.003).iloc[0]
        hits.append(row.low <= score_from_tau(tau) <= row.high)
    # Smoothing makes the curves better than single points, so the interval may only be too wide.
    assert 0.88 <= np.mean(hits) <= 1.0


def scores_of(frame: pd.DataFrame, **options) -> pd.DataFrame:
    return bilingual_transfer_scores(load_runs(frame), **options)


def test_scores_from_a_runs_table():
    tau = {("a", "b"): 0.5, ("b", "a"): -0.1, ("a", "c"): 0.1, ("c", "a"): 0.3, ("b", "c"): 0.0, ("c", "b"): 0.2}
    scores = scores_of(table(tau))
    assert len(scores) == 6 * 5
    matrix = latest_scores(scores).pivot(index="target", columns="source", values="score")
    for (target, source), value in tau.items():
        assert matrix.loc[target, source] == pytest.approx(score_from_tau(value), abs=0.02)
    # By default only anchors that can be measured; equal budgets reach to half the monolingual tokens or so.
    assert (scores.censored == "").all() and scores.anchor_tokens.max() < 1e10
    bounded = scores_of(table(tau), anchors=[3e9, 1e10])
    assert (bounded.query("anchor_tokens == 1e10").censored == "at most").all()
    assert (latest_scores(bounded).anchor_tokens == 3e9).all()


def test_pairs_that_never_meet_are_bounded():
    tau = {("a", "b"): 0.4, ("b", "a"): 0.4}
    frame = table(tau)
    worse = frame.assign(loss=np.where((frame[["tokens.a", "tokens.b"]] > 0).all(axis=1), 2, 1) * frame.loss)
    scores = scores_of(worse)
    assert list(scores.censored) == ["at most"] * 2 and scores.score.isna().all()
    assert list(latest_scores(scores).censored) == ["at most"] * 2
    better = frame.assign(loss=np.where((frame[["tokens.a", "tokens.b"]] > 0).all(axis=1), 0.2, 1) * frame.loss)
    assert list(scores_of(better).censored) == ["at least"] * 2


def test_phases_are_never_mixed():
    tau = {("a", "b"): 0.4, ("b", "a"): 0.4}
    both = table(tau, phase=("trunk", "cooldown"))
    scores = scores_of(both)
    assert set(scores.phase) == {"cooldown"}
    latest = latest_scores(scores).set_index(["target", "source"])
    assert latest.score["a", "b"] == pytest.approx(score_from_tau(0.4), abs=0.02)
    assert latest.tau["a", "b"] == pytest.approx(0.4, abs=0.02)
    few = both[(both.phase == "trunk") | both.groupby("run").cumcount().isin([0, 2, 4])]
    assert set(scores_of(few).phase) == {"trunk"}
    # A bilingual side without cooled-down points falls back to trunk with trunk.
    mono_only = both[(both.phase == "trunk") | (both["tokens.b"] == 0) | (both["tokens.a"] == 0)]
    assert set(scores_of(mono_only).phase) == {"trunk"}


def test_replicates_widen_the_interval():
    tau = {("a", "b"): 0.4, ("b", "a"): 0.4}
    quiet, loud = (
        scores_of(table(tau, seeds=(0, 1, 2), offset=offset, noise=1e-4)).query("censored == ''")
        for offset in (0.0, 0.01)
    )
    assert (loud.high - loud.low).median() > 5 * (quiet.high - quiet.low).median()


def test_odd_tables():
    tau = {("a", "b"): 0.4, ("b", "a"): 0.4}
    frame = table(tau)
    only_mono = frame[(frame["tokens.a"] == 0) | (frame["tokens.b"] == 0)]
    assert scores_of(only_mono).empty
    frame.loc[::7, "loss"] = np.nan
    assert scores_of(frame).score.notna().any()
    unequal = frame.assign(**{"tokens.b": frame["tokens.b"] * 3})
    assert scores_of(unequal).empty


def test_curve_is_monotone_and_inverts():
    rng = np.random.default_rng(3)
    tokens = np.geomspace(1e6, 1e9, 30)
    curve = loss_curve(tokens, law(tokens) * np.exp(0.02 * rng.normal(size=30)))
    fine = np.array([curve.at(x) for x in np.geomspace(1e6, 0.999e9, 400)])
    assert np.all(np.diff(fine) <= 1e-12)
    for loss in np.linspace(fine[-1] + 1e-3, fine[0] - 1e-3, 7):
        assert curve.at(curve.reach(loss)) == pytest.approx(loss, rel=1e-9)
    with pytest.raises(UserError, match="positive finite"):
        loss_curve([1.0, 2.0], [1.0, np.nan])
