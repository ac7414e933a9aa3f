"""Runs modules as `python -m` does, in children of one process that has imported what takes seconds to import."""

import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
_DRIVER = """
import itertools, json, os, runpy, sys, tempfile
import jax, pandas, tensorflow_datasets
import atlas.studies.attention_comparison, atlas.studies.scaling_study, models.decoding, experiments._app
results = []
for words in json.load(sys.stdin):
    variables = list(itertools.takewhile(lambda word: "=" in word, words))
    module, *arguments = words[len(variables):]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            os.environ.update(variable.split("=", 1) for variable in variables)
            sys.argv = [module, *arguments]
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as done:
                code = done.code or 0
            # Taking apart all that was imported would take as long as a short binary.
            sys.stdout.flush(), sys.stderr.flush(), os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        results.append((code, out.read().decode(), err.read().decode()))
json.dump(results, sys.stdout)
"""


def host_devices(count: int) -> dict[str, str]:
    """The environment of a process that sees so many devices of the host."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


class Done(NamedTuple):
    """What a finished binary leaves; a signal that ended it is its negative exit code."""

    returncode: int
    stdout: str
    stderr: str


def run_binaries(*commands: list[str], **environment: str) -> list[Done]:
    """Runs `python -m` with each command, one after the other; words NAME=VALUE before a module are of its environment.

    environment: of all, from their start.
    """
    call, own = [sys.executable, "-c", _DRIVER], os.environ | environment
    done = subprocess.run(call, input=json.dumps(commands), cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Done(*result) for result in json.loads(done.stdout)]
