"""What every binary shares: one-line errors, exit codes, the config."""

import contextlib
import dataclasses
import importlib.util
import inspect
import logging as python_logging
import os
import pathlib
import re
import select
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from absl import app, flags, logging

from checked import Checked, UserError, describe, leaves, overlay, read, unknown
from checked.files import check_writable, refusal_of_disk
from checked.processes import compile_lean

if TYPE_CHECKING:
    from atlas.training import Study

C = TypeVar("C", bound=Checked)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141  # as shells name the end by SIGPIPE
_SLOW = 2.0  # seconds
_WORTH_KEEPING = 0.1  # seconds of compilation; JAX's own threshold of 1 would leave out most programs of a fit


def run(
    main: Callable[[Sequence[str]], object], *, resumes: bool = False, words: bool = False, fits: bool = False
) -> None:
    """Runs `main` under absl: a user's mistake is one line and exit code 2, an interruption exit code 130.

    resumes: whether the same command continues an interrupted one, which is then said. words: whether it takes
    arguments that are no flags. fits: whether its work is fits of laws, which compile for longer than they run.
    """

    def guarded(argv: Sequence[str]) -> None:
        # absl's default of INFO shows every library's chatter between our own lines.
        logging.set_verbosity(logging.WARNING)
        python_logging.getLogger().setLevel(python_logging.WARNING)
        _hush_dropped_reads()
        said = _hear_interrupts()
        if fits:
            compile_lean()
        _keep_programs()
        if len(argv) > 1 and not words:
            _fail(f"unexpected argument {argv[1]!r}; flags are written --name=value, see --help")
        try:
            main(argv)
        except KeyboardInterrupt:
            then = "; the same command continues where it stopped" if resumes else ""
            said.wait(timeout=1)  # so that lines do not cross; it may have been raised by no signal
            print(f"interrupted{then}", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        except Exception as error:
            if reason := _mistake(error):
                _fail(reason)
            raise

    with _quiet_when_unread():
        app.run(guarded, flags_parser=_parse_flags)


@contextlib.contextmanager
def _quiet_when_unread() -> Iterator[None]:
    """Ends without a word once nobody reads what is printed any more, as behind `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # what is left would fail when the interpreter ends, where nothing can be caught
    except BrokenPipeError:
        # Pipes to other processes break too.
        if not _hung_up(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_UNREAD)


def _hung_up(descriptor: int) -> bool:
    """Whether the reading end of a pipe is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)  # of errors and hang-ups it tells unasked
    return bool(poll.poll(0))


def _keep_programs() -> None:
    """Keeps compiled programs in the user's cache directory, for the next process.

    JAX_COMPILATION_CACHE_DIR names another place, and nowhere where it is empty.
    """
    import jax  # takes a second, which --help need not wait for

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "atlas" / "programs"))
    jax.config.update("jax_numpy_rank_promotion", "allow")  # what we compute broadcasts by design
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


def _hush_dropped_reads() -> None:
    """Drops what the other arrays of a damaged checkpoint say, which Orbax was reading beside it and gave up."""
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        coroutine = getattr(unraisable.object, "cr_code", None)
        of_orbax = coroutine is not None and "orbax" in coroutine.co_filename
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook
    python_logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())


def _mistake(error: Exception) -> str:
    """What a user can mend about an error, in words; nothing where it is a fault of ours."""
    if isinstance(error, UserError):
        return str(error)
    if refusal := refusal_of_disk(error):
        return f"{refusal}; give the work directory room, or another place, and run the same command again"
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    reason = str(error).partition("\n")[0]
    if isinstance(error, AssertionError) and raised_in.endswith("xla_bridge.py"):  # as JAX says it of unknown names
        reason = f"Unable to initialize backend {os.environ.get('JAX_PLATFORMS')!r}: nothing that is installed knows it"
    if "initialize backend" in reason:
        return f"{reason}; install its extra (.[cuda], .[tpu]), or set JAX_PLATFORMS=cpu"
    return ""


def _hear_interrupts() -> threading.Event:
    """Lets SIGINT and SIGTERM raise KeyboardInterrupt, and says at once that one was heard; the next ends all.

    The event is set when it has been said.

    Python obeys a signal between two of its instructions: a compilation is one for many seconds.
    """
    said = threading.Event()
    heard, wake = os.pipe()
    os.set_blocking(wake, False)

    def listen() -> None:
        numbers = (signal.SIGINT, signal.SIGTERM)
        while os.read(heard, 1)[0] not in numbers:
            pass
        print("\ninterrupted: stops after what it is at; once more stops at once", file=sys.stderr, flush=True)
        said.set()
        while os.read(heard, 1)[0] not in numbers:
            pass
        os._exit(EXIT_INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    return said


class Config:
    """What `--config=FILE.py[:argument]` and `--config.<key>=<value>` say; complete once flags are parsed.

    base: the file's get_config(argument), executed once, with the user's values.
    """

    def __init__(self) -> None:
        self.base: Any = None
        self._module = ModuleType("none")
        self._overrides: dict[str, Any] = {}

    def study(self, population: int | None = None) -> "Study":
        """The file's get_sweep of the base; raises UserError where the user's values would not reach all runs."""
        require(config=self.base)
        if not hasattr(self._module, "get_sweep"):
            raise UserError(f"{self._module.__file__} defines no get_sweep(); use experiments.train for a single run")
        study = self._call("get_sweep", self.base)
        if not getattr(study, "overlays", None):
            raise UserError(f"{self._module.__file__}: get_sweep() gives no runs; it must give a Study that has some")
        study.check_overrides(self._overrides)
        return dataclasses.replace(study, population=population) if population else study

    def take(self, argv: Sequence[str]) -> list[str]:
        """Reads the config out of the arguments; returns the others."""
        values, rest, arguments = {}, [], iter(argv)
        for argument in arguments:
            if not (match := _CONFIG_ARGUMENT.fullmatch(argument)):
                rest.append(argument)
                continue
            value = match["value"] if match["value"] is not None else next(arguments, "--")
            if value.startswith("--"):
                raise UserError(f"{argument} lacks its value; write {argument}=…")
            values[match["key"] or ""] = value
        if path := values.pop("", ""):
            self._load(*path.split(":", 1))
        elif values:
            raise UserError(f"--config is missing; give --config=FILE.py before --config.{next(iter(values))}")
        self._overrides = {key: read(self.base, key, text) for key, text in values.items()}
        self.base = overlay(self.base, self._overrides) if values else self.base
        return rest

    def _load(self, path: str, *argument: str) -> None:
        file = pathlib.Path(path)
        if not file.is_file():
            raise unknown("config file", path, [str(p) for p in file.parent.glob("*.py") if p.stem != "__init__"])
        spec = importlib.util.spec_from_file_location(f"configs.{file.stem}", file)
        if spec is None:
            raise UserError(f"{path} is no Python file; a config file ends in .py")
        self._module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self._module
        with _executing(path):
            spec.loader.exec_module(self._module)
        if not hasattr(self._module, "get_config"):
            raise UserError(f"{path} defines no get_config(); a config file must")
        self.base = self._call("get_config", *argument)
        if not isinstance(self.base, Checked):
            raise UserError(f"{path}: get_config() gives {type(self.base).__name__}; it must give a RunConfig")

    def _call(self, name: str, *arguments: Any) -> Any:
        """What a function of the file gives; UserError where it fails, or takes other arguments."""
        function = getattr(self._module, name)
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError as error:
            raise UserError(
                f"{self._module.__file__}: {name}{inspect.signature(function)} was given {len(arguments)} ({error}); "
                "write --config=FILE.py, and FILE.py:ARGUMENT where get_config takes one"
            ) from None
        with _executing(self._module.__file__ or ""):
            return function(*arguments)


@contextlib.contextmanager
def _executing(path: str) -> Iterator[None]:
    """Makes a UserError of whatever a config file raises, with the line that it is at."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
        at = f" line {lines[-1]}" if lines else ""
        raise UserError(f"{path}{at} cannot be executed ({type(error).__name__}: {error}); mend it") from error


_CONFIG_ARGUMENT = re.compile(r"--?config(\.(?P<key>[\w.]+))?(=(?P<value>.*))?", re.DOTALL)
_config: Config | None = None


def define_config() -> Config:
    """Defines `--config` and the overrides of its keys; call at import, use the result in main."""
    global _config
    # Only for the help: what it stands for is taken out of the arguments before absl reads them.
    text = "FILE.py[:argument] with a get_config(); --config.<key>=<value> sets a key"
    flags.DEFINE_string("config", None, text, module_name=_main())
    flags.DEFINE_bool("print_config", False, "print the whole config as flags, and do nothing", module_name=_main())
    _config = Config()
    return _config


def define_settings(config: C) -> Callable[[], C]:
    """Defines a flag for every setting of a config, which has no sections; call the result in main for their values."""
    holders = {}
    for line in describe(config):
        name, _, rest = line.partition("=")
        key = name.removeprefix(f"{config.section}.")
        holders[key] = flags.DEFINE_string(key, None, f"default {rest}", module_name=_main())
    return lambda: overlay(config, {k: read(config, k, h.value) for k, h in holders.items() if h.value is not None})


def define_processes() -> Callable[["Study"], int]:
    """Defines `--processes`, of what trains many runs; call the result in main for a study's, and before JAX starts."""
    text = (
        "processes that train side by side, each with its share of a CPU's cores; default: one a core, if runs are many"
    )
    holder = flags.DEFINE_integer("processes", None, text, lower_bound=1)

    def read_processes(study: "Study") -> int:
        from atlas.training import populations, workers  # take seconds, which other binaries need not wait for

        return holder.value or workers.usual(populations(study.runs, study.population))

    return read_processes


def define_columns() -> Callable[[], dict[str, str]]:
    """Defines `--columns`, of every binary that reads a runs table; call the result in main for what it says."""
    text = "what the table calls ours, as ours=theirs,…; theirs may be an expression: loss=val_loss,num_params=n*1e9"
    holder = flags.DEFINE_list("columns", [], text)

    def read_columns() -> dict[str, str]:
        pairs = [item.partition("=") for item in holder.value]
        for ours, _, theirs in pairs:
            if not (ours and theirs):
                raise UserError(f"--columns: {ours!r} is not ours=theirs, such as loss=val_loss")
        return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}

    return read_columns


def _main() -> str:
    """The module whose flags --help shows, as absl names it."""
    return sys.argv[0]


def command() -> str:
    """How this binary was started, for what it leaves behind."""
    return f"python -m experiments.{pathlib.Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}"


def require(**values: Any) -> None:
    """Raises for the first flag without a value."""
    for name, value in values.items():
        if value in (None, ""):
            raise UserError(f"--{name} is missing; give --{name}=…, see --help")


def check_outputs(workdir: str | None = None, json: str | None = None) -> None:
    """Raises UserError, before the work, for a directory or a file that could not be written after it."""
    if workdir:
        check_writable(pathlib.Path(workdir), directory=True)
    if json:
        check_writable(pathlib.Path(json))


@contextlib.contextmanager
def said_if_slow(text: str) -> Iterator[None]:
    """Says what is done once it has taken so long that one wonders."""
    timer = threading.Timer(_SLOW, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(_config.take(argv) if _config else list(argv))
        if _config and flags.FLAGS.print_config:
            require(config=_config.base)
    except (UserError, flags.Error) as error:
        _fail(str(error))
    except SystemExit:
        # Only the help flags exit here, and absl's code for having helped is 1.
        if _config:
            from atlas.training import RunConfig  # takes seconds, which binaries without a config need not wait for

            print("\nkeys of the config, with their values:")
            print(*(f"  --config.{line}" for line in describe(_config.base or RunConfig())), sep="\n")
        sys.exit(0)
    if _config and flags.FLAGS.print_config:
        for name, value in leaves(_config.base).items():
            print(shlex.quote(f"--config.{name}={value if isinstance(value, str) else repr(value)}"))
        sys.exit(0)
    return rest
