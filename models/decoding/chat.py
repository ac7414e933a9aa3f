"""Chats as one text, by the templates that come with models."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checked.tokenizer_json import read

_CONFIG, _ALONE = "tokenizer_config.json", "chat_template.jinja"
_MARKS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Template(NamedTuple):
    """A Jinja template, and the special tokens that it may name."""

    source: str
    marks: Mapping[str, str]


def read_template(directory: Path) -> Template | None:
    """The template of a model, from chat_template.jinja or tokenizer_config.json; None where there is none.

    Of several templates it is the one called "default".
    """
    config = read(directory / _CONFIG) if (directory / _CONFIG).is_file() else {}
    alone = directory / _ALONE
    source = alone.read_text(encoding="utf-8") if alone.is_file() else config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    named = {mark: config[mark] for mark in _MARKS if config.get(mark)}
    return Template(source, {mark: name["content"] if isinstance(name, dict) else name for mark, name in named.items()})


def render(template: Template, messages: Sequence[Mapping[str, str]]) -> str:
    """The text of a chat, up to where the next message begins, as the transformers library renders it.

    The template runs in Jinja's sandbox, which gives it no access to Python.

    Raises:
      ValueError: the template is broken, or refuses the messages.
    """

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        # Jinja's own filter escapes characters of HTML.
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    try:
        made = environment.from_string(template.source)
        return made.render(messages=list(messages), add_generation_prompt=True, **template.marks)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from error
