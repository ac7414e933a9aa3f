"""A process that trains: python -m tests.atlas.training.worker WORKDIR '{"train.steps": [8]}' STEP_TO_DIE_AT SIGNAL.

The tests run it where a run must be killed, have several devices, or have several processes.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

from atlas.data import DataConfig, prepare
from atlas.training import RunConfig, TrainConfig, initialize_distributed, train
from checked import overlay
from models import ModelConfig
from tests.experiments.binaries import Done, host_devices, run_binaries

DATA = DataConfig(source="synthetic", languages=("a1", "a2", "b1"), window=32, synthetic_tokens=40_000)
MODEL = ModelConfig(
    d_model=16,
    layers=2,
    heads=2,
    kv_heads=2,
    head_width=8,
    d_ff=32,
    attention="gated_sparse",
    indexer_width=8,
    k_base=8,
    k_min=2,
)
BASE = RunConfig(
    mixture="a1:0.5,a2:0.25,b1:0.25",
    data=DATA,
    model=MODEL,
    train=TrainConfig(
        batch_size=8, steps=(6, 12), warmup_steps=2, evaluation_windows=8, evaluate_every=3, checkpoint_every=2
    ),
)


def config_of(changes: dict) -> RunConfig:
    """The base run with dotted changes."""
    return overlay(BASE, changes)


Changes = dict | list[dict]  # of a run, or of the runs of a population


def run_worker(
    workdir: pathlib.Path, changes: Changes, *die_at: float, die_by: int = signal.SIGKILL, devices: int = 1
) -> list[Done]:
    """Trains in processes one after the other, each of which dies after so many steps and the fraction of a second, or
    ends where it is 0."""
    ends = [["tests.atlas.training.worker", *_arguments(workdir, changes, step, die_by)] for step in die_at]
    return run_binaries(*ends, **host_devices(devices))


def start_worker(workdir: pathlib.Path, changes: Changes, **environment: str) -> subprocess.Popen:
    """Starts a process that trains."""
    command = [sys.executable, "-m", __name__, *_arguments(workdir, changes, 0, 0)]
    return subprocess.Popen(command, env=os.environ | environment)


def _arguments(workdir: pathlib.Path, changes: Changes, die_at: float, die_by: int) -> list[str]:
    return [str(workdir), json.dumps(changes), str(die_at), str(int(die_by))]


def main(workdir: pathlib.Path, changes: Changes, die_at: float, die_by: int) -> None:
    """Trains; die_at > 0: signals its own process after so many steps, and the fraction of a second after that."""
    initialize_distributed()
    last, delay = divmod(die_at, 1)
    steps = 0

    def die() -> None:
        os.kill(os.getpid(), die_by)

    def progress(tokens: int, words: str) -> None:
        nonlocal steps
        steps += 1
        if steps == last:
            threading.Timer(delay, die).start() if delay else die()

    if delay and not last:
        threading.Timer(delay, die).start()
    corpus = prepare(DATA, workdir.parent / "corpus")  # one for the workers of all tests
    members = changes if isinstance(changes, list) else [changes]
    train([config_of(member) for member in members], corpus, workdir, progress=progress)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
