"""Random inputs of everything that a person may hand in: each ends in a result or in a UserError."""

import contextlib
import copy
import gzip
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas.data import DataConfig, mixtures, tokenizers
from atlas.data.sources import open_source
from atlas.scaling import load_runs
from checked import UserError
from models.pretrained.settings import read_config
from tests.atlas.data.corpora import write_corpus

EXAMPLES = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
SIZES = {"a1": 1000, "b1": 50, "Min Nan": 7}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
GRAMMAR = st.sampled_from(["a1", "b1", "zz", ":", ",", ";", "(", ")", "*", "=", "0.5", "1", "nan", "-1", "uniform"])


@EXAMPLES
@given(st.text(max_size=30) | st.lists(GRAMMAR | st.sampled_from(["unimax", "epochs", "inf"]), max_size=9).map("".join))
def test_mixtures(spec):
    with contextlib.suppress(UserError):
        weights = mixtures.parse(spec, SIZES, SIZES, 10_000)
        assert sum(weights.values()) == pytest.approx(1) and min(weights.values()) > 0 and set(weights) <= set(SIZES)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    root = write_corpus(tmp_path_factory.mktemp("fuzz"), {"a1": ["x"]})
    return root, root / "a1" / "train.jsonl.gz"


@EXAMPLES
@given(line=st.binary(max_size=60) | JSON.map(lambda value: json.dumps({"text": value}).encode()))
def test_lines_of_text(text_file, line):
    root, file = text_file
    file.write_bytes(gzip.compress(line + b"\n"))
    with contextlib.suppress(UserError):
        for text in open_source(DataConfig(source="jsonl", input=str(root))).documents("a1", "train"):
            text.encode()


WORDS = ("", "nan", "en", "zh", "1e9", "x", "-1", "r0", "'", '"')
CELLS = st.floats() | st.integers() | st.sampled_from(WORDS)
HEADERS = ("run", "num_params", "tokens", "loss", "language", "unique_tokens", "tokens.en", "phase", "seed", "", "loss")


@EXAMPLES
@given(
    st.lists(st.sampled_from(HEADERS), min_size=1, max_size=7),
    st.lists(st.lists(CELLS, max_size=8), max_size=6),
    st.binary(max_size=8),
)
def test_runs_tables(tmp_path_factory, header, rows, tail):
    path = tmp_path_factory.getbasetemp() / "fuzzed.csv"
    lines = (",".join(map(str, cells)) for cells in (header, *rows))
    path.write_bytes("\n".join(lines).encode() + tail)
    with contextlib.suppress(UserError):
        runs = load_runs(path)
        assert len(runs) and (runs.loss > 0).all()


def damaged(document, choice: random.Random, value):
    """A JSON document with one of its values, at any depth, replaced or left out."""
    document = copy.deepcopy(document)
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return document
        key = choice.choice(keys)
        if not isinstance(place[key], dict | list) or choice.random() < 0.3:
            if choice.random() < 0.3:
                del place[key]
            else:
                place[key] = value
            return document
        place = place[key]


@pytest.fixture(scope="module")
def tokenizer_json():
    trained = tokenizers.train("bpe", 280, ["some words of text, and some more words"] * 9)
    return json.loads(trained._json)


@EXAMPLES
@given(choice=st.randoms(use_true_random=False), value=JSON)
def test_tokenizers(tokenizer_json, choice, value):
    with contextlib.suppress(UserError):
        tokenizer = tokenizers.JsonTokenizer(json.dumps(damaged(tokenizer_json, choice, value)))
        for ids in tokenizer.encode_documents(["some text"]):
            assert (ids < tokenizer.vocab_size).all()


GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32, "vocab_size": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 64, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"],
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": True,
}  # fmt: skip


def test_a_whole_config_is_read():
    assert read_config(GEMMA, "float32").layers == 2


@EXAMPLES
@given(choice=st.randoms(use_true_random=False), value=JSON)
def test_configs_of_models(choice, value):
    with contextlib.suppress(ValueError):
        assert read_config(damaged(GEMMA, choice, value), "float32").d_model > 0
