import importlib.util
import math
import struct

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


def events(directory):
    """(tag, value, step) of the scalars that TensorBoard would find, file by file."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event, data = event_pb2.Event.FromString(data[12 : 12 + size]), data[16 + size :]
            yield from ((value.tag, value.simple_value, event.step) for value in event.summary.value)


def test_boards_hold_numbers_by_phase(tmp_path):
    pytest.importorskip("tensorboardX")
    boards = metrics.Boards()
    speed = {"mfu": 0.5}
    boards.add(tmp_path, {"phase": "trunk", "step": 1, "time": 9.0, "loss": 0.25, "speed": speed})
    boards.add(tmp_path, {"phase": "trunk", "step": 2, "loss": 0.125}, {"phase": "cooldown", "step": 2, "loss": None})
    boards.close()
    found = list(events(tmp_path / "tensorboard" / "trunk"))
    assert found == [("loss", 0.25, 1), ("speed/mfu", 0.5, 1), ("loss", 0.125, 2)]
    assert list(events(tmp_path / "tensorboard" / "cooldown")) == []


def test_boards_without_their_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.tensorboard needs tensorboardX: pip install"):
        metrics.Boards()
