"""What a program costs, read from what is about to run: FLOPs from the jaxpr, bytes from the compiled text.

XLA's own analysis counts the body of a loop once; here loops count by their length.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

_SHAPE = re.compile(r"\b(pred|(?:s|u|f|bf|c)(\d+)\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
# Instructions that name bytes which another one has moved.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}$")
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=\d+ line=(\d+)")
_NAME = re.compile(r'^(\d+) "(.*)"$')


class Instruction(NamedTuple):
    """One line of compiled text; `times`: how often a step runs it. bytes: of its result."""

    opcode: str
    bytes: int
    operands: tuple[str, ...]
    text: str
    times: int
    in_fusion: bool


def flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products in a (closed) jaxpr, over all devices; a loop of unknown length counts once."""
    return sum(map(_flops_of, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def _flops_of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contract)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    inner = [flops(part) for value in params.values() for part in _jaxprs(value)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    if name == "shard_map":
        # Versions of JAX name the parameter differently.
        axes = next(value for key, value in params.items() if key.endswith("manual_axes"))
        return math.prod(params["mesh"].shape[axis] for axis in axes) * sum(inner)
    return max(inner, default=0.0) if name == "cond" else sum(inner)


def _jaxprs(value: Any) -> Iterator[Any]:
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)


class Text:
    """A compiled program as XLA prints it, for one device."""

    def __init__(self, text: str):
        self._lines = text.splitlines()
        self.instructions = list(self._read())

    def collectives(self) -> dict[str, dict[str, float]]:
        """By kind of collective, how many a step runs, and the bytes that a device receives for them."""
        found: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "bytes": 0.0})
        for i in self.instructions:
            kind = i.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                found[kind]["count"] += i.times
                found[kind]["bytes"] += i.times * _received(kind, i)
        return dict(found)

    def traffic(self) -> float:
        """Bytes that instructions read from and write to memory: operands and results of what is not fused."""
        sizes = {name: i.bytes for name, i in self._named.items()}
        moved = (i for i in self.instructions if not i.in_fusion and i.opcode not in _FREE)
        return float(sum(i.times * (i.bytes + sum(sizes.get(name, 0) for name in i.operands)) for i in moved))

    def largest(self, count: int = 5) -> list[dict[str, Any]]:
        """The largest results that are no arguments: bytes, shape, and the code they come from."""
        made = [i for i in self.instructions if not i.in_fusion and i.opcode not in _FREE]
        rows: dict[tuple[int, str], dict[str, Any]] = {}
        for i in sorted(made, key=lambda i: -i.bytes):
            shape = ", ".join(dict.fromkeys(m[0] for m in _SHAPE.finditer(i.text.partition(f" {i.opcode}(")[0])))
            row = {"bytes": i.bytes, "shape": shape, "code": self._code(i.text)}
            rows.setdefault((i.bytes, row["code"]), row)
            if len(rows) == count:
                break
        return list(rows.values())

    def _read(self) -> Iterator[Instruction]:
        computations: dict[str, list[re.Match]] = {}
        current, entry = [], ""
        for line in self._lines:
            if match := _COMPUTATION.match(line):
                current = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
            elif match := _INSTRUCTION.match(line):
                current.append(match)
        times, fused, self._named = _times(computations, entry), _fused(computations), {}
        for name, matches in computations.items():
            for match in matches:
                operands = tuple(re.findall(r"%([\w.\-]+)", match[4].partition("), ")[0]))
                size = _largest_element(match[2]) if match[3].endswith("-start") else _bytes(match[2])
                text = match.string.strip()
                self._named[match[1]] = i = Instruction(match[3], size, operands, text, times[name], name in fused)
                yield i

    def _code(self, text: str) -> str:
        """`file:line (operation)` of this project if the instruction has it, else of whatever asked for it."""
        operation = re.search(r'op_name="([^"]*)"', text)
        name = "/".join(operation[1].split("/")[-2:]) if operation else "compiler"
        frame = re.search(r"stack_frame_id=(\d+)", text)
        places, at = [], int(frame[1]) if frame else 0
        while at in self._frames:
            location, parent = self._frames[at]
            places.append(self._places[location])
            at = parent if parent != at else 0
        own = [place for place in places if re.match(r"(models|atlas|experiments)/", place)]
        return f"{(own or places or ['?'])[0]} ({name})"

    @functools.cached_property
    def _frames(self) -> dict[int, tuple[int, int]]:
        return {int(m[1]): (int(m[2]), int(m[3])) for m in map(_FRAME.match, self._lines) if m}

    @functools.cached_property
    def _places(self) -> dict[int, str]:
        start = self._lines.index("FileNames") + 1 if "FileNames" in self._lines else 0
        names = {}
        for match in map(_NAME.match, self._lines[start:]):
            if not match:
                break
            names[int(match[1])] = re.sub(r".*/((?:models|atlas|experiments)/)", r"\1", match[2])
        found = (m for m in map(_LOCATION.match, self._lines) if m)
        return {int(m[1]): f"{names.get(int(m[2]), '?')}:{m[3]}" for m in found}


def _times(computations: dict[str, list[re.Match]], entry: str) -> Counter:
    """How often each computation runs; a loop of unknown length counts once."""
    times: Counter = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for match in computations.get(name, ()):
            trips = _trips(match[4], computations) if match[3] == "while" else 1
            for called in _called(match[4]):
                visit(called, count * trips)

    visit(entry, 1)
    return times


def _trips(rest: str, computations: dict[str, list[re.Match]]) -> int:
    """How often a loop runs: as XLA says it, or, where it does not (TPUs), the number that its condition compares with;
    1 where that has no number, or several."""
    if known := _TRIPS.search(rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    lines = computations.get(condition[1], ()) if condition else ()
    limits = [m[4].partition(")")[0] for m in lines if m[3] == "constant" and m[2].startswith("s32[]")]
    return int(limits[0]) if len(limits) == 1 else 1


def _called(rest: str) -> Iterator[str]:
    for match in _CALLED.finditer(rest):
        yield from [match[1]] if match[1] else re.findall(r"[\w.\-]+", match[2])


def _fused(computations: dict[str, list[re.Match]]) -> set[str]:
    """Computations whose results stay on the chip."""
    inner = {"fusion", "reduce", "map", "sort", "scatter", "reduce-window", "custom-call", *_COLLECTIVES}
    lines = (match for matches in computations.values() for match in matches)
    return {name for match in lines if match[3].removesuffix("-start") in inner for name in _called(match[4])}


def _elements(shape: str) -> list[int]:
    sizes = ((m[1], m[2], m[3]) for m in _SHAPE.finditer(shape))
    return [int(bits or 8) * math.prod(map(int, filter(None, dims.split(",")))) // 8 for _, bits, dims in sizes]


def _bytes(shape: str) -> int:
    return sum(_elements(shape))


def _largest_element(shape: str) -> int:
    return max(_elements(shape), default=0)


def _received(kind: str, i: Instruction) -> float:
    """Bytes that a device receives, the best that rings do."""
    groups = _GROUPS.search(i.text)
    n = len(groups[1].split(",")) if groups and groups[1] else int(groups[2]) if groups else jax.device_count()
    if kind == "collective-permute":
        return i.bytes
    if kind == "reduce-scatter":
        return i.bytes * (n - 1)
    return i.bytes * (n - 1) / n * (2 if kind == "all-reduce" else 1)
