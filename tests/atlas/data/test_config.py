import pytest

from atlas.data import DataConfig
from atlas.errors import UserError


def test_the_default_is_valid():
    DataConfig().validate()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"source": "synthetics"}, "did you mean 'synthetic'"),
        ({"input": "x"}, "reads nothing"),
        ({"languages": "a1"}, "languages"),
        ({"languages": ("a1", "a1")}, "different"),
        ({"window": 1}, "data.window=1"),
        ({"synthetic_tokens": 0}, "data.synthetic_tokens=0"),
        ({"max_train_windows": -1}, "data.max_train_windows=-1"),
        ({"tokenizer": "byte"}, "did you mean 'bytes'"),
        ({"tokenizer": "/none/tokenizer.json"}, "no such file"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "data.vocab_size=100"),
        ({"tokenizer_temperature": 0.5}, "tokenizer_temperature"),
    ],
)
def test_mistakes_are_named(fields, word):
    with pytest.raises(UserError, match=word) as error:
        DataConfig(**fields).validate()
    assert "\n" not in str(error.value)
