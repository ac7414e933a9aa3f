import socket

import jax
import pytest


@pytest.fixture
def unused_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drops a module's compiled programs behind it.

    A process may map only so many regions of memory, and every program takes some: a worker that keeps thousands
    of them crashes in the compiler.
    """
    yield
    jax.clear_caches()
