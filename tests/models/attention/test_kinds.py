import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checked import UserError
from models import Decoder, ModelConfig
from models.attention import attention_kind, kinds, oracle
from models.config import ATTENTION_NAMES

SMALL = {"layers": 1, "d_model": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "d_ff": 16}


def mine(q_BTHE, k_BSGE, v_BSGE, reads):
    attended = oracle.attend(q_BTHE, k_BSGE, v_BSGE, reads)
    return attended._replace(output=2 * attended.output)


@pytest.fixture(autouse=True, scope="module")
def added():
    attention_kind("mine")(mine)
    yield
    kinds._ADDED.pop("mine")
    ATTENTION_NAMES.remove("mine")


def test_a_kind_of_ones_own_takes_the_place_of_dense_attention():
    tokens_BT = jnp.arange(24).reshape(2, 12)
    logits = {}
    for kind in ("dense", "mine"):
        model = Decoder(ModelConfig(**SMALL, attention=kind), rngs=nnx.Rngs(0))
        if kind == "dense":
            model.layers.attention.out[...] *= 2
        logits[kind], metrics = model(tokens_BT, measure=True)
    assert "sink_rate" not in metrics  # of softmax attention
    np.testing.assert_allclose(logits["mine"], logits["dense"], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="attention='mine' are not decoded"):
        model.extend(tokens_BT[:, :1], model.init_cache(2, 4))


def test_a_name_is_one_function():
    with pytest.raises(UserError, match="'dense' is another function already"):
        attention_kind("dense")(mine)
    with pytest.raises(UserError, match="'mine' is another function already"):
        attention_kind("mine")(lambda *_: None)
    assert attention_kind("mine")(mine) is mine
    with pytest.raises(UserError, match="one of dense, gated, sparse, gated_sparse, mine"):
        ModelConfig(attention="mein")
