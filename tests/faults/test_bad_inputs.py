"""A table of bad inputs: whatever is wrong ends in one line that names it, exit code 2, and nothing lost."""

import functools
import gzip
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from atlas.training import RunConfig
from checked import leaves
from tests.atlas.data.corpora import write_corpus
from tests.experiments.binaries import Done, run_binaries

RESULTS = pathlib.Path("experiments/results")
TRAIN, SMOKE, QUICKSTART = (f"--config=configs/{name}.py" for name in ("train", "smoke", "quickstart"))
DOCUMENTATION = f"--fit={RESULTS / 'documentation'}"
WORKDIR = "--workdir={dir}/out"
Prepare = Callable[[pathlib.Path], object]


class Row(NamedTuple):
    """A command whose `{dir}` is a fresh directory, made by `prepare`; the words that its one line must hold."""

    name: str
    words: str
    command: tuple[str, ...]
    prepare: Prepare | None = None
    environment: tuple[str, ...] = ()  # NAME=VALUE


def row(name: str, words: str, *command: str, prepare: Prepare | None = None, environment: tuple[str, ...] = ()) -> Row:
    return Row(f"{command[0]}: {name}", words, command, prepare, environment)


def text(name: str, content: str | bytes) -> Prepare:
    """Makes a file."""

    def write(directory: pathlib.Path) -> None:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


# Settings ------------------------------------------------------------------------------------------------------------

WRONG = {
    bool: ("maybe",),
    int: ("1.5", "many", "nan", "99999999999999999999.5"),
    float: ("nan", "inf", "high"),
    str: ("../../evil",),
    tuple: ("('a',)", "(1.5,)"),
}
FREE = {"group", "mixture", "data.input", "data.tokenizer"}  # any text; what it means is looked at later
TUPLES_OF_TEXT = {"data.languages", "data.tasks"}


def settings() -> Iterator[Row]:
    """Every setting of a run with values that it cannot have."""
    for key, value in leaves(RunConfig()).items():
        kind = type(value)
        wrong = () if key in FREE else ("('../up',)", "('a b',)") if key in TUPLES_OF_TEXT else WRONG[kind]
        for value in wrong[: 2 if kind is int else 3]:
            yield row(f"{key}={value}", key, "train", TRAIN, f"--config.{key}={value}", WORKDIR)


RANGES = {
    "name": ("", "x" * 300, "a/b", ".hidden", "a b", "-x"),
    "seed": ("-1", "2147483648"),
    "initialize": ("../other", "/etc"),
    "data.languages": ("..", "a1,a1", "zz"),
    "data.window": ("0", "1"),
    "data.synthetic_tokens": ("0",),
    "data.vocab_size": ("0",),
    "data.max_train_windows": ("-1",),
    "model.d_model": ("0", "-16"),
    "model.heads": ("0", "3"),
    "model.layers": ("0",),
    "model.k_base": ("0", "99999"),
    "model.k_max": ("2",),
    "train.steps": ("()", "0", "(5,5)", "(9,5)", "-1"),
    "train.batch_size": ("0", "-8"),
    "train.learning_rate": ("0", "-1"),
    "train.warmup_steps": ("-1",),
    "train.cooldown_fraction": ("1", "-0.1"),
    "train.beta1": ("1.5", "-0.1"),
    "train.clip_norm": ("0",),
    "train.evaluation_windows": ("0",),
    "mesh.data": ("0", "-2"),
}
MIXTURES = {
    "a9": "unknown language 'a9'",
    "a1:0.5,a2:0.4": "sum to",
    "a1:nan,a2:0.5": "needs a number",
    "a1:inf,a2:0.5": "needs a number",
    "a1:-1,a2:2": "needs a number",
    "a1:0.5,a1:0.5": "more than once",
    "uniform()": "is empty",
    "": "is empty",
    "uniform(a1;epochs=2)": "takes no option",
    "unimax(*;epochs=0)": "epochs is 0",
    "unimx(*)": "unknown kind of mixture",
    "a1:0.5,a2": "needs a number",
}
FLAGS = (
    row("unknown flag", "confg", "sweep", "--confg=x"),
    row("unknown setting", "did you mean 'model.attention'", "train", TRAIN, "--config.model.atention=dense"),
    row("section", "is a section", "train", TRAIN, "--config.model=dense"),
    row("no value", "lacks its value", "train", TRAIN, "--config.model.remat"),
    row("no workdir", "--workdir is missing", "train", TRAIN),
    row("no config", "--config is missing", "train", WORKDIR),
    row("population 0", "population", "sweep", QUICKSTART, "--population=0", WORKDIR),
    row("population -1", "population", "sweep", QUICKSTART, "--population=-1", WORKDIR),
    row("population text", "population", "study", QUICKSTART, "--population=many", WORKDIR),
    row("shard 4/4", "--shard=4/4", "sweep", SMOKE, "--shard=4/4", WORKDIR),
    row("shard text", "--shard=x", "sweep", SMOKE, "--shard=x", WORKDIR),
    row("shard 1/0", "--shard=1/0", "sweep", SMOKE, "--shard=1/0", WORKDIR),
    row("varied", "is varied by the sweep itself", "sweep", QUICKSTART, "--config.model.d_ff=9", WORKDIR),
    row("mesh", "mesh", "sweep", QUICKSTART, "--config.mesh.data=3", WORKDIR),
    row("law", "law", "fit", "--runs=x", "--law=chinchila", WORKDIR),
    row("suite", "suite", "benchmark", "--suite=atention"),
    row("lengths", "lengths", "benchmark", "--suite=attention", "--lengths=2K"),
    row("nothing to continue", "--prompt is missing", "generate", "--target=x"),
    row("no target", "--target is missing", "generate", "--prompt=a"),
    row("target gone", "does not exist", "generate", "--target=nowhere", "--prompt=a"),
    row("target is a file", "does not exist", "generate", "--target=setup.py", "--prompt=a"),
    row("target of nothing", "config.json", "generate", "--target={dir}", "--prompt=a"),
    row("no question", "give one of", "plan"),
    row("unknown question", "did you mean 'expand'", "plan", "expnd"),
)
_ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT"))


def array_task(digits: str) -> tuple[str, ...]:
    return tuple(f"{name}={digit}" for name, digit in zip(_ARRAY, digits, strict=True))


SCHEDULERS = tuple(
    row(name, words, "sweep", SMOKE, WORKDIR, environment=environment)
    for name, words, environment in (
        ("array without its range", "MIN='', which is no whole number; give --shard", ("SLURM_ARRAY_TASK_ID=1",)),
        ("array of text", "SLURM_ARRAY_TASK_ID='x'", array_task("xxxxx")),
        ("array of a list", "is one of a list: say of how many", array_task("30713")),
        ("array's task repeated", "--shard=3/n", array_task("33311")),
        ("completions unknown", "JOB_COMPLETIONS=''", ("JOB_COMPLETION_INDEX=1",)),
        ("completions of text", "JOB_COMPLETION_INDEX='one'", ("JOB_COMPLETION_INDEX=one", "JOB_COMPLETIONS=4")),
        ("step of text", "SLURM_STEP_NUM_TASKS='abc'", ("SLURM_STEP_NUM_TASKS=abc",)),
        ("processes unknown", "JAX_NUM_PROCESSES=''", ("JAX_COORDINATOR_ADDRESS=localhost:1",)),
        ("completion too far", "--shard=4/4", ("JOB_COMPLETION_INDEX=4", "JOB_COMPLETIONS=4")),
    )
)  # fmt: skip
RUBBISH = tuple(
    row("rubbish", "unexpected argument 'rubbish'", *command, "rubbish")
    for command in (
        ("train", TRAIN, WORKDIR), ("sweep", SMOKE, WORKDIR), ("study", SMOKE, WORKDIR), ("prepare", WORKDIR),
        ("fit", "--runs=x", WORKDIR), ("generate", "--target=x", "--prompt=a"), ("benchmark", "--suite=fit"),
        ("compare_attention", SMOKE, WORKDIR),
    )
)  # fmt: skip

# Config files --------------------------------------------------------------------------------------------------------

GET_CONFIG = "from atlas.training import RunConfig, Study\ndef get_config():\n    return RunConfig()\n"
CONFIGS = (
    ("syntax", "x = (", "SyntaxError"),
    ("import", "import nope_nope", "No module named 'nope_nope'"),
    ("raises", "x = 1 / 0", "line 1 cannot be executed (ZeroDivisionError"),
    ("no get_config", "x = 1", "defines no get_config()"),
    ("nothing", "", "defines no get_config()"),
    ("gives nothing", "def get_config():\n    pass", "gives NoneType"),
    ("gives text", "def get_config():\n    return 'x'", "gives str"),
    ("config raises", "def get_config():\n    return {}['x']", "line 2 cannot be executed (KeyError"),
    ("wrong setting", GET_CONFIG.replace("()\n", "(seed='x')\n"), "seed='x' must be"),
    ("binary", b"\x7fELF\x00\x01\x02", "cannot be executed"),
    ("not UTF-8", b"x = '\xff\xfe'", "cannot be executed"),
    ("recursion", "def get_config():\n    return get_config()", "RecursionError"),
)
SWEEPS = (
    ("no get_sweep", GET_CONFIG, "defines no get_sweep()"),
    ("nothing", GET_CONFIG + "def get_sweep(base):\n    pass", "gives no runs"),
    ("empty", GET_CONFIG + "def get_sweep(base):\n    return Study('x', base, [])", "gives no runs"),
    ("raises", GET_CONFIG + "def get_sweep(base):\n    return base.x", "line 5 cannot be executed (AttributeError"),
    ("takes nothing", GET_CONFIG + "def get_sweep():\n    return 1", "was given 1"),
    ("bad overlay", GET_CONFIG + "def get_sweep(base):\n    return Study('x', base, [{'sed': 1}])", "'sed'"),
    ("bad value", GET_CONFIG + "def get_sweep(base):\n    return Study('x', base, [{'seed': -1}])", "seed=-1"),
    ("twice", GET_CONFIG + "def get_sweep(base):\n    return Study('x', base, [{}, {}])", "twice"),
)


def configs() -> Iterator[Row]:
    """Config files that cannot be executed, and what they give."""
    for name, content, words in CONFIGS:
        command = ("train", "--config={dir}/c.py", WORKDIR)
        yield row(f"config {name}", words, *command, prepare=text("c.py", content))
    for name, content, words in SWEEPS:
        for binary in ("sweep", "study") if name in ("no get_sweep", "empty") else ("sweep",):
            yield row(f"sweep {name}", words, binary, "--config={dir}/c.py", WORKDIR, prepare=text("c.py", content))
    yield row("argument", "was given 1", "train", "--config=configs/smoke.py:foo", WORKDIR)
    yield row("no Python", "ends in .py", "train", "--config={dir}/c.txt", WORKDIR, prepare=text("c.txt", "x"))
    yield row("directory", "unknown config file", "train", "--config=configs", WORKDIR)
    yield row("missing", "did you mean 'configs/smoke.py'", "train", "--config", "configs/smok.py", WORKDIR)


# Places --------------------------------------------------------------------------------------------------------------

FIT_RUNS = f"--runs={RESULTS / 'quickstart/runs.csv'}"
WRITING = {
    "train": (TRAIN,),
    "sweep": (SMOKE,),
    "study": (SMOKE,),
    "prepare": ("--synthetic_tokens=1000",),
    "fit": (FIT_RUNS,),
    "compare_attention": ("--config=configs/attention_comparison.py",),
}
JSON = {"plan": ("expand",), "generate": ("--target=x", "--prompt=a"), "benchmark": ("--suite=fit",)}


def places() -> Iterator[Row]:
    """Directories and files that cannot be written, which every binary says before its work."""
    for binary, arguments in WRITING.items():
        yield row("workdir in /proc", "cannot write '/proc/x'", binary, *arguments, "--workdir=/proc/x")
        yield row("workdir is a file", "cannot write", binary, *arguments, WORKDIR, prepare=text("out", "mine"))
        yield row("workdir name", "File name too long", binary, *arguments, "--workdir={dir}/" + "x" * 300)
    for binary, arguments in JSON.items():
        yield row("json in /proc", "cannot write '/proc/x/y'", binary, *arguments, "--json=/proc/x/y")
        yield row("json is a directory", "it is a directory", binary, *arguments, "--json={dir}")
        below = row("json below a file", "Not a directory", binary, *arguments, "--json={dir}/f/x")
        yield below._replace(prepare=text("f", "mine"))
    lock = row("lock is a directory", "cannot write", "prepare", "--synthetic_tokens=1000", WORKDIR)
    yield lock._replace(prepare=lambda directory: (directory / "out" / ".lock").mkdir(parents=True))


# Text ----------------------------------------------------------------------------------------------------------------


def lines(*content: bytes) -> bytes:
    return gzip.compress(b"".join(line + b"\n" for line in content))


GOOD = b'{"text": "a good line of text"}'
LINES = {
    "deep": (lines(GOOD, b"[" * 100_000), "train.jsonl.gz line 2 is not JSON (it is nested too deeply)"),
    "digits": (lines(GOOD, b'{"text": ' + b"1" * 5000 + b"}"), "line 2 is not JSON (it holds a number of thousands"),
    "NUL": (lines(GOOD, b'{"text": "a\x00b"}'), "line 2 is not JSON"),
    "only NUL": (lines(GOOD, b"\x00" * 9), "line 2 is not JSON"),
    "not UTF-8": (lines(GOOD, b'{"text": "\xff"}'), "line 2 is not JSON (it is not UTF-8"),
    "cut": (lines(GOOD, b'{"text": "a'), "line 2 is not JSON"),
    "list": (lines(GOOD, b"[1]"), "line 2 has no string 'text'"),
    "number": (lines(GOOD, b"7"), "line 2 has no string 'text'"),
    "other key": (lines(GOOD, b'{"txt": "a"}'), "line 2 has no string 'text'"),
    "null": (lines(GOOD, b'{"text": null}'), "line 2 has no string 'text'"),
    "nothing": (lines(), "is empty"),
    "empty texts": (lines(b'{"text": ""}'), "a1"),
    "plain": (GOOD, "is not a whole gzip file"),
    "cut gzip": (lines(*[GOOD] * 200)[:-12], "is not a whole gzip file"),
    "no bytes": (b"", "is empty"),
}


def corpus(directory: pathlib.Path, name: str = "a1") -> pathlib.Path:
    return write_corpus(directory / "in", {name: ["some text, long enough to fill windows"] * 9})


def bad_line(content: bytes) -> Prepare:
    return lambda directory: (corpus(directory) / "a1" / "train.jsonl.gz").write_bytes(content)


def dangling(directory: pathlib.Path) -> None:
    path = corpus(directory) / "a1" / "train.jsonl.gz"
    path.unlink()
    path.symlink_to("nowhere")


def named(name: str) -> Prepare:
    return lambda directory: corpus(directory, name)


def plain_text(name: str, content: bytes | None) -> Prepare:
    def write(directory: pathlib.Path) -> None:
        path = directory / "in" / "a1" / name
        (path if content is None else path.parent).mkdir(parents=True)
        if content is not None:
            path.write_bytes(content)

    return write


def texts() -> Iterator[Row]:
    """Corpora that cannot be built."""
    jsonl = ("prepare", "--source=jsonl", "--input={dir}/in", "--window=8", WORKDIR)
    for name, (content, words) in LINES.items():
        yield row(f"line {name}", words, *jsonl, prepare=bad_line(content))
    yield row("dangling link", "cannot be read", *jsonl, prepare=dangling)
    for name in ("en,fr", "Chinese (Simplified)", "a b", "a:b"):
        yield row(f"language {name}", "cannot be the name of a language", *jsonl, prepare=named(name))
    for name in (".ipynb_checkpoints", ".git"):
        yield row(f"only {name}", "holds no", *jsonl, prepare=named(name))
    lacking = row("no such language", "unknown language", *jsonl, "--languages=zz")
    yield lacking._replace(prepare=corpus)
    gone = row("no test split", "lacks test.jsonl.gz", *jsonl)
    yield gone._replace(prepare=lambda d: (corpus(d) / "a1" / "test.jsonl.gz").unlink())
    large = row("window too large", "fewer than a window", *jsonl, "--window=4096")
    yield large._replace(prepare=corpus)
    yield row("no input", "data.input='' is missing", "prepare", "--source=jsonl", WORKDIR)
    yield row("input gone", "cannot be opened", "prepare", "--source=jsonl", "--input={dir}/no", WORKDIR)
    yield row("unknown protocol", "cannot be opened", "prepare", "--source=jsonl", "--input=nope://x", WORKDIR)
    yield row("unknown source", "did you mean 'jsonl'", "prepare", "--source=jsonlx", WORKDIR)
    tokenizer = (*jsonl, "--tokenizer={dir}/t.json")
    yield row("tokenizer gone", "t.json", *tokenizer, prepare=corpus)
    for name, content in (("cut", "{"), ("list", "[]"), ("empty", ""), ("binary", b"\xff\xfe"), ("other", "{}")):
        yield row(f"tokenizer {name}", "t.json", *tokenizer, prepare=both(corpus, text("t.json", content)))
    plain = ("prepare", "--source=text", "--input={dir}/in", "--window=8", WORKDIR)
    yield row("directory x.txt", "holds no", *plain, prepare=plain_text("x.txt", None))
    yield row("AppleDouble alone", "holds no", *plain, prepare=plain_text("._x.txt", b"\x00\x05"))
    yield row("text not UTF-8", "is not UTF-8", *plain, prepare=plain_text("x.txt", b"caf\xe9 " * 99))
    yield row("tfds without languages", "data.languages is missing", "prepare", "--source=tfds", "--input=x", WORKDIR)
    yield row("synthetic name", "synthetic language 'xx'", "prepare", "--languages=xx", WORKDIR)


def both(*steps: Prepare) -> Prepare:
    def prepare(directory: pathlib.Path) -> None:
        for step in steps:
            step(directory)

    return prepare


# Fits and tables -----------------------------------------------------------------------------------------------------


def edited(change: Callable[[dict], object]) -> Prepare:
    """A study's workdir whose fit somebody has edited."""

    def prepare(directory: pathlib.Path) -> None:
        shutil.copytree(RESULTS / "quickstart", directory / "study", ignore=shutil.ignore_patterns("figures"))
        path = directory / "study" / "fit.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return prepare


def broken(name: str, content: str | bytes) -> Prepare:
    return both(edited(lambda _: None), text(f"study/{name}", content))


EDITS: dict[str, Callable[[dict], object]] = {
    "no law": lambda d: d.pop("joint_law"),
    "law is text": lambda d: d.update(joint_law="x"),
    "law is a list": lambda d: d.update(joint_law=[]),
    "null": lambda d: d["joint_law"]["beta"].__setitem__(0, None),
    "text for a number": lambda d: d["joint_law"]["E"].__setitem__(0, "x"),
    "language gone": lambda d: d["joint_law"]["targets"].pop(),
    "row of tau gone": lambda d: d["joint_law"]["tau"].pop(),
    "ragged tau": lambda d: d["joint_law"]["tau"][0].pop(),
    "no parameters": lambda d: d.pop("parameters"),
    "parameters are a list": lambda d: d.update(parameters=[]),
    "NaN": lambda d: d["joint_law"]["alpha"].__setitem__(0, float("nan")),
}
BYTES = {"cut": '{"parameters": {', "empty": "", "list": "[1]", "utf-16": "{}".encode("utf-16"), "binary": b"\xff\x00"}
DEEP = '{"parameters": ' + "[" * 100_000
TABLES = {
    "junk": ("a,b\n1,2\n", "column"),
    "empty": ("", "runs.csv"),
    "header alone": ("run,num_params,tokens,language,loss\n", "no"),
    "utf-16": ("run,num_params\nx,1\n".encode("utf-16"), "runs.csv"),
    "binary": (b"\x00\x01\x02\xff" * 30, "runs.csv"),
    "unclosed quote": ('run,num_params,tokens,language,loss\n"a,1,2,en,3\n', "runs.csv"),
    "text for numbers": ("run,num_params,tokens,language,loss\na,x,1e9,en,3\n", "num_params"),
    "negative loss": ("run,num_params,tokens,language,loss\na,1e6,1e9,en,-3\n", "loss"),
    "no loss": ("run,num_params,tokens,language\na,1e6,1e9,en\n", "loss"),
}


def fits() -> Iterator[Row]:
    """Fits and runs tables that no plan, fit or study can be made of."""
    mixture = ("plan", "mixture", "--fit={dir}/study", "--flops=1e13")
    for name, change in EDITS.items():
        yield row(f"fit {name}", "fit.json", *mixture, prepare=edited(change))
    for name, content in (BYTES | {"deep": DEEP}).items():
        yield row(f"fit {name}", "fit.json", *mixture, prepare=broken("fit.json", content))
        expand = ("plan", "expand", "--fit={dir}/study")
        yield row(f"capacity {name}", "capacity.json", *expand, prepare=broken("capacity.json", content))
    yield row("fit gone", "no fit at", "plan", "mixture", "--fit=nowhere", "--flops=1e18")
    yield row("runs gone", "runs", "plan", "next", "--fit=nowhere", "--language=en", "--params=1e9", "--tokens=1e10")
    for name, (content, words) in TABLES.items():
        for binary, more in (("fit", ()), ("study", ())):
            command = (binary, "--runs={dir}/runs.csv", *more, WORKDIR)
            yield row(f"runs {name}", words, *command, prepare=text("runs.csv", content))
    for binary in ("fit", "study"):
        yield row("runs gone", "nowhere.csv", binary, "--runs={dir}/nowhere.csv", WORKDIR)
        yield row("runs a directory", "{dir}", binary, "--runs={dir}", WORKDIR)
        zst = row("runs compressed", "runs.csv.zst", binary, "--runs={dir}/runs.csv.zst", WORKDIR)
        yield zst._replace(prepare=text("runs.csv.zst", b"\x28\xb5\x2f\xfd1234"))


NUMBERS = (
    ("expand", "--multiplier=nan"), ("expand", "--multiplier=inf"), ("expand", "--multiplier=0"),
    ("expand", "--multiplier=-2"), ("expand", "--multiplier=x"),
    ("crossover", "--params=nan", "--language=es"), ("crossover", "--params=-1", "--language=es"),
    ("crossover", "--params=inf", "--language=es"), ("crossover", "--params=2e9", "--language=fr"),
    ("allocate", "--flops=nan", "--language=en"), ("allocate", "--flops=0", "--language=en"),
    ("allocate", "--flops=1e18", "--language=zz"), ("allocate", "--flops=1e18", "--language=en", "--unique=en"),
    ("allocate", "--flops=1e18", "--language=en", "--unique=en:nan"),
    ("mixture", DOCUMENTATION, "--flops=nan"), ("mixture", DOCUMENTATION, "--flops=-1"),
    ("mixture", DOCUMENTATION, "--flops=1e13", "--weights=en:nan"),
    ("mixture", DOCUMENTATION, "--flops=1e13", "--weights=zz:1"),
    ("mixture", DOCUMENTATION, "--flops=1e13", "--weights=en:-1"),
    ("mixture", DOCUMENTATION, "--flops=1e13", "--unique=zz:1e9"),
    ("mixture", DOCUMENTATION, "--flops=1e13", "--unique=en:-5"),
    ("next", DOCUMENTATION, "--language=id", "--params=nan", "--tokens=1e7"),
    ("next", DOCUMENTATION, "--language=id", "--params=1e6", "--tokens=inf"),
    ("next", DOCUMENTATION, "--language=id", "--params=1e6", "--tokens=1e7", "--count=0"),
    ("transfer", "--language=zz"), ("transfer", DOCUMENTATION, "--language=zz"),
)  # fmt: skip


# The argument that is wrong.
BAD = re.compile(r"=(nan|inf|0|-\d|x|fr|zz|)$|:(nan|0|-\d+)$|=zz:|unique=en$")


def numbers() -> Iterator[Row]:
    """Numbers that are none, and languages that are not there, for each of the plans."""
    for question, *arguments in NUMBERS:
        wrong = next(filter(BAD.search, reversed(arguments)))
        language, _, number = wrong.partition("=")[2].rpartition(":")
        words = language if language == "zz" else number
        yield row(f"{question} {wrong} of {len(arguments)}", words, "plan", question, *arguments)


def ranges() -> Iterator[Row]:
    for key, values in RANGES.items():
        for value in values:
            words = "synthetic language" if value == "zz" else key.rpartition(".")[2]
            yield row(f"{key}={value[:20]}", words, "train", TRAIN, f"--config.{key}={value}", WORKDIR)
    for mixture, words in MIXTURES.items():
        yield row(f"mixture {mixture}", words, "train", TRAIN, f"--config.mixture={mixture}", WORKDIR)


ROWS = [*settings(), *ranges(), *FLAGS, *SCHEDULERS, *RUBBISH, *configs(), *places(), *texts(), *fits(), *numbers()]
NAMES = [row.name for row in ROWS]
assert len(set(NAMES)) == len(NAMES) >= 200, sorted(name for name in set(NAMES) if NAMES.count(name) > 1)


def content(directory: pathlib.Path) -> dict[str, bytes | str]:
    """All files and links below a directory."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or path.is_file())
    return {str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() for path in paths}


QUICK = ROWS[::6]  # of every kind some


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Callable[[bool], dict[str, tuple[Done, list[str]]]]:
    """What the quick rows, or the others, left by name: the binary's end, and which files it changed that were there
    before. All of them run at the first question."""

    @functools.cache
    def of(quick: bool) -> dict[str, tuple[Done, list[str]]]:
        rows = [row for row in ROWS if (row in QUICK) == quick]
        commands, before = [], []
        for row in rows:
            directory = tmp_path_factory.mktemp("row")
            if row.prepare:
                row.prepare(directory)
            arguments = (argument.replace("{dir}", str(directory)) for argument in row.command[1:])
            commands.append([*row.environment, f"experiments.{row.command[0]}", *arguments])
            before.append(content(directory))
        done = run_binaries(*commands)
        changed = [[path for path in files if content_of(path) != files[path]] for files in before]
        return {row.name: both for row, *both in zip(rows, done, changed, strict=True)}

    return of


def content_of(path: str) -> bytes | str | None:
    if os.path.islink(path):
        return os.readlink(path)
    return pathlib.Path(path).read_bytes() if os.path.exists(path) else None


CASES = [row if row in QUICK else pytest.param(row, marks=pytest.mark.thorough) for row in ROWS]


@pytest.mark.parametrize("row", CASES, ids=lambda row: row.name)
def test_one_line_names_it_and_nothing_is_lost(outcomes, row):
    done, changed = outcomes(row in QUICK)[row.name]
    assert done.returncode == 2, done.stderr[-3000:]
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and row.words.replace("{dir}", "") in line, done.stderr[-3000:]
    others = done.stderr.splitlines()[:-1]
    assert not any(other.startswith(("error: ", "Traceback")) for other in others), done.stderr[-3000:]
    assert not changed
