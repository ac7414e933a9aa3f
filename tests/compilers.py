"""What tests need that compile for chips which are not here."""

import importlib.util
from collections.abc import Callable

import pytest


def needs(module: str) -> Callable[[Callable], Callable]:
    """Marks a test that needs a compiler of the extra `compile`: "libtpu" or "jax_cuda12_plugin"."""
    missing = pytest.mark.skipif(not importlib.util.find_spec(module), reason=f"without the extra compile ({module})")
    return lambda test: pytest.mark.compile(missing(test))
