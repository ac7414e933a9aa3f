"""A fit as the document that fit.json holds: parameters, held-out scores, resampled intervals, advice; and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from atlas.scaling.estimates import Z90, finite
from atlas.scaling.holdout import heldout
from atlas.scaling.joint.fit import fit_joint
from atlas.scaling.joint.fitted import JointFit
from atlas.scaling.planning.practice import advice, check_advice
from atlas.scaling.single.bootstrap import bootstrap, check_count
from atlas.scaling.single.comparison import compare
from atlas.scaling.single.fit import fit
from atlas.scaling.single.fitted import Fit
from atlas.scaling.table.runs import Runs

_SKEWED = 1.3  # of the upper half of an interval over the lower: beyond it "±" misleads


def fit_document(
    runs: Runs,
    law: str,
    options: Mapping[str, Any],
    holdout: str | None = None,
    resamples: int = 0,
    advise: float | None = None,
    seed: int = 0,
    laws: Sequence[str] = (),
) -> tuple[dict, str, Fit | JointFit]:
    """Fits a law and says how far to trust it.

    Args:
      runs: rows to fit.
      law: "atlas", of all languages, or the name of a law of one; "" for the best of `laws`.
      options: for `fit_joint` or `fit`.
      holdout: split of `heldout` to score the law on.
      resamples: of the runs, whose spread replaces the formula's errors and intervals (a law of one language).
      advise: FLOPs to plan further runs for (a law of one language).
      seed: of the random split and of the resamples.
      laws: to rank against each other, see `compare`.

    Returns:
      Plain values, ready for json.dumps: those of the fit's `to_json`, and "bootstrap", "advice" and "comparison" where
      asked for; the same as text for a terminal; and the fit.

    Raises:
      UserError: as those functions do.
    """
    if resamples:
        check_count(resamples)
    if advise is not None:
        for name in [law] if law else laws:
            check_advice(advise, name)
    ranked = compare(laws, runs, holdout or "top_compute", seed=seed, **options) if laws else None
    law = law or ranked["law"][0]
    found = fit_joint(runs, **options) if law == "atlas" else fit(law, runs, **options)
    scores = None
    if holdout:
        scores, _ = heldout(runs, holdout, "chinchilla_own" if law == "chinchilla" else law, seed=seed, **options)
    document = found.to_json(scores)
    if law != "atlas":  # plans of a joint fit read its runs again
        document["unique_tokens"] = finite(runs.unique_tokens())
    if resamples:
        document["bootstrap"] = _resample(found, document["parameters"], resamples, seed)
    if advise is not None:
        table, notes = advice(runs, advise, law, seed=seed, **options)
        document["advice"] = finite({"flops": advise, "plans": table.to_dict("records"), "notes": notes})
    if ranked is not None:
        document["comparison"] = finite({"split": holdout or "top_compute", "laws": ranked.to_dict("records")})
    return document, _describe(document), found


def _resample(law: Fit, parameters: dict[str, dict], resamples: int, seed: int) -> dict:
    """Puts errors and intervals of the resamples in place of those of the formula.

    Not of parameters that the runs leave open: a prior, which no resample moves, would pass for knowledge.
    """
    found = bootstrap(law, resamples, seed=seed)
    interval, error = found.interval(), found.se
    for name, estimate in parameters.items():
        if estimate["identified"]:
            estimate |= {"se": error[name], "low": interval[name][0], "high": interval[name][1]}
    return {"resamples": resamples, "converged": found.converged}


def _describe(document: Mapping) -> str:
    size = f"{document['n_rows']} rows of {document['n_runs']} runs"
    doubt = "" if document["converged"] else " (the fit did not converge: do not trust it)"
    lines = [f"{document['law']} law: {size}, objective {document['objective']:.9g}{doubt}"]
    lines.append(f"{'parameter':<20}{'value':>12}{'se':>11}   90 % interval")
    for name, e in document["parameters"].items():
        verdict = "" if e["identified"] else "   not identified"
        low, high = _text(e["low"]), _text(e["high"])
        lines.append(f"{name:<20}{_text(e['value'], 12)}{_spread(e):>11}   {low} … {high}{verdict}")
    if found := document.get("diagnostics"):
        agreeing = f"{found['starts_agreeing']:.0%} of the starts reach this optimum"
        lines.append(f"{agreeing}; error in sample {found['are']:.2%}")
    if (found := document.get("bootstrap")) and found["converged"] < 1.0:
        left = 1.0 - found["converged"]
        lines.append(f"{left:.1%} of the {found['resamples']} resamples found no optimum; more runs would tell")
    if scores := document["holdout"]:
        r2 = "undefined" if scores["r2"] is None else f"{scores['r2']:.3f}"
        held = f"held out {scores['split']}: {scores['n_heldout']} rows"
        lines.append(f"{held}, R² {r2}, relative error {scores['are']:.2%}")
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    if found := document.get("comparison"):
        lines.append(
            f"laws by their error on {found['split']}, held out; excess over the least with its 90 % interval:"
        )
        if found["laws"][0]["excess_se"] is None:
            lines.append(
                "one run is held out, which tells no error of that: laws rank by BIC; or take --holdout=random"
            )
        lines.append(pd.DataFrame(found["laws"]).to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    if found := document.get("advice"):
        lines.append(f"with {found['flops']:.3g} more FLOPs, to predict 30 times the compute of the largest run:")
        lines.append(pd.DataFrame(found["plans"]).to_string(index=False, float_format=lambda x: f"{x:.4g}"))
        lines += [f"note: {note}" for note in found["notes"]]
    return "\n".join(lines)


def _spread(estimate: Mapping) -> str:
    """The standard error; of a skewed estimate, whose error says little, the factor within which it lies.

    >>> _spread({"value": 2143.0, "se": 770.0, "low": 1184.0, "high": 3880.0})
    '×÷1.43'
    """
    low, value, high = (estimate[key] for key in ("low", "value", "high"))
    if None in (low, value, high) or low <= 0 or high - value < _SKEWED * (value - low):
        return _text(estimate["se"], digits=3)
    return f"×÷{(high / low) ** (0.5 / Z90):.3g}"


def _text(value: float | None, width: int = 0, digits: int = 5) -> str:
    """A number; JSON holds none that is infinite."""
    return f"{'∞' if value is None else format(value, f'.{digits}g'):>{width}}"


def parameter_tables(document: Mapping) -> dict[str, str]:
    """A fit's parameters as files for papers: parameters.csv and parameters.tex."""
    table = pd.DataFrame(document["parameters"]).T.rename_axis("parameter")
    return {"parameters.csv": table.to_csv(), "parameters.tex": latex(table)}


def latex(table: pd.DataFrame) -> str:
    """Parameters [value, se, low, high, identified] as a tabular for booktabs.

    >>> row = {"value": 0.35, "se": 0.01, "low": 0.33, "high": 0.37, "identified": False}
    >>> skewed = {"value": 2143.0, "se": 770.0, "low": 1184.0, "high": 3880.0, "identified": True}
    >>> print(latex(pd.DataFrame({"alpha": row, "B": skewed}).T))
    \\begin{tabular}{lrrl}
    \\toprule
    parameter & value & s.e. & 90\\,\\% interval \\\\
    \\midrule
    alpha & 0.35 & 0.01 & [0.33, 0.37], not identified \\\\
    B & 2143 & $\\times\\!\\div$1.43 & [1184, 3880] \\\\
    \\bottomrule
    \\end{tabular}
    <BLANKLINE>
    """
    lines = [r"\begin{tabular}{lrrl}", r"\toprule", r"parameter & value & s.e. & 90\,\% interval \\", r"\midrule"]
    for name, row in table.iterrows():
        value, low, high = (_text(row[key], digits=4) for key in ("value", "low", "high"))
        error = _spread(row)
        verdict = "" if row["identified"] else ", not identified"
        shown = str(name).replace("_", r"\_")
        lines.append(rf"{shown} & {value} & {error} & [{low}, {high}]{verdict} \\")
    text = "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
    return text.replace("∞", r"$\infty$").replace("×÷", r"$\times\!\div$")
