"""Attention kinds side by side: trains them, measures the trained models, and tabulates what differs."""

import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import pandas as pd
from scipy.special import stdtrit
from tqdm import tqdm

from atlas.data import Corpus, tasks
from atlas.data.tokenizers import Tokenizer
from atlas.data.windows import cut
from atlas.report import attention_comparison as figures
from atlas.studies.lengths import BEYOND, PositionReader
from atlas.studies.scaling_study import machine, training_seconds
from atlas.training import RunConfig, Study, load_model, metrics, run_id, run_sweep, runs_table, stability
from atlas.training.config import shape_of
from atlas.training.evaluation import evaluation_set, exact_matches, read
from atlas.training.finished import EVALUATIONS, METRICS
from atlas.training.loop import COOLDOWN, TRUNK
from atlas.training.metrics import Record
from atlas.training.step import Skeleton
from atlas.training.sweep import prepare_corpus
from checked.files import read_sealed, write_atomically, write_sealed

RATES = "learning_rates"  # the group of a comparison's short runs

_CONSTANTS = ["num_params", "d_ff"]  # numbers of a kind, the same for every seed
_MEASURED_WINDOWS = 256  # of validation, a language or task, that trained models are measured on
_CURVE_STEPS = 20  # steps that a point of a curve is the mean of
_SOLVED = 0.1 * np.log(2)  # nats an answer: one that is not the first choice costs ln 2, so that nine of ten are right
_UNDISTURBED = 0.1  # quantile of the times between steps
_CLOCK_SECONDS = 1e-3  # to which log lines tell the time
_DPI = 150
_SINKS = ("first_token_attention", "sink_rate", "largest_activation")
_CURVES = {
    "loss": "loss, nats per token",
    "largest_activation": "largest activation",
    "indexer_loss": "indexer's loss, nats",
}


def run_comparison(study: Study, workdir: pathlib.Path, command: str) -> str:
    """Trains and measures what is not done yet, and leaves what it found in `workdir`.

    study: a run's name is its kind. Runs of group RATES tell the largest stable learning rate of their kind, all others
      everything else; kinds of one group are compared, with its first.
    command: how it was started, for the summary.

    Files: `table.csv` (a row a kind), `summary.json` (the same with its circumstances), `runs.csv` (the runs table),
    `results.csv` (a row a run), `curves.csv` (means of 20 steps), figures/*.png, and where there are long documents,
    evaluations on the trunk, tasks or short runs `positions.csv` (a row a run and stretch of positions), `sinks.csv` (a
    row an evaluation), `accuracy.csv` (a row a run, task and document length), `solved.csv` (see `solved`) and
    `learning_rates.csv` (a row a short run).

    Returns:
      The table in words.
    """
    run_sweep(study.runs, workdir, study.population, shard="0/1")
    full, short = ([run for run in study.runs if (run.group == RATES) is wanted] for wanted in (False, True))
    measured = _measure(full, workdir)
    records = {run: metrics.read(workdir / "runs" / run_id(run) / METRICS) for run in study.runs}
    evaluations = runs_table(full, workdir)
    cooled = evaluations[evaluations.phase == COOLDOWN]
    last = cooled[cooled.step == cooled.groupby("run").step.transform("max")]
    of_text = last[~last.language.isin(study.base.data.tasks)].groupby("run")
    facts = pd.DataFrame({"num_params": of_text.num_params.first(), "bits_per_byte": of_text.loss.mean()})
    results = pd.DataFrame(_row(run, facts.loc[run_id(run)], measured[run], records[run]) for run in full)
    rates = pd.DataFrame(_rate_row(run, records[run]) for run in short)
    accuracy = pd.DataFrame(row for run in full for row in _accuracy_rows(run, measured[run]))
    positions = pd.DataFrame(row for run in full for row in _position_rows(run, measured[run]))
    curves = pd.DataFrame(row for run in full for row in _curve_rows(run, records[run]))
    table = tabulate(results, rates)
    frames = {"results": results, "accuracy": accuracy, "positions": positions, "learning_rates": rates}
    frames |= {"curves": curves, "runs": evaluations, "solved": solved(evaluations, study.base.data.tasks)}
    frames |= {"sinks": pd.DataFrame(row for run in full for row in _sink_rows(run, workdir))}
    drawn = {"training": figures.training_curves(curves, _CURVES)}
    if len(accuracy):
        drawn["accuracy"] = figures.accuracy_by_length(accuracy)
    if len(rates):
        drawn["learning_rates"] = figures.learning_rates(rates)
    for name, frame in (frames | {"table": table.reset_index()}).items():
        if len(frame):
            write_atomically(workdir / f"{name}.csv", frame.to_csv(index=False, float_format="%.6g"))
    for name, figure in drawn.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=_DPI)
        write_atomically(workdir / "figures" / f"{name}.png", image.getvalue())
    summary = {
        "title": study.title,
        "command": command,
        **machine(),
        "training_minutes": round(training_seconds(map(run_id, study.runs), workdir) / 60, 1),
        "tokens_a_run": study.base.train.planned_steps * study.base.train.batch_size * study.base.data.window,
        "kinds": json.loads(table.to_json(orient="index", double_precision=6)),
    }
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=1))
    return f"{study.title}: mean ± standard deviation over seeds\n{describe(table)}\ntable: {workdir / 'table.csv'}"


def _measure(runs: Sequence[RunConfig], workdir: pathlib.Path) -> dict[RunConfig, Record]:
    """Measurements of trained runs, read back where they were made before.

    Each has `metrics`, those of the attention on validation text, `positions`, [from, to, bits per byte] of long
    validation documents, and `matches`, {task: {document length: (answers that match, documents)}} on validation
    windows of the tasks and on some of BEYOND times their length.
    """
    files = {run: workdir / "runs" / run_id(run) / "measurements.json" for run in runs}
    missing = [run for run, file in files.items() if not file.exists()]
    readers: dict[RunConfig, Callable[[dict], Record]] = {}
    for run in tqdm(missing, desc="measure", unit="run", disable=not missing):
        shape = shape_of(run)
        if shape not in readers:
            readers = {shape: _reader(run, prepare_corpus(run.data, workdir))}
        write_sealed(files[run], readers[shape](load_model(workdir, run_id(run))))
    return {run: read_sealed(file, "record of measurements", "delete it") for run, file in files.items()}


def _reader(run: RunConfig, corpus: Corpus) -> Callable[[dict], Record]:
    """Measures trained models of one shape, compiled once."""
    tokenizer = corpus.tokenizer
    skeleton = Skeleton(dataclasses.replace(run.model, vocab_size=tokenizer.vocab_size))
    ids = tokenizer.separator, tokenizer.padding
    compiled = jax.jit(lambda model, tokens: read(skeleton.merge(model["params"], model["buffers"]), tokens, *ids))
    windows = evaluation_set(corpus, _MEASURED_WINDOWS, run.train.batch_size, run.data.tasks)
    language = np.asarray(corpus.languages)[windows.language]
    longer = {task: _longer_windows(task, run, tokenizer) for task in run.data.tasks}
    positions = PositionReader(run.model, corpus, [name for name in corpus.languages if name not in run.data.tasks])

    def matches(model: dict, tokens_CBS: np.ndarray) -> dict[int, tuple[int, int]]:
        correct_CBT, _ = compiled(model, tokens_CBS)
        rows = tokens_CBS.reshape(-1, tokens_CBS.shape[-1])
        return exact_matches(rows, np.asarray(correct_CBT).reshape(len(rows), -1), tokenizer.separator)

    def measure(model: dict) -> Record:
        _, measured = compiled(model, windows.tokens[~np.isin(language, run.data.tasks)])
        beyond = {task: matches(model, longer[task])[longer[task].shape[-1] - 1] for task in longer}
        within = {task: matches(model, windows.tokens[language == task]) for task in longer}
        return {
            "metrics": {name: float(value) for name, value in measured.items()},
            "positions": list(positions.read(model)),
            "matches": {task: within[task] | {BEYOND * run.data.window: beyond[task]} for task in longer},
        }

    return measure


def _longer_windows(task: str, run: RunConfig, tokenizer: Tokenizer) -> np.ndarray:
    """Validation windows of BEYOND times the length, int32 [C, 1, BEYOND · T + 1]."""
    window = BEYOND * run.data.window
    documents = tasks.documents(task, "validation", _MEASURED_WINDOWS * window, window, run.data.seed)
    rows = list(cut(tokenizer.encode_documents(documents), window, tokenizer.padding))
    return np.stack(rows)[:, None]


def tabulate(results: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
    """One row a kind: each number of `results` as the mean over seeds, and `<number>_sd`, its deviation (n - 1).

    `difference` is that of the bits per byte from the first kind of the group; see `differences`. `largest_stable_rate`
    is that of the short runs; see `atlas.training.stability`.
    """
    kinds = results.groupby("kind", sort=False)
    columns = [kinds.size().rename("runs"), kinds[_CONSTANTS].first()]
    for name in results.columns.drop(["run", "group", "kind", "seed", *_CONSTANTS]):
        columns.append(kinds[name].agg(**{name: "mean", f"{name}_sd": "std"}))
    table = pd.concat([*columns, differences(results)], axis=1)
    if not len(rates):
        return table
    by_kind = {kind: dict(zip(part.learning_rate, part.diverged, strict=True)) for kind, part in rates.groupby("kind")}
    stable = {kind: stability.largest_stable_rate(runs) for kind, runs in by_kind.items()}
    return table.assign(largest_stable_rate=pd.Series(stable, dtype=float))


def differences(results: pd.DataFrame) -> pd.DataFrame:
    """`difference` of every kind in bits per byte from the first of its group, and `difference_95`, half the width of
    its interval, which holds between any two kinds with as many seeds.

    Kinds see the same batches where their seeds are the same, so that differences are taken seed by seed. Their
    deviation is one for all, from the kinds that have every seed: what is left of kinds × seeds without the mean of
    each. NaN where there is one seed or one kind.
    """
    found = []
    for _, part in results.groupby("group", sort=False):
        losses = part.pivot(index="kind", columns="seed", values="bits_per_byte").loc[part.kind.unique()]
        whole = losses.dropna().to_numpy()
        left = whole - whole.mean(1, keepdims=True) - whole.mean(0) + whole.mean()
        freedom = (whole.shape[0] - 1) * (whole.shape[1] - 1)
        deviation = np.sqrt(np.sum(left**2) / freedom) if freedom else np.nan
        gaps = losses - losses.iloc[0]
        reach = stdtrit(freedom, 0.975) * deviation * np.sqrt(2 / gaps.notna().sum(axis=1))
        found.append(pd.DataFrame({"difference": gaps.mean(axis=1), "difference_95": reach}))
    return pd.concat(found)


def solved(evaluations: pd.DataFrame, of: Sequence[str]) -> pd.DataFrame:
    """A row a run and task that it trains on: `step`, the first evaluated at which nine answers of ten are right.

    evaluations: rows of the runs table. of: the names of the tasks. NaN where no evaluation was so good.
    """
    rows = []
    for (run, task), part in evaluations[evaluations.language.isin(of)].groupby(["run", "language"], sort=False):
        if part[f"tokens.{task}"].max() > 0:
            rows.append({"run": run, "task": task, "step": part.step[part.nats_per_token <= _SOLVED].min()})
    return pd.DataFrame(rows)


def describe(table: pd.DataFrame) -> str:
    """The table with a column a kind and a line a number, as text."""
    lines = {}
    for name in table:
        if f"{name}_sd" in table:
            lines[name] = [
                "" if np.isnan(mean) else f"{mean:.4g}" + ("" if np.isnan(sd) else f" ± {sd:.2g}")
                for mean, sd in zip(table[name], table[f"{name}_sd"], strict=True)
            ]
        elif not name.endswith("_sd"):
            lines[name] = [f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in table[name]]
    return pd.DataFrame(lines, index=table.index).T.to_string()


def _row(run: RunConfig, facts: pd.Series, measured: Record, records: Sequence[Record]) -> Record:
    losses = stability.losses_of(records)
    matches = {
        task: np.sum([n for length, n in counts.items() if int(length) <= run.data.window], axis=0)
        for task, counts in measured["matches"].items()
    }
    return {
        **_labels(run),
        "num_params": int(facts.num_params),
        "d_ff": run.model.d_ff,
        "bits_per_byte": facts.bits_per_byte,
        **{task: float(right / documents) for task, (right, documents) in matches.items()},
        **{name: value for name, value in measured["metrics"].items() if _concerns(run, name)},
        "spike_score": float(stability.spikes(losses).mean()),
        "spike_events_per_100k": stability.spike_events_per_100k(losses),
        "steps_per_second": _steps_per_second(records),
    }


def _rate_row(run: RunConfig, records: Sequence[Record]) -> Record:
    losses = stability.losses_of(records)
    last = [np.nan if loss is None else loss for loss in losses[-max(1, len(losses) // 10) :]]
    return {
        "kind": run.name,
        "learning_rate": run.train.learning_rate,
        "loss": float(np.mean(last)),
        "diverged": stability.diverged(losses),
    }


def _accuracy_rows(run: RunConfig, measured: Record) -> Iterator[Record]:
    for task, counts in measured["matches"].items():
        for length, (right, documents) in counts.items():
            found = {"task": task, "length": int(length), "documents": documents, "accuracy": right / documents}
            yield _labels(run) | found


def _position_rows(run: RunConfig, measured: Record) -> Iterator[Record]:
    for start, stop, loss in measured["positions"]:
        yield _labels(run) | {"start": start, "stop": stop, "bits_per_byte": loss}


def _sink_rows(run: RunConfig, workdir: pathlib.Path) -> Iterator[Record]:
    """What each evaluation on the trunk measured of attention."""
    for record in metrics.read(workdir / "runs" / run_id(run) / EVALUATIONS):
        if record["phase"] == TRUNK:
            yield _labels(run) | {name: record.get(name) for name in ("step", *_SINKS)}


def _curve_rows(run: RunConfig, records: Sequence[Record]) -> Iterator[Record]:
    frame = pd.DataFrame(records).sort_values("step")
    columns = [name for name in _CURVES if name in frame and _concerns(run, name)]
    for step, part in frame.groupby(-(-frame.step // _CURVE_STEPS) * _CURVE_STEPS):
        yield {"kind": run.name, "seed": run.seed, "step": step} | part[columns].mean().to_dict()


def _labels(run: RunConfig) -> Record:
    return {"run": run_id(run), "group": run.group, "kind": run.name, "seed": run.seed}


def _concerns(run: RunConfig, metric: str) -> bool:
    """Attention without an indexer logs a loss of 0 for it."""
    return run.model.is_sparse or metric != "indexer_loss"


def _steps_per_second(records: Sequence[Record]) -> float:
    """From the 10th percentile of the times between two steps of the trunk.

    Checkpoints, interruptions and other work on the machine lengthen some steps and shorten none, so the short ones
    say most about the run.
    """
    times = [r["time"] for r in sorted(records, key=lambda r: r["step"]) if r["phase"] == TRUNK]
    if len(times) < 2:
        return float("nan")
    return float(1 / max(np.quantile(np.diff(times), _UNDISTURBED), _CLOCK_SECONDS))
