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

from atlas.training import Study, check_runs, estimate, initialize_distributed, run_id, run_sweep, runs_table, status
from checked import UserError
from checked.files import write_atomically
from experiments import _app

_CONFIG = _app.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "directory for the corpus, the runs and their checkpoints")
_POPULATION = flags.DEFINE_integer(
    "population", None, "runs of one shape that train as one step; default: the file's", lower_bound=1
)
_PROCESSES = _app.define_processes()
_SHARD = flags.DEFINE_string(
    "shard", "", "part i of n as i/n; default: from the scheduler's environment, else everything"
)
_LIST = flags.DEFINE_bool("list", False, "print the runs and the groups, and train nothing")
_STATUS = flags.DEFINE_bool("status", False, "print how far every run is, and train nothing")


def main(_: Sequence[str]) -> None:
    """Lists, reports or trains."""
    study = _CONFIG.study(_POPULATION.value)
    workdir = pathlib.Path(_WORKDIR.value) if _WORKDIR.value else None
    if _LIST.value:
        check_runs(study.plan, study.population, workdir)
        _print_list(study)
        return
    _app.require(workdir=workdir)
    if _STATUS.value:
        table = status(study.runs, workdir)
        print(table.to_string(index=False))
        print(table["state"].value_counts().to_string())
        return
    _app.check_outputs(_WORKDIR.value)
    initialize_distributed()
    run_sweep(study.runs, workdir, study.population, _SHARD.value, processes=_PROCESSES(study))
    write_atomically(workdir / "runs.csv", runs_table(study.runs, workdir).to_csv(index=False))
    print(f"runs table: {workdir / 'runs.csv'}")


def _print_list(study: Study) -> None:
    try:
        ids, note = [run_id(run) for run in study.runs], ""
    except UserError as error:
        ids, note = [run.name for run in study.plan], f"names, as ids depend on the text: {error}\n"
    rows = [(c.group, c.model.d_model, c.model.layers, c.train.steps[-1], c.mixture[:60]) for c in study.plan]
    table = pd.DataFrame(rows, columns=["group", "d_model", "layers", "steps", "mixture"])
    of_size = estimate.sizes(study.plan)
    table = pd.concat([pd.Series(ids, name="run"), table.iloc[:, :-1], of_size, table["mixture"]], axis=1)
    print(table.to_string(index=False, formatters={"flops": "{:.2e}".format}))
    print(table["group"].value_counts(sort=False).to_string())
    print(f"{note}{len(rows)} runs, {of_size['flops'].sum():.3g} FLOPs")


if __name__ == "__main__":
    _app.run(main, resumes=True)
