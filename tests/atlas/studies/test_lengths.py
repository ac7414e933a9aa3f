import jax
import numpy as np
import pytest

from atlas.data import Corpus, DataConfig, prepare
from atlas.studies.lengths import PositionReader, edges, long_documents
from atlas.training.step import Skeleton
from models import ModelConfig, token_losses

WINDOW = 32
CONFIG = ModelConfig(
    d_model=16, layers=2, heads=2, kv_heads=1, head_width=8, d_ff=16, attention="gated_sparse", indexer_heads=1,
    k_base=8, k_min=2, k_max=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    config = DataConfig(source="synthetic", languages=("a1",), window=WINDOW, synthetic_tokens=60_000)
    return prepare(config, tmp_path_factory.mktemp("corpus"))


def test_long_documents_are_those_of_the_stream(corpus):
    found = long_documents(corpus, "a1", 64)
    separator = corpus.tokenizer.separator
    assert len(found) > 1 and (found[:, 0] == separator).all() and not (found[:, 1:] == separator).any()


def test_losses_through_the_cache_are_those_of_the_whole_document(corpus):
    """Four times as long as a window, by the function that training uses; with the running variance after training."""
    skeleton = Skeleton(CONFIG)
    params, buffers = skeleton.init(jax.random.key(0))
    buffers = {name: value + 0.003 for name, value in buffers.items()}
    reader = PositionReader(CONFIG, corpus, ["a1"])
    rows = list(reader.read({"params": params, "buffers": buffers}))
    assert [(start, stop) for start, stop, _ in rows] == list(zip(edges(WINDOW), edges(WINDOW)[1:], strict=False))
    tokens_NS = long_documents(corpus, "a1", 4 * WINDOW)
    ids = corpus.tokenizer.separator, corpus.tokenizer.padding
    nats_NT = jax.jit(lambda p, b: token_losses(skeleton.merge(p, b), tokens_NS, *ids)[0])(params, buffers)
    for start, stop, bits in rows:  # of bytes, so that a token is one
        np.testing.assert_allclose(bits, np.mean(nats_NT[:, start:stop]) / np.log(2), rtol=1e-5)
