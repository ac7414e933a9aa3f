import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas.data import windows


def documents(lengths):
    stream = np.arange(sum(lengths), dtype=np.int32)
    return np.split(stream, np.cumsum(lengths)[:-1]) if lengths else []


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(2, 9))
def test_every_token_but_the_first_is_a_target_once(lengths, window):
    total = sum(lengths)
    cut = list(windows.cut(documents(lengths), window, padding=-1))
    targets = np.concatenate([w[1:] for w in cut]) if cut else np.empty(0, int)
    assert np.array_equal(targets[targets >= 0], np.arange(1, total))
    assert all(len(w) == window + 1 and w[1] >= 0 for w in cut)
    # Inputs and targets are neighbours of one stream, and only the end is padded.
    inputs = np.concatenate([w[:-1] for w in cut]) if cut else np.empty(0, int)
    assert np.array_equal(inputs[targets >= 0], np.arange(max(0, total - 1)))


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(2, 9))
def test_training_drops_the_last_partial_window(lengths, window):
    padded = list(windows.cut(documents(lengths), window, padding=-1))
    whole = [w for w in padded if w[-1] >= 0]
    assert np.array_equal(list(windows.cut(documents(lengths), window)), whole)


def test_streams_longer_than_what_is_gathered_at_once():
    total, window = 5000, 3
    cut = list(windows.cut(documents([7] * (total // 7)), window))
    assert np.array_equal(np.concatenate([w[:-1] for w in cut]), np.arange(len(cut) * window))
    assert len(cut) == (total // 7 * 7 - 1) // window


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("windows")
    rows = np.random.default_rng(0).integers(0, 2**31 - 1, (23, 5)).astype(np.int32)
    windows.write(directory, "ace_Arab", 4, {"train": iter(rows), "test": iter(rows[:2])})
    return directory, rows


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("indices", [[3], [22, 0, 3, 3], list(range(23))])
def test_rows_come_back_as_written(built, in_memory, indices):
    directory, rows = built
    read = windows.read(directory, "ace_Arab", "train", in_memory)
    assert len(read) == 23
    assert read[np.array(indices)].dtype == np.int32
    assert np.array_equal(read[np.array(indices)], rows[indices])


def test_only_the_data_set_is_left(built):
    directory, _ = built
    assert [path.name for path in directory.iterdir()] == ["windows"]
    assert [path.name for path in (directory / "windows").iterdir()] == ["ace_Arab"]
    names = {path.name.split("-")[0] for path in (directory / "windows/ace_Arab/1.0.0").iterdir()}
    assert names == {"dataset_info.json", "features.json", "windows"}
