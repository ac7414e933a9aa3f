"""What schedulers say of a process by its environment."""

import os

from checked import UserError


def read_variable(name: str, remedy: str) -> int:
    """A whole number of the environment; raises UserError, which ends in the remedy, where it is none or not set."""
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(f"the environment has {name}={value!r}, which is no whole number; {remedy}")
    return int(value)


def parse_shard(shard: str) -> tuple[int, int]:
    """(i, n) of "i/n" (0 ≤ i < n); "" asks the scheduler's environment, and is (0, 1) where there is none.

    Raises UserError for anything else.
    """
    shard = shard or _shard_of_environment()
    try:
        index, count = (int(part) for part in shard.split("/"))
    except ValueError as error:
        raise UserError(f"--shard={shard}: give i/n with whole numbers, such as 0/4") from error
    if not 0 <= index < count:
        raise UserError(f"--shard={shard}: i must lie in 0 … n−1")
    return index, count


def _shard_of_environment() -> str:
    remedy = "give --shard=i/n"
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        names = (f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT"))
        task, first, last, step, count = (read_variable(name, remedy) for name in names)
        # Of a list, or of one task that is repeated, SLURM does not tell the whole that this is a part of.
        if count == 1 or (last - first) // step + 1 != count:
            raise UserError(f"array task {task} is one of a list: say of how many, as --shard={task}/n, counted from 0")
        return f"{(task - first) // step}/{count}"
    if "JOB_COMPLETION_INDEX" in os.environ:
        # Kubernetes sets the first itself and leaves the second to the job.
        return "/".join(str(read_variable(name, remedy)) for name in ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"))
    return "0/1"
