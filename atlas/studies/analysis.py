"""What a runs table tells: joint law, transfer, capacity law, held-out scores, the next mixture; as files and words."""

import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from atlas import report, scaling
from atlas.scaling import JointFit, Runs
from checked import UserError
from checked.files import digest_of_file, read_sealed, write_atomically, write_sealed

SUMMARY = "summary.txt"
LAWS = ("atlas", "chinchilla_own", "chinchilla_total", "data_constrained")
SPLITS = ("largest_n", "mixture")
SCORES = ["split", "law", "r2", "are", "rmse_log", "n_train", "n_heldout"]

_STAMP = "study.json"
_PARTS = 5 + len(SPLITS) * len(LAWS)  # joint law, transfer, its conclusions, capacity law, mixture; held-out scores
_LABELS = {"families": "family", "scripts": "script"}
_SHOWN = 8  # pairs of a sentence
_BAR = "{desc}{n}/{total} |{bar}| {elapsed}"

Known = Mapping[tuple[str, str], float] | None


def analyse_into(
    workdir: pathlib.Path,
    source: str | os.PathLike | pd.DataFrame,
    title: str,
    relatedness: Known = None,
    facts: Mapping[str, object] | None = None,
    columns: Mapping[str, str] | None = None,
) -> str:
    """Analyses a runs table and leaves the results in `workdir`, at once where they stand there already.

    Results stand as long as the table, the title, the relatedness and the code that makes them are the same and every
    file is as it was left.

    Args:
      workdir: receives runs.csv, fit.json, transfer.csv, heldout.csv, report.html with its figures, summary.txt and,
        where the runs give them, transfer_scores.csv and capacity.json.
      source: a runs table, as `load_runs` takes it.
      title, relatedness, facts: as for `analyse`.
      columns: what the table calls ours, as for `load_runs`.

    Returns:
      The summary in words.

    Raises:
      UserError: the table cannot be read or holds too little for a joint fit.
    """
    table = scaling.read_runs(source, columns)
    stamp = _stamp(table, title, relatedness)
    if _stands(workdir, stamp):
        return (workdir / SUMMARY).read_text()
    path = workdir / "runs.csv"
    if isinstance(source, pd.DataFrame) or path.resolve() != pathlib.Path(source).resolve():
        write_atomically(path, table.to_csv(index=False))
    text, outputs = write_analysis(analyse(scaling.load_runs(table), title, relatedness, facts), workdir)
    left = {name: digest_of_file(workdir / name) for name in ("runs.csv", *outputs)}
    write_sealed(workdir / _STAMP, {"stamp": stamp, "outputs": left})
    return text


def analyse(
    runs: Runs, title: str, relatedness: Known = None, facts: Mapping[str, object] | None = None
) -> report.StudySummary:
    """Everything that a runs table tells: joint law, transfer, capacity, held-out scores, next runs.

    The laws are fitted to `Runs.comparable`; curves of the trunk serve transfer scores too.

    Args:
      runs: all rows of the table.
      title: of the report.
      relatedness: (target, source) → how related two languages are; by default the transfer scores that ATLAS
        published, as far as it has these languages.
      facts: hardware, time, command and the like, for the report.

    Returns:
      What the runs cannot give is None, and `missing` says why.

    Raises:
      UserError: the runs hold too little for a joint fit.
    """
    missing: dict[str, str] = {}
    fitted = runs.comparable()
    options = scaling.labels(runs.languages)
    with tqdm(total=_PARTS, desc="joint law", unit="part", bar_format=_BAR) as bar:
        attempt = functools.partial(_attempt, missing, bar)
        fit = scaling.fit_joint(fitted, **options)
        bar.update()
        transfer = attempt("transfer", lambda: scaling.bilingual_transfer_scores(runs.single_epoch()))
        capacity = attempt("capacity", lambda: scaling.fit_capacity(runs.single_epoch()))
        scores, rows = _heldout(fitted, options, attempt)
        conclusions = attempt("conclusions", lambda: _conclusions(fitted, fit, transfer))
        mixture = attempt("mixture", lambda: scaling.plan_mixture(fit.law, fitted))
        bar.set_description("analysed", refresh=False)
    return report.StudySummary(
        title=title,
        runs=runs,
        fit=fit,
        transfer=transfer,
        capacity=capacity,
        heldout=scores,
        heldout_rows=rows,
        **(_published(runs.targets) if relatedness is None else {"relatedness": relatedness}),
        mixture=mixture,
        facts=facts or {},
        draws=scaling.joint_draws(fit),
        conclusions=conclusions or (),
        warnings=_skipped(runs.frame),
        missing=missing,
    )


def write_analysis(summary: report.StudySummary, workdir: pathlib.Path) -> tuple[str, list[str]]:
    """Writes the results of a study as files; returns them in words, and the names of the files."""
    scores = {f"{row.split}/{row.law}": {"r2": row.r2, "are": row.are} for row in summary.heldout.itertuples()}
    files = {
        "fit.json": json.dumps(summary.fit.to_json(scores), indent=1),
        "transfer.csv": transfer_table(summary.fit).to_csv(index=False),
        "heldout.csv": summary.heldout.to_csv(index=False),
    }
    if summary.transfer is not None:
        files["transfer_scores.csv"] = summary.transfer.to_csv(index=False)
    if summary.capacity is not None:
        files["capacity.json"] = json.dumps(summary.capacity.to_json(), indent=1)
    path = report.write_report(workdir, summary)
    files[SUMMARY] = f"{describe(summary)}\nreport: {path}\n"
    for name, content in files.items():
        write_atomically(workdir / name, content)
    figures = sorted(figure.relative_to(workdir).as_posix() for figure in (workdir / "figures").glob("*.png"))
    return files[SUMMARY], [*files, path.name, *figures]


def transfer_table(fit: JointFit) -> pd.DataFrame:
    """One row an ordered pair: target, source, tau with se and 90 % interval, identified, and the bilingual score it
    implies (NaN at τ ≤ −1, where there is none)."""
    fields = {"tau": "value"} | {name: name for name in ("se", "low", "high", "identified")}
    table = pd.DataFrame({name: fit.transfer_matrix(field).stack() for name, field in fields.items()}).reset_index()
    table = table[table.target != table.source].reset_index(drop=True)
    eta = 1.0 if fit.law.eta is None else table.target.map(dict(zip(fit.targets, fit.law.eta, strict=True)))
    return table.assign(implied_score=scaling.score_from_tau(table.tau.where(table.tau > -1), eta))


def describe(summary: report.StudySummary) -> str:
    """The results of a study as text for a terminal."""
    fit = summary.fit
    law = pd.DataFrame({name: fit.law.language(name) for name in fit.targets}, dtype=float).T
    doubt = "" if fit.converged else " (the joint fit did not converge: do not trust it)"
    parts = [
        f"{summary.title}: {fit.n_runs} runs, {fit.n_rows} rows, noise {100 * fit.sigma:.2f} % of the loss, "
        f"misfit {100 * fit.misfit:.2f} %{doubt}",
        f"\nfitted law, loss in {summary.loss_unit}: E + A K^phi / N^alpha + B / D_eff^beta\n"
        + law.to_string(float_format="{:.4g}".format),
        *summary.phi_in_words(),
        "\ntransfer matrix tau (row: target, column: source)\n" + fit.transfer_matrix().round(3).to_string(),
    ]
    parts += ["", *summary.conclusions] if summary.conclusions else []
    if len(summary.heldout):
        parts.append("\nheld out, mean over languages\n" + summary.heldout.round(4).to_string(index=False))
    if summary.mixture is not None:
        plan = summary.mixture
        rows = [(row.language, f"{row.share:.0%}", row.epochs) for row in plan.table.itertuples()]
        shares = ", ".join(f"{name} {share}" + (f" ({n:.1f} epochs)" if n > 1 else "") for name, share, n in rows)
        parts.append(
            f"\nnext, for {plan.flops:.2g} FLOPs: N = {plan.params:.3g}, D = {plan.tokens:.3g}, mixture {shares}"
        )
    parts += [f"warning: {warning}" for warning in (*fit.warnings, *summary.warnings)]
    parts += [f"no {name}: {reason}" for name, reason in summary.missing.items()]
    return "\n".join(parts)


def _attempt(missing: dict[str, str], bar: tqdm, name: str, compute: Callable[[], Any]) -> Any:
    """What is computed; None and the reason under its name where a user's data do not give it."""
    bar.set_description(name)
    try:
        return compute()
    except UserError as error:
        missing[name] = str(error)
        return None
    finally:
        bar.update()


def _conclusions(runs: Runs, fit: JointFit, scores: pd.DataFrame | None) -> tuple[str, ...]:
    """Whether relatives help each other more, by weights that no prior on relatives has moved, and by scores; whether
    help is mutual; how many weights the runs tell."""
    count = len(fit.targets)
    if count < 2 or not fit.converged:
        return ()
    told = fit.transfer_matrix("identified").to_numpy(bool)[:, :count]
    known = int(told.sum() - np.trace(told))
    one_way, pairs = scaling.asymmetric_pairs(fit)
    found = [
        f"{known} of {count * (count - 1)} weights τ are told by the runs, the others by the prior",
        f"{len(one_way)} of {pairs} pairs help one way more than the other, where chance gives {0.1 * pairs:.1f}"
        + (f": {', '.join(one_way[:_SHOWN])}" if one_way else ""),
    ]
    labels = {word: scaling.labels(runs.languages)[kind] for kind, word in _LABELS.items()}
    if not any(labels.values()):
        return tuple(found)
    matrices = {"τ": scaling.fit_joint(runs, initial_tau=fit.transfer_matrix()).transfer_matrix()}
    if scores is not None and len(scores):
        matrices["score"] = scaling.latest_scores(scores).pivot(index="target", columns="source", values="score")
    for word, label in labels.items():
        for name, matrix in matrices.items():
            if effect := scaling.label_effect(matrix, label):
                found.append(
                    f"{name} of pairs of one {word}: {effect.difference:+.3f} against the others ({effect.sharing} and "
                    f"{effect.others} ordered pairs; p = {effect.p:.3g} by exchanging languages)"
                )
    return tuple(found)


def _heldout(
    runs: Runs, options: Mapping[str, Any], attempt: Callable[..., Any]
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """A row per split and law with its scores, and the rows that the joint law predicted unseen."""
    scores, rows = [], []
    for split, law in itertools.product(SPLITS, LAWS):
        fit = functools.partial(scaling.heldout, runs, split, law, **(options if law == "atlas" else {}))
        if found := attempt(f"held-out score of {law} on {split}", fit):
            scores.append(found[0])
            rows += [found[1].assign(split=split)] if law == "atlas" else []
    return pd.DataFrame(scores, columns=SCORES), pd.concat(rows) if rows else None


def _skipped(frame: pd.DataFrame) -> tuple[str, ...]:
    """A warning for every run that left out steps because their loss or gradient was not finite."""
    if "skipped_steps" not in frame:
        return ()
    most = frame.groupby("run")["skipped_steps"].max()
    return tuple(f"run {run} skipped {count:g} steps that were not finite" for run, count in most[most > 0].items())


def _published(languages: Sequence[str]) -> dict[str, Any]:
    """The paper's transfer scores to compare with, as far as it has these languages."""
    scores = scaling.published.transfer_scores()
    pairs = [(t, s) for t in languages for s in languages if t != s and t in scores.index and s in scores.columns]
    known = {(t, s): float(scores.loc[t, s]) for t, s in pairs}
    return {"relatedness": known or None, "relatedness_name": "published by ATLAS"}


def _stamp(table: pd.DataFrame, title: str, relatedness: Known) -> str:
    """A digest of all that the results follow from: the table, how it is headed, and the code that analyses it."""
    digest = hashlib.sha256(table.to_csv(index=False).encode())
    digest.update(repr((title, sorted((relatedness or {}).items()))).encode())
    for path in _code():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _code() -> list[pathlib.Path]:
    """The files whose change can change the results: code, published tables and the look of the report."""
    atlas, kinds = pathlib.Path(__file__).parents[1], (".py", ".csv", ".css", ".js", ".mplstyle")
    rooms = (pathlib.Path(__file__), *(atlas / "scaling").rglob("*"), *(atlas / "report").rglob("*"))
    return sorted(path for path in rooms if path.suffix in kinds)


def _stands(workdir: pathlib.Path, stamp: str) -> bool:
    try:
        found = read_sealed(workdir / _STAMP, "record of a study", "analyse its runs again")
        left = found["outputs"].items()
        return found["stamp"] == stamp and all(digest_of_file(workdir / name) == digest for name, digest in left)
    except (UserError, OSError):
        return False
