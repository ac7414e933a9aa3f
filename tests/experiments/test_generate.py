"""The command line on runs of the smallest pipeline, whose tokenizers differ, and on a Hugging Face directory."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from flax import nnx

from atlas.training import RunConfig, run_id, run_sweep
from configs import smoke
from models import Decoder, ModelConfig
from models.config import Architecture
from models.pretrained import Pretrained, save_pretrained

ROOT = pathlib.Path(__file__).parents[2]
PROMPT, NEW = "ba", 12
# Runs every command of a list in one process, which imports once: their exit codes and what they printed, as JSON.
DRIVER = """
import contextlib, io, json, sys
from absl.testing import flagsaver
from experiments import _app, generate

results = []
for arguments in json.load(sys.stdin):
    sys.argv, out, err, code = ["generate", *arguments], io.StringIO(), io.StringIO(), 0
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            _app.run(generate.main)
        except SystemExit as done:
            code = done.code or 0
    results.append((code, out.getvalue(), err.getvalue()))
json.dump(results, sys.stdout)
"""


def generate(*commands):
    call = [sys.executable, "-c", DRIVER]
    done = subprocess.run(call, input=json.dumps(commands), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_of(tokenizer, workdir):
    study = smoke.get_config()
    data = dataclasses.replace(study.data, tokenizer=tokenizer, vocab_size=300, languages=("a1",))
    train = dataclasses.replace(study.train, steps=(10,))
    model = dataclasses.replace(study.model, attention="dense")
    config = RunConfig(name=tokenizer, data=data, model=model, train=train)
    run_sweep([config], workdir)
    return workdir / "runs" / run_id(config)


def pretrained(directory, tokenizer, vocab_size):
    """A random Llama with somebody's tokenizer."""
    shape = {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 8, "d_ff": 32}
    config = ModelConfig(**shape, vocab_size=vocab_size, architecture=Architecture(family="llama"))
    save_pretrained(Pretrained(Decoder(config, rngs=nnx.Rngs(0)), config, 64), directory)
    shutil.copy(tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of models by name."""
    root = tmp_path_factory.mktemp("models")
    runs = {name: run_of(name, root / name) for name in ("bpe", "bytes")}
    tokenizer = runs["bpe"] / "model" / "tokenizer.json"
    (root / "mamba").mkdir()
    (root / "mamba" / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    layouts = {
        "llama": pretrained(root / "llama", tokenizer, 320),
        "narrow": pretrained(root / "narrow", tokenizer, 96),
    }
    return runs | layouts | {"mamba": root / "mamba"}


@pytest.fixture(scope="module")
def written(models, tmp_path_factory):
    """By name: exit code, output, errors and the JSON of the commands that work."""
    root = tmp_path_factory.mktemp("json")
    target, draft = f"--target={models['bpe']}", f"--draft={models['bytes']}"
    common = (f"--prompt={PROMPT}", f"--max_new_tokens={NEW}")
    sampled = ("--temperature=1", "--seed=3")
    commands = {
        "plain": (target, "--method=ar", *common, *sampled),
        "exact": (target, draft, "--method=tli", "--draft_length=2", *common, *sampled),
        "batch": (target, "--method=lookup", "--draft_length=2", *common, "--prompt=a b", *sampled),
        "compared": (f"--target={models['llama']}", "--compare", "--draft_length=2", *common),
    }
    results = generate(*((*command, f"--json={root / name}") for name, command in commands.items()))
    return {
        name: (*result, json.loads((root / name).read_text()) if not result[0] else {})
        for name, result in zip(commands, results, strict=True)
    }


@pytest.mark.parametrize("name", ["plain", "exact"])
def test_text_is_streamed_and_written_with_its_figures(written, name):
    code, out, err, document = written[name]
    assert code == 0, err
    (row,) = document["rows"]
    assert out == PROMPT + row["text"] + "\n"
    assert row["prompt"] == PROMPT and document["tokens"] == len(row["tokens"]) <= NEW
    assert document["method"] == {"plain": "ar", "exact": "tli"}[name]
    assert document["tokens_per_call"] >= 1 and document["time_to_first_token"] > 0
    assert "tokens per call" in err and "time to first token" in err


def test_drafts_do_not_change_the_text(written):
    texts = {name: written[name][3]["rows"][0]["text"] for name in ("plain", "exact", "batch")}
    assert texts["exact"] == texts["plain"] == texts["batch"]


def test_several_prompts_are_a_batch(written):
    code, out, err, document = written["batch"]
    assert code == 0, err
    assert [row["prompt"] for row in document["rows"]] == [PROMPT, "a b"]
    assert out == "".join(row["prompt"] + row["text"] + "\n" for row in document["rows"])
    assert document["tokens"] == sum(len(row["tokens"]) for row in document["rows"])


def test_a_hugging_face_directory_is_read_and_compared(written):
    code, _, err, document = written["compared"]
    assert code == 0, err
    assert document["method"] == "lookup" and document["tokens"] == NEW
    ratio = document["tokens_per_second"] / document["plain_tokens_per_second"]
    assert document["speedup"] == pytest.approx(ratio) and document["compile_seconds"] >= 0


MISTAKES = {
    "no target": ((), "--target is missing"),
    "missing directory": (("--target=nowhere", "--prompt=a"), "'nowhere' does not exist"),
    "no prompt": (("--target={bpe}",), "--prompt is missing"),
    "empty prompt": (("--target={bpe}", "--prompt="), "--prompt is missing"),
    "long prompt": (
        ("--target={bytes}", f"--prompt={40 * 'x'}"),
        "41 tokens of prompts[0] exceed the model's window of 32",
    ),
    "long text": (
        ("--target={bytes}", "--prompt=x", "--max_new_tokens=31"),
        "max_new_tokens=31 and the 2 tokens of prompts[0] exceed the model's window of 32 tokens; give max_new_tokens",
    ),
    "seed": (("--target={bpe}", "--prompt=a", "--seed=-1"), "seed=-1 must be from 0 to 4294967295"),
    "large seed": (("--target={bpe}", "--prompt=a", f"--seed={2**32}"), "must be from 0 to 4294967295"),
    "K above the largest": (
        ("--target={bpe}", "--prompt=a", "--draft_length=17"),
        "draft_length=17 must be from 1 to 16",
    ),
    "chat": (("--target={bpe}", "--prompt=a", "--chat"), "has no chat template"),
    "K of 0": (("--target={bpe}", "--prompt=a", "--max_new_tokens=4", "--draft_length=0"), "draft_length=0 must be"),
    "cold": (("--target={bpe}", "--prompt=a", "--temperature=-1"), "temperature=-1.0 must be at least 0"),
    "no drafter": (("--target={bpe}", "--prompt=a", "--max_new_tokens=4", "--method=tli"), "needs a model that drafts"),
    "unknown method": (("--target={bpe}", "--prompt=a", "--method=eagle"), "auto|ar|tli"),
    "tokenizer": (("--target={narrow}", "--prompt=a"), "embedding has 96 rows"),
    "architecture": (("--target={mamba}", "--prompt=a"), "MambaForCausalLM' is recurrent"),
}


@pytest.fixture(scope="module")
def refused(models):
    commands = [[argument.format(**models) for argument in arguments] for arguments, _ in MISTAKES.values()]
    return dict(zip(MISTAKES, generate(*commands), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(refused, name):
    code, out, err = refused[name]
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1
    assert MISTAKES[name][1] in err
