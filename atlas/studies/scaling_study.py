"""The loop itself: corpus → sweep → runs table → joint fit and transfer matrix → report → what to train next."""

import os
import pathlib
import platform
from collections.abc import Iterable

import jax
import numpy as np
import pandas as pd

from atlas.studies.analysis import analyse_into
from atlas.training import Study, metrics, run_sweep, runs_table
from atlas.training.finished import METRICS
from atlas.training.sweep import prepare_corpus

_IDLE_SECONDS = 60.0  # longer gaps between log lines are interruptions, not training


def run_study(study: Study, workdir: pathlib.Path, command: str = "", processes: int = 1) -> str:
    """Trains what is not trained yet, analyses all of it and leaves the results in `workdir`, see `analyse_into`.

    Finished studies return at once; interrupted ones continue. Every process of several calls this; the first analyses.
    command: how it was started, for the report. processes: that train side by side, see `run_sweep`.

    Returns:
      The summary in words: law, transfer matrix, held-out scores and the path of the report.
    """
    run_sweep(study.runs, workdir, study.population, shard="0/1", processes=processes)
    known = prepare_corpus(study.base.data, workdir).relatedness
    if jax.process_index():
        return "trained with the others; process 0 analyses"
    frame = runs_table(study.runs, workdir)
    return analyse_into(workdir, frame, study.title, known, _facts(study, frame, workdir, command))


def _facts(study: Study, frame: pd.DataFrame, workdir: pathlib.Path, command: str) -> dict[str, object]:
    data = study.base.data
    return {
        "command": command,
        "runs": len(study.runs),
        "sizes N": ", ".join(f"{n:,}" for n in sorted(frame["num_params"].unique())),
        "attention": study.base.model.attention,
        "corpus": f"{data.source}, {data.tokenizer} tokens, windows of {data.window}",
        "tokens a step": study.base.train.batch_size * data.window,
        "training time": f"{training_seconds(frame['run'].unique(), workdir) / 60:.1f} minutes",
        **machine(),
    }


def machine() -> dict[str, str]:
    """What this process runs on and with, in words."""
    device = jax.devices()[0].device_kind
    return {
        "hardware": f"{jax.device_count()} × {device}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
    }


def training_seconds(runs: Iterable[str], workdir: pathlib.Path) -> float:
    """Time in which log lines of these runs, by id, were written, without interruptions; processes that trained side by
    side count once."""
    times = [r["time"] for run in runs for r in metrics.read(workdir / "runs" / run / METRICS)]
    gaps = np.diff(np.sort(times))
    return float(gaps[gaps < _IDLE_SECONDS].sum())
