import json

import pytest

from atlas.training import finished
from checked import UserError
from checked.files import write_sealed


@pytest.fixture
def directory(tmp_path):
    """The files of a finished run, in place of its model a file of bytes."""
    run = tmp_path / "runs" / "a"
    (run / finished.MODEL / "0").mkdir(parents=True)
    (run / finished.MODEL / "0" / "arrays").write_bytes(bytes(64))
    for name in (finished.METRICS, finished.EVALUATIONS):
        (run / name).write_text("1\n2\n3\n")
    (run / finished.CONFIG).write_text(json.dumps({"config": {"model": {"layers": 2}}}))
    finished.mark(run, {"step": 3})
    return run


def test_a_whole_run_is_done(directory):
    assert finished.is_done(directory)
    assert finished.load_model_config(directory.parents[1], "a").layers == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "config.json", "model/0/arrays", "done.json"])
def test_what_is_missing_is_trained_again(directory, name):
    (directory / name).unlink()
    assert not finished.is_done(directory)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "config.json", "model/0/arrays", "done.json"])
def test_what_is_cut_is_named(directory, name):
    (directory / name).write_bytes((directory / name).read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"{name}'? .*delete it, and the command that trained the run"):
        finished.is_done(directory)


def test_a_model_of_the_same_size_is_compared_where_it_is_loaded(directory):
    (directory / "model/0/arrays").write_bytes(bytes(63) + b"\1")
    assert finished.is_done(directory)
    with pytest.raises(UserError, match="model/0/arrays is not as training left it"):
        finished.load_model(directory.parents[1], "a")


def test_another_config_of_a_model_is_noticed(directory):
    (directory / finished.CONFIG).write_text(json.dumps({"config": {"model": {"layers": 3}}}))
    with pytest.raises(UserError, match=r"config.json is not as training left it"):
        finished.load_model_config(directory.parents[1], "a")


def test_a_record_that_somebody_edited_is_not_believed(directory):
    document = json.loads((directory / finished.DONE).read_text())
    (directory / finished.DONE).write_text(json.dumps(document | {"files": {}}))
    with pytest.raises(UserError, match="not as it was written"):
        finished.is_done(directory)
    write_sealed(directory / finished.DONE, {"files": {}})
    assert finished.is_done(directory)
