"""A sweep of one run whose results are printed as one line: python -m tests.faults.worker WORKDIR.

Digests of the runs table, the logs and the model: equal for equal results, whatever became of the files between.
"""

import hashlib
import itertools
import json
import os
import pathlib
import signal
from collections.abc import Callable, Sequence

from atlas.training import load_model, metrics, run_id, run_sweep, runs_table
from atlas.training.finished import METRICS
from experiments import _app
from models import checkpoint
from tests.atlas.training.worker import config_of

CHANGES = {"model.attention": "dense", "model.layers": 1, "train.steps": [4, 8], "data.synthetic_tokens": 2000}


def dying_after(number: int, save: Callable) -> Callable:
    """As `save`, but the process is killed behind so many calls."""
    calls = itertools.count(1)

    def saved(*arguments: object) -> None:
        save(*arguments)
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return saved


def main(argv: Sequence[str]) -> None:
    """Trains what is not trained yet, reads all of it back and prints what it is."""
    run, workdir = config_of(CHANGES), pathlib.Path(argv[1])
    if number := int(os.environ.get("DIE_AFTER_SAVES", 0)):
        checkpoint.save = dying_after(number, checkpoint.save)
    run_sweep([run], workdir, shard="0/1")
    digest = hashlib.sha256(runs_table([run], workdir).to_csv(index=False).encode())
    records = metrics.read(workdir / "runs" / run_id(run) / METRICS)
    lines = sorted(json.dumps({k: v for k, v in r.items() if k not in ("time", "speed")}) for r in records)
    digest.update("\n".join(lines).encode())
    for part in load_model(workdir, run_id(run)).values():
        for name, array in sorted(part.items()):
            digest.update(name.encode() + array.tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    _app.run(main, resumes=True, words=True)
