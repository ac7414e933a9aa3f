import numpy as np
import pandas as pd
import pytest

from atlas.scaling import load_runs
from atlas.scaling.planning.crossover import crossover_law, measured_crossovers, published_crossovers
from checked import UserError

CROSSING = 3e10


def table(sizes=(1e9,), noise=0.0, points=20, crossing=lambda N: CROSSING, seed=0, **columns) -> pd.DataFrame:
    """From scratch and continued runs of "sw" whose losses are equal at `crossing` tokens."""
    rng = np.random.default_rng(seed)
    rows = []
    for N in sizes:
        at = crossing(N)
        tokens = np.geomspace(at / 30, at * 30, points)
        scratch = 0.8 + 0.5 * (tokens / at) ** -0.35
        continued = 0.8 + 0.5 * (tokens / at) ** -0.12
        for loss, parent in ((scratch, ""), (continued, "unimax-34")):
            rows.append(
                pd.DataFrame(
                    {
                        "run": f"{N:g}-{parent}",
                        "num_params": N,
                        "initialize": parent,
                        "language": "sw",
                        "tokens.sw": tokens,
                        "tokens.en": 0.0,
                        "loss": loss * np.exp(noise * rng.normal(size=points)),
                    }
                )
            )
    return pd.concat(rows, ignore_index=True).assign(**columns)


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    return measured_crossovers(load_runs(frame))


def test_exact_curves_cross_where_they_do():
    found = measured(table()).iloc[0]
    assert found.tokens == pytest.approx(CROSSING, rel=0.01)
    assert found.flops == pytest.approx(6e9 * found.tokens)
    assert (found.language, found.num_params, found.censored) == ("sw", 1e9, "")
    assert found.low <= found.tokens <= found.high


def test_interval_holds_the_crossing_and_grows_with_noise():
    inside, widths = [], []
    for seed in range(10):
        found = measured(table(noise=0.005, seed=seed)).iloc[0]
        inside.append(found.low <= CROSSING <= found.high)
        widths.append(np.log(found.high / found.low))
    assert np.mean(inside) >= 0.8
    loud = measured(table(noise=0.02)).iloc[0]
    assert np.log(loud.high / loud.low) > 1.5 * np.median(widths)
    assert np.median(widths) < 1.0


def test_curves_that_do_not_cross_are_bounded():
    frame = table()
    before = frame[frame["tokens.sw"] < CROSSING / 3]
    later = measured(before).iloc[0]
    assert later.censored == "later" and np.isnan(later.tokens) and later.high == np.inf
    assert later.low == pytest.approx(before["tokens.sw"].max(), rel=0.3)
    after = frame[frame["tokens.sw"] > 3 * CROSSING]
    earlier = measured(after).iloc[0]
    assert earlier.censored == "earlier" and earlier.low == 0
    assert earlier.high == pytest.approx(after["tokens.sw"].min(), rel=0.3)
    apart = pd.concat([before[before.initialize == ""], after[after.initialize != ""]])
    assert measured(apart).censored[0] == "no common tokens"


def test_law_over_sizes():
    exponent = 1.54
    found = measured(table(sizes=(3e8, 1e9, 2e9), crossing=lambda N: 3e10 * (N / 1e9) ** (exponent - 1), noise=0.001))
    law = crossover_law(found)
    assert law.sizes == 3
    assert law.exponent == pytest.approx(exponent, abs=0.1)
    assert abs(law.exponent - exponent) < 3 * law.exponent_se
    assert law.flops(1e9) == pytest.approx(6e9 * 3e10, rel=0.1)
    assert crossover_law(found.iloc[:1]) is None


def test_only_rows_on_the_language_alone_and_of_one_phase_count():
    frame = table(phase="trunk")
    cooled = table(crossing=lambda N: 1e10, phase="cooldown")
    mixed = table(crossing=lambda N: 9e11).assign(**{"tokens.en": 1e9})
    found = measured(pd.concat([frame, cooled, mixed.assign(phase="cooldown")]))
    assert len(found) == 1 and found.phase[0] == "cooldown"
    assert found.tokens[0] == pytest.approx(1e10, rel=0.02)


def test_replicates_widen_the_interval():
    rng = np.random.default_rng(0)
    seeds = [table(noise=1e-4, seed=i).assign(run=lambda t, i=i: t.run + str(i)) for i in range(3)]
    shifted = [
        s.assign(loss=s.loss * np.exp(0.03 * s.run.map({r: rng.normal() for r in s.run.unique()}))) for s in seeds
    ]
    quiet, loud = measured(pd.concat(seeds)).iloc[0], measured(pd.concat(shifted)).iloc[0]
    assert np.log(loud.high / loud.low) > 5 * np.log(quiet.high / quiet.low)


def test_tables_without_both_curves_are_refused():
    with pytest.raises(UserError, match="needs the column 'initialize'"):
        measured(table().drop(columns="initialize"))
    with pytest.raises(UserError, match="no language and size has both"):
        measured(table(initialize=""))


def test_crossover_formulas():
    table = published_crossovers(2_034_422_912)
    assert list(table.consistent) == [True, True, False]
    np.testing.assert_allclose(table.flops, [2.22e21, 2.54e21, 2.35e22], rtol=5e-3)
    np.testing.assert_allclose(table.tokens / 1e9, [182, 209, 1925], rtol=5e-3)
    assert list(table.flops.between(1.758e21, 3.454e21)) == list(table.consistent)
    for N, first, second in ((1e9, 124, 131), (4.34e9, 274, 341), (8.45e9, 393, 526)):
        np.testing.assert_allclose(published_crossovers(N).tokens[:2] / 1e9, [first, second], rtol=6e-3)


def test_crossover_of_a_language():
    np.testing.assert_allclose(published_crossovers(2_034_422_912, "es").tokens[:2], 239e9)
    assert published_crossovers(2_034_422_912, "es").tokens[2] > 1e12
    assert published_crossovers(1e9, "es").tokens[0] < published_crossovers(1e9, "zh").tokens[0]
    with pytest.raises(UserError, match="published crossover 'fr'"):
        published_crossovers(2e9, "fr")
    with pytest.raises(UserError, match="positive"):
        published_crossovers(-1.0)
