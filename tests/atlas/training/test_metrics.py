import math

import pytest

from atlas.training import metrics
from checked import UserError


def test_not_finite_numbers_become_null_and_cut_lines_are_left_out(tmp_path):
    path = tmp_path / "deep" / "m.jsonl"
    assert metrics.read(path) == []
    metrics.append(path, {"step": 1, "loss": math.nan}, {"step": 2, "loss": 0.5})
    with path.open("a") as raw:
        raw.write('{"step": 3, "lo')
    assert metrics.read(path) == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_any_changed_byte_of_a_line_is_noticed(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics.append(path, {"step": 1, "loss": 0.25}, {"step": 2, "loss": 0.5})
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for position in range(first):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(UserError, match=r"m.jsonl line 1 is not as training wrote it; delete the file"):
            metrics.read(path)


@pytest.mark.parametrize("line", ["{}", "[1]", "", "not JSON", "\ufeff{}"])
def test_foreign_lines_are_named(tmp_path, line):
    path = tmp_path / "m.jsonl"
    metrics.append(path, {"step": 1})
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(UserError, match="line 2"):
        metrics.read(path)


def test_keep_rewrites(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics.append(path, *({"step": step} for step in range(4)))
    metrics.keep(path, lambda record: record["step"] < 2)
    assert metrics.read(path) == [{"step": 0}, {"step": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]
