"""Models and their directories: finished runs of ours, which become Hugging Face's layout, and that layout itself."""

import json
from pathlib import Path

from checked import UserError
from checked.files import write_atomically
from checked.tokenizer_json import TokenizerJson, bytes_json, read
from models.decoding.language_model import Voice, make_voice
from models.decoding.tokenizers import FILE, ByteView, byte_tokenizer, load_tokenizer
from models.pretrained import Pretrained, load_pretrained, save_pretrained
from models.pretrained.settings import write_config
from models.run import MODEL, is_run, load_run, model_config, read_description


def load(path: Path | str, dtype: str = "float32") -> Voice:
    """A model that writes.

    Args:
      path: a finished run of ours (`WORKDIR/runs/RUN`, or a copy of it), or a directory in Hugging Face's layout
        (config.json, safetensors, tokenizer.json) of an architecture that `models.pretrained` knows.
      dtype: "float32" or "bfloat16", of parameters and activations.

    Raises:
      UserError: the directory is neither, or its parts do not fit together.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"model directory {str(path)!r} does not exist; give a run (WORKDIR/runs/RUN) or a checkpoint")
    try:
        description = read_description(path)
        if is_run(description):
            data, (decoder, _) = description["config"]["data"], load_run(path, dtype, stacked=False)
            return make_voice(decoder, run_tokenizer(path, data["tokenizer"]), data["window"])
        pretrained = load_pretrained(path, dtype, stacked=False)
        return make_voice(pretrained.model, load_tokenizer(path), pretrained.max_length or None)
    except ValueError as error:
        raise UserError(str(error)) from error


def run_tokenizer(path: Path, name: str) -> ByteView:
    """The tokenizer of a run, with the separator that goes before and behind every document."""
    plain = byte_tokenizer() if name == "bytes" else load_tokenizer(path / MODEL / FILE)
    return plain.with_separator()


def export(run: Path | str, out: Path | str) -> None:
    """Writes a finished run of a family that Hugging Face knows in its layout, for transformers and for `load`.

    Texts begin and end with the separator of our documents, which the tokenizer adds before them.

    Raises:
      UserError: the run has no model, or one that the layout has no form for.
    """
    run, out = Path(run), Path(out)
    try:
        description = read_description(run)
        if not is_run(description):
            raise UserError(f"{str(run)!r} is no run of ours; give WORKDIR/runs/RUN")
        data = description["config"]["data"]
        write_config(model_config(run), data["window"])  # refuses what has no form there before it is read
        decoder, config = load_run(run)
        save_pretrained(Pretrained(decoder, config, data["window"]), out)
        plain = bytes_json() if data["tokenizer"] == "bytes" else read(run / MODEL / FILE)
        files = TokenizerJson(plain, run / MODEL / FILE).with_separator()
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, content in files.items():
        write_atomically(out / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
