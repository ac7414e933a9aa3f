"""What holds for the project as a whole: arrows between its rooms, and its doctests."""

import ast
import pathlib
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What each room may import of the others.
ARROWS = {
    "checked": set(),
    "models": set(),
    "atlas.scaling": set(),
    "atlas.data": set(),
    "atlas.report": {"atlas.scaling"},
    "atlas.training": {"models", "atlas.data"},
    "atlas.studies": {"models", "atlas.data", "atlas.training", "atlas.report", "atlas.scaling"},
}
GROUND = "checked"  # below all rooms


def room_of(module: str) -> str:
    return ".".join(module.split(".")[: 2 if module.startswith("atlas.") else 1])


def imported_rooms(room: str) -> dict[str, pathlib.Path]:
    found = {}
    for file in (ROOT / room.replace(".", "/")).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"atlas.{a.name}" for a in node.names] if node.module == "atlas" else [node.module]
            found |= {
                room_of(name): file
                for name in names
                if name.split(".")[0] in (GROUND, "atlas", "models", "experiments")
            }
    return found


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_run_one_way(room):
    allowed = ARROWS[room] | {room, GROUND}
    assert {other: file for other, file in imported_rooms(room).items() if other not in allowed} == {}


def test_doctests_of_the_packages_are_collected():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--doctest-modules" in options["addopts"]
    assert {"tests", "checked", "atlas", "models", "configs"} <= set(options["testpaths"])
