"""The joint law and LightGBM on the runs of RegMix (Liu et al., arXiv 2407.01492): losses of mixtures that no run has.

Models of one size, each trained on one mixture of 17 domains of the Pile and evaluated on 13 of them. A directory holds
their runs tables, train1m.csv.gz (512 runs) and test1m.csv.gz (256): run, num_params, language (the domain), loss
(nats), and tokens.<domain>, a billion in all. The authors predict losses by gradient-boosted trees.
"""

import importlib.metadata
import importlib.util
import io
import pathlib
import time
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from atlas.report import decisions, style
from atlas.scaling import FLOPS_PER_PARAMETER_TOKEN, JointFit, Runs, fit_joint, load_runs, plan_mixture
from checked.files import write_atomically

_RUNS = (64, 128, 256, 512)
_GOAL = "pile_cc"  # the domain for whose loss the authors chose their mixture
# The authors' parameters of LightGBM, without their early stopping, which looks at the test set.
_TREES = {"objective": "regression", "learning_rate": 1e-2, "seed": 42, "verbosity": -1, "num_threads": 1}
_ROUNDS = 1000
# Rows that a leaf holds at least: their default, and what 128 runs are better served by.
_LEAVES = {"LightGBM": 20, "LightGBM, leaves of 5": 5}
# Their mixture for Pile-CC (regmix.yaml of github.com/sail-sg/regmix), of at least a thousandth.
_THEIRS = {
    "pile_cc": 0.8701,
    "ubuntu_irc": 0.0642,
    "pubmed_abstracts": 0.0242,
    "wikipedia_en": 0.0159,
    "hackernews": 0.0119,
    "pubmed_central": 0.0031,
    "uspto_backgrounds": 0.0025,
    "enron_emails": 0.0017,
    "gutenberg_pg_19": 0.0016,
    "freelaw": 0.0015,
    "nih_exporter": 0.0012,
    "arxiv": 0.0012,
}


def run(folder: str, workdir: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per number of runs, predictor and domain, and one of all domains: rank correlation (Spearman) with the
    losses of the test runs that train the domain, median relative error, whether the fit settled, CPU seconds.

    Args:
      folder: holds the two runs tables.
      workdir: receives the transfer matrix of the fit to all runs as figure and table, and the mixture that it would
        choose beside that of the authors; "" keeps nothing.
    """
    train, test = (pd.read_csv(pathlib.Path(folder) / f"{part}1m.csv.gz") for part in ("train", "test"))
    runs, rows = load_runs(test), []
    runs = runs.where(runs.own(runs.D) > 0)
    known = importlib.util.find_spec("lightgbm") is not None
    for count in tqdm(_RUNS, desc="runs", leave=False):
        some = load_runs(train[train["run"].isin(train["run"].unique()[:count])])
        for mixing in ("sum", "ces"):
            start = time.process_time()
            best = fit_joint(some, mixing=mixing)
            cpu = time.process_time() - start
            predicted, deviation = best.predict_runs(runs)
            rows += _scores(count, f"law, {mixing}", runs, predicted, cpu, best.converged, np.isinf(deviation))
        for name, least in _LEAVES.items() if known else ():
            start = time.process_time()
            predicted = _trees(some, runs, least)
            rows += _scores(count, name, runs, predicted, time.process_time() - start)
    table, facts = _choice(best, load_runs(train))
    if workdir:
        _write(pathlib.Path(workdir), best, table, pd.DataFrame(rows))
    return rows, facts | {"lightgbm": importlib.metadata.version("lightgbm") if known else "not installed"}


def _trees(train: Runs, test: Runs, least: int) -> np.ndarray:
    """Losses [n] of the test rows by trees on the shares of all domains, those of each domain by themselves, and with
    `least` rows a leaf."""
    import lightgbm

    predicted = np.full(len(test), np.nan)
    for name in test.targets:
        fitted, asked = (runs.target == runs.languages.index(name) for runs in (train, test))
        data = lightgbm.Dataset(_shares(train)[fitted], train.loss[fitted])
        predicted[asked] = lightgbm.train(_TREES | {"min_data_in_leaf": least}, data, _ROUNDS).predict(
            _shares(test)[asked]
        )
    return predicted


def _shares(runs: Runs) -> np.ndarray:
    """[n, 17] in alphabetical order of the domains."""
    return runs.shares[:, np.argsort(runs.languages)]


def _scores(
    count: int,
    predictor: str,
    runs: Runs,
    predicted: np.ndarray,
    cpu: float,
    settled: bool | None = None,
    refused: np.ndarray | bool = False,
) -> list[dict[str, Any]]:
    frame = runs.evaluations()[["language", "loss"]].assign(predicted=predicted, refused=refused)
    frame["error"] = 100 * np.abs(frame.predicted / frame.loss - 1)
    found = []
    for name, part in frame.groupby("language"):
        rank = part[["loss", "predicted"]].corr("spearman").iat[0, 1]
        scores = {"spearman": rank, "least": rank, "error_percent": part.error.median(), "refused": part.refused.sum()}
        found.append({"runs": count, "predictor": predictor, "domain": name} | {k: float(v) for k, v in scores.items()})
    table = pd.DataFrame(found)
    mean = {name: float(table[name].mean()) for name in ("spearman", "error_percent")}
    mean |= {"least": float(table.spearman.min()), "refused": float(table.refused.sum())}
    return [{"runs": count, "predictor": predictor, "domain": "all"} | mean | {"settled": settled, "cpu": cpu}, *found]


def _choice(fit: JointFit, runs: Runs) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The mixture of least loss on Pile-CC by the law and the authors' one, [domain, law, regmix]; and their losses."""
    N, tokens = float(runs.N[0]), float(np.median(runs.total_tokens))
    plan = plan_mixture(fit.law, runs, FLOPS_PER_PARAMETER_TOKEN * N * tokens, {_GOAL: 1.0})
    share = plan.table.set_index("language").share
    theirs = pd.Series(_THEIRS).reindex(share.index).fillna(0.0)
    table = pd.DataFrame({"law": share, "regmix": theirs / theirs.sum(), "alone": 1.0 * (share.index == _GOAL)})
    mixtures = tokens * table.to_numpy().T
    loss, deviation = fit.predict(N, mixtures, np.inf * mixtures.clip(1), [_GOAL] * len(mixtures))
    names = zip(table, loss, deviation, strict=True)
    facts: dict[str, Any] = {f"{_GOAL} by the mixture of {name}": f"{x:.4f} ± {sd:.4f}" for name, x, sd in names}
    eta = dict(zip(fit.targets, np.asarray(fit.law.eta).round(3).tolist(), strict=True))
    return table.rename_axis("domain").reset_index(), facts | {"eta": eta, "sigma": fit.sigma}


def _write(workdir: pathlib.Path, fit: JointFit, table: pd.DataFrame, scores: pd.DataFrame) -> None:
    matrix = fit.transfer_matrix().join(pd.Series(fit.law.eta, fit.targets, name="eta"))
    write_atomically(workdir / "transfer.csv", matrix.round(4).to_csv())
    write_atomically(workdir / "mixture.csv", table.round(4).to_csv(index=False))
    for name, figure in (("transfer", decisions.transfer(fit, None, None, "")), ("runs", _by_runs(scores))):
        picture = io.BytesIO()
        figure.savefig(picture, dpi=150, metadata={"Software": None})
        write_atomically(workdir / "figures" / f"{name}.png", picture.getvalue())


@style.styled
def _by_runs(scores: pd.DataFrame) -> Figure:
    """Mean over the domains of median error and of what rank correlation lacks to 1, against the number of runs."""
    figure, axes = style.panels(2, columns=2, height=3.2, xlabel="runs fitted")
    names = {"law, sum": "law, plain sum", "law, ces": "law, substitution"} | {name: name for name in _LEAVES}
    means = scores[scores.domain == "all"].assign(lack=lambda rows: 1 - rows.spearman)
    for axis, (column, title) in zip(
        axes, {"error_percent": "median error, %", "lack": "1 − Spearman"}.items(), strict=True
    ):
        for colour, (name, label) in zip(style.COLOURS, names.items(), strict=False):
            part = means[means.predictor == name]
            axis.plot(part.runs, part[column], "o-", color=colour, label=label)
        style.log_axis(axis.xaxis, means.runs, text="{:g}".format)
        style.log_axis(axis.yaxis, means[column])
        axis.set_title(title)
    axes[0].legend()
    return figure
