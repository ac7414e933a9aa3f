import pytest

from checked import UserError
from checked.files import read_json, write_atomically


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
        (b"\xff", r"some.json' is no thing: .*utf-8.*; mend it"),
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
