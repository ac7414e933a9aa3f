"""How a person runs ATLAS: short absl binaries without logic of their own."""

import os
import signal
import sys


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


# `python -m experiments.<name>` imports for seconds before `_app.run` takes over, and has nothing to save till then.
if sys.argv[0] == "-m":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _leave)
