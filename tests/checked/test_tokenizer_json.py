import pytest

from checked.tokenizer_json import TokenizerJson, bytes_json


@pytest.mark.parametrize("component", ["normalizer", "decoder"])
def test_a_list_that_the_library_takes_for_an_object_is_named(component):
    with pytest.raises(ValueError, match="made is spelled unusually"):
        TokenizerJson(bytes_json() | {component: [""]}, "made")
