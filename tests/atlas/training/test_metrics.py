import math

from atlas.training.metrics import Buffered, JsonLines


def test_not_finite_numbers_become_null_and_cut_lines_are_left_out(tmp_path):
    file = JsonLines(tmp_path / "deep" / "m.jsonl")
    file.append({"step": 1, "loss": math.nan}, {"step": 2, "loss": 0.5})
    with file.path.open("a") as raw:
        raw.write('{"step": 3, "lo')
    assert file.read() == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_keep_rewrites(tmp_path):
    file = JsonLines(tmp_path / "m.jsonl")
    file.append(*({"step": step} for step in range(4)))
    file.keep(lambda record: record["step"] < 2)
    assert file.read() == [{"step": 0}, {"step": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_buffer_writes_in_groups(tmp_path):
    files = [JsonLines(tmp_path / name) for name in "ab"]
    buffer = Buffered(files, size=2)
    buffer.append(iter([{"x": 1}, {"x": 2}]))
    assert files[0].read() == []
    buffer.append(iter([{"x": 3}, {"x": 4}]))
    assert (files[0].read(), files[1].read()) == ([{"x": 1}, {"x": 3}], [{"x": 2}, {"x": 4}])
    buffer.append(iter([{"x": 5}, {"x": 6}]))
    buffer.flush()
    assert files[1].read()[-1] == {"x": 6}
