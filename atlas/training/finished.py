"""Finished runs: `done.json` lists what a run has left, and is verified before it is believed."""

import pathlib
from typing import Any

from atlas.training.step import Arrays
from checked import UserError
from checked.files import digest_of_file, read_json, write_sealed
from models import ModelConfig
from models.run import DONE, MODEL, compare, left_by, load_arrays, model_config

CONFIG, METRICS, EVALUATIONS = "config.json", "metrics.jsonl", "evaluations.jsonl"


def mark(directory: pathlib.Path, facts: dict[str, Any]) -> None:
    """Marks the run of a directory as done: facts, and size and SHA-256 of all files that it leaves."""
    model = (path.relative_to(directory).as_posix() for path in (directory / MODEL).rglob("*") if path.is_file())
    paths = {name: directory / name for name in (CONFIG, METRICS, EVALUATIONS, *sorted(model))}
    files = {name: [path.stat().st_size, digest_of_file(path)] for name, path in paths.items()}
    write_sealed(directory / DONE, facts | {"files": files})


def is_done(directory: pathlib.Path) -> bool:
    """Whether a run is complete: what its `done.json` lists is there.

    Raises UserError for a file that is not as it was left. Of the model only sizes are looked at: its content is
    verified where it is loaded.
    """
    if not (directory / DONE).exists():
        return False
    files = left_by(directory)
    if not all((directory / name).is_file() for name in files):
        return False
    for name, left in files.items():
        compare(directory / name, left[: 1 if name.startswith(f"{MODEL}/") else 2])
    return True


def load_model(workdir: pathlib.Path, name: str) -> dict[str, Arrays]:
    """The final parameters and buffers of a run, as {"params": …, "buffers": …} of arrays without the run axis.

    Raises UserError where the run has no model, or one that is not as training left it.
    """
    return {"params": {}, "buffers": {}} | load_arrays(_trained(workdir, name))


def load_model_config(workdir: pathlib.Path, name: str) -> ModelConfig:
    """What a trained run's model was made of."""
    directory = _trained(workdir, name)
    compare(directory / CONFIG, left_by(directory)[CONFIG])
    return model_config(directory)


def describe(directory: pathlib.Path) -> dict[str, Any]:
    """The `config.json` of a run, as training wrote it."""
    return read_json(directory / CONFIG, "description of a run", "delete it, and run the sweep again")


def _trained(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """The directory of a run that has a model; UserError where there is none."""
    directory = workdir / "runs" / name
    if not (directory / DONE).exists():
        done = sorted(path.parent.name for path in (workdir / "runs").glob(f"*/{DONE}"))
        raise UserError(
            f"run {name!r} has no trained model in {workdir}; train it first (trained: {', '.join(done) or 'none'})"
        )
    return directory
