import pytest

from models.files import read_json


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no some.json"),
        (b"{", r"some.json cannot be read as JSON \("),
        (b"\xff", r"some.json cannot be read as JSON \("),
        (b"[]", "some.json must hold a JSON object, not a list"),
    ],
)
def test_what_is_no_json_object_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert "\n" not in str(error.value)
