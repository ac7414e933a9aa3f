import dataclasses
import math

import pytest

from checked import UserError, overlay
from models import ModelConfig, count_params, shape, shape_table
from models.config import ATTENTION_KINDS, OUTPUT_GATES, VALUE_GATES, Architecture


@pytest.mark.parametrize("scale", range(52))
def test_totals_are_those_of_the_atlas_table(scale):
    config = ModelConfig(**shape(scale))
    assert count_params(config)["total"] == shape_table()[scale]["params"]


def test_the_last_row_of_the_table_is_off():
    assert count_params(ModelConfig(**shape(52)))["total"] != shape_table()[52]["params"]


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
@pytest.mark.parametrize("output_gate", OUTPUT_GATES)
@pytest.mark.parametrize("value_gate", VALUE_GATES)
def test_gates_and_indexers_count_and_embeddings_do_not(tiny, attention, output_gate, value_gate):
    c = tiny(attention=attention, output_gate=output_gate, value_gate=value_gate)
    outputs = {"elementwise": c.heads * c.head_width, "headwise": c.heads, "none": 0}[output_gate]
    values = c.kv_heads * c.head_width if value_gate == "elementwise" else 0
    gates = (c.d_model + 1) * (outputs + values) if c.is_gated else 0
    indexer = c.d_model * (c.indexer_heads * c.indexer_width + c.indexer_width + c.indexer_heads) + c.indexer_heads
    plain = 2 * c.d_model * c.head_width * (c.heads + c.kv_heads) + 3 * c.d_model * c.d_ff + c.d_model
    non_embedding = c.layers * (plain + gates + (indexer if c.is_sparse else 0))
    total = non_embedding + c.vocab_size * c.d_model
    assert count_params(c) == {"total": total, "non_embedding": non_embedding}


@pytest.mark.parametrize(
    ("family", "norms", "biases"), [("llama", 5, 0), ("qwen2", 5, 2 * 32), ("qwen3", 5, 2 * 8), ("gemma2", 9, 0)]
)
def test_norms_and_biases_count_and_a_head_does_not(tiny, family, norms, biases):
    c = tiny(architecture=Architecture(family=family, tied_head=False))
    matrices = c.layers * (2 * c.d_model * c.head_width * (c.heads + c.kv_heads) + 3 * c.d_model * c.d_ff)
    non_embedding = matrices + norms * c.d_model + biases
    assert count_params(c) == {"total": non_embedding + 2 * c.vocab_size * c.d_model, "non_embedding": non_embedding}


def test_the_indexer_keeps_the_proportions_of_the_paper():
    config = dataclasses.replace(ModelConfig(**shape(32)), attention="gated_sparse")
    assert (config.heads, config.head_width) == (16, 128)
    assert (config.indexer_heads, config.indexer_width) == (4, 64)


@pytest.mark.parametrize("scale", [-1, 53, 1.5])
def test_unknown_scale(scale):
    with pytest.raises(ValueError, match=r"scale=.* from 0 to 52"):
        ModelConfig(**shape(scale))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head_width": 7}, "model.head_width=7 must be even"),
        ({"kv_heads": 3}, "model.kv_heads=3 must divide heads=4"),
        ({"layers": 0}, "model.layers=0 must be a whole number of at least 1"),
        ({"layers": 1.5}, "model.layers=1.5 must be a whole number"),
        ({"rope_base": math.inf}, "model.rope_base=inf must be a number above 0"),
        ({"scan_layers": 1}, "model.scan_layers=1 must be True or False"),
        ({"attention": "gated_sparce"}, "model.attention='gated_sparce' .* mean 'gated_sparse'"),
        ({"remat": "ful"}, "model.remat='ful' must be one of none, dots, full; did you mean 'full'"),
        ({"attention": "sparse", "k_min": 9}, "model.k_min=9 must not exceed k_max=8"),
        ({"indexer_rotary_width": 3}, "model.indexer_rotary_width=3 must be even, at most indexer_width=4"),
        ({"attention": "sparse", "k_base": 9}, "model.k_base=9 must lie between k_min=2 and k_max=8"),
        ({"indexer_temperature": 0.0}, "model.indexer_temperature=0.0 must be a number above 0"),
        ({"variance_decay": 1.0}, "model.variance_decay=1.0 must be a number of at least 0 and below 1"),
        ({"architecture": None}, "model.architecture=None is a section"),
        ({"architecture": {"full_layers": (2,)}}, r"model.architecture.full_layers=\(2,\) must be from 0 to 1"),
        ({"architecture": {"rope_scaling": {"kind": "ntk"}}}, "scaling.kind='ntk' must be one of none, linear"),
        ({"attention": "sparse", "architecture": {"window": 4}}, "window=4 must be 0 for attention='sparse'"),
        (
            {"architecture": {"attention_softcap": 4.0}, "query_chunk": 2},
            "attention_softcap=4.0 must be 0 for .* query_chunk=2",
        ),
        ({"dtype": "float64"}, "model.dtype='float64' needs JAX_ENABLE_X64=1"),
    ],
)
def test_bad_fields_are_named(tiny, fields, message):
    with pytest.raises(UserError, match=message) as raised:
        overlay(tiny(), fields)
    assert "\n" not in str(raised.value)


def test_selection_is_not_checked_where_nothing_is_selected(tiny):
    tiny(attention="dense", k_min=9)
    tiny(attention="sparse", k_rule="fixed", k_base=100)
