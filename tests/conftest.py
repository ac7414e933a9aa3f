import socket

import pytest


@pytest.fixture
def unused_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
