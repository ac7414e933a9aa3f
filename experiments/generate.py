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
from collections.abc import Callable
from typing import Any

from absl import flags

from checked import UserError
from checked.files import write_atomically
from experiments._app import check_outputs, require, run
from models.decoding import METHODS, VERIFICATIONS, Generated, Sampling, Voice, Written, compare, generate, load, rates

_TARGET = flags.DEFINE_string("target", "", "directory of the model whose text is wanted")
_DRAFT = flags.DEFINE_string("draft", "", "directory of the model that drafts")
_METHOD = flags.DEFINE_enum("method", "auto", METHODS, "who drafts, and how")
_VERIFY = flags.DEFINE_enum("verify", "exact", VERIFICATIONS, "how drafts are verified; all are lossless")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; several make a batch")
_CHAT = flags.DEFINE_boolean(
    "chat", False, "whether prompts are a user's messages, in the form of the model's template"
)
_NEW = flags.DEFINE_integer("max_new_tokens", None, "most tokens to write, a prompt; default: what fits, up to 128")
_SAMPLES = flags.DEFINE_integer("n", 1, "texts to write, a prompt")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy")
_TOP_K = flags.DEFINE_integer("top_k", 0, "most probable tokens to draw from; 0: all")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "share of the probability to draw from")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "least probability to draw, as a share of the largest")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "divides the positive logits of tokens that the text has")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the first text; the next ones count up")
_LENGTH = flags.DEFINE_integer("draft_length", None, "drafts a round; default: adapted to what is accepted")
_STOP = flags.DEFINE_multi_string("stop", [], "text that ends the writing; it is not printed")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of parameters and activations")
_LOGPROBS = flags.DEFINE_boolean("logprobs", False, "whether --json also gets every new token's log probability")
_COMPARE = flags.DEFINE_boolean("compare", False, "also time plain decoding, with the same cache and warm-up")
_JSON = flags.DEFINE_string("json", "", "file that receives texts and figures")
_ROUNDS = 3  # of a comparison, after one to warm up


def main(_) -> None:
    require(target=_TARGET.value, prompt="".join(_PROMPT.value))
    check_outputs(json=_JSON.value)
    prompts = [[{"role": "user", "content": text}] if _CHAT.value else text for text in _PROMPT.value]
    try:
        seeds = [_SEED.value + row for row in range(len(prompts) * _SAMPLES.value)]
        laws = (_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value, _PENALTY.value)
        common = {"max_new_tokens": _NEW.value, "n": _SAMPLES.value, "sampling": Sampling(*laws, seeds)}
        target = load(_TARGET.value, _DTYPE.value)
        drafter = load(_DRAFT.value, _DTYPE.value) if _DRAFT.value else None
        drafts = {"drafter": drafter, "method": _METHOD.value, "verify": _VERIFY.value, "draft_length": _LENGTH.value}
        show = _show(len(seeds))
        written = {"stop_strings": _STOP.value, "logprobs": _LOGPROBS.value, "on_text": show}
        generated = generate(target, prompts, **common, **drafts, **written)
        show(0, "\n")
        if len(seeds) > 1:
            print(*map("".join, zip(_sources(), generated.texts, strict=True)), sep="\n")
        figures = _figures(target, prompts, common, drafts, generated.written)
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<28}{value if isinstance(value, str) else f'{value:.4g}'}", file=sys.stderr)
    if _JSON.value:
        write_atomically(pathlib.Path(_JSON.value), _document(generated, figures) + "\n")


def _sources() -> list[str]:
    """The prompt of every text."""
    return [prompt for prompt in _PROMPT.value for _ in range(_SAMPLES.value)]


def _show(texts: int) -> Callable[[int, str], None]:
    """What prints one text as it comes, behind its prompt; several are printed when they are written."""
    before = list(_PROMPT.value)

    def show(row: int, text: str) -> None:
        if texts == 1:
            print(*before, text, sep="", end="", flush=True)
            before.clear()

    return show


def _document(generated: Generated, figures: dict[str, Any]) -> str:
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "text": text, "tokens": tokens}
        for prompt, text, tokens in zip(_sources(), generated.texts, generated.written.tokens, strict=True)
    ]
    for row, logprobs in zip(rows, generated.logprobs or [], strict=False):
        row["logprobs"] = logprobs
    return json.dumps({"rows": rows, **figures}, ensure_ascii=False, indent=1)


def _figures(
    target: Voice, prompts: list[Any], common: dict[str, Any], drafts: dict[str, Any], written: Written
) -> dict[str, Any]:
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
    ways = {"plain": {"method": "ar"}, "drafted": drafts}
    programs = {
        name: lambda way=way: [generate(target, prompts, **common, **way).written] for name, way in ways.items()
    }
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
