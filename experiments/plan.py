"""What to train next, from a fit, from runs or from the published figures.

    python -m experiments.plan expand --multiplier=2,4,8 [--fit=capacity.json]
    python -m experiments.plan crossover --params=2e9 [--language=es]
    python -m experiments.plan crossover --runs=runs.csv [--language=es] [--params=2e9]
    python -m experiments.plan allocate --flops=1e21 --language=en [--fit=DIR] [--unique=en:1e9]
    python -m experiments.plan mixture --fit=DIR --flops=1e21 [--weights=en:1,sw:3] [--unique=sw:7.7e8]
    python -m experiments.plan next --fit=DIR --language=sw --params=1e9 --tokens=1e11 [--mixture=sw:1,en:9]
    python -m experiments.plan predict --fit=DIR --params=1e9 --tokens=1e11 [--mixture=sw:1,en:9] [--at=X:8]
    python -m experiments.plan transfer --language=sw [--fit=DIR]

DIR is the workdir of a study or of experiments.fit, whose runs table is read again where it is. Prints a table;
--json=FILE writes the same for programs. Bands are of 90 %, over laws that the runs allow.
"""

import itertools
import json
import pathlib
from collections.abc import Sequence

from absl import flags

from atlas.scaling import answers, finite
from checked import UserError, unknown
from checked.files import write_atomically
from experiments import _app

_MULTIPLIER = flags.DEFINE_list("multiplier", ["2", "4", "8", "16"], "expand: times as many languages")
_PARAMS = flags.DEFINE_float("params", None, "crossover, next, predict: parameters N")
_TOKENS = flags.DEFINE_float("tokens", None, "next, predict: training tokens of the run, over all languages")
_FLOPS = flags.DEFINE_float("flops", None, "allocate, mixture, next: budget C = 6·N·D in FLOPs (next: of all runs)")
_LANGUAGE = flags.DEFINE_string("language", "", "crossover, allocate, next, predict, transfer: target language")
_REGIME = flags.DEFINE_string("regime", "mono_vocab_mono_train", "allocate: training regime of the published law")
_FIT = flags.DEFINE_string(
    "fit", "", "workdir of a study or fit, or a JSON file with parameters; default: published figures"
)
_RUNS = flags.DEFINE_string("runs", "", "crossover: runs table with a column initialize")
_COLUMNS = _app.define_columns()
_COUNT = flags.DEFINE_integer("count", 6, "next: how many runs to add", lower_bound=1)
_WEIGHTS = flags.DEFINE_list("weights", [], "mixture: importance as language:weight,…; default: all alike")
_MIXTURE = flags.DEFINE_list("mixture", [], "next, predict: mixture of the run as language:share,…; default: target")
_AT = flags.DEFINE_list("at", [], "predict: other columns of the law as name:value,…, such as experts:8")
_UNIQUE = flags.DEFINE_list(
    "unique", [], "allocate, mixture, next, predict: unique tokens U as language:tokens,…; default: as in the runs"
)
_JSON = flags.DEFINE_string("json", "", "file for the result as JSON")

_TAKES = {  # flags of each question, beside --json
    "expand": ("fit", "multiplier"),
    "crossover": ("params", "language", "runs", "columns"),
    "allocate": ("fit", "flops", "language", "regime", "unique"),
    "mixture": ("fit", "flops", "weights", "unique"),
    "next": ("fit", "language", "params", "tokens", "mixture", "unique", "flops", "count"),
    "predict": ("fit", "params", "tokens", "language", "mixture", "unique", "at"),
    "transfer": ("fit", "language"),
}
_REFIT = ("allocate", "mixture", "next", "predict")  # fit a study's runs again, to know what they leave open


def main(argv: Sequence[str]) -> None:
    """Answers the question that the first argument names."""
    if len(argv) != 2:
        raise UserError(f"give one of {', '.join(_TAKES)}; for example: plan expand --multiplier=4")
    _app.check_outputs(json=_JSON.value)
    _check_flags(argv[1])
    doing = "fitting the study's runs again, for the bands: tens of seconds" if argv[1] in _REFIT else "reading"
    with _app.said_if_slow(doing):
        table, facts = _answer(argv[1])
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    for name, value in facts.items():
        if value != []:
            print(f"{name}: {_text(value)}")
    if _JSON.value:
        document = finite({"plan": argv[1], "rows": table.to_dict("records"), **facts})
        write_atomically(pathlib.Path(_JSON.value), json.dumps(document, indent=1))


def _answer(question: str) -> answers.Answer:
    fit, runs, language, params, flops = (f.value for f in (_FIT, _RUNS, _LANGUAGE, _PARAMS, _FLOPS))
    unique = _pairs(_UNIQUE)
    match question:
        case "expand":
            return answers.expand([_number("multiplier", text) for text in _MULTIPLIER.value], fit)
        case "crossover":
            _app.require(params=runs or params)
            return answers.crossover(params, language, runs, _COLUMNS())
        case "allocate":
            _app.require(flops=flops, language=fit or language)
            return answers.allocate(flops, language, fit, _REGIME.value, unique)
        case "mixture":
            _app.require(fit=fit, flops=flops)
            return answers.mixture(fit, flops, _pairs(_WEIGHTS), unique)
        case "next":
            tokens = _TOKENS.value
            _app.require(fit=fit, language=language, params=params, tokens=tokens)
            return answers.further_runs(fit, language, params, tokens, _pairs(_MIXTURE), unique, flops, _COUNT.value)
        case "predict":
            _app.require(fit=fit)
            at = _pairs(_AT, least=float("-inf"))
            return answers.predict(fit, params, _TOKENS.value, language, _pairs(_MIXTURE), unique, at)
        case "transfer":
            _app.require(language=fit or language)
            return answers.transfer(language, fit)
    raise unknown("plan", question, _TAKES)


def _check_flags(question: str) -> None:
    """Refuses flags that do not belong to the question, and numbers that are none, before anything is fitted."""
    if question not in _TAKES:
        raise unknown("plan", question, _TAKES)
    for name in sorted({*itertools.chain(*_TAKES.values())} - {*_TAKES[question]}):
        if flags.FLAGS[name].present:
            raise UserError(f"--{name} does not apply to plan {question}; drop it")
    for flag in (_PARAMS, _TOKENS, _FLOPS):
        if flag.value is not None and not 0 < flag.value < float("inf"):
            raise UserError(f"--{flag.name} must be a positive number, got {flag.value}")
    for flag in (_WEIGHTS, _MIXTURE, _UNIQUE):
        if (found := _pairs(flag)) and not any(found.values()):
            raise UserError(f"--{flag.name}: every number is 0; give a positive one")
    _pairs(_AT, least=float("-inf"))


def _pairs(flag: flags.FlagHolder, least: float = 0.0) -> dict[str, float]:
    """The numbers by language, or by column, of a flag such as --unique=en:1e9,sw:7e8."""
    found: dict[str, float] = {}
    for item in flag.value:
        name, colon, number = item.rpartition(":")
        if not colon:
            raise UserError(f"--{flag.name}: {item!r} is not name:number")
        if name in found:
            raise UserError(f"--{flag.name} names {name!r} twice; keep one")
        found[name] = _number(flag.name, number, least)
    return found


def _number(flag: str, text: str, least: float = 0.0) -> float:
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"--{flag}: {text!r} is not a number") from None
    if not (least <= number and abs(number) < float("inf")):
        raise UserError(f"--{flag}: {text!r} is not a finite number" + (" of at least 0" if least == 0 else ""))
    return number


def _text(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    _app.run(main, words=True, fits=True)
