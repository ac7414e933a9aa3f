"""What to train next, from a fit or from the published figures.

    python -m experiments.plan expand --multiplier=2,4,8 [--fit=capacity.json]
    python -m experiments.plan crossover --params=2e9 [--language=es]
    python -m experiments.plan allocate --flops=1e21 --language=en [--fit=DIR] [--unique=en:1e9]
    python -m experiments.plan mixture --fit=DIR --flops=1e21 [--weights=en:1,sw:3] [--unique=sw:7.7e8]

DIR is the workdir of a study (fit.json and runs.csv). Prints a table; --json=FILE writes the same for
programs.
"""

import json
import pathlib
from collections.abc import Sequence

import pandas as pd
from absl import flags

from atlas.errors import UserError, unknown
from atlas.files import write_atomically
from atlas.scaling import planning, published
from atlas.scaling.expansion import PUBLISHED_EXPONENTS, CapacityExponents
from atlas.scaling.mixtures import MixtureLaw, TrustRegion, optimal_mixture
from atlas.scaling.runs import load_runs
from experiments import _app

_MULTIPLIER = flags.DEFINE_list("multiplier", ["2", "4", "8", "16"], "expand: times as many languages")
_PARAMS = flags.DEFINE_float("params", None, "crossover: parameters N")
_FLOPS = flags.DEFINE_float("flops", None, "allocate, mixture: budget C = 6·N·D in FLOPs")
_LANGUAGE = flags.DEFINE_string("language", "", "crossover, allocate: target language")
_REGIME = flags.DEFINE_string("regime", "mono_vocab_mono_train", "allocate: training regime of the published law")
_FIT = flags.DEFINE_string("fit", "", "workdir of a study, or a JSON file with parameters; default: published figures")
_WEIGHTS = flags.DEFINE_list("weights", [], "mixture: importance as language:weight,…; default: all alike")
_UNIQUE = flags.DEFINE_list("unique", [], "unique tokens U as language:tokens,…; default: as in the runs")
_JSON = flags.DEFINE_string("json", "", "file for the result as JSON")


def main(argv: Sequence[str]) -> None:
    """Runs the subcommand that the first argument names."""
    commands = {"expand": _expand, "crossover": _crossover, "allocate": _allocate, "mixture": _mixture}
    if len(argv) != 2:
        raise UserError(f"give one of {', '.join(commands)}; for example: plan expand --multiplier=4")
    if argv[1] not in commands:
        raise unknown("plan", argv[1], commands)
    table, facts = commands[argv[1]]()
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    for name, value in facts.items():
        print(f"{name}: {'; '.join(value) if isinstance(value, list) else value}")
    if _JSON.value:
        # pandas writes NaN, which JSON cannot hold, as null.
        rows = json.loads(table.to_json(orient="records", double_precision=15))
        document = {"plan": argv[1], "rows": rows, **facts}
        write_atomically(pathlib.Path(_JSON.value), json.dumps(document, indent=1))


def _expand() -> tuple[pd.DataFrame, dict]:
    law, source = PUBLISHED_EXPONENTS, "ATLAS, Fig. 5 (phi, psi as printed; alpha, beta from its multipliers)"
    if _FIT.value:
        values = _parameters("capacity.json")
        try:
            law = CapacityExponents(**{name: values[name]["value"] for name in ("alpha", "beta", "phi", "psi")})
        except KeyError as error:
            raise UserError(f"{_FIT.value} is no fit of the capacity law: it lacks {error}") from None
        source = _FIT.value
    multipliers = [_number("multiplier", text) for text in _MULTIPLIER.value]
    return planning.expansion_table(multipliers, law), {"unit": "multiples of the baseline", "source": source}


def _crossover() -> tuple[pd.DataFrame, dict]:
    _app.require(params=_PARAMS.value)
    table = planning.crossover(_PARAMS.value, _LANGUAGE.value or None)
    use = table[table.consistent]
    low, high = (f"{tokens / 1e9:.0f}" for tokens in (use.tokens.min(), use.tokens.max()))
    advice = f"below {low} billion tokens continue the multilingual checkpoint, above {high} billion pretrain"
    note = "the paper prints three formulas; the one that is not consistent contradicts its own curves"
    return table, {"unit": "flops, tokens", "advice": advice, "note": note}


def _allocate() -> tuple[pd.DataFrame, dict]:
    _app.require(flops=_FLOPS.value)
    language = _LANGUAGE.value
    if _FIT.value:
        values, suffix = _parameters("fit.json"), f"[{language}]" if language else ""
        names = ("E", "A", "alpha", "B", "beta", "lambda")
        law = {name: values[name + suffix]["value"] for name in names if name + suffix in values}
        source = _FIT.value
    else:
        _app.require(language=language)
        law, source = published.language_law(language, _REGIME.value), f"ATLAS, Table C.1, {_REGIME.value}"
    best = planning.compute_optimal(law, _FLOPS.value, _pairs("unique", _UNIQUE.value).get(language, float("inf")))
    return pd.DataFrame([vars(best)]), {"flops": _FLOPS.value, "source": source}


def _mixture() -> tuple[pd.DataFrame, dict]:
    _app.require(fit=_FIT.value, flops=_FLOPS.value)
    law = MixtureLaw.from_parameters(_parameters("fit.json"))
    runs = load_runs(pathlib.Path(_FIT.value) / "runs.csv")
    seen = {name: U for name, U in zip(runs.languages, runs.U.min(axis=0), strict=True) if name in law.sources}
    plan = optimal_mixture(
        law,
        _FLOPS.value,
        TrustRegion.of_runs(law, runs),
        _pairs("weights", _WEIGHTS.value),
        seen | _pairs("unique", _UNIQUE.value),
    )
    facts = {"params": plan.params, "tokens": plan.tokens, "flops": plan.flops, "loss": plan.loss}
    return plan.table, facts | {"even_loss": plan.even_loss, "warnings": list(plan.warnings)}


def _parameters(name: str) -> dict:
    path = pathlib.Path(_FIT.value)
    path = path / name if path.is_dir() else path
    try:
        return json.loads(path.read_text())["parameters"]
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
