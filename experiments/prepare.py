"""Builds a corpus and its tokenizer from text.

    python -m experiments.prepare --source=jsonl --input=DIR --workdir=DIR
    python -m experiments.prepare --source=tfds --input=wiki40b/{language} --languages=en,de --workdir=DIR
    python -m experiments.prepare --source=madlad --input=gs://BUCKET --workdir=SHARED_DIR --workers=64 [--shard=0/8]

Leaves the windows, the tokenizer and `corpus.json` in the work directory; run again, it finishes at once, and
interrupted it goes on with the file it was at. A corpus of 90 MB takes about 20 seconds on one core with the bytes
tokenizer. `--workers` processes take a file each. On several machines each makes the tokens of its `--shard` of the
files, or of its index in an array of SLURM or Kubernetes; the same command with --shard=0/1 then cuts the windows,
which are the same whoever made the tokens. With `--max_train_windows`, no more files are read than a language needs.
"""

from collections.abc import Sequence

import pandas as pd
from absl import flags

from atlas.data import Corpus, DataConfig, prepare, prepare_part
from checked.environment import parse_shard
from experiments import _app

_WORKDIR = flags.DEFINE_string("workdir", "", "directory to build in")
_WORKERS = flags.DEFINE_integer("workers", 1, "processes that make tokens of files", lower_bound=1)
_SHARD = flags.DEFINE_string("shard", "", "make only the tokens of part i of n of the files, as i/n")
_SETTINGS = _app.define_settings(DataConfig())


def main(_: Sequence[str]) -> None:
    """Builds the corpus and prints what it holds."""
    _app.require(workdir=_WORKDIR.value)
    _app.check_outputs(_WORKDIR.value)
    number, count = parse_shard(_SHARD.value)
    if count > 1:
        files = prepare_part(_SETTINGS(), _WORKDIR.value, number, count, _WORKERS.value)
        print(f"tokens of {files} files are ready; when all shards are, the same command with --shard=0/1 cuts windows")
        return
    corpus = prepare(_SETTINGS(), _WORKDIR.value, _WORKERS.value)
    print(table(corpus))
    print(f"\nvocabulary {corpus.tokenizer.vocab_size}, windows of {corpus.window} tokens, in {corpus.directory}")


def table(corpus: Corpus) -> str:
    """Sizes of the train split by language, as lines of text."""
    sizes = pd.DataFrame({language: splits["train"] for language, splits in corpus.sizes.items()}).T
    sizes["tokens"] = sizes["windows"] * corpus.window
    sizes.loc["total"] = sizes.sum()
    columns = sizes[["documents", "windows", "tokens", "bytes"]].rename_axis(columns="language")
    return columns.map("{:,}".format).to_string(col_space=15)


if __name__ == "__main__":
    _app.run(main, resumes=True)
