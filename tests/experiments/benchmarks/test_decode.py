import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.benchmarks import decode, pair
from models import Decoder, ModelConfig
from models.config import Architecture


def small() -> tuple[Decoder, ModelConfig]:
    config = ModelConfig(
        vocab_size=24, d_model=16, layers=2, heads=2, kv_heads=1, head_width=8, d_ff=24, scan_layers=False,
        architecture=Architecture(family="llama"), dtype="float64",
    )  # fmt: skip
    return Decoder(config, rngs=nnx.Rngs(0)), config


# The norms' scales shrink by the root of the ratio of widths, which float32 parameters hold exactly or round.
@pytest.mark.parametrize(
    ("shape", "tolerance"), [((16, 2, 2, 1, 24), 1e-12), ((64, 3, 4, 2, 40), 1e-12), ((24, 2, 6, 3, 24), 1e-6)]
)
def test_a_padded_model_computes_what_the_small_one_does(shape, tolerance):
    with jax.enable_x64(True):
        model, config = small()
        sizes = dict(zip(("d_model", "layers", "heads", "kv_heads", "d_ff"), shape, strict=True))
        larger, wider = pair.pad(model, config, dataclasses.replace(config, **sizes))
        tokens_BT = jnp.arange(14).reshape(2, 7) % config.vocab_size
        expected, found = model(tokens_BT)[0], larger(tokens_BT)[0]
    assert wider.d_model == shape[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))


@pytest.mark.thorough
def test_every_way_to_decode_is_measured_against_plain_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(pair, "_TRAINING", {"target": (3, 4e-3), "draft": (3, 6e-3)})
    monkeypatch.setattr(pair, "SHAPES", {"1M": (64, 2), "5M": (128, 3)})
    monkeypatch.setattr(pair, "_DRAFT_SHAPE", (64, 1))
    monkeypatch.setattr(decode, "SHAPES", {"5M": pair.SHAPES["5M"]})
    monkeypatch.setattr(decode, "_ROUNDS", 1)
    monkeypatch.setattr(decode, "_NEW", 8)
    rows, facts = decode.run(str(tmp_path))
    ours = [row for row in rows if row["path"] == "atlas"]
    assert {row["method"] for row in ours} == {"ar", "tli", "slem", "lookup"}
    assert {row["verify"] for row in ours if row["method"] == "tli"} == {"exact", "rejection", "block"}
    assert {row["size"] for row in rows} == {"5M"} and facts["new_tokens"] == 8
    for row in rows:
        assert row["tokens_per_second"] > 0 and 1 <= row["tokens_per_call"] <= 1 + decode.LENGTH + 8
        if row["method"] == "ar":
            assert row["tokens_per_call"] == 1 and row["speedup"] == 1 and row["acceptance"] == 0
    if facts["peer"].startswith("none"):
        pytest.skip(f"the peer is missing: {facts['peer']}")
    peers = [row for row in rows if row["path"] == "transformers"]
    assert len(peers) == 7 and all(row["ratio"] is None for row in peers)
    assert all(math.isfinite(row["ratio"]) for row in ours)


def test_templated_text_is_the_same_everywhere():
    assert pair._document(3) == pair._document(3) != pair._document(4)
