"""Where tests find the published runs; they are no part of the repository."""

import importlib.util
import os
import pathlib

import pytest

ROOT = pathlib.Path(os.environ.get("ATLAS_SHARED", "../shared")) / "runs"


def path(name: str) -> pathlib.Path:
    """A file of published runs, or the test is skipped."""
    file = ROOT / name
    if not file.is_file():
        pytest.skip(f"published runs are not at {file}")
    return file


def module(name: str):
    """A Python file beside the published runs."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, path(name))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
