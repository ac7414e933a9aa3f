"""Worker processes, and what XLA is told on machines that have nothing but CPUs."""

import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

# XLA's older generator of code for CPUs compiles fits in half the time, and they run as fast; training runs slower by
# it. Where a jaxlib does not know the flag, as 0.12 does not, XLA ends the process.
_LEAN, _KNOWN = "--xla_cpu_use_fusion_emitters=false", ("0.10",)
# A fit of a small table compiles for seconds and runs for milliseconds: unoptimised code runs for three times as many.
_LEANEST = "--xla_backend_optimization_level=0"


def follow_parent() -> None:
    """What a worker process does first: it ends with its parent, and leaves it the interruptions.

    A terminal sends those to all processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent:
        sentinel = parent.sentinel

        def end_with_parent() -> None:
            multiprocessing.connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


def only_cpus() -> bool:
    """Whether JAX can use CPUs alone, as its plugins and JAX_PLATFORMS say; JAX is not started."""
    plugins = [name for name in ("libtpu", "jax_plugins") if importlib.util.find_spec(name)]
    return not plugins or os.environ.get("JAX_PLATFORMS") == "cpu"


def compile_lean(*, leanest: bool = False) -> None:
    """Spares compile time on CPUs by a flag in XLA_FLAGS, unless it names the same; before JAX compiles anything.

    Plugins of accelerators are XLAs of their own, which read it too: where there are any, nothing is changed.

    leanest: whether by one more, for programs that run for milliseconds: their code is not optimised.
    """
    import jaxlib  # takes as long as jax

    known = ".".join(jaxlib.__version__.split(".")[:2]) in _KNOWN
    for flag in [_LEAN] * known + [_LEANEST] * leanest if only_cpus() else []:
        flags = os.environ.get("XLA_FLAGS", "")
        if flag.split("=")[0] not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def compile_fully() -> None:
    """Takes back what `compile_lean` has set, in a process that starts from its environment."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").removesuffix(_LEAN).strip()
