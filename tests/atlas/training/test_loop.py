import importlib.util
import pathlib
import re
import signal

import numpy as np
import pytest

from atlas.training import finished, load_model, run_id, status, train
from atlas.training import metrics as logs
from checked import UserError
from checked.files import read_sealed
from tests.atlas.training.test_metrics import events
from tests.atlas.training.worker import config_of, run_worker, start_worker


def outcome(workdir: pathlib.Path, changes: dict) -> dict:
    directory = workdir / "runs" / run_id(config_of(changes))
    metrics = logs.read(directory / "metrics.jsonl")
    return {
        "done": {k: v for k, v in read_sealed(directory / finished.DONE, "", "").items() if k != "files"},
        "metrics": sorted(({k: v for k, v in r.items() if k not in ("time", "speed")} for r in metrics), key=str),
        "evaluations": sorted(logs.read(directory / "evaluations.jsonl"), key=str),
    }


def final_losses(workdir: pathlib.Path, changes: dict) -> np.ndarray:
    return np.array([list(r["bits_per_byte"].values()) for r in outcome(workdir, changes)["evaluations"]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    shown = importlib.util.find_spec("tensorboardX") is not None
    words = []
    progress = lambda tokens, word: words.append(word)  # noqa: E731  what the bar shows
    train([config_of({"train.tensorboard": shown})], corpus, workdir, progress, profile=(2, 3))
    (workdir / "words").write_text("\n".join(words))
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(trained: pathlib.Path) -> dict:
    return outcome(trained, {})


def test_what_people_watch(trained):
    """The speed of every step but the first of a segment; that it compiles, once; a trace."""
    words = (trained / "words").read_text().splitlines()
    assert words.count("compiling") == 1 == words.index("compiling") + 1 and "nan" not in " ".join(words)
    lines = [r for r in logs.read(trained / "runs" / run_id(config_of({})) / "metrics.jsonl") if r["speed"]]
    assert len(lines) == 9 and sum("ms a step" in word for word in words) == len(lines)
    config = config_of({})
    for speed in (line["speed"] for line in lines):
        tokens = config.train.batch_size * config.data.window
        assert speed["tokens_per_second"] == pytest.approx(tokens / speed["step_seconds"])
    assert list((trained / "profile").rglob("*.xplane.pb"))


@pytest.mark.thorough
def test_samples_can_be_read_and_change_nothing(tmp_path, corpus, uninterrupted, capsys):
    train([config_of({"train.sample_tokens": 16})], corpus, tmp_path)
    directory = next((tmp_path / "runs").iterdir())
    records = logs.read(directory / "evaluations.jsonl")
    assert all(len(record["sample"]) > 33 and "|" in record["sample"] for record in records)
    assert f"{directory.name}, step 3: " in capsys.readouterr().err
    assert outcome(tmp_path, {})["metrics"] == uninterrupted["metrics"]


def test_boards_show_every_phase(trained):
    pytest.importorskip("tensorboardX")
    boards = trained / "runs" / run_id(config_of({})) / "tensorboard"
    found = {directory.name: {tag for tag, *_ in events(directory)} for directory in boards.iterdir()}
    assert found.keys() == {"trunk", "cooldown", "cooldown-6", "cooldown-12"}
    assert "loss" in found["cooldown-12"] and "bits_per_byte/a1" in found["cooldown"] & found["trunk"]


def test_killed_run_ends_like_an_uninterrupted_one(tmp_path, uninterrupted):
    """In the second segment of the trunk; tests/faults/test_kills.py kills anywhere, and again."""
    killed, continued = run_worker(tmp_path, {}, 9, 0)
    assert (killed.returncode, continued.returncode) == (-9, 0)
    assert re.search(rf"{run_id(config_of({}))}: continues from step \d+ of its trunk", continued.stderr)
    assert outcome(tmp_path, {}) == uninterrupted


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_saves_its_step_and_continues(tmp_path, uninterrupted, number):
    never = {"train.checkpoint_every": 0}
    (interrupted,) = run_worker(tmp_path, never, 8, die_by=number)
    assert interrupted.returncode != 0
    saved = {int(path.name) for path in (tmp_path / "checkpoints").glob("*/trunk/*")}
    assert saved - {5, 10}, "without being asked the trunk saves only where its branches begin"
    (continued,) = run_worker(tmp_path, never, 0)
    assert continued.returncode == 0, continued.stderr
    assert outcome(tmp_path, never) == uninterrupted


@pytest.mark.thorough
def test_flipped_bit_falls_back_to_the_checkpoint_before(tmp_path, uninterrupted):
    assert run_worker(tmp_path, {}, 6)[0].returncode == -9
    saved = sorted((tmp_path / "checkpoints").glob("*/trunk/*"), key=lambda path: int(path.name))
    assert len(saved) == 2
    newest = saved[-1]
    file = max((path for path in newest.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    (continued,) = run_worker(tmp_path, {}, 0)
    assert continued.returncode == 0 and f"{newest} is damaged" in continued.stderr
    assert outcome(tmp_path, {}) == uninterrupted


def test_logs_every_step_once(uninterrupted):
    steps = sorted((r["phase"], r["step"]) for r in uninterrupted["metrics"])
    trunk = [("trunk", step) for step in range(1, 11)]
    assert steps == sorted([("cooldown-6", 6), ("cooldown-12", 11), ("cooldown-12", 12), *trunk])


def test_a_run_that_does_not_learn_stops_and_says_why(tmp_path, corpus):
    config = config_of({"train.learning_rate": 1e30, "train.steps": [12]})
    with pytest.raises(UserError, match=r"skipped 6 of its first \d+ steps, .* lower train\.learning_rate"):
        train([config], corpus, tmp_path)
    (row,) = status([config], tmp_path).itertuples()
    assert (row.state, row.skipped_steps) == ("started", 6)


@pytest.mark.thorough
def test_branch_equals_a_run_of_its_own_length(tmp_path, corpus, uninterrupted):
    changes = {"train.steps": [6]}
    train([config_of(changes)], corpus, tmp_path)
    (alone,) = (r for r in outcome(tmp_path, changes)["evaluations"] if r["phase"] == "cooldown")
    (branch,) = (r for r in uninterrupted["evaluations"] if (r["phase"], r["step"]) == ("cooldown", 6))
    assert alone == branch


# Selecting keys is not continuous: rounding may swap two keys of nearly equal score. Where another order of summation
# must give the same numbers, the model has gates and no selection.
SMOOTH = {"model.attention": "gated"}


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory, corpus) -> np.ndarray:
    workdir = tmp_path_factory.mktemp("smooth")
    train([config_of(SMOOTH)], corpus, workdir)
    return final_losses(workdir, SMOOTH)


@pytest.mark.thorough
def test_population_equals_single_runs(tmp_path, corpus):
    """vmap batches the same arithmetic, so results agree to the rounding that a few float32 steps accumulate."""
    mixtures = ["a1", "a2", "uniform(*)", "b1:0.9,a1:0.1"]
    members = [SMOOTH | {"seed": seed, "mixture": mixture} for seed, mixture in enumerate(mixtures)]
    train([config_of(changes) for changes in members], corpus, tmp_path / "together")
    for changes in members:
        train([config_of(changes)], corpus, tmp_path / "alone")
        together, alone = (final_losses(tmp_path / place, changes) for place in ("together", "alone"))
        np.testing.assert_allclose(together, alone, rtol=1e-5)
        models = [load_model(tmp_path / place, run_id(config_of(changes)))["params"] for place in ("together", "alone")]
        for name, value in models[1].items():
            # Adam divides by a root of squares and magnifies rounding where gradients are near zero:
            # the bound is on what the steps may move a parameter by.
            np.testing.assert_allclose(models[0][name], value, atol=4e-5, err_msg=name)


@pytest.mark.thorough
def test_eight_devices_train_like_one(tmp_path, smooth):
    changes = SMOOTH | {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    assert run_worker(tmp_path, changes, 0, devices=8)[0].returncode == 0
    np.testing.assert_allclose(final_losses(tmp_path, changes), smooth, rtol=1e-5)


@pytest.mark.thorough
def test_two_processes_train_like_one(tmp_path, smooth, unused_port):
    environment = {"JAX_COORDINATOR_ADDRESS": f"localhost:{unused_port}", "JAX_NUM_PROCESSES": "2"}
    workers = [start_worker(tmp_path, SMOOTH, JAX_PROCESS_ID=str(index), **environment) for index in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    np.testing.assert_allclose(final_losses(tmp_path, SMOOTH), smooth, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("attention, before", [("gated", "gated"), ("gated_sparse", "dense")])
def test_continues_from_another_run(tmp_path, corpus, attention, before):
    kind = {"model.attention": before}
    parent = config_of(kind | {"mixture": "uniform(*)"})
    with pytest.raises(UserError, match="train it first"):
        train([config_of(kind | {"initialize": run_id(parent)})], corpus, tmp_path)
    train([parent], corpus, tmp_path)
    changes = {"model.attention": attention, "initialize": run_id(parent), "mixture": "b1", "train.evaluate_every": 1}
    train([config_of(changes)], corpus, tmp_path)
    evaluations = logs.read(tmp_path / "runs" / run_id(config_of(changes)) / "evaluations.jsonl")
    assert next(r["step"] for r in evaluations if r["phase"] == "trunk") == 0
    first = logs.read(tmp_path / "runs" / run_id(config_of(changes)) / "metrics.jsonl")[0]
    scratch = logs.read(tmp_path / "runs" / run_id(parent) / "metrics.jsonl")[0]
    assert first["loss"] < scratch["loss"] - 0.05
