import dataclasses
import math

import jax
import pytest
from flax import nnx

from checked import UserError, overlay
from models import Decoder, count_params, shape_config, shape_table
from models.config import ATTENTION_KINDS, FAMILIES, OUTPUT_GATES, VALUE_GATES, Architecture


def leaf_sizes(config):
    shapes = nnx.eval_shape(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param))
    return {path: math.prod(leaf.shape) for path, leaf in jax.tree.leaves_with_path(shapes)}


@pytest.mark.parametrize("scale", range(52))
def test_totals_are_those_of_the_atlas_table(scale):
    config = shape_config(scale)
    assert count_params(config)["total"] == shape_table()[scale]["params"]


def test_the_last_row_of_the_table_is_off():
    assert count_params(shape_config(52))["total"] != shape_table()[52]["params"]


@pytest.mark.parametrize("scale", [0, 34])
def test_a_scale_has_as_many_parameters_as_its_tree(scale):
    config = shape_config(scale)
    assert sum(leaf_sizes(config).values()) == shape_table()[scale]["params"]


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
@pytest.mark.parametrize("output_gate", OUTPUT_GATES)
@pytest.mark.parametrize("value_gate", VALUE_GATES)
def test_count_equals_the_tree_of_every_kind(tiny, attention, output_gate, value_gate):
    gates = {"output_gate": output_gate, "value_gate": value_gate}
    config = tiny(attention=attention, indexer_gate_bias=value_gate == "none", **gates)
    total = sum(leaf_sizes(config).values())
    embedding = config.vocab_size * config.d_model
    assert count_params(config) == {"total": total, "non_embedding": total - embedding}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied_head", [True, False])
def test_count_equals_the_tree_of_every_family(tiny, family, tied_head):
    config = tiny(architecture=Architecture(family=family, tied_head=tied_head), attention="gated")
    total = sum(leaf_sizes(config).values())
    embeddings = config.vocab_size * config.d_model * (1 if tied_head else 2)
    assert count_params(config) == {"total": total, "non_embedding": total - embeddings}


def test_the_indexer_keeps_the_proportions_of_the_paper():
    config = dataclasses.replace(shape_config(32), attention="gated_sparse")
    assert (config.heads, config.head_width) == (16, 128)
    assert (config.indexer_heads, config.indexer_width) == (4, 64)


@pytest.mark.parametrize("scale", [-1, 53, 1.5])
def test_unknown_scale(scale):
    with pytest.raises(ValueError, match=r"scale=.* from 0 to 52"):
        shape_config(scale)


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
        ({"attention": "sparse", "k_base": 9}, "model.k_base=9 must lie between k_min=2 and k_max=8"),
        ({"indexer_temperature": 0.0}, "model.indexer_temperature=0.0 must be a number above 0"),
        ({"variance_decay": 1.0}, "model.variance_decay=1.0 must be a number of at least 0 and below 1"),
        ({"architecture": None}, "model.architecture=None is a section"),
        ({"architecture": {"full_layers": (2,)}}, r"model.architecture.full_layers=\(2,\) must be from 0 to 1"),
        ({"architecture": {"rope_scaling": {"kind": "yarn"}}}, "scaling.kind='yarn' must be one of none, linear"),
        ({"attention": "sparse", "architecture": {"window": 4}}, "window=4 must be 0 for attention='sparse'"),
        ({"architecture": {"window": 4}, "query_chunk": 2}, "window=4 must be 0 for .* query_chunk=2"),
    ],
)
def test_bad_fields_are_named(tiny, fields, message):
    with pytest.raises(UserError, match=message) as raised:
        overlay(tiny(), fields)
    assert "\n" not in str(raised.value)


def test_selection_is_not_checked_where_nothing_is_selected(tiny):
    tiny(attention="dense", k_min=9)
    tiny(attention="sparse", k_rule="fixed", k_base=100)
