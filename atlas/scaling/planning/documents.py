"""A fit as the document that fit.json holds: parameters, held-out scores, resampled intervals, advice; and in words."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from atlas.scaling.estimates import finite
from atlas.scaling.holdout import heldout
from atlas.scaling.joint.fit import fit_joint
from atlas.scaling.planning.practice import advice
from atlas.scaling.single.bootstrap import bootstrap
from atlas.scaling.single.fit import Fit, fit
from atlas.scaling.table.runs import Runs


def fit_document(
    runs: Runs,
    law: str,
    options: Mapping[str, Any],
    holdout: str | None = None,
    resamples: int = 0,
    advise: float | None = None,
    seed: int = 0,
) -> tuple[dict, str]:
    """Fits a law and says how far to trust it.

    Args:
      runs: rows to fit.
      law: "atlas", of all languages, or the name of a law of one.
      options: for `fit_joint` or `fit`.
      holdout: split of `heldout` to score the law on.
      resamples: of the runs, whose spread replaces the formula's errors and intervals (a law of one language).
      advise: FLOPs to plan further runs for (a law of one language).
      seed: of the random split and of the resamples.

    Returns:
      Plain values, ready for json.dumps: those of the fit's `to_json`, and "bootstrap" and "advice" where asked for.
      And the same as text for a terminal.

    Raises:
      UserError: as those functions do.
    """
    found = fit_joint(runs, **options) if law == "atlas" else fit(law, runs, **options)
    scores = None
    if holdout:
        scores, _ = heldout(runs, holdout, "chinchilla_own" if law == "chinchilla" else law, seed=seed, **options)
    document = found.to_json(scores)
    if resamples:
        document["bootstrap"] = _resample(found, document["parameters"], resamples, seed)
    if advise is not None:
        table, notes = advice(runs, advise, law, **options)
        document["advice"] = finite({"flops": advise, "plans": table.to_dict("records"), "notes": notes})
    return document, _describe(document)


def _resample(law: Fit, parameters: dict[str, dict], resamples: int, seed: int) -> dict:
    """Puts errors and intervals of the resamples in place of those of the formula."""
    found = bootstrap(law, resamples, seed=seed)
    interval, error = found.interval(), found.se
    for name, estimate in parameters.items():
        estimate |= {"se": error[name], "low": interval[name][0], "high": interval[name][1]}
    return {"resamples": resamples, "converged": found.converged}


def _describe(document: Mapping) -> str:
    size = f"{document['n_rows']} rows of {document['n_runs']} runs"
    lines = [f"{document['law']} law: {size}, objective {document['objective']:.9g}"]
    lines.append(f"{'parameter':<20}{'value':>12}{'se':>11}   90 % interval")
    for name, e in document["parameters"].items():
        verdict = "" if e["identified"] else "   not identified"
        low, high = _text(e["low"]), _text(e["high"])
        lines.append(f"{name:<20}{_text(e['value'], 12)}{_text(e['se'], 11, 3)}   {low} … {high}{verdict}")
    if found := document.get("diagnostics"):
        agreeing = f"{found['starts_agreeing']:.0%} of the starts reach this optimum"
        lines.append(f"{agreeing}; error in sample {found['are']:.2%}")
    if scores := document["holdout"]:
        r2 = "undefined" if scores["r2"] is None else f"{scores['r2']:.3f}"
        held = f"held out {scores['split']}: {scores['n_heldout']} rows"
        lines.append(f"{held}, R² {r2}, relative error {scores['are']:.2%}")
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    if found := document.get("advice"):
        lines.append(f"with {found['flops']:.3g} more FLOPs, to predict 30 times the compute of the largest run:")
        lines.append(pd.DataFrame(found["plans"]).to_string(index=False, float_format=lambda x: f"{x:.4g}"))
        lines += [f"note: {note}" for note in found["notes"]]
    return "\n".join(lines)


def _text(value: float | None, width: int = 0, digits: int = 5) -> str:
    """A number; JSON holds none that is infinite."""
    return f"{'∞' if value is None else format(value, f'.{digits}g'):>{width}}"
