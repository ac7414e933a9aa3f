import numpy as np
import pandas as pd
import pytest

from atlas.scaling import load_runs
from checked import UserError


def single(**columns):
    return pd.DataFrame({"num_params": [1e6, 2e6, 4e6], "tokens": [1e7, 2e7, 4e7], "loss": [2.0, 1.8, 1.6]} | columns)


def mixed(**columns):
    base = {
        "run": ["a", "a", "b"],
        "num_params": [1e6, 1e6, 2e6],
        "tokens.fr": [1e6, 1e6, 0.0],
        "tokens.other": [0.0, 0.0, 1e6],
        "tokens.de": [1e6, 1e6, np.nan],
        "unique_tokens.fr": [5e5, 5e5, np.nan],
        "language": ["de", "fr", "fr"],
        "loss": [2.0, 1.9, 2.5],
    }
    return pd.DataFrame(base | columns)


def test_single_language_table_has_one_source_and_a_run_per_row(tmp_path):
    single().to_csv(tmp_path / "runs.csv", index=False)
    runs = load_runs(tmp_path / "runs.csv")
    assert runs.languages == runs.targets == ("all",)
    assert runs.run.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(runs.D[:, 0], [1e7, 2e7, 4e7])
    assert np.isinf(runs.U).all()


def test_mixtures_put_evaluated_languages_first_and_keep_sources():
    runs = load_runs(mixed())
    assert runs.languages == ("fr", "de", "other")
    assert runs.targets == ("fr", "de")
    assert runs.target.tolist() == [1, 0, 0]
    assert runs.run.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(runs.own(runs.D), [1e6, 1e6, 0.0])
    np.testing.assert_array_equal(runs.U[:, 0], [5e5, 5e5, np.inf])
    assert any("sources only: other" in note for note in runs.warnings)


def test_language_column_without_token_columns_means_monolingual_runs():
    runs = load_runs(single(language=["fr", "fr", "de"]))
    assert runs.languages == ("fr", "de")
    np.testing.assert_array_equal(runs.shares, [[1, 0], [1, 0], [0, 1]])


def test_dropped_rows_are_counted_with_the_reason():
    table = pd.concat([single(), single(loss=[np.nan, np.inf, 1.6])])
    runs = load_runs(table)
    assert len(runs) == 3
    notes = " ".join(runs.warnings)
    for reason in ("6 rows: 'loss' is missing", "5 rows: 'loss' is infinite", "4 rows: the row repeats"):
        assert reason in notes


@pytest.mark.parametrize(
    "table, message",
    [
        (single().rename(columns={"num_params": "num_param"}), "did you mean --columns=num_params=num_param?"),
        (single().drop(columns="tokens"), "no column 'tokens'"),
        (single(loss=[2.0, "high", 1.0]), "'loss' is not numeric: 'high' in row 1"),
        (single(num_params=[1e6, 0.0, 1e6]), "'num_params' must be positive: row 1 has 0; such rows: 1"),
        (single(tokens=[1e6, 1e6, -1.0]), "'tokens' must be positive: row 2"),
        (single(loss=[-0.1, 1.0, 1.0]), "'loss' must be positive"),
        (single(loss_unit=["nats", "bits", "bits"]), "several units"),
        (single().iloc[:0], "no rows"),
        (single(loss=[np.nan] * 3), "no usable row"),
        (single(unique_tokens=[1e6, 0.0, 1e6]), "unique tokens of 'all' must be positive"),
        (mixed(**{"tokens.fr": [-1.0, 1.0, 1.0]}), "'tokens.fr' must be finite and not negative"),
        (mixed(**{"tokens.other": [0.0, 0.0, 0.0]}), "must not all be 0"),
        (mixed(**{"unique_tokens.frr": [1.0, 1.0, 1.0]}), "did you mean 'fr'"),
        (mixed(language=["xx", "xx", "xx"]), "'tokens.xx'"),
        (mixed().drop(columns="language"), "needs a 'language' column"),
    ],
)
def test_mistakes_are_one_clear_line(table, message):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        load_runs(table)
    assert message in str(error.value)


def test_unreadable_files_are_user_errors(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    for path in (tmp_path / "none.csv", tmp_path / "empty.csv"):
        with pytest.raises(UserError, match=path.name):
            load_runs(path)


def test_where_by_mask_and_by_query():
    runs = load_runs(mixed())
    by_query = runs.where('language == "fr" and run == "b"')
    assert len(by_query) == 1 and by_query.run_ids == ("b",) and by_query.run.tolist() == [0]
    assert by_query.targets == runs.targets
    assert runs.where(runs.N > 1e6).frame.equals(by_query.frame)
    wrong = {"lang == 1": "cannot apply", "num_params": "not a condition", "loss > 9": "keeps none"}
    for bad, message in wrong.items():
        with pytest.raises(UserError, match=message):
            runs.where(bad)


def test_warnings_speak_of_the_rows_that_are_left():
    table = single(phase=["trunk", "trunk", "cooldown"], unique_tokens=[1e6, np.nan, 4e9])
    runs = load_runs(pd.concat([table, table.assign(num_params=table.num_params * 2)]))
    told = " ".join(runs.warnings)
    assert "mixes learning-rate phases" in told and "missing in 2 of the 6 rows" in told
    assert runs.where('phase == "cooldown"').warnings == ()


def test_runs_that_vanish_from_the_comparable_ones_are_counted_with_the_reason():
    runs = [f"r{i}" for i in range(20)]
    table = pd.DataFrame({"run": runs, "num_params": 1e6, "tokens": np.geomspace(1e7, 1e9, 20), "loss": 2.0})
    some = load_runs(table.assign(phase=["cooldown"] * 8 + [None] * 12)).comparable()
    assert len(some) == 8 and some.notes == some.comparable().notes
    assert some.notes[0].startswith("left out 12 of 20 rows, of 12 runs that have no row of phase 'cooldown'")
    continued = load_runs(table.assign(run=["a", "b"] * 10, initialize=[None, "a"] * 10)).comparable()
    assert continued.warnings[0].startswith("left out 10 of 20 rows, of 1 runs that continue another one")
    trunks = load_runs(table.assign(run=["a", "b"] * 10, phase=["trunk"] * 18 + ["cooldown"] * 2)).comparable()
    assert len(trunks) == 2 and trunks.notes == ()
    for alike in ({"phase": "trunk"}, {"initialize": "x"}):
        whole = load_runs(table.assign(**alike)).comparable()
        assert len(whole) == 20 and whole.notes == ()


def test_plain_tokens_of_a_run_of_several_languages_are_said_to_be_the_evaluated_ones():
    table = single(run=["a", "a", "b"], language=["fr", "de", "fr"])
    runs = load_runs(table)
    assert runs.unmixed == ("a",) and len(runs.notes) == 1 and runs.notes[0] in runs.where('language == "fr"').warnings
    assert runs.notes[0].startswith("1 runs, such as a, evaluate several languages: 'tokens' are taken as those of the")
    assert "columns tokens.<language> give a mixture" in runs.notes[0]
    for told in (mixed(), table.assign(run=["a", "c", "b"]), table.drop(columns="run"), table.drop(columns="language")):
        assert load_runs(told).unmixed == () and "such as" not in " ".join(load_runs(told).notes)


def test_laws_that_need_no_tokens_read_tables_without_them():
    runs = load_runs(
        single(width=[1.0, 2.0, np.nan], loss=[-0.5, 0.0, 0.5]).drop(columns="tokens"), needs=("width",), signed=True
    )
    assert len(runs) == 2 and np.isnan(runs.D).all() and runs.loss.tolist() == [-0.5, 0.0]
    assert runs.notes == ("dropped 1 of 3 rows: 'width' is missing",)


def test_a_million_rows_take_a_moment():
    rng = np.random.default_rng(0)
    n = 1_000_000
    columns = ("num_params", "tokens", "loss")
    assert len(load_runs(pd.DataFrame({name: rng.uniform(1, 2, n) for name in columns}))) == n


def test_a_run_of_several_sizes_is_noted():
    table = pd.DataFrame(
        {"run": ["a", "a", "b"], "num_params": [1e6, 2e6, 1e6], "tokens": [1e7, 1e7, 2e7], "loss": 2.0}
    )
    assert any("1 runs, such as a, have rows of several sizes" in warning for warning in load_runs(table).warnings)
    assert not any("several sizes" in warning for warning in load_runs(table[1:]).warnings)
