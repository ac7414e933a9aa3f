import os

import pytest

from checked import processes


@pytest.mark.parametrize(
    ("version", "flags", "plugin", "platforms", "left"),
    [
        ("0.10.2", None, False, None, "--xla_cpu_use_fusion_emitters=false"),
        ("0.10.0", "--xla_dump_to=x", False, None, "--xla_dump_to=x --xla_cpu_use_fusion_emitters=false"),
        ("0.10.2", None, True, "cpu", "--xla_cpu_use_fusion_emitters=false"),
        ("0.10.2", None, True, None, None),  # its own XLA reads the flags, too
        ("0.12.0.1", None, False, None, None),  # it does not know the flag, and would end the process
        ("0.10.2", "--xla_cpu_use_fusion_emitters=true", False, None, "--xla_cpu_use_fusion_emitters=true"),
    ],
)
def test_the_flag_that_spares_compile_time_is_set_where_it_is_known(
    monkeypatch, version, flags, plugin, platforms, left
):
    given = {"XLA_FLAGS": flags, "JAX_PLATFORMS": platforms}
    monkeypatch.setattr(os, "environ", {name: value for name, value in given.items() if value})
    monkeypatch.setattr("jaxlib.__version__", version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: plugin or None)
    processes.compile_lean()
    assert os.environ.get("XLA_FLAGS") == left


@pytest.mark.parametrize(
    "version, plugin, flags, left",
    [
        ("0.10.2", False, "", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"),
        ("0.12.0", False, "", "--xla_backend_optimization_level=0"),  # which every XLA knows
        ("0.12.0", False, "--xla_backend_optimization_level=3", "--xla_backend_optimization_level=3"),
        ("0.10.2", True, "", ""),
    ],
)
def test_code_that_runs_for_milliseconds_is_not_optimised(monkeypatch, version, plugin, flags, left):
    monkeypatch.setattr(processes, "only_cpus", lambda: not plugin)
    monkeypatch.setattr("jaxlib.__version__", version)
    monkeypatch.setenv("XLA_FLAGS", flags)
    processes.compile_lean()
    processes.compile_lean(leanest=True)
    assert os.environ["XLA_FLAGS"] == left


def test_a_worker_that_trains_takes_the_flag_back(monkeypatch):
    monkeypatch.setattr(processes, "only_cpus", lambda: True)
    monkeypatch.setattr("jaxlib.__version__", "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    processes.compile_lean()
    processes.compile_fully()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x"
