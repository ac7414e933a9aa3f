"""Trains one run.

    python -m experiments.train --config=configs/train.py --workdir=DIR [--config.model.attention=dense …]

Leaves DIR/runs/<run id>/ with metrics.jsonl (a line a step), evaluations.jsonl, the model and done.json, and
DIR/runs.csv. Interrupted, the same command continues; on several machines every process runs the same command.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from atlas.training import initialize_distributed, run_id, run_sweep, runs_table
from checked import UserError
from checked.files import write_atomically
from experiments import _app

_CONFIG = _app.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "directory for the corpus, the run and its checkpoints")

_PROFILE = flags.DEFINE_list("profile_steps", [], "first and last step of a trace for xprof, left in WORKDIR/profile")


def main(_: Sequence[str]) -> None:
    """Prepares the corpus, trains, prints the last evaluation."""
    _app.require(config=_CONFIG.base, workdir=_WORKDIR.value)
    config, workdir = _CONFIG.base, pathlib.Path(_WORKDIR.value)
    _app.check_outputs(_WORKDIR.value)
    initialize_distributed()
    run_sweep([config], workdir, shard="0/1", profile=_profile())
    table = runs_table([config], workdir)
    write_atomically(workdir / "runs.csv", table.to_csv(index=False))
    last = table[table["step"] == table["step"].max()]
    print(last[["language", "loss", "nats_per_token", "step"]].to_string(index=False))
    print(f"run {run_id(config)}: {workdir / 'runs' / run_id(config)}")


def _profile() -> tuple[int, int] | None:
    if not _PROFILE.value:
        return None
    try:
        first, last = (int(text) for text in _PROFILE.value)
    except ValueError as error:
        raise UserError(
            f"--profile_steps={','.join(_PROFILE.value)}: give the first and the last step, as 10,12"
        ) from error
    return first, last


if __name__ == "__main__":
    _app.run(main, resumes=True)
