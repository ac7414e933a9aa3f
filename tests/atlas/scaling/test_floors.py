"""The arrows between the rooms of atlas.scaling, read from the imports in its source: none points up, none past it."""

import ast
import pathlib

import pytest

from atlas import scaling

ROOT = pathlib.Path(__file__).parents[3]
ROOM = ROOT / "atlas" / "scaling"
# From the ground up; holdout compares laws of one language with the law of all, so it lies above both.
FLOORS = (
    ("padding", "solver", "law", "estimates", "noise", "simulation"),
    ("table",),
    ("single",),
    ("joint",),
    ("holdout", "transfer"),
    ("planning",),
)
LEVEL = {name: i for i, names in enumerate(FLOORS) for name in names}


def imported(path: pathlib.Path) -> set[str]:
    """Modules of this repository that a file imports, submodules imported by name included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if (ROOT / (name.replace(".", "/") + ".py")).exists()]
            packages = [name for name in inner if (ROOT / name.replace(".", "/") / "__init__.py").exists()]
            found |= set(modules + packages) or {node.module}
    return {name for name in found if name.split(".")[0] in ("atlas", "models", "configs", "experiments")}


def modules() -> list[pathlib.Path]:
    return [path for path in sorted(ROOM.rglob("*.py")) if path != ROOM / "__init__.py"]


def dotted(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_no_arrow_points_up(path):
    floor = LEVEL[dotted(path).split(".")[2]]
    for name in imported(path):
        parts = name.split(".")
        assert parts[:2] == ["atlas", "scaling"] or parts[:2] in (["atlas", "errors"], ["atlas", "files"]), name
        if parts[1] == "scaling":
            assert len(parts) > 2, f"{dotted(path)} imports the whole of atlas.scaling"
            assert LEVEL[parts[2]] <= floor, f"{dotted(path)} imports {name}, a floor above it"


def test_there_is_no_circle():
    edges = {dotted(path): imported(path) for path in modules()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join((*above, name))
        if name not in done:
            for child in edges.get(name, ()):
                visit(child, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_outside_imports_what_the_package_exports():
    rooms = [ROOT / name for name in ("configs", "experiments", "models", "atlas/data", "atlas/training")]
    rooms += [ROOT / "atlas" / name for name in ("report", "studies")]
    for path in (p for room in rooms for p in sorted(room.rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("atlas.scaling"):
                assert node.module == "atlas.scaling", f"{path.relative_to(ROOT)} imports {node.module}"
                names = {alias.name for alias in node.names}
                assert names <= set(scaling.__all__), f"{path.relative_to(ROOT)}: {names - set(scaling.__all__)}"
