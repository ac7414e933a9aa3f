"""What to train next, from a fit, from runs or from the published figures.

    python -m experiments.plan expand --multiplier=2,4,8 [--fit=capacity.json]
    python -m experiments.plan crossover --params=2e9 [--language=es]
    python -m experiments.plan crossover --runs=runs.csv [--language=es] [--params=2e9]
    python -m experiments.plan allocate --flops=1e21 --language=en [--fit=DIR] [--unique=en:1e9]
    python -m experiments.plan mixture --fit=DIR --flops=1e21 [--weights=en:1,sw:3] [--unique=sw:7.7e8]
    python -m experiments.plan next --fit=DIR --language=sw --params=1e9 --tokens=1e11 [--shares=sw:1,en:9]
    python -m experiments.plan transfer --language=sw [--fit=DIR]

DIR is the workdir of a study (fit.json and runs.csv); allocate takes that of experiments.fit too. Prints a table;
--json=FILE writes the same for programs. Bands are of 90 %, over laws that the runs allow.
"""

import json
import pathlib
from collections.abc import Sequence

import pandas as pd
from absl import flags

from atlas.errors import UserError, unknown
from atlas.files import write_atomically
from atlas.scaling import Runs, fit_joint
from atlas.scaling.estimates import Z90
from atlas.scaling.joint.draws import joint_draws, refitted
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN, JointLaw
from atlas.scaling.planning import allocation as planning
from atlas.scaling.planning.crossover import crossover_law, measured_crossovers
from atlas.scaling.planning.expansion import PUBLISHED_EXPONENTS, CapacityExponents
from atlas.scaling.planning.mixtures import MixtureLaw, TrustRegion, optimal_mixture
from atlas.scaling.planning.next_runs import candidate_runs, goal_of, next_runs
from atlas.scaling.single.draws import law_draws
from atlas.scaling.table import published
from atlas.scaling.table.labels import labels
from atlas.scaling.table.runs import load_runs
from atlas.scaling.transfer.completion import Completion, complete, fitted_scores
from experiments import _app

_MULTIPLIER = flags.DEFINE_list("multiplier", ["2", "4", "8", "16"], "expand: times as many languages")
_PARAMS = flags.DEFINE_float("params", None, "crossover, next: parameters N")
_TOKENS = flags.DEFINE_float("tokens", None, "next: training tokens of the run to predict, over all languages")
_FLOPS = flags.DEFINE_float("flops", None, "allocate, mixture, next: budget C = 6·N·D in FLOPs (next: of all runs)")
_LANGUAGE = flags.DEFINE_string("language", "", "crossover, allocate, next, transfer: target language")
_REGIME = flags.DEFINE_string("regime", "mono_vocab_mono_train", "allocate: training regime of the published law")
_FIT = flags.DEFINE_string("fit", "", "workdir of a study, or a JSON file with parameters; default: published figures")
_RUNS = flags.DEFINE_string("runs", "", "crossover: runs table with a column initialize")
_COUNT = flags.DEFINE_integer("count", 6, "next: how many runs to add", lower_bound=1)
_WEIGHTS = flags.DEFINE_list("weights", [], "mixture: importance as language:weight,…; default: all alike")
_SHARES = flags.DEFINE_list("shares", [], "next: mixture of the run to predict as language:share,…; default: target")
_UNIQUE = flags.DEFINE_list("unique", [], "unique tokens U as language:tokens,…; default: as in the runs")
_JSON = flags.DEFINE_string("json", "", "file for the result as JSON")

_LAW_DRAWS, _JOINT_DRAWS = 1000, 48


def main(argv: Sequence[str]) -> None:
    """Runs the subcommand that the first argument names."""
    commands = {
        "expand": _expand,
        "crossover": _crossover,
        "allocate": _allocate,
        "mixture": _mixture,
        "next": _next,
        "transfer": _transfer,
    }
    if len(argv) != 2:
        raise UserError(f"give one of {', '.join(commands)}; for example: plan expand --multiplier=4")
    if argv[1] not in commands:
        raise unknown("plan", argv[1], commands)
    table, facts = commands[argv[1]]()
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    for name, value in facts.items():
        print(f"{name}: {_text(value)}")
    if _JSON.value:
        # pandas writes NaN, which JSON cannot hold, as null.
        rows = json.loads(table.to_json(orient="records", double_precision=15))
        document = {"plan": argv[1], "rows": rows, **facts}
        write_atomically(pathlib.Path(_JSON.value), json.dumps(document, indent=1))


def _text(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _expand() -> tuple[pd.DataFrame, dict]:
    law, source = PUBLISHED_EXPONENTS, "ATLAS, Fig. 5 (phi, psi as printed; alpha, beta from its multipliers)"
    if _FIT.value:
        values = _document("capacity.json")["parameters"]
        try:
            law = CapacityExponents(**{name: values[name]["value"] for name in ("alpha", "beta", "phi", "psi")})
        except KeyError as error:
            raise UserError(f"{_FIT.value} is no fit of the capacity law: it lacks {error}") from None
        source = _FIT.value
    multipliers = [_number("multiplier", text) for text in _MULTIPLIER.value]
    return planning.expansion_table(multipliers, law), {"unit": "multiples of the baseline", "source": source}


def _crossover() -> tuple[pd.DataFrame, dict]:
    if _RUNS.value:
        return _measured_crossover()
    _app.require(params=_PARAMS.value)
    table = planning.crossover(_PARAMS.value, _LANGUAGE.value or None)
    use = table[table.consistent]
    low, high = (f"{tokens / 1e9:.0f}" for tokens in (use.tokens.min(), use.tokens.max()))
    advice = f"below {low} billion tokens continue the multilingual checkpoint, above {high} billion pretrain"
    note = "the paper prints three formulas; the one that is not consistent contradicts its own curves"
    return table, {"unit": "flops, tokens", "advice": advice, "note": note}


def _measured_crossover() -> tuple[pd.DataFrame, dict]:
    table = measured_crossovers(load_runs(_RUNS.value))
    if _LANGUAGE.value:
        if _LANGUAGE.value not in set(table.language):
            raise unknown("language with both curves", _LANGUAGE.value, table.language.unique())
        table = table[table.language == _LANGUAGE.value]
    facts: dict = {"unit": "tokens with 90 % interval, flops", "source": _RUNS.value}
    for language, rows in table.groupby("language"):
        if law := crossover_law(rows):
            reach = f"exponent ± {Z90 * law.exponent_se:.2g}, {law.sizes} sizes"
            facts[f"law[{language}]"] = f"C = {law.coefficient:.4g} · N^{law.exponent:.3f} ({reach})"
            if _PARAMS.value:
                facts[f"tokens[{language}]"] = law.flops(_PARAMS.value) / (FLOPS_PER_PARAMETER_TOKEN * _PARAMS.value)
    return table, facts


def _allocate() -> tuple[pd.DataFrame, dict]:
    _app.require(flops=_FLOPS.value)
    language = _LANGUAGE.value
    if _FIT.value:
        document, suffix = _document("fit.json"), f"[{language}]" if language else ""
        names = ("E", "A", "alpha", "B", "beta", "lambda")
        values = document["parameters"]
        law = {name: values[name + suffix]["value"] for name in names if name + suffix in values}
        source, (draws, bands) = _FIT.value, _language_draws(document, language)
    else:
        _app.require(language=language)
        law, source = published.language_law(language, _REGIME.value), f"ATLAS, Table C.1, {_REGIME.value}"
        draws, bands = None, "none: the paper prints no covariance"
    unique = _pairs("unique", _UNIQUE.value).get(language, float("inf"))
    best = planning.compute_optimal(law, _FLOPS.value, unique)
    band = {} if draws is None else planning.allocation_band(draws, _FLOPS.value, best, unique)
    return pd.DataFrame([vars(best) | band]), {"flops": _FLOPS.value, "source": source, "bands": bands}


def _language_draws(document: dict, language: str) -> tuple[dict | None, str]:
    if document.get("law") == "atlas":
        draws, bands = _joint_draws(document)
        return (draws.language(language) if draws and language in draws.targets else None), bands
    if draws := law_draws(document, _LAW_DRAWS):
        return draws, f"90 %, over {_LAW_DRAWS} laws drawn from the covariance of the fit"
    return None, "none: the fit holds no finite covariance; fit the runs again"


def _joint_draws(document: dict) -> tuple[JointLaw | None, str]:
    try:
        fit = refitted(document, _study_runs())
    except UserError as error:
        return None, f"none: {error}"
    return joint_draws(fit, _JOINT_DRAWS), f"90 %, over {_JOINT_DRAWS} laws drawn from the fit's posterior"


def _mixture() -> tuple[pd.DataFrame, dict]:
    _app.require(fit=_FIT.value, flops=_FLOPS.value)
    document = _document("fit.json")
    law = MixtureLaw.from_parameters(document["parameters"])
    runs = _study_runs()
    draws, bands = _joint_draws(document)
    seen = {name: U for name, U in zip(runs.languages, runs.U.min(axis=0), strict=True) if name in law.sources}
    plan = optimal_mixture(
        law,
        _FLOPS.value,
        TrustRegion.of_runs(law, runs),
        _pairs("weights", _WEIGHTS.value),
        seen | _pairs("unique", _UNIQUE.value),
        draws=draws,
    )
    facts = {"params": plan.params, "tokens": plan.tokens, "flops": plan.flops, "loss": plan.loss}
    facts |= {"even_loss": plan.even_loss, **plan.band, "bands": bands}
    return plan.table, facts | {"warnings": list(plan.warnings)}


def _next() -> tuple[pd.DataFrame, dict]:
    _app.require(fit=_FIT.value, language=_LANGUAGE.value, params=_PARAMS.value, tokens=_TOKENS.value)
    runs = _study_runs()
    fit = fit_joint(runs, **labels(runs.languages))
    shares, unique = _pairs("shares", _SHARES.value), _pairs("unique", _UNIQUE.value)
    goal = goal_of(fit, runs, _LANGUAGE.value, _PARAMS.value, _TOKENS.value, shares, unique)
    plan = next_runs(fit, goal, candidate_runs(fit, runs, goal), _FLOPS.value, _COUNT.value)
    facts = {"loss": plan.loss, "deviation_before": plan.deviation, "budget": plan.flops}
    facts |= {"candidates": plan.candidates, "source": f"{fit.n_rows} rows of {fit.n_runs} runs"}
    return plan.table, facts | {"note": "deviations are of the law at its fitted form, and somewhat optimistic"}


def _transfer() -> tuple[pd.DataFrame, dict]:
    if _FIT.value:
        found = complete(fitted_scores(_document("fit.json")["parameters"]), published.scripts(), published.families())
        source = f"{_FIT.value}; pairs that the runs do not determine are predicted from the others"
    else:
        _app.require(language=_LANGUAGE.value)
        found = complete(published.measured_scores(), published.scripts(), published.families())
        scores = published.transfer_scores()
        measured = found.measured.reindex(scores.index, columns=scores.columns, fill_value=False)
        found = Completion(scores, measured, found.error, found.skill)
        source = "ATLAS, Fig. C.2; its random forest filled what was not measured; the skill is of our completion"
    table = found.table()
    if _LANGUAGE.value:
        if _LANGUAGE.value not in set(table.target):
            raise unknown("target language", _LANGUAGE.value, table.target.unique())
        table = table[table.target == _LANGUAGE.value]
    skill = {f"skill_{name}": value for name, value in vars(found.skill).items()}
    return table, {"source": source, "error_of_a_prediction": found.error, **skill}


def _study_runs() -> Runs:
    """The rows that a study fits its laws to: ends of cooldown branches, where the table tells them apart."""
    runs = load_runs(pathlib.Path(_FIT.value) / "runs.csv")
    cooled = "phase" in runs.frame and (runs.frame["phase"] == "cooldown").any()
    return runs.where("phase == 'cooldown'") if cooled else runs


def _document(name: str) -> dict:
    path = pathlib.Path(_FIT.value)
    path = path / name if path.is_dir() else path
    try:
        document = json.loads(path.read_text())
        return document | {"parameters": dict(document["parameters"])}
    except FileNotFoundError:
        raise UserError(f"no fit at {str(path)!r}; --fit takes a study's workdir or a JSON file") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{str(path)!r} is no fit: expected JSON with 'parameters'") from None


def _pairs(flag: str, items: list[str]) -> dict[str, float]:
    found = {}
    for item in items:
        language, colon, number = item.partition(":")
        if not colon:
            raise UserError(f"--{flag}: {item!r} is not language:number")
        found[language] = _number(flag, number)
    return found


def _number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--{flag}: {text!r} is not a number") from None


if __name__ == "__main__":
    _app.run(main)
