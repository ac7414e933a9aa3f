import collections
import importlib
import pathlib

import pytest

from atlas.training import RunConfig, run_id, sweep
from models.config import count_params

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text())
SWEEPS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if "def get_sweep" in path.read_text())


def load(name: str):
    return importlib.import_module(f"configs.{name}")


@pytest.mark.parametrize("name", NAMES)
def test_config_is_valid_and_says_how_it_is_run(name):
    module = load(name)
    module.get_config().validate()
    assert f"--config=configs/{name}.py" in module.__doc__


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_lists_different_valid_runs(name):
    module = load(name)
    sweep.check_ids(module.get_sweep(module.get_config()))


def paper() -> list[RunConfig]:
    module = load("atlas_paper")
    return module.get_sweep(module.get_config())


def test_paper_has_774_runs_in_its_nine_groups():
    """140 + 20 + 70 + 50 + 90 + 150 + 120 + 50 + 84, arXiv 2510.22037 Table B.1."""
    counts = collections.Counter(config.group for config in paper())
    assert list(counts.values()) == [140, 20, 70, 50, 90, 150, 120, 50, 84]
    assert sum(counts.values()) == 774


def test_paper_finetunes_continue_runs_of_their_own_size():
    runs = {run_id(config): config for config in paper()}
    finetunes = [config for config in runs.values() if config.initialize]
    assert len(finetunes) == 134
    for config in finetunes:
        parent = runs[config.initialize]
        assert parent.mixture.startswith("unimax")
        assert count_params(parent.model) == count_params(config.model)


def test_paper_trains_as_published():
    by_scale = {config.name: config for config in paper()}
    assert count_params(by_scale["unimax-34"].model)["total"] == 2_034_422_912
    assert [by_scale[f"unimax-{scale}"].train.batch_size for scale in (4, 8, 28, 34)] == [
        256,
        256,
        1024,
        2048,
    ]
    assert by_scale["monolingual-0"].data.languages == ("yo",)
