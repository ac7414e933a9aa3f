"""Writes text with a trained model, faster with a small one that drafts; their vocabularies may differ.

    python -m experiments.generate --target=WORKDIR/runs/RUN --prompt='Once upon' --max_new_tokens=64
    python -m experiments.generate --target=DIR --draft=SMALL_DIR --prompt='def f(x):' --temperature=1 --compare

A model is a finished run of ours or a directory in Hugging Face's layout. Prints the text as it comes, and then,
to stderr, what it took; --json=FILE keeps both. With --verify=exact, the default, one seed gives one text,
whatever drafts.
"""

import json
import pathlib
import sys
from typing import Any

from absl import flags

from atlas.studies.voices import load_voice
from checked import UserError
from checked.files import write_atomically
from experiments._app import require, run
from models.decoding import METHODS, VERIFICATIONS, Sampling, Voice, Written, compare, rates, write, write_text

_TARGET = flags.DEFINE_string("target", "", "directory of the model whose text is wanted")
_DRAFT = flags.DEFINE_string("draft", "", "directory of the model that drafts")
_METHOD = flags.DEFINE_enum("method", "auto", METHODS, "who drafts, and how")
_VERIFY = flags.DEFINE_enum("verify", "exact", VERIFICATIONS, "how drafts are verified; all are lossless")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; several make a batch")
_NEW = flags.DEFINE_integer("max_new_tokens", 128, "most tokens to write, a prompt")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "most probable tokens to draw from; 0: all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "share of the probability to draw from")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the first prompt; the next ones count up")
_LENGTH = flags.DEFINE_integer("draft_length", None, "drafts a round; default: adapted to what is accepted")
_STOP = flags.DEFINE_multi_string("stop", [], "text that ends the writing; it is not printed")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of activations")
_COMPARE = flags.DEFINE_boolean("compare", False, "also time plain decoding, with the same cache and warm-up")
_JSON = flags.DEFINE_string("json", "", "file that receives texts and figures")
_ROUNDS = 3  # of a comparison, after one to warm up


def main(_) -> None:
    require(target=_TARGET.value, prompt="".join(_PROMPT.value))
    target = load_voice(_TARGET.value, _DTYPE.value)
    options: dict[str, Any] = {"method": _METHOD.value, "verify": _VERIFY.value, "draft_length": _LENGTH.value}
    if _DRAFT.value:
        options["drafter"] = load_voice(_DRAFT.value, _DTYPE.value)
    try:
        seeds = [_SEED.value + row for row in range(len(_PROMPT.value))]
        options["sampling"] = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, seeds)
        texts, written = _write(target, options)
        figures = _figures(target, options, written)
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<28}{value if isinstance(value, str) else f'{value:.4g}'}", file=sys.stderr)
    if _JSON.value:
        fields = zip(_PROMPT.value, texts, written.tokens, strict=True)
        rows = [{"prompt": prompt, "text": text, "tokens": tokens} for prompt, text, tokens in fields]
        document = json.dumps({"rows": rows, **figures}, ensure_ascii=False, indent=1)
        write_atomically(pathlib.Path(_JSON.value), document + "\n")


def _write(target: Voice, options: dict[str, Any]) -> tuple[list[str], Written]:
    """Prints one text as it comes, several when they are written."""
    prompts = list(_PROMPT.value)
    alone = len(prompts) == 1

    def show(row: int, text: str) -> None:
        if alone:
            print(*prompts, text, sep="", end="", flush=True)
            prompts.clear()

    texts, written = write_text(target, _PROMPT.value, _NEW.value, stop_strings=_STOP.value, on_text=show, **options)
    print(*prompts) if alone else print(*map("".join, zip(prompts, texts, strict=True)), sep="\n")
    return texts, written


def _figures(target: Voice, options: dict[str, Any], written: Written) -> dict[str, Any]:
    tokens = sum(map(len, written.tokens))
    figures = {
        "method": written.method,
        "tokens": tokens,
        **rates([written]),
        "time_to_first_token": written.first_seconds,
        "tokens_per_second_with_compilation": tokens / (written.first_seconds + written.seconds),
    }
    if not _COMPARE.value:
        return figures
    prompts = [target.tokenizer.encode_prompt(prompt) for prompt in _PROMPT.value]
    ways = {"plain": {"method": "ar", "sampling": options["sampling"]}, "drafted": options}
    programs = {name: lambda way=way: [write(target, prompts, _NEW.value, **way)] for name, way in ways.items()}
    plain, drafted = compare(programs, range(1 + _ROUNDS)).values()
    return figures | {
        "tokens_per_second": drafted["tokens_per_second"],
        "plain_tokens_per_second": plain["tokens_per_second"],
        "speedup": drafted["tokens_per_second"] / plain["tokens_per_second"],
        "warm_time_to_first_token": drafted["first_seconds"],
        "compile_seconds": drafted["compile_seconds"],
    }


if __name__ == "__main__":
    run(main)
