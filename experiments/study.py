"""The main job: corpus → sweep → runs table → joint fit → transfer matrix → report.

    python -m experiments.study --config=configs/quickstart.py --workdir=DIR

Leaves DIR/runs.csv, fit.json, transfer.csv, report.html and more. Interrupted, the same command continues; finished,
it returns at once. --estimate says beforehand what it takes. With --runs=FILE it trains nothing and analyses a runs
table from anywhere.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from atlas.studies.analysis import analyse_into
from atlas.studies.scaling_study import run_study
from atlas.training import check_runs, estimate, initialize_distributed
from checked.processes import compile_lean
from experiments import _app

_CONFIG = _app.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "directory for the corpus, the runs and the results")
_POPULATION = flags.DEFINE_integer(
    "population", None, "runs of one shape that train as one step; default: the file's", lower_bound=1
)
_PROCESSES = _app.define_processes()
_COLUMNS = _app.define_columns()
_ESTIMATE = flags.DEFINE_bool("estimate", False, "print what it would take, from a measured second, and train nothing")
_RUNS = flags.DEFINE_string("runs", None, "runs table to analyse in place of training")


def main(_: Sequence[str]) -> None:
    """Trains and analyses, or only analyses, or says what it would take."""
    if _ESTIMATE.value:
        study = _CONFIG.study(_POPULATION.value)
        check_runs(study.plan, study.population)
        print(estimate.in_words(estimate.estimate(study.plan, study.population)))
        return
    _app.require(workdir=_WORKDIR.value)
    _app.check_outputs(_WORKDIR.value)
    workdir = pathlib.Path(_WORKDIR.value)
    if _RUNS.value:
        compile_lean()
        print(analyse_into(workdir, _RUNS.value, pathlib.Path(_RUNS.value).stem, columns=_COLUMNS()))
        return
    initialize_distributed()
    study = _CONFIG.study(_POPULATION.value)
    processes = _PROCESSES(study)
    if processes > 1:
        compile_lean()  # what is left to this process is fits
    print(run_study(study, workdir, _app.command(), processes))


if __name__ == "__main__":
    _app.run(main, resumes=True)
