"""Extrapolation on public tables of five kinds of law: the official splits of ScaleBench (arXiv 2604.22753).

The tables are no part of this repository (CC-BY-4.0). A law is fitted to the training split with its default options
and predicts the test split; the score is R² over the test rows, of domain mixtures the mean over domains. There a tenth
of the rows evaluate a domain that the run does not train, by a law of their own: R² of the others stands beside it.
"""

import io
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from atlas.report import style
from atlas.scaling import Runs, fit, fit_joint, law_named, load_runs
from checked import UserError
from checked.files import write_atomically

_TOKENS = 1e10  # of a run of the domain mixtures, which do not say how many: the same in all, so that B takes it up


class _Task(NamedTuple):
    """A table, the law that is fitted to it, the R² to reach, and that of the law people wrote for it (SLDBench)."""

    name: str
    law: str
    bar: float
    by_people: float
    columns: Mapping[str, str] = MappingProxyType({})  # what the table calls ours
    by: str = ""  # a column whose groups have a law each


_TASKS = (
    _Task("domain_mixture", "atlas", 0.95, 0.671),
    _Task("data_constrained", "overfitting", 0.97, 0.911),
    _Task("parallel", "parallel", 0.99, 1.0, by="group"),
    _Task(
        "vocab",
        "vocabulary",
        0.975,
        0.966,
        MappingProxyType(
            {"num_params": "non_vocab_parameters", "tokens": "num_characters", "loss": "unigram_normalized_loss"}
        ),
    ),
    _Task("farseer", "farseer", 0.93, float("nan")),
)


def run(folder: str, workdir: str = "") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per task: law, r2, r2_trained (of rows whose run trains what they evaluate), bar, reached, by_people (R² of
    the law published for it), median_error, n_train, n_test, settled.

    Args:
      folder: of <task>.train.csv.gz and <task>.test.csv.gz.
      workdir: receives predicted.png, observed against predicted losses of every test split; "" draws nothing.
    """
    if not pathlib.Path(folder, "farseer.train.csv.gz").is_file():
        raise UserError(f"no ScaleBench tables in {folder!r}; give their folder as --table=DIR")
    rows, drawn = [], {}
    for task in _TASKS:
        tables = [pd.read_csv(pathlib.Path(folder, f"{task.name}.{split}.csv.gz")) for split in ("train", "test")]
        found = [_predict(task, *part) for part in _groups(task, *tables)]
        rest = drawn[task.name] = pd.concat([frame for frame, _ in found])
        scores, trained = _scores(rest), _scores(rest[rest["trained"]])
        rows.append(
            {
                "task": task.name,
                "law": task.law,
                "r2": float(np.mean(scores)),
                "r2_trained": float(np.mean(trained)),
                "bar": task.bar,
                "reached": bool(np.mean(scores) >= task.bar),
                "by_people": task.by_people,
                "median_error": float((rest["predicted"] - rest["loss"]).abs().median() / rest["loss"].abs().mean()),
                "n_train": len(tables[0]),
                "n_test": len(tables[1]),
                "settled": all(settled for _, settled in found),
            }
        )
    if workdir:
        content = io.BytesIO()
        _figure(drawn).savefig(content, dpi=100)
        write_atomically(pathlib.Path(workdir, "predicted.png"), content.getvalue())
    return rows, {"data": "ScaleBench, CC-BY-4.0, official splits", "score": "R² on the test split"}


@style.styled
def _figure(tables: Mapping[str, pd.DataFrame]) -> Figure:
    figure, axes = style.panels(len(tables), xlabel="predicted loss", ylabel="observed loss")
    for axis, (name, rows) in zip(axes, tables.items(), strict=True):
        ends = [rows["loss"].min(), rows["loss"].max()]
        axis.plot(ends, ends, color=style.MUTED, lw=0.8)
        axis.scatter(rows["predicted"], rows["loss"], s=9, color=style.COLOURS[0], alpha=0.6, lw=0)
        axis.set_title(name)
    return figure


def _groups(task: _Task, train: pd.DataFrame, test: pd.DataFrame):
    if not task.by:
        return [(train, test)]
    return [tuple(t[t[task.by] == name] for t in (train, test)) for name in train[task.by].unique()]


def _scores(rows: pd.DataFrame) -> list[float]:
    """R² of every language."""
    return [_r2(part["loss"], part["predicted"]) for _, part in rows.groupby("language")]


def _r2(loss: pd.Series, predicted: pd.Series) -> float:
    return float(1.0 - ((loss - predicted) ** 2).sum() / ((loss - loss.mean()) ** 2).sum())


def _predict(task: _Task, train: pd.DataFrame, test: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """Rows [language, loss, predicted, trained] of the test split, and whether the fit settled."""
    if task.law == "atlas":
        known, unseen = (load_runs(_with_tokens(table)) for table in (train, test))
        law = fit_joint(known)
    else:
        known, unseen = (_load(task, table) for table in (train, test))
        law = fit(task.law, known)
    rows = unseen.evaluations()[["language", "loss"]].assign(predicted=law.predict_runs(unseen)[0])
    return rows.assign(trained=task.law != "atlas" or unseen.own(unseen.D) > 0), law.converged


def _load(task: _Task, table: pd.DataFrame) -> Runs:
    law = law_named(task.law)
    return load_runs(table, task.columns, needs=law.needs, signed=law.residual == "raw")


def _with_tokens(table: pd.DataFrame) -> pd.DataFrame:
    """Domain mixtures as a runs table: sizes from the models' names, tokens from the shares."""
    shares = table.filter(like="share.")
    sizes = table["model"].str.removesuffix("M").astype(float) * 1e6
    tokens = (shares * _TOKENS).rename(columns=lambda name: name.replace("share.", "tokens."))
    return table[["run", "language", "loss"]].assign(num_params=sizes).join(tokens)
