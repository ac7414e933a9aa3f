"""What to train next, asked in plain numbers: every answer is a table and the facts that belong beside it.

Answers come from a study's workdir (its fit.json, capacity.json and runs.csv), from the fit.json of any law, or from
ATLAS's published figures.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd

from atlas.scaling.estimates import Z90
from atlas.scaling.joint.draws import DRAWS, joint_draws, mixing_of, refitted
from atlas.scaling.joint.fit import fit_joint
from atlas.scaling.joint.fitted import SUPPORTED
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN, JointLaw
from atlas.scaling.planning.allocation import allocation_band, compute_optimal
from atlas.scaling.planning.crossover import crossover_law, measured_crossovers, published_crossovers
from atlas.scaling.planning.expansion import PUBLISHED_EXPONENTS, expansion_table
from atlas.scaling.planning.mixtures import by_language, plan_mixture
from atlas.scaling.planning.next_runs import candidate_runs, goal_of, next_runs
from atlas.scaling.single.draws import band, law_draws, run_band
from atlas.scaling.single.fitted import Fit
from atlas.scaling.single.library import law_named
from atlas.scaling.table import published
from atlas.scaling.table.labels import labels
from atlas.scaling.table.runs import Runs, load_runs
from atlas.scaling.transfer.capacity import CapacityExponents
from atlas.scaling.transfer.completion import Completion, complete, fitted_scores
from checked import UserError, unknown
from checked.files import read_json

Answer = tuple[pd.DataFrame, dict[str, Any]]
Numbers = Mapping[str, float]

_REMEDY = "give a study's workdir, or fit its runs again"
_RUN_BANDS = "run_ of a new run, with its noise and the law's misfit"
_KINDS = {"law": str, "converged": bool, "warnings": list, "n_rows": int, "joint_law": dict, "source": dict}
_LAW_DRAWS = 1000  # of one law, whose draws are nearly free


def caution(converged: bool, warnings: Sequence[str]) -> dict[str, str]:
    """The fact that stands first where an answer rests on a fit that did not converge, with what would mend it."""
    return {} if converged else {"do not trust this": f"the fit did not converge; {'; '.join(warnings[:1])}"}


class Fitted:
    """A fit on disk: a workdir with fit.json or capacity.json and, for bands and mixtures, runs.csv; or one JSON file.

    `caution` belongs first among the facts of every answer from it.

    Args:
      path: the workdir or the file.
      name: of the file within the workdir.

    Raises:
      UserError: there is no such file, or it is no fit.
    """

    def __init__(self, path: str | pathlib.Path, name: str = "fit.json") -> None:
        path = pathlib.Path(path)
        self.folder, self.file = (path, path / name) if path.is_dir() else (path.parent, path)
        self.document = read_json(self.file, "fit", _REMEDY)
        if not isinstance(self.document.get("parameters"), dict):
            raise UserError(f"{str(self.file)!r} is no fit: it has no 'parameters'; {_REMEDY}")
        self._check_kinds()
        self.caution = caution(self.document.get("converged", True), self.document.get("warnings", []))

    def _check_kinds(self) -> None:
        """Raises UserError for what a person has made of another kind."""
        estimates = {f"parameters.{name}": estimate for name, estimate in self.document["parameters"].items()}
        values = {f"{name}.value": e.get("value", "") for name, e in estimates.items() if isinstance(e, dict)}
        checked = (
            *((name, self.document[name], kind) for name, kind in _KINDS.items() if name in self.document),
            *((name, estimate, dict) for name, estimate in estimates.items()),
            *((name, value, (int, float, type(None))) for name, value in values.items()),
        )
        for name, value, kind in checked:
            if not isinstance(value, kind):
                raise UserError(f"{str(self.file)!r}: {name} is of another kind than a fit leaves; {_REMEDY}")

    def joint_law(self) -> JointLaw:
        """The law of all languages.

        Raises:
          UserError: the fit is of another law.
        """
        if "joint_law" not in self.document:
            raise UserError(f"{str(self.file)!r} is no law of all languages; fit its runs again, with --law=atlas")
        try:
            law = JointLaw.from_json(self.document["joint_law"])
        except UserError as error:
            raise UserError(f"{str(self.file)!r}: {error}") from None
        self._check_finite(law.named())
        for name in law.named().keys() - self.document["parameters"].keys():
            raise UserError(f"{str(self.file)!r}: 'parameters' lack {name}; {_REMEDY}")
        return law

    def law(self, language: str = "") -> dict[str, float]:
        """Parameters of the law of one language, which a joint fit needs the name of."""
        if "joint_law" in self.document:
            joint = self.joint_law()
            if not language:
                raise UserError(f"the fit is of several languages: give --language, one of {', '.join(joint.targets)}")
            return {name: float(value) for name, value in joint.language(language).items()}
        found = {name: estimate["value"] for name, estimate in self.document["parameters"].items()}
        self._check_finite(found)
        return found

    def open(self, language: str = "", repeats: bool = True) -> dict[str, str]:
        """The fact which parameters of a law of one language, or of that one, the runs leave open.

        repeats: whether λ counts.
        """
        of = f"[{language}]" if "joint_law" in self.document else ""
        told = {name: estimate.get("identified", True) for name, estimate in self.document["parameters"].items()}
        names = [n for n, known in told.items() if not known and n.endswith(of) and (repeats or "lambda" not in n)]
        return {"not identified": ", ".join(names)} if names else {}

    def check_form(self, values: Mapping[str, float], best: Mapping[str, float], U: float) -> None:
        """Raises UserError for a law that at its optimum is not the E + A/N^alpha + B/D^beta which was minimised."""
        if "joint_law" in self.document or "law" not in self.document:
            return
        law = law_named(self.document["law"])
        batch = {c.name: c.default for c in law.columns} | {"N": best["params"], "D": best["tokens"], "U": U}
        needed = [c.name for c in law.columns if batch[c.name] is None]
        with jax.enable_x64(True):
            same = not needed and np.isclose(float(law.loss(values, batch)), best["loss"], rtol=1e-9)
        if not same:
            raise UserError(f"allocate knows E + A/N^alpha + B/D^beta, and the {law.name} law is another; use predict")

    def _check_finite(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if value is None or not np.isfinite(value):
                raise UserError(f"{str(self.file)!r}: {name} is {value}, no finite number; {_REMEDY}")

    def run_noise(self) -> float | None:
        """How far new runs lie off a law of all languages, see `JointFit.run_noise`; None where the fit is older."""
        known = [self.document.get(name) for name in ("sigma", "misfit")]
        return None if None in known else float(np.hypot(*known))

    def runs(self) -> Runs:
        """The rows that the fit is of: of the table that it names, or of the runs.csv beside it."""
        source = self.document.get("source") or {"runs": self.folder / "runs.csv", "columns": {}, "where": ""}
        path, columns, where = (source.get(name) for name in ("runs", "columns", "where"))
        if not (isinstance(path, str | pathlib.Path) and isinstance(columns, dict) and isinstance(where, str)):
            raise UserError(f"{str(self.file)!r}: 'source' does not name its runs; fit them again")
        runs = load_runs(path, columns)
        return (runs.where(where) if where else runs).comparable()

    def joint_draws(self) -> tuple[JointLaw | None, str]:
        """Laws of all languages that the runs allow, None where they cannot be had; and in words which they are."""
        try:
            draws = joint_draws(refitted(self.document, self.runs()))
        except UserError as error:
            return None, f"none: {error}"
        return draws, f"90 %, over {DRAWS} laws drawn from the fit's posterior"

    def draws(self, language: str) -> tuple[Mapping | None, str]:
        """`joint_draws` for the law of one language, or draws of a fit of one law."""
        if "joint_law" in self.document:
            draws, bands = self.joint_draws()
            return None if draws is None else draws.language(language), bands
        if draws := law_draws(self.document, _LAW_DRAWS):
            return draws, f"90 %, over {_LAW_DRAWS} laws drawn from the covariance of the fit"
        return None, "none: the fit holds no finite covariance; fit the runs again"


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
    else:
        law, draws = published.language_law(language, regime), None
        bands = "none: the paper prints no covariance"
    U = unique.get(language, float("inf"))
    best = compute_optimal(law, flops, U)
    if not (np.isfinite(best["loss"]) and 0 < best["params"] < np.inf and 0 < best["tokens"] < np.inf):
        exponents = ", ".join(f"{name} = {law[name]:.3g}" for name in ("alpha", "beta"))
        raise UserError(f"the law has its optimum beyond all numbers ({exponents}); fit runs of more sizes and tokens")
    if fit:
        fitted.check_form(law, best, U)
        facts |= fitted.open(language, bool(unique))
    band = {} if draws is None else allocation_band(draws, flops, best, U)
    facts |= {"flops": flops, "source": fit or f"ATLAS, Table C.1, {regime}", "bands": bands}
    config = f"--config.mixture={language}, with" if language else "a model with"
    N, D = (float(np.asarray(best[name])) for name in ("params", "tokens"))
    facts["train"] = f"{config} about {N:.3g} parameters and {D:.3g} tokens"
    return pd.DataFrame([best | band]), facts


def predict(
    fit: str, params: float | None, tokens: float | None, language: str, shares: Numbers, unique: Numbers, at: Numbers
) -> Answer:
    """The loss that a fit expects of a planned run, with 90 % intervals of the law and of the run.

    Args:
      fit: workdir or file.
      params, tokens: N and D of the run, over all languages; a law of one language may need neither.
      language: of a law of all languages: the one evaluated; every target where it is "".
      shares: of the mixture, relative (a law of all languages; the target alone by default).
      unique: unique tokens by language.
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
    told = joint.effective_share(D, U, asked) >= least
    beyond = ", ".join(joint.targets[t] for t in asked[~told])
    if not told.any():
        raise UserError(f"the mixture leaves {beyond} hardly an effective token, which no law tells; give it a share")
    (draws, bands), noise = fitted.joint_draws(), fitted.run_noise()
    if draws is not None:
        bands = f"{bands}; {_RUN_BANDS if noise is not None else 'of runs none: the fit tells no misfit; fit again'}"
    rows: list[dict[str, Any]] = []
    for t, seen in zip(asked[told], D[told], strict=True):
        loss = float(joint.loss(params, seen, U, t))
        rows.append({"language": joint.targets[t], "params": params, "tokens": tokens, "loss": loss})
        if draws is not None:
            rows[-1]["loss_low"], rows[-1]["loss_high"] = law_band = band(draws.loss(params, seen, U, t))
            if noise is not None:
                rows[-1]["run_low"], rows[-1]["run_high"] = run_band(loss, *law_band, noise)
    no_say = {"no prediction": f"{beyond}: hardly an effective token in the mixture"} if beyond else {}
    return pd.DataFrame(rows), fitted.caution | {"law": "atlas", "bands": bands} | no_say


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
    for name in {language, *(unique if law.tokens == "own" else ())} - {"", law.language}:
        if law.language:
            raise unknown("language of this fit", name, [law.language])
    given = {"N": params, "num_params": params, "D": tokens, "tokens": tokens, "U": next(iter(unique.values()), None)}
    named = {key: x for key, x in given.items() if x is not None and key in law.column_names} | dict(at)
    row = {"params": params, "tokens": tokens, **at, "loss": float(law.predict(**named)[0])}
    for kind, bounds in (("loss", law.interval(**named)), ("run", law.run_interval(**named))):
        row |= {f"{kind}_low": float(bounds[0]), f"{kind}_high": float(bounds[1])}
    asked = {"params": ("N", "num_params"), "tokens": ("D", "tokens")}
    unread = [key for key, names in asked.items() if row[key] is not None and not {*names} & {*law.column_names}]
    bands = f"90 %: loss_ of the law, {_RUN_BANDS}"
    facts = {"law": law.law, "unit": law.unit or "that of the runs", "bands": bands}
    facts |= fitted.open() | ({"not in the law": ", ".join(unread)} if unread else {})
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
    joint = fit_joint(runs, **labels(runs.languages), mixing=mixing_of(fitted.document))
    goal = goal_of(joint, runs, language, params, tokens, shares, unique)
    table, facts = next_runs(joint, goal, candidate_runs(joint, runs, goal), flops, count)
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
