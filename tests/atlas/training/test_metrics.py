import math

from atlas.training import metrics


def test_not_finite_numbers_become_null_and_cut_lines_are_left_out(tmp_path):
    path = tmp_path / "deep" / "m.jsonl"
    assert metrics.read(path) == []
    metrics.append(path, {"step": 1, "loss": math.nan}, {"step": 2, "loss": 0.5})
    with path.open("a") as raw:
        raw.write('{"step": 3, "lo')
    assert metrics.read(path) == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_keep_rewrites(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics.append(path, *({"step": step} for step in range(4)))
    metrics.keep(path, lambda record: record["step"] < 2)
    assert metrics.read(path) == [{"step": 0}, {"step": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]
