import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checked import UserError
from models import checkpoint


def tree(seed: int) -> dict:
    key = jax.random.key(seed)
    return {
        "params": {"w": jax.random.normal(key, (2, 64, 32)), "b": jnp.arange(6.0).reshape(2, 3)},
        "step": jnp.array([seed, seed]),
    }


def largest_file(directory: pathlib.Path) -> pathlib.Path:
    return max(
        (path for path in directory.rglob("*") if path.is_file() and "/d/" in str(path)), key=lambda p: p.stat().st_size
    )


def assert_equal(found: dict, expected: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path, 3, tree(3))
    step, found = checkpoint.restore(tmp_path, tree(0))
    assert step == 3
    assert_equal(found, tree(3))


def test_nothing_to_restore(tmp_path):
    assert checkpoint.restore(tmp_path / "none", tree(0)) is None


@pytest.mark.parametrize("seed", range(5))
def test_one_flipped_bit_falls_back_to_the_older_step(tmp_path, caplog, seed):
    checkpoint.save(tmp_path, 1, tree(1))
    checkpoint.save(tmp_path, 2, tree(2))
    file = largest_file(tmp_path / "2")
    content = bytearray(file.read_bytes())
    position = np.random.default_rng(seed).integers(len(content) * 8)
    content[position // 8] ^= 1 << (position % 8)
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        step, found = checkpoint.restore(tmp_path, tree(0))
    assert step == 1
    assert_equal(found, tree(1))
    assert "damaged" in caplog.text


def test_truncated_file_falls_back(tmp_path, caplog):
    checkpoint.save(tmp_path, 1, tree(1))
    checkpoint.save(tmp_path, 2, tree(2))
    file = largest_file(tmp_path / "2")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    step, _ = checkpoint.restore(tmp_path, tree(0))
    assert step == 1
    assert "damaged" in caplog.text


def test_other_shapes_are_refused(tmp_path, caplog):
    checkpoint.save(tmp_path, 1, tree(1))
    like = tree(0)
    like["params"]["b"] = jnp.zeros((2, 4))
    assert checkpoint.restore(tmp_path, like) is None
    assert "damaged" in caplog.text


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**31 - 1), st.integers(0, 31), st.sampled_from([jnp.float32, jnp.int32, jnp.bfloat16, jnp.bool_])
)
def test_checksum_sees_any_bit_in_any_place(position, bit, dtype):
    values = np.asarray(jax.random.normal(jax.random.key(1), (2, 5, 7)).astype(dtype))
    flipped = values.copy()
    words = flipped.reshape(-1).view(np.uint8)
    place = position % words.size
    words[place] ^= 1 << (bit % (1 if dtype == jnp.bool_ else 8))
    before, after = (checkpoint.manifest_of({"x": jnp.asarray(v)})["x"] for v in (values, flipped))
    run = place // (words.size // 2)
    assert before[run] != after[run]
    assert before[1 - run] == after[1 - run]


def test_digest_tells_runs_apart():
    manifest = checkpoint.manifest_of(tree(1))
    assert checkpoint.digest(manifest, 0) != checkpoint.digest(manifest, 1)
    assert checkpoint.digest(manifest, 0) == checkpoint.digest(checkpoint.manifest_of(tree(1)), 0)


def test_load_gives_arrays_of_one_run(tmp_path):
    one = jax.tree.map(lambda leaf: leaf[:1], {"params": tree(1)["params"]})
    checkpoint.save(tmp_path, 0, one)
    found = checkpoint.load(tmp_path, 0)
    assert found["params"]["w"].shape == (64, 32)
    np.testing.assert_array_equal(found["params"]["b"], one["params"]["b"][0])


def test_prune_keeps_only_what_is_named(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"x": jnp.zeros((1, 2))})
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    checkpoint.prune(tmp_path, keep=(2, 9))
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_full_disk_is_a_users_mistake(tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28']")

    monkeypatch.setattr(checkpoint.orbax, "save", full)
    with pytest.raises(UserError, match=r"No space left.*free some space"):
        checkpoint.save(tmp_path, 1, tree(1))
