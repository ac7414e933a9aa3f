"""Chats as the transformers library writes them."""

import json

import pytest

from models.decoding import load_tokenizer
from models.decoding.chat import read_template, render
from tests.models.decoding import tokenizer_files as files

CHAT = [{"role": "user", "content": " Say <b>“é”</b>\n"}, {"role": "assistant", "content": "é"}]
CHATML = """{% for message in messages %}
    {{- '<s>' + message['role'] + '\\n' + message['content'] | trim + '</s>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"""
TEMPLATES = {
    "roles": CHATML,
    "marks and turns": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}",
    "json and loops": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
}


def write(directory, template, **fields):
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "chat_template": template}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return files.save(directory, files.library("llama2").to_str(), tokenizer_config=config | fields)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_transformers_does(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[peers]'")
    directory = write(tmp_path, TEMPLATES[name])
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    expected = peer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert render(read_template(directory), CHAT) == expected
    ids = peer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert load_tokenizer(directory).encode_chat(CHAT) == list(ids)


def test_the_template_may_lie_in_a_file_of_its_own_or_be_one_of_several(tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    write(tmp_path, several)
    assert render(read_template(tmp_path), CHAT) == "yes"
    (tmp_path / "chat_template.jinja").write_text("alone")
    assert render(read_template(tmp_path), CHAT) == "alone"


def test_what_a_template_refuses_is_one_line(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, TEMPLATES["marks and turns"]))
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
        tokenizer.encode_chat(CHAT[1:])
    for broken in ("{% for %}", "{{ messages.__class__.__mro__[1].__subclasses__() }}"):
        (tmp_path / "chat_template.jinja").write_text(broken)
        with pytest.raises(ValueError, match="the chat template refuses"):
            load_tokenizer(tmp_path).encode_chat(CHAT)


def test_a_tokenizer_without_a_template_says_so(tmp_path):
    config = {"bos_token": "<s>"}
    tokenizer = load_tokenizer(files.save(tmp_path, files.library("llama2").to_str(), tokenizer_config=config))
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.encode_chat(CHAT)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == config
