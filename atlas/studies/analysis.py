"""What a runs table tells: joint law, transfer, capacity law, held-out scores, the next mixture; as files and words."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from atlas import report
from atlas.errors import UserError
from atlas.files import write_atomically
from atlas.scaling import JointFit, Runs, fit_joint, heldout, heldout_predictions, load_runs
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN
from atlas.scaling.planning.allocation import expansion_table
from atlas.scaling.planning.mixtures import MixtureLaw, MixturePlan, TrustRegion, optimal_mixture
from atlas.scaling.table.checks import is_continued
from atlas.scaling.table.labels import labels, starting_tau
from atlas.scaling.table.published import transfer_scores
from atlas.scaling.transfer.capacity import fit_capacity
from atlas.scaling.transfer.scores import bilingual_transfer_scores, score_from_tau

SUMMARY = "summary.txt"
OUTPUTS = (
    "runs.csv",
    "fit.json",
    "transfer.csv",
    "transfer_scores.csv",
    "heldout.csv",
    "report.html",
    SUMMARY,
)
LAWS = ("atlas", "chinchilla_own", "chinchilla_total", "data_constrained")
SPLITS = ("largest_n", "mixture")
FITTED_ROWS = "phase == 'cooldown'"

_BUDGET_FACTOR = 10  # the next budget, in multiples of the study's most expensive run

T = TypeVar("T")
Known = Mapping[tuple[str, str], float] | None


def analyse(
    frame: pd.DataFrame, title: str, relatedness: Known = None, facts: Mapping[str, object] | None = None
) -> report.StudySummary:
    """Everything that a runs table tells: joint law, transfer, capacity, held-out scores, next runs.

    The laws are fitted to the ends of cooldown branches, which are comparable; curves of the trunk serve transfer
    scores too. What the runs cannot give is None, and `missing` says why.
    """
    missing: dict[str, str] = {}

    def attempt(name: str, compute: Callable[[], T]) -> T | None:
        try:
            return compute()
        except UserError as error:
            missing[name] = str(error)
            return None

    # Laws are of runs from scratch; a continued one starts ahead of them.
    scratch = frame[~is_continued(frame)]
    runs = load_runs(scratch.query(FITTED_ROWS))
    once = scratch[_epochs(scratch) <= 1]
    options = labels(runs.languages) | {"initial_tau": starting_tau(once)}
    fit = fit_joint(runs, **options)
    capacity = attempt("capacity", lambda: fit_capacity(load_runs(once)))
    scores = [s for split in SPLITS for s in _scores(runs, split, options, missing)]
    return report.StudySummary(
        title=title,
        runs=frame,
        fit=fit,
        fitted_rows=FITTED_ROWS,
        transfer=attempt("transfer", lambda: bilingual_transfer_scores(once)),
        capacity=capacity,
        heldout=pd.DataFrame(scores),
        heldout_rows=_heldout_rows(runs, {score["split"] for score in scores}, options),
        **(_published(runs.targets) if relatedness is None else {"relatedness": relatedness}),
        expansion=attempt("expansion", lambda: expansion_table([2, 4, 8], capacity.exponents)) if capacity else None,
        mixture=attempt("mixture", lambda: next_mixture(fit, runs)),
        facts=facts or {},
        warnings=_skipped(frame),
        missing=missing,
    )


def next_mixture(fit: JointFit, runs: Runs) -> MixturePlan:
    """The mixture and size of least mean loss for ten times the compute of the study's most expensive run."""
    law = MixtureLaw.from_parameters(fit.parameters)
    flops = _BUDGET_FACTOR * FLOPS_PER_PARAMETER_TOKEN * float((runs.N * runs.total_tokens).max())
    unique = {name: float(runs.U[:, i].max()) for i, name in enumerate(runs.languages)}
    return optimal_mixture(law, flops, TrustRegion.of_runs(law, runs), unique_tokens=unique)


def write_analysis(summary: report.StudySummary, workdir: pathlib.Path) -> str:
    """Writes the results of a study as files and returns them in words."""
    scores = {f"{row.split}/{row.law}": {"r2": row.r2, "are": row.are} for row in summary.heldout.itertuples()}
    write_atomically(workdir / "fit.json", json.dumps(summary.fit.to_json(scores), indent=1))
    write_atomically(workdir / "transfer.csv", transfer_table(summary.fit).to_csv(index=False))
    if summary.transfer is not None:
        write_atomically(workdir / "transfer_scores.csv", summary.transfer.to_csv(index=False))
    if summary.capacity is not None:
        write_atomically(workdir / "capacity.json", json.dumps(summary.capacity.to_json(), indent=1))
    write_atomically(workdir / "heldout.csv", summary.heldout.to_csv(index=False))
    path = report.write_report(workdir, summary)
    text = _describe(summary) + f"\nreport: {path}\n"
    write_atomically(workdir / SUMMARY, text)
    return text


def transfer_table(fit: JointFit) -> pd.DataFrame:
    """One row an ordered pair: target, source, tau with se and 90 % interval, identified, and the bilingual score it
    implies."""
    rows = []
    for target in fit.targets:
        for source in fit.sources:
            if source != target:
                tau = fit.parameters[f"tau[{target}<-{source}]"]
                implied = float(score_from_tau(tau.value)) if tau.value > -1 else float("nan")
                rows.append(
                    {
                        "target": target,
                        "source": source,
                        "tau": tau.value,
                        "se": tau.se,
                        "low": tau.low,
                        "high": tau.high,
                    }
                )
                rows[-1] |= {"identified": tau.identified, "implied_score": implied}
    return pd.DataFrame(rows)


def _describe(summary: report.StudySummary) -> str:
    fit = summary.fit
    names = ("E", "A", "alpha", "B", "beta", "lambda")
    law = pd.DataFrame({t: {n: fit.parameters[f"{n}[{t}]"].value for n in names} for t in fit.targets}).T
    parts = [
        f"{summary.title}: {fit.n_runs} runs, {fit.n_rows} rows, noise {100 * fit.sigma:.2f} % of the loss",
        "\nfitted law, loss in bits per byte: E + A K^phi / N^alpha + B / D_eff^beta\n"
        + law.to_string(float_format="{:.4g}".format),
        _estimate("phi (capacity)", fit.parameters.get("phi")),
        "\ntransfer matrix tau (row: target, column: source)\n" + fit.transfer_matrix().round(3).to_string(),
    ]
    if len(summary.heldout):
        parts.append("\nheld out, mean over languages\n" + summary.heldout.round(4).to_string(index=False))
    if summary.mixture is not None:
        plan = summary.mixture
        shares = ", ".join(f"{row.language} {row.share:.0%}" for row in plan.table.itertuples())
        parts.append(
            f"\nnext, for {plan.flops:.2g} FLOPs: N = {plan.params:.3g}, D = {plan.tokens:.3g}, mixture {shares}"
        )
    parts += [f"warning: {warning}" for warning in (*fit.warnings, *summary.warnings)]
    parts += [f"no {name}: {reason}" for name, reason in summary.missing.items()]
    return "\n".join(parts)


def _estimate(name: str, estimate: Any) -> str:
    if estimate is None:
        return ""
    known = "" if estimate.identified else ", not identified"
    return f"{name} = {estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]{known}"


def _scores(runs: Runs, split: str, options: Mapping[str, Any], missing: dict[str, str]) -> Iterable[dict]:
    for law in LAWS:
        try:
            score = heldout(runs, split, law, **(options if law == "atlas" else {}))
        except UserError as error:
            missing[f"held-out score on {split}"] = str(error)
        else:
            yield {key: score[key] for key in ("split", "law", "r2", "are", "rmse_log", "n_train", "n_heldout")}


def _heldout_rows(runs: Runs, splits: Iterable[str], options: Mapping[str, Any]) -> pd.DataFrame | None:
    parts = [heldout_predictions(runs, split, **options).assign(split=split) for split in sorted(splits)]
    return pd.concat(parts) if parts else None


def _skipped(frame: pd.DataFrame) -> tuple[str, ...]:
    """A warning for every run that left out steps because their loss or gradient was not finite."""
    if "skipped_steps" not in frame:
        return ()
    most = frame.groupby("run")["skipped_steps"].max()
    return tuple(f"run {run} skipped {count} steps that were not finite" for run, count in most[most > 0].items())


def _published(languages: Sequence[str]) -> dict[str, Any]:
    """The paper's transfer scores to compare with, as far as it has these languages."""
    scores = transfer_scores()
    pairs = [(t, s) for t in languages for s in languages if t != s and t in scores.index and s in scores.columns]
    known = {(t, s): float(scores.loc[t, s]) for t, s in pairs}
    return {"relatedness": known or None, "relatedness_name": "published by ATLAS"}


def _epochs(frame: pd.DataFrame) -> np.ndarray:
    """[n] the most often that a row's run has seen any one language."""
    tokens = [name for name in frame if name.startswith("tokens.")]
    epochs = [frame[name].fillna(0) / frame[f"unique_{name}"] for name in tokens]
    return np.max(epochs, axis=0)
