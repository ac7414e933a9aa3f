"""Checkpoints: Orbax files with a checksum of every array, so that damage is found and the newest sound step is used.

Orbax loads a file with a flipped bit without a word; here every leaf's checksum is stored beside it and compared on
restore.
"""

import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as orbax

from checked import UserError
from checked.files import disk_errors

PyTree = Any
Manifest = dict[str, list[int]]

_LOG = logging.getLogger(__name__)
_REASON = 200  # characters of a library's own words


@jax.jit
def checksums(tree: PyTree) -> dict[str, jax.Array]:
    """uint32 [R] for every leaf [R, …]: Σ_i (2i + 1)·bits_i mod 2³², over the leaf's words in order.

    A change of any single bit changes the sum, because an odd multiple of 2^b is not 0 mod 2³². As a reduction it
    runs where the shards are and gives the same number on any mesh.
    """
    return {name: _checksum(leaf) for name, leaf in _plain(tree).items()}


def digest(manifest: Manifest, run: int) -> str:
    """A hash of run number `run` of a population, from its checksums."""
    lines = json.dumps({name: sums[run] for name, sums in sorted(manifest.items())})
    return hashlib.sha256(lines.encode()).hexdigest()


def manifest_of(tree: PyTree) -> Manifest:
    """The checksums of a population's arrays as plain numbers."""
    return {name: np.asarray(sums).tolist() for name, sums in jax.device_get(checksums(tree)).items()}


def save(directory: pathlib.Path, step: int, tree: PyTree) -> None:
    """Writes `directory/<step>` atomically: arrays and their checksums; raises UserError where the disk is full."""
    arrays, manifest = _plain(tree), manifest_of(tree)
    with disk_errors(directory):
        orbax.save(_path(directory, step), arrays, overwrite=True, custom_metadata={"checksums": manifest})


def steps(directory: pathlib.Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def restore(directory: pathlib.Path, like: PyTree) -> tuple[int, PyTree] | None:
    """The newest sound checkpoint as (step, tree with the shardings of `like`), or None; damaged ones are named in
    the log.

    like: a tree of arrays or of jax.ShapeDtypeStruct with shardings.
    """
    for step in reversed(steps(directory)):
        try:
            return step, _load(_path(directory, step), like)
        except Exception as error:
            reason = " ".join(str(error).split())[:_REASON]
            _LOG.warning("checkpoint %s is damaged (%s); falling back to an older one", _path(directory, step), reason)
    return None


def load(directory: pathlib.Path, step: int) -> dict[str, dict[str, np.ndarray]]:
    """The arrays {first part of the name: {rest: array}} of a checkpoint of one run, without the run axis.

    Raises UserError if one is damaged.
    """
    path, here = _path(directory, step), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        stored = orbax.metadata(path).metadata
        abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for name, leaf in stored.items()}
        arrays = orbax.load(path, abstract)
        _compare(path, manifest_of(arrays))
    except Exception as error:  # Orbax raises what its many readers raise
        reason = " ".join(str(error).split())[:_REASON]
        raise UserError(f"{path} is damaged ({reason}); delete it and train again") from error
    nested: dict[str, dict[str, np.ndarray]] = {}
    for name, leaf in arrays.items():
        first, rest = name.split(".", 1)
        nested.setdefault(first, {})[rest] = np.asarray(leaf[0])
    return nested


def prune(directory: pathlib.Path, keep: Iterable[int]) -> None:
    """Deletes what is not a checkpoint of a step in `keep`, also of saves cut short; only the first process does."""
    names = {str(step) for step in keep}
    if jax.process_index() == 0:
        for path in list(directory.glob("*")):
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)


def _load(path: pathlib.Path, like: PyTree) -> PyTree:
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
    arrays = orbax.load(path, _plain(abstract))
    tree = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in _plain(like)])
    _compare(path, manifest_of(tree))
    return tree


def _compare(path: pathlib.Path, found: Manifest) -> None:
    expected = orbax.metadata(path).custom_metadata["checksums"]
    if wrong := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
        raise ValueError(f"the checksum of {sorted(wrong)[0]} differs")


def _path(directory: pathlib.Path, step: int) -> pathlib.Path:
    return directory.absolute() / str(step)


def _plain(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


@jax.vmap
def _checksum(leaf: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = leaf.view(unsigned).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)
