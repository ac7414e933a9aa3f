"""Trains the attention kinds at equal parameters and data, and tabulates loss, retrieval, sinks, stability and speed.

    python -m experiments.compare_attention --config=configs/attention_comparison.py --workdir=DIR

Leaves DIR/table.csv, summary.json, the tables behind them and figures/. Interrupted, the same command continues;
finished runs are never repeated.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from atlas.studies import attention_comparison as comparison
from experiments import _app

_CONFIG = _app.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "directory for the corpus, the runs and the results")


def main(_: Sequence[str]) -> None:
    """Trains, measures and tabulates."""
    study = _CONFIG.study()
    _app.require(workdir=_WORKDIR.value)
    _app.check_outputs(_WORKDIR.value)
    print(comparison.run_comparison(study, pathlib.Path(_WORKDIR.value), _app.command()))


if __name__ == "__main__":
    _app.run(main, resumes=True)
