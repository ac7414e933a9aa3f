import pytest

from checked import UserError
from checked.files import check_writable, disk_errors, read_json, read_sealed, write_atomically, write_sealed


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_place_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path / "file" / "deep", "text")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"no thing at '.*some.json': mend it"),
        (b"{", r"some.json' is no thing: Expecting .*; mend it"),
        (b"\xff", r"some.json' is no thing: it is not UTF-8 .*; mend it"),
        (b"[]", "some.json' is no thing: it holds no JSON object; mend it"),
    ],
)
def test_what_is_no_json_object_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_json(path, "thing", "mend it")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("place", "directory"), [("d", False), ("f", True)])
def test_what_is_in_the_way_is_said_before_the_work(tmp_path, place, directory):
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        check_writable(tmp_path / place, directory)
    check_writable(tmp_path / "d" / "deep" / "file")
    check_writable(tmp_path / "d", directory=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["d", "f"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device.*free some space"),
        (RuntimeError("write(): No space left on device; at x"), "No space left on device.*free some space"),
        (OSError(30, "Read-only file system"), "Read-only file system.*give a place"),
    ],
)
def test_disks_that_take_nothing_are_the_users_to_mend(tmp_path, error, message):
    with pytest.raises(UserError, match=message), disk_errors(tmp_path):
        raise error


def test_other_errors_of_libraries_pass(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), disk_errors(tmp_path):
        raise RuntimeError("shape")


def test_a_sealed_file_that_has_changed_is_named(tmp_path):
    path = tmp_path / "s.json"
    write_sealed(path, {"counts": {9: 1, 10: 2}, "x": 0.1})
    assert read_sealed(path, "thing", "mend it") == {"counts": {"9": 1, "10": 2}, "x": 0.1}
    path.write_text(path.read_text().replace("0.1", "0.3"))
    with pytest.raises(UserError, match="not as it was written; mend it"):
        read_sealed(path, "thing", "mend it")
