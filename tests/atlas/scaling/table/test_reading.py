import numpy as np
import pandas as pd
import pytest

from atlas.scaling import load_runs
from atlas.scaling.table.reading import read_runs
from checked import UserError
from tests.atlas.scaling import published_runs


def rows(**columns) -> pd.DataFrame:
    return pd.DataFrame({"num_params": [1e6, 2e6, 4e6], "tokens": [1e7, 2e7, 4e7], "loss": [2.0, 1.8, 1.6]} | columns)


@pytest.mark.parametrize(
    "names, note",
    [
        ({"num_params": "N", "tokens": "D"}, "read 'N' as num_params, 'D' as tokens"),
        ({"num_params": "params", "tokens": "tokens_seen"}, "read 'params' as num_params, 'tokens_seen' as tokens"),
        ({"num_params": "Model Size", "loss": "LOSS"}, "read 'Model Size' as num_params, 'LOSS' as loss"),
        (
            {"num_params": "config.n_params", "loss": "val/loss"},
            "read 'config.n_params' as num_params, 'val/loss' as loss",
        ),
        ({"tokens": "num_tokens", "loss": "train_loss"}, "read 'num_tokens' as tokens, 'train_loss' as loss"),
    ],
)
def test_usual_names_are_understood_and_said(names, note):
    runs = load_runs(rows().rename(columns=names))
    assert (runs.N.sum(), runs.D.sum(), runs.loss.sum()) == (7e6, 7e7, pytest.approx(5.4))
    assert runs.notes == (note,)


def test_a_letter_in_lower_case_and_a_second_loss_are_left_alone():
    runs = load_runs(rows(n=[1, 2, 3], d=[1, 2, 3], val_loss=9.0, train_loss=8.0))
    assert runs.notes == () and runs.loss[0] == 2.0
    assert load_runs(rows(val_loss=9.0, train_loss=8.0).drop(columns="loss")).loss[0] == 9.0


def test_columns_name_or_compute_what_the_table_calls_otherwise():
    table = rows(billions=[1.0, 2.0, 3.0], ppl=np.e, val_loss=5.0, test_loss=6.0)
    runs = load_runs(table, {"num_params": "billions * 1e9", "loss": "log(ppl)"})
    assert runs.N.tolist() == [1e9, 2e9, 3e9] and runs.loss == pytest.approx(1.0)
    assert load_runs(table.drop(columns="loss"), {"loss": "test_loss"}).loss[0] == 6.0
    assert load_runs(table, {"tokens.fr": "tokens", "language": "'fr'"} | {"num_params": "num_params*2"}).N[0] == 2e6
    for columns, message in (
        ({"los": "ppl"}, "unknown column of a runs table 'los'; did you mean 'loss'?"),
        ({"loss": "pppl"}, "'pppl'; did you mean 'ppl'?"),
    ):
        with pytest.raises(UserError, match=r"^[^\n]+$") as error:
            load_runs(table, columns)
        assert message in str(error.value)


@pytest.mark.parametrize("separator, decimal", [(",", "."), (";", "."), (";", ","), ("\t", ".")])
def test_separators(tmp_path, separator, decimal):
    rows(family="a, b").to_csv(tmp_path / "runs.csv", index=False, sep=separator, decimal=decimal)
    runs = load_runs(tmp_path / "runs.csv")
    assert runs.loss.tolist() == [2.0, 1.8, 1.6] and runs.frame["family"][0] == "a, b"


def test_text_is_text_and_numbers_are_numbers(tmp_path):
    (tmp_path / "runs.csv").write_text(
        "run,language,model,corpus,seed,rate,num_params,tokens,loss\n"
        "00000002,nan,NA,null,01,0.1,1e6,1e7,2.0\n"
        "00000003,nan,null,web,02,nan,2e6,2e7,1.8\n"
        ",no,,,03,,4e6,NA,1.6\n"
    )
    runs = load_runs(tmp_path / "runs.csv")
    assert runs.run_ids == ("00000002", "00000003") and runs.languages == ("nan",)
    assert runs.notes == ("dropped 1 of 3 rows: 'tokens' is missing",)
    assert runs.frame[["model", "corpus", "seed"]].to_numpy().tolist() == [["NA", "null", "01"], ["null", "web", "02"]]
    assert len(runs.where("rate == 0.1")) == 1


def test_rows_without_a_run_id_are_runs_of_their_own():
    runs = load_runs(rows(run=["a", "", None]))
    assert runs.run_ids == ("a", "row 1", "row 2")
    assert runs.notes == ("2 of 3 rows have no run id: each counts as a run of its own",)


def test_rows_of_one_model_are_asked_about_and_made_one_run_where_told():
    table = pd.DataFrame(
        {"model": ["a", "a", "b"], "N": [1e6, 1e6, 2e6], "D": [1e7, 2e7, 1e7], "loss": [3.0, 2.9, 2.8]}
    )
    runs = load_runs(table)
    assert len(runs.run_ids) == 3 and any("--columns=run=model" in note for note in runs.notes)
    assert load_runs(table, {"run": "model"}).run_ids == ("a", "b")
    assert not any("no column 'run'" in note for note in load_runs(table.drop_duplicates("model")).notes)


def test_what_was_understood_stays_with_the_frame():
    frame = read_runs(rows().rename(columns={"tokens": "D"}))
    assert load_runs(frame).notes == ("read 'D' as tokens",)


def test_cases_from_other_people():
    cases = published_runs.ROOT.parent / "cases"
    if not cases.is_dir():
        pytest.skip(f"cases of other people are not at {cases}")
    nan, blank = load_runs(cases / "runs_nan.csv"), load_runs(cases / "runs_blank_ids.csv")
    assert len(nan) == 192 and nan.languages == ("en", "zh", "nan")
    assert len(blank.run_ids) == 59 and "21 of 96 rows have no run id" in blank.notes[0]
    assert load_runs(cases / "runs_minimal.csv").warnings == ()
