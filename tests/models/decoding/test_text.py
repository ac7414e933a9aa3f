"""Text as it comes: whole characters, and nothing of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.decoding.text import _Row
from tests.models.decoding import tokenizer_files as files
from tests.models.decoding.toys import tokenizer

BYTES = tokenizer([bytes([i]) for i in range(256)], end=False)
cuts = st.lists(st.integers(0, 40))


def stream(row, tokens, cuts):
    """The pieces that a row gives when it is shown more and more of its tokens."""
    return [row.push(tokens[:end]) for end in (*sorted(min(cut, len(tokens)) for cut in cuts), len(tokens))]


@settings(deadline=None)
@given(st.text(max_size=6).map(str.encode) | st.binary(max_size=9), cuts)
def test_streamed_text_is_the_text(data, cuts):
    row = _Row(BYTES, [])
    pieces = [*stream(row, list(data), cuts), row.push((), final=True)]
    assert "".join(pieces) == row.text == data.decode(errors="replace")


@pytest.mark.parametrize("kind", ["bytes", "llama2"])
def test_characters_split_over_tokens_are_streamed_whole(kind, tmp_path):
    own = files.load(kind, tmp_path)
    ids = own.encode("🎉".encode())
    assert len(ids) == 4
    assert stream(_Row(own, []), ids, range(1, 4)) == ["", "", "", "🎉"]


@settings(deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", max_size=3), max_size=2), cuts)
def test_text_ends_before_the_first_stop_string(text, stops, cuts):
    row = _Row(BYTES, stops)
    pieces = [*stream(row, list(text.encode()), cuts), row.push((), final=True)]
    found = [text.find(stop) for stop in stops if stop and stop in text]
    assert "".join(pieces) == row.text
    # A piece may hold several stop strings, of which the first counts; one that is complete sooner has ended the row.
    if len(set(found)) == len(found) and not cuts:
        assert row.text == text[: min(found, default=len(text))]
    assert row.ended == bool(found)
    assert not any(stop and stop in row.text for stop in stops)
