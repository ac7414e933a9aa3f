import json
import pathlib

import pytest

from models.config import ATTENTION_NAMES

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "experiments" / "notebooks").glob("*.ipynb"))

# What a notebook must have found, beside running.
CHECKS = {
    "from_runs_to_plan": lambda found: _equal(len(found["plan"].table), len(found["fit"].sources)),
    "train_and_extend": lambda found: _equal(sorted(found["curves"]), ["alibi", "dense"]),
    "writing": lambda found: _equal(found["again"].texts, found["plain"].texts),
}


def _equal(found, expected):
    assert found == expected


@pytest.mark.thorough
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    cells = json.loads(path.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sources
    namespace: dict = {}
    names = list(ATTENTION_NAMES)
    for source in sources:
        exec(compile(source, path.name, "exec"), namespace)
    ATTENTION_NAMES[:] = names
    CHECKS[path.stem](namespace)
