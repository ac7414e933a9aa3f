import pytest

from atlas.data import DataConfig
from checked import UserError


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"source": "synthetics"}, "did you mean 'synthetic'"),
        ({"input": "x"}, "not read by the synthetic source"),
        ({"source": "jsonl"}, "data.input='' is missing"),
        *(({"languages": (name,)}, f"synthetic language '{name}'") for name in ("xx", "a", "1a", "a0", "A1", "a100")),
        ({"languages": ("../up",)}, "data.languages"),
        ({"languages": "a1"}, "languages"),
        ({"languages": ("a1", "a1")}, "different"),
        ({"window": 1}, "data.window=1"),
        ({"synthetic_tokens": 0}, "data.synthetic_tokens=0"),
        ({"max_train_windows": -1}, "data.max_train_windows=-1"),
        ({"tokenizer": "byte"}, "did you mean 'bytes'"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "data.vocab_size=100"),
        ({"tokenizer_temperature": 0.5}, "tokenizer_temperature"),
        ({"tasks": ("needel",), "window": 64}, "did you mean 'needle'"),
        ({"tasks": ("needle", "needle"), "window": 64}, "different names"),
        ({"tasks": "needle", "window": 64}, "data.tasks='needle' must be a tuple"),
        ({"tasks": ("needle",), "window": 31}, "data.window=31 must hold a task's 32 tokens"),
        ({"tasks": ("needle",), "tokenizer": "bpe"}, "data.tokenizer='bpe' must be 'bytes'"),
    ],
)
def test_mistakes_are_named(fields, word):
    with pytest.raises(UserError, match=word) as error:
        DataConfig(**fields)
    assert "\n" not in str(error.value)
