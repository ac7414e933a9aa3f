import dataclasses
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.data import DataConfig, prepare, tasks, windows
from atlas.data.tokenizers import ByteTokenizer
from checked import UserError

SEPARATOR = ByteTokenizer.separator
WINDOWS = (32, 48, 96, 128, 256)


def texts(task: str, window: int, seed: int = 0, count: int = 200) -> list[str]:
    return list(itertools.islice(tasks.documents(task, "train", count * window, window, seed), count))


def solve(task: str, body: str, key: str) -> str:
    """The answer, by reading: a key's fact names a digit, or another key to go on with."""
    facts = dict(re.findall(r"([A-Z])([A-Z0-9])", body))
    value = facts[key]
    return value if task != "tracking" or value.isdigit() else solve(task, body, value)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("window", WINDOWS)
def test_every_answer_follows_from_the_facts(task, window):
    for text in texts(task, window):
        body, *questions = text.split("?")
        assert len(questions) == {"needle": 1, "multikey": 4, "tracking": 2}[task]
        for question in questions:
            assert question[1:] == solve(task, body, question[0])


@pytest.mark.parametrize("task", tasks.TASKS)
def test_keys_of_a_document_differ_and_filler_holds_none(task):
    for text in texts(task, 128):
        body = text.split("?")[0]
        facts = re.findall(r"([A-Z])([A-Z0-9])", body)
        assert len({key for key, _ in facts}) == len(facts) == {"needle": 1, "multikey": 4, "tracking": 6}[task]
        values = [value for _, value in facts if value.isdigit()]
        assert len(set(values)) == len(values)
        filler = re.sub(r"[A-Z][A-Z0-9]", "", body)
        assert filler in tasks._FILLER * 4


def test_nothing_but_the_key_tells_which_fact_is_asked_for():
    found = np.zeros(4)
    for text in texts("multikey", 64, count=400):
        body, question, *_ = text.split("?")
        found[re.findall(r"[A-Z]\d", body).index(question)] += 1
    assert (found / found.sum() > 0.2).all()
    values = [re.findall(r"\d", text)[:3] for text in texts("tracking", 64, count=400)]
    assert 0.4 < np.mean([asked == first for first, _, asked in values]) < 0.6


def test_needles_lie_at_every_depth():
    depths = [re.search("[A-Z]", text).start() / (text.index("?") - 2) for text in texts("needle", 128, count=900)]
    np.testing.assert_allclose(np.quantile(depths, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.05)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(tasks.TASKS), st.sampled_from(WINDOWS), st.integers(0, 5), st.integers(1, 3000))
def test_windows_hold_whole_documents_of_one_length(task, window, seed, num_bytes):
    documents = tasks.documents(task, "validation", num_bytes, window, seed)
    cut = windows.cut(ByteTokenizer().encode_documents(documents), window, ByteTokenizer.padding)
    rows_NS = np.stack(list(cut))
    assert len(rows_NS) == -(-num_bytes // window)
    ends = [np.flatnonzero(row[:-1] == SEPARATOR) for row in rows_NS]
    for positions in ends:
        length = positions[0] + 1
        assert length in tasks.lengths(window)
        np.testing.assert_array_equal(positions, np.arange(length, window + 1, length) - 1)
    rows, position, lengths = tasks.answers(rows_NS, SEPARATOR)
    assert len(rows) == sum(map(len, ends))
    for row, target, length in zip(rows, position, lengths, strict=True):
        # The first question of a document: mark, key, answer.
        start = (target + 1) // length * length
        text = bytes(rows_NS[row, start : start + length - 1].tolist()).decode()
        assert length == ends[row][0] + 1
        assert target + 1 - start == text.index("?") + 2
        assert chr(rows_NS[row, target + 1]) == solve(task, text.split("?")[0], text[text.index("?") + 1])


@given(st.integers(32, 5000))
def test_lengths_are_halves_of_the_window_down_to_the_shortest(window):
    found = tasks.lengths(window)
    assert found[-1] == window
    assert all(2 * a == b for a, b in itertools.pairwise(found))
    assert found[0] % 2 or found[0] // 2 < tasks.SHORTEST <= found[0]


def test_documents_depend_on_seed_split_and_task_alone():
    assert texts("needle", 64) == texts("needle", 64)
    assert texts("needle", 64) != texts("needle", 64, seed=1)
    held = list(itertools.islice(tasks.documents("multikey", "validation", 9999, 64, 0), 50))
    assert not set(held) & set(texts("multikey", 64, count=5000))


def test_corpus_has_tasks_beside_its_languages(tmp_path):
    config = DataConfig(languages=("a1", "b1"), tasks=("needle", "tracking"), window=64, synthetic_tokens=6400)
    corpus = prepare(config, tmp_path)
    assert corpus.languages == ("a1", "b1", "needle", "tracking")
    assert set(corpus.relatedness) == {("a1", "b1"), ("b1", "a1")}
    # The last window lacks the first token of a next one.
    assert corpus.sizes["needle"]["train"]["windows"] == 99
    rows = corpus.windows("tracking", "train")[np.arange(3)]
    text = next(tasks.documents("tracking", "train", 6400, 64, 0)).encode()
    assert bytes(rows[0, : len(text)].tolist()) == text
    with pytest.raises(UserError, match=r"holds a corpus with data\.languages"):
        prepare(dataclasses.replace(config, tasks=("needle",)), tmp_path)
    with pytest.raises(UserError, match=r"holds a corpus with data\.seed|data\.tasks\.seed"):
        prepare(dataclasses.replace(config, seed=1), tmp_path)


def test_tasks_change_nothing_of_a_corpus_without_them(tmp_path):
    plain = DataConfig(languages=("a1",), window=64, synthetic_tokens=6400)
    alone = prepare(plain, tmp_path / "alone")
    beside = prepare(dataclasses.replace(plain, tasks=("needle",)), tmp_path / "beside")
    indices = np.arange(alone.sizes["a1"]["train"]["windows"])
    np.testing.assert_array_equal(*(c.windows("a1", "train")[indices] for c in (alone, beside)))
    assert "tasks" not in (alone.directory / "corpus.json").read_text()


def test_language_named_like_a_task(tmp_path):
    (tmp_path / "needle").mkdir()
    (tmp_path / "needle" / "a.txt").write_text("text")
    config = DataConfig(source="text", input=str(tmp_path), tasks=("needle",), window=64)
    with pytest.raises(UserError, match="names needle, which is a language"):
        prepare(config, tmp_path / "corpus")
