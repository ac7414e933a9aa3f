import getpass
import importlib.metadata
import os
import pathlib
import signal
import socket
import tempfile

# Before jax is imported, and inherited by workers and by the commands that tests start: most of the time of a test is
# compiling, and many modules compile the same small programs. Entries are named by the program and its compiler.
_PROGRAMS = pathlib.Path(tempfile.gettempdir()) / f"atlas-test-programs-{getpass.getuser()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# The compiler for GPUs leaves itself out where there is none, when the first test that uses JAX has it looked for.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# Nearly all of these programs run for less time than they compile.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The older code generator of XLA's CPU backend compiles them in a third of the time; later versions do not know it, and
# end a process whose flags they do not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# The commands that tests interrupt would inherit it from a shell's background job that interrupts are ignored.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
