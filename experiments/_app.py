"""What every binary shares: one-line errors, exit codes, the config flag."""

import dataclasses
import errno
import importlib.util
import logging as python_logging
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from atlas.errors import UserError, unknown

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run(main: Callable[[Sequence[str]], object], *, resumes: bool = False) -> None:
    """Runs `main` under absl: a user's mistake is one line and exit code 2, an interruption exit code 130.

    resumes: whether the same command continues an interrupted one, which is then said.
    """

    def guarded(argv: Sequence[str]) -> None:
        # absl's default of INFO shows every library's chatter between our own lines.
        logging.set_verbosity(logging.WARNING)
        python_logging.getLogger().setLevel(python_logging.WARNING)
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            main(argv)
        except UserError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _fail(f"no space left on the disk that holds {error.filename or '--workdir'}; free some and run again")
        except KeyboardInterrupt:
            then = "; the same command continues where it stopped" if resumes else ""
            print(f"interrupted{then}", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)

    app.run(guarded, flags_parser=_parse_flags)


def define_config() -> flags.FlagHolder:
    """Defines `--config=FILE.py` with `--config.<key>=<value>` overrides; call at import, read `.value` in main."""
    return config_flags.DEFINE_config_file("config", None, "config file that defines get_config()")


def config_module(holder: flags.FlagHolder) -> ModuleType:
    """The module of the file that `--config` names, to reach its `get_sweep` beside the config."""
    return _load(config_flags.get_config_filename(flags.FLAGS[holder.name]))


def require(**values: Any) -> None:
    """Raises for the first flag without a value."""
    for name, value in values.items():
        if value in (None, ""):
            raise UserError(f"--{name} is missing; give --{name}=…, see --help")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        _check_overrides(argv)
        rest = flags.FLAGS(list(argv))
    except (UserError, flags.Error) as error:
        _fail(str(error))
    except SystemExit:
        # Only the help flags exit here, and absl's code for having helped is 1.
        sys.exit(0)
    return rest


def _check_overrides(argv: Sequence[str]) -> None:
    """Refuses a missing config file and unknown keys, with the nearest valid name: ml_collections shows a traceback."""
    path = next((match[1] for argument in argv if (match := re.fullmatch(r"--?config=(.*)", argument))), None)
    if path is None:
        return
    config = _load(path).get_config()
    for argument in argv:
        if match := re.match(r"--?config\.([\w.]+)", argument):
            _check_key(config, match[1])


def _check_key(config: Any, key: str) -> None:
    for part in key.split("."):
        names = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
        if part not in names:
            raise unknown(f"part of the config key {key!r}:", part, names)
        config = getattr(config, part)


def _load(path: str) -> ModuleType:
    file = pathlib.Path(path.split(":")[0])
    if not file.is_file():
        near = unknown("config file", path, [str(p) for p in sorted(file.parent.glob("*.py")) if p.stem != "__init__"])
        raise near
    spec = importlib.util.spec_from_file_location(f"configs.{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} defines no get_config(); a config file must")
    return module
