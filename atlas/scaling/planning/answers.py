"""What to train next, asked in plain numbers: every answer is a table and the facts that belong beside it.

Answers come from a study's workdir (its fit.json, capacity.json and runs.csv), from the fit.json of any law, or from
ATLAS's published figures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from atlas.scaling.estimates import Z90
from atlas.scaling.joint.draws import fit_again, joint_draws
from atlas.scaling.joint.fitted import SUPPORTED, JointFit
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN, JointLaw
from atlas.scaling.planning.allocation import allocation_band, compute_optimal
from atlas.scaling.planning.crossover import crossover_law, measured_crossovers, published_crossovers
from atlas.scaling.planning.expansion import PUBLISHED_EXPONENTS, expansion_table
from atlas.scaling.planning.fit_file import Fitted, caution
from atlas.scaling.planning.mixtures import by_language, plan_mixture, untold
from atlas.scaling.planning.next_runs import candidate_runs, goal_of, next_runs
from atlas.scaling.single.draws import band, run_band
from atlas.scaling.single.fitted import Fit
from atlas.scaling.table import published
from atlas.scaling.table.runs import load_runs
from atlas.scaling.transfer.capacity import CapacityExponents
from atlas.scaling.transfer.completion import Completion, complete, fitted_scores
from checked import UserError, unknown

Answer = tuple[pd.DataFrame, dict[str, Any]]
Numbers = Mapping[str, float]

_RUN_BANDS = "run_ of a new run, with its noise and the law's misfit"


def expand(multipliers: Sequence[float], fit: str = "") -> Answer:
    """What r times as many languages cost; fit: of the capacity law, or nothing for the published exponents."""
    law, source = PUBLISHED_EXPONENTS, "ATLAS, Fig. 5 (phi, psi as printed; alpha, beta from its multipliers)"
    facts: dict[str, str] = {}
    if fit:
        fitted = Fitted(fit, "capacity.json")
        facts, values = fitted.caution | fitted.open(), fitted.document["parameters"]
        try:
            law = CapacityExponents(**{name: values[name]["value"] for name in ("alpha", "beta", "phi", "psi")})
        except (KeyError, TypeError) as error:
            raise UserError(f"{fit} is no fit of the capacity law: it lacks {error}; run the study again") from None
    return expansion_table(multipliers, law), facts | {"unit": "multiples of the baseline", "source": fit or source}


def crossover(
    params: float | None, language: str = "", runs: str = "", columns: Mapping[str, str] | None = None
) -> Answer:
    """Pretrain or continue: by the curves of a runs table where one is given, or by the formulas that ATLAS printed.

    params: N to predict the crossover at, which the formulas need; columns: of the table, see `load_runs`.
    """
    if runs:
        return _measured_crossover(runs, language, params, columns)
    table = published_crossovers(params, language)
    use = table[table.consistent]
    low, high = (f"{tokens / 1e9:.0f}" for tokens in (use.tokens.min(), use.tokens.max()))
    advice = f"below {low} billion tokens continue the multilingual checkpoint, above {high} billion pretrain"
    note = "the paper prints three formulas; the one that is not consistent contradicts its own curves"
    return table, {"unit": "flops, tokens", "advice": advice, "note": note}


def _measured_crossover(runs: str, language: str, params: float | None, columns: Mapping[str, str] | None) -> Answer:
    table = _of_language(measured_crossovers(load_runs(runs, columns)), "language", language)
    facts: dict = {"unit": "tokens with 90 % interval, flops", "source": runs}
    for name, rows in table.groupby("language"):
        if law := crossover_law(rows):
            reach = f"exponent ± {Z90 * law.exponent_se:.2g}, {law.sizes} sizes"
            facts[f"law[{name}]"] = f"C = {law.coefficient:.4g} · N^{law.exponent:.3f} ({reach})"
            if params:
                facts[f"tokens[{name}]"] = law.flops(params) / (FLOPS_PER_PARAMETER_TOKEN * params)
    return table, facts


def allocate(flops: float, language: str, fit: str, regime: str, unique: Numbers) -> Answer:
    """Size and tokens of least loss of one language; regime: of the published law, where no fit is given."""
    facts: dict[str, Any] = {}
    for name in set(unique) - {language}:
        if not language:
            raise UserError(f"--unique is of {name}: give --language={name} beside it")
        raise unknown("language of --unique", name, [language])
    if fit:
        fitted = Fitted(fit)
        law, (draws, bands), facts = fitted.law(language), fitted.draws(language), fitted.caution
        U, said = _unique_of_one(fitted, unique, language)
    else:
        law, draws = published.language_law(language, regime), None
        bands = "none: the paper prints no covariance"
        U, said = unique.get(language, float("inf")), {}
    # A law that knows repetition by other parameters than lambda is planned without: it must be the same at the plan.
    told = float("inf") if fit and fitted.repeats and "lambda" not in law else U
    best = compute_optimal(law, flops, told)
    best["epochs"] = best["tokens"] / U
    if not (np.isfinite(best["loss"]) and 0 < best["params"] < np.inf and 0 < best["tokens"] < np.inf):
        exponents = ", ".join(f"{name} = {law[name]:.3g}" for name in ("alpha", "beta"))
        raise UserError(f"the law has its optimum beyond all numbers ({exponents}); fit runs of more sizes and tokens")
    if fit:
        fitted.check_form(law, best, U)
        facts |= fitted.open(language, best["epochs"] > 1) | said
    band = {} if draws is None else allocation_band(draws, flops, best, told)
    facts |= {"flops": flops, "source": fit or f"ATLAS, Table C.1, {regime}", "bands": bands}
    config = f"--config.mixture={language}, with" if language else "a model with"
    N, D = (float(np.asarray(best[name])) for name in ("params", "tokens"))
    facts["train"] = f"{config} about {N:.3g} parameters and {D:.3g} tokens"
    return pd.DataFrame([best | band]), facts


def _unique_of_one(fitted: Fitted, unique: Numbers, language: str = "") -> tuple[float, dict[str, str]]:
    """U of a language alone, as given or as in the runs, and the fact which it is."""
    if unique or not fitted.repeats:
        return next(iter(unique.values()), float("inf")), {}
    U, why = fitted.unique_tokens(language)
    if np.isfinite(U):
        return U, {"unique tokens": f"{U:.4g}, as in the runs"}
    return U, _unlimited([language or fitted.language or "LANGUAGE"], why)


def _unlimited(names: Sequence[str], why: str = "the runs do not state them") -> dict[str, str]:
    """The fact that text of these languages is taken never to repeat."""
    if not names:
        return {}
    return {"unique tokens": f"taken as unlimited for {', '.join(names)}: {why}; --unique={names[0]}:TOKENS gives them"}


def predict(
    fit: str, params: float | None, tokens: float | None, language: str, shares: Numbers, unique: Numbers, at: Numbers
) -> Answer:
    """The loss that a fit expects of a planned run, with 90 % intervals of the law and of the run.

    Args:
      fit: workdir or file.
      params, tokens: N and D of the run, over all languages; a law of one language may need neither.
      language: of a law of all languages: the one evaluated; every target where it is "".
      shares: of the mixture, relative (a law of all languages; the target alone by default).
      unique: unique tokens by language; those of the runs by default.
      at: other columns of a law of one language by name.
    """
    fitted = Fitted(fit)
    if "joint_law" not in fitted.document:
        return _predict_one(fitted, params, tokens, language, shares, unique, at)
    if at:
        raise UserError(f"the law of all languages has no column {next(iter(at))!r}; drop --at")
    if params is None or tokens is None:
        raise UserError("the law of all languages needs both --params and --tokens")
    joint, runs = fitted.joint_law(), fitted.runs()
    if language and language not in joint.targets:
        raise unknown("target language", language, joint.targets)
    given = by_language(unique, joint.sources, np.nan, "source language of --unique")
    mixtures = by_language(shares, joint.sources, 0.0, "source language of --mixture")
    known = runs.unique_tokens()
    U = np.where(np.isnan(given), [known.get(name, np.inf) for name in joint.sources], given)
    asked = np.array([t for t, name in enumerate(joint.targets) if language in ("", name)])
    weight = np.tile(mixtures, (len(asked), 1)) if shares else np.eye(len(joint.sources))[asked]
    D = tokens * weight / weight.sum(1, keepdims=True)
    least = SUPPORTED * joint.supported_share(*runs.aligned(joint.sources))[asked]
    lacking, told = D[range(len(asked)), asked] == 0, joint.effective_share(D, U, asked) >= least
    if not (told | lacking).any():
        raise untold(joint.targets[t] for t in asked)
    (again, bands), noise = fitted.refitted(), fitted.run_noise()
    draws = None if again is None else joint_draws(again)
    if draws is not None:
        bands = f"{bands}; {_RUN_BANDS if noise is not None else 'of runs none: the fit tells no misfit; fit again'}"
    apart = lacking if again is None else lacking & again.record.untrained.told[asked]
    rows: dict[str, Numbers] = {}
    for t, seen in zip(asked[told & ~lacking], D[told & ~lacking], strict=True):
        rows[joint.targets[t]] = _of_law(joint, draws, noise, params, seen, U, t)
    for t, seen in zip(asked[apart], D[apart], strict=True):
        if again is not None:
            rows[joint.targets[t]] = _of_untrained(again, params, seen, U, t)
    facts, names = {"law": "atlas", "bands": bands}, [joint.targets[t] for t in asked]
    if silent := [name for name in names if name not in rows]:
        facts["no prediction"] = f"{', '.join(silent)}: not in the mixture, or with hardly an effective token"
    if again is not None and apart.any():
        by_others = ", ".join(name for name, of_others in zip(names, apart, strict=True) if of_others)
        facts["not in the mixture"] = f"{by_others}: by a regression on the rows of such runs"
    if not rows:
        raise untold(names)
    facts |= _unlimited([name for s, name in enumerate(joint.sources) if np.isinf(U[s]) and D[:, s].any()])
    planned = {"params": params, "tokens": tokens}
    return pd.DataFrame([{"language": n} | planned | rows[n] for n in names if n in rows]), fitted.caution | facts


def _of_law(joint: JointLaw, draws: JointLaw | None, noise: float | None, *point: Any) -> dict[str, float]:
    loss = float(joint.loss(*point))
    found = {"loss": loss}
    if draws is not None:
        found["loss_low"], found["loss_high"] = law_band = band(draws.loss(*point))
        if noise is not None:
            found["run_low"], found["run_high"] = run_band(loss, *law_band, noise)
    return found


def _of_untrained(fit: JointFit, *point: Any) -> dict[str, float]:
    """What other rows tell of a language that the mixture lacks."""
    (loss, deviation), (low, high) = (tuple(map(float, f(*point))) for f in (fit.predict, fit.run_interval))
    reach = float(np.exp(Z90 * deviation / loss))
    return {"loss": loss, "loss_low": loss / reach, "loss_high": loss * reach, "run_low": low, "run_high": high}


def _predict_one(
    fitted: Fitted,
    params: float | None,
    tokens: float | None,
    language: str,
    shares: Numbers,
    unique: Numbers,
    at: Numbers,
) -> Answer:
    """`predict` by a law of one language."""
    law = Fit.from_json(fitted.document)
    if shares:
        raise UserError(f"the {law.law} law is of one language and knows no mixture; drop --mixture")
    if len(unique) > 1 or (unique and "U" not in law.column_names):
        raise UserError(f"the {law.law} law takes {'one number' if len(unique) > 1 else 'no number'} of unique tokens")
    for name in (language, *(unique if law.tokens == "own" else ())):
        fitted.check_language(name)
    U, said = _unique_of_one(fitted, unique)
    given = {"N": params, "num_params": params, "D": tokens, "tokens": tokens, "U": U}
    named = {key: x for key, x in given.items() if x is not None and key in law.column_names} | dict(at)
    row = {"params": params, "tokens": tokens, **at, "loss": float(law.predict(**named)[0])}
    for kind, bounds in (("loss", law.interval(**named)), ("run", law.run_interval(**named))):
        row |= {f"{kind}_low": float(bounds[0]), f"{kind}_high": float(bounds[1])}
    asked = {"params": ("N", "num_params"), "tokens": ("D", "tokens")}
    unread = [key for key, names in asked.items() if row[key] is not None and not {*names} & {*law.column_names}]
    bands = f"90 %: loss_ of the law, {_RUN_BANDS}"
    facts = {"law": law.law, "unit": law.unit or "that of the runs", "bands": bands}
    facts |= fitted.open() | ({} if "U" in at else said) | ({"not in the law": ", ".join(unread)} if unread else {})
    table = pd.DataFrame([{key: value for key, value in row.items() if value is not None and key not in unread}])
    return table, fitted.caution | facts


def mixture(fit: str, flops: float, weights: Numbers, unique: Numbers) -> Answer:
    """The mixture and size of least mean loss of a study's languages, as its report plans it, with bands."""
    fitted = Fitted(fit)
    law, runs = fitted.joint_law(), fitted.runs()
    for flag, named in (("--weights", weights), ("--unique", unique)):
        by_language(named, law.sources, 0.0, f"language of {flag}")
    draws, bands = fitted.joint_draws()
    plan = plan_mixture(law, runs, flops, weights, unique, draws)
    facts = {name: getattr(plan, name) for name in ("params", "tokens", "flops", "loss", "even_loss")}
    shares = ",".join(f"{row.language}:{row.share:.3g}" for row in plan.table.itertuples() if row.share > 0.0005)
    config = f"--config.mixture={shares}, with about {plan.params:.3g} parameters and {plan.tokens:.3g} tokens"
    if plan.band and (noise := fitted.run_noise()) is not None:
        law_band = plan.band["loss_low"], plan.band["loss_high"]
        facts["run_low"], facts["run_high"] = run_band(plan.loss, *law_band, noise)
        bands = f"{bands}; {_RUN_BANDS}"
    rows = plan.table
    facts |= _unlimited(list(rows.language[(rows.tokens > 0) & (rows.epochs == 0)]))
    facts |= plan.band | {"bands": bands, "warnings": list(plan.warnings), "train": config}
    return plan.table, fitted.caution | facts


def further_runs(
    fit: str,
    language: str,
    params: float,
    tokens: float,
    shares: Numbers,
    unique: Numbers,
    flops: float | None,
    count: int,
) -> Answer:
    """Runs that sharpen a prediction most: of `language` at N = params and D = tokens of a mixture by `shares`."""
    fitted = Fitted(fit)
    runs = fitted.runs()
    for kind, named in (
        ("language", {language: 1.0}),
        ("language of --mixture", shares),
        ("language of --unique", unique),
    ):
        by_language(named, runs.languages, 0.0, kind)
    joint = fit_again(fitted.document, runs)
    goal = goal_of(joint, runs, language, params, tokens, shares, unique)
    table, facts = next_runs(joint, goal, candidate_runs(joint, runs, goal), flops, count)
    facts |= _unlimited([n for n, U, D in zip(joint.sources, goal.U, goal.D, strict=True) if D > 0 and np.isinf(U)])
    facts["source"] = f"{joint.n_rows} rows of {joint.n_runs} runs"
    facts["train"] = [
        f"--config.mixture={row.mixture}: {row.params:.3g} parameters, {row.tokens:.3g} tokens"
        for row in table.itertuples()
    ]
    facts = caution(joint.converged, joint.warnings) | facts
    return table, facts | {"note": "deviations are of the law at its fitted form, and somewhat optimistic"}


def transfer(language: str, fit: str = "") -> Answer:
    """Which languages help a language, or every one: a fit's transfer weights or the published scores, completed."""
    known = published.scripts(), published.families()
    facts: dict[str, str] = {}
    if fit:
        fitted = Fitted(fit)
        found = complete(fitted_scores(fitted.joint_law(), fitted.document["parameters"]), *known)
        source = f"{fit}; pairs that the runs do not determine are predicted from the others"
        facts = fitted.caution
    else:
        found = complete(published.measured_scores(), *known)
        scores = published.transfer_scores()
        measured = found.measured.reindex(scores.index, columns=scores.columns, fill_value=False)
        found = Completion(scores, measured, found.error, found.skill)
        source = "ATLAS, Fig. C.2; its random forest filled what was not measured; the skill is of our completion"
    skill = {f"skill_{name}": value for name, value in vars(found.skill).items()}
    table = _of_language(found.table(), "target", language)
    return table, facts | {"source": source, "error_of_a_prediction": found.error, **skill}


def _of_language(table: pd.DataFrame, column: str, language: str) -> pd.DataFrame:
    """The rows of one language, or all without one."""
    if not language:
        return table
    if language not in set(table[column]):
        raise unknown("language of this answer", language, table[column].unique())
    return table[table[column] == language]
