"""Runs from any path, and a run's way into Hugging Face's layout."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from atlas.training import run_id, run_sweep
from checked import UserError, overlay
from checked.tokenizer_json import TokenizerJson, bytes_json
from configs import llama
from models.decoding import Sampling, export, generate, load
from models.run import load_run

QUICK = {
    "data.synthetic_tokens": 4000, "data.vocab_size": 300, "data.window": 32, "model.d_model": 16, "model.layers": 1,
    "model.heads": 2, "model.kv_heads": 1, "model.head_width": 8, "model.d_ff": 24, "train.steps": (3,),
    "train.batch_size": 4, "train.evaluation_windows": 2,
}  # fmt: skip


CHANGES = {"llama": {}, "bytes": {"data.tokenizer": "bytes", "model.architecture.family": "qwen3"}}


@pytest.fixture(scope="module", name="run_of")
def make_run(tmp_path_factory):
    """Directories of short runs: a Llama with tokens of its own, a Qwen of bytes."""

    @functools.cache
    def train(name):
        workdir = tmp_path_factory.mktemp(name)
        config = dataclasses.replace(overlay(llama.get_config(), QUICK | CHANGES[name]), name=name)
        run_sweep([config], workdir)
        return workdir / "runs" / run_id(config)

    return train


def test_a_copied_run_writes_the_same(run_of, tmp_path):
    copy = shutil.copytree(run_of("llama"), tmp_path / "elsewhere")
    options = {"max_new_tokens": 8, "method": "ar", "sampling": Sampling(1.0)}
    texts = [generate(load(path), ["ba"], **options).texts for path in (run_of("llama"), copy)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["llama", pytest.param("bytes", marks=pytest.mark.thorough)])
def test_an_exported_run_is_the_same_to_us_and_to_transformers(name, run_of, tmp_path):
    export(run_of(name), tmp_path)
    options = {"max_new_tokens": 8, "method": "ar", "sampling": Sampling(1.0)}
    ours, again = load(run_of(name)), load(tmp_path)
    assert generate(ours, ["ba é"], **options).written.tokens == generate(again, ["ba é"], **options).written.tokens
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[peers]'")
    model, tokenizer = (
        auto.from_pretrained(tmp_path) for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    text = "ba é  <|separator_|>"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == ours.tokenizer.encode_prompt(text)
    assert tokenizer.decode(ids[0, 1:]) == text
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == ours.tokenizer.roles["eos"][0]
    decoder, _ = load_run(run_of(name))
    logits = model(ids).logits.detach().numpy()
    np.testing.assert_allclose(jax.jit(lambda t: decoder(t)[0])(ids.numpy()), logits, rtol=0, atol=1e-5 * logits.std())
    greedy = generate(ours, [text], max_new_tokens=6, method="ar").written.tokens[0]
    written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert written == greedy


def test_what_has_no_form_there_is_refused(run_of, tmp_path):
    ours = shutil.copytree(run_of("llama"), tmp_path / "ours")
    config = (ours / "config.json").read_text()
    (ours / "config.json").write_text(config.replace('"attention": "dense"', '"attention": "sparse"'))
    with pytest.raises(UserError, match="attention 'sparse' has no form in Hugging Face's layout"):
        export(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(run_of("llama"), tmp_path / "once")
    with pytest.raises(UserError, match="is no run of ours"):
        export(tmp_path / "once", tmp_path / "twice")


def test_directories_without_a_model_are_named(run_of, tmp_path):
    with pytest.raises(UserError, match="'nowhere' does not exist"):
        load("nowhere")
    unfinished = shutil.copytree(run_of("llama"), tmp_path / "unfinished", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(UserError, match="unfinished' has no trained model"):
        load(unfinished)
    with pytest.raises(UserError, match=r"no model at .*config\.json"):
        load(tmp_path)


def test_marks_of_documents_take_names_that_no_token_has():
    description = bytes_json()
    description["model"]["vocab"] |= {"<|separator|>": 256}
    files = TokenizerJson(description, "made").with_separator()
    assert files["tokenizer_config.json"]["eos_token"] == "<|separator|>_"
    assert files["generation_config.json"] == {"bos_token_id": 257, "eos_token_id": 257, "pad_token_id": 258}
    assert json.loads(TokenizerJson(files["tokenizer.json"], "made").library.to_str())["added_tokens"][0]["id"] == 257
