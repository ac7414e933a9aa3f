"""Lists or executes the sweep of a config file, or a shard of it.

    python -m experiments.sweep --config=configs/atlas_mini.py --workdir=DIR [--shard=0/4]
    python -m experiments.sweep --config=configs/atlas_paper.py --list
    python -m experiments.sweep --config=configs/atlas_mini.py --workdir=DIR --status

Without --shard the array index of SLURM or of a Kubernetes indexed job is used where there is one. Finished runs are
never repeated; a broken one continues from its last checkpoint. DIR/runs.csv collects every evaluation.
"""

import pathlib
from collections.abc import Sequence

import pandas as pd
from absl import flags

from atlas.errors import UserError
from atlas.files import write_atomically
from atlas.training import initialize_distributed, run_id, run_sweep, runs_table, status
from experiments import _app

_CONFIG = _app.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "directory for the corpus, the runs and their checkpoints")
_SHARD = flags.DEFINE_string(
    "shard", "", "part i of n as i/n; default: from the scheduler's environment, else everything"
)
_LIST = flags.DEFINE_bool("list", False, "print the runs and the groups, and train nothing")
_STATUS = flags.DEFINE_bool("status", False, "print how far every run is, and train nothing")


def main(_: Sequence[str]) -> None:
    """Lists, reports or trains."""
    _app.require(config=_CONFIG.value)
    config = _CONFIG.value
    module = _app.config_module(_CONFIG)
    if not hasattr(module, "get_sweep"):
        raise UserError(f"{module.__file__} defines no get_sweep(); use experiments.train for a single run")
    configs = module.get_sweep(config)
    if _LIST.value:
        _print_list(configs)
        return
    _app.require(workdir=_WORKDIR.value)
    workdir = pathlib.Path(_WORKDIR.value)
    if _STATUS.value:
        table = status(configs, workdir)
        print(table.to_string(index=False))
        print(table["state"].value_counts().to_string())
        return
    initialize_distributed()
    run_sweep(configs, workdir, config.population, _SHARD.value)
    write_atomically(workdir / "runs.csv", runs_table(configs, workdir).to_csv(index=False))
    print(f"runs table: {workdir / 'runs.csv'}")


def _print_list(configs: Sequence) -> None:
    rows = [(run_id(c), c.group, c.model.d_model, c.model.layers, c.train.steps[-1], c.mixture[:60]) for c in configs]
    print(pd.DataFrame(rows, columns=["run", "group", "d_model", "layers", "steps", "mixture"]).to_string(index=False))
    groups = pd.Series([c.group for c in configs]).value_counts(sort=False)
    print(groups.to_string())
    print(f"{len(configs)} runs")


if __name__ == "__main__":
    _app.run(main, resumes=True)
