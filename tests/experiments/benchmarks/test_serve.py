import numpy as np
import pytest

from experiments.benchmarks import serve
from models.pretrained import load_pretrained

SHAPE = {"d_model": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 16, "d_ff": 48}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(serve, "_LARGE", SHAPE)
    monkeypatch.setattr(serve, "_VOCABULARY", 256)


def test_the_large_model_is_whole_and_as_large_as_it_says(tmp_path):
    size = serve._write_large(tmp_path)
    loaded = load_pretrained(tmp_path, "bfloat16")
    assert (loaded.config.d_model, loaded.config.layers) == (32, 2)
    numbers = np.asarray(loaded.model.embedding[...], np.float32)
    assert 0.9 < numbers.std() * 32**0.5 < 1.1
    assert size == 2 * (256 * 32 + 32 + 2 * (2 * 32 + 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48))


@pytest.mark.thorough
def test_every_cost_is_measured(monkeypatch):
    small = {
        "_SMALL": SHAPE,
        "_LIMITS": (12, 300),
        "_WRITTEN": 10,
        "_PROMPTS": (300,),
        "_LENGTHS": (5, 9),
        "_ROUNDS": 1,
    }
    small |= {"_ROUNDS": 1}
    for name, value in (small | {"_TEXTS": (20, 2000), "_alone": lambda measure, *rest: measure(*rest)}).items():
        monkeypatch.setattr(serve, name, value)
    rows, _ = serve.run()
    measures = [row["measure"] for row in rows]
    assert measures[:6] == [*["limit of new tokens"] * 2, *["lookup on the host"] * 2, "prompt", "lengths of prompts"]
    assert set(measures[6:]) == {"large model, bfloat16"}
    # Some are differences of two times, which at this size may have either sign.
    assert all(np.isfinite(row["milliseconds"]) for row in rows if "milliseconds" in row)
    assert next(row["programs"] for row in rows if "programs" in row) > 0
