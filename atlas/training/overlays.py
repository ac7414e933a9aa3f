"""Sweeps as lists of overlays: mappings from dotted settings to values that vary a base run.

>>> small, large = {"name": "small", "model.layers": 2}, {"name": "large", "model.layers": 4}
>>> languages = [{"name": "one"} | overlay for overlay in each("mixture", ["a1", "b1"])]
>>> study = Study("A study", RunConfig(), chain(cross([small, large], languages), [{"name": "base"}]))
>>> [(run.name, run.model.layers, run.mixture) for run in study.plan][1:]
[('small-one', 2, 'b1'), ('large-one', 4, 'a1'), ('large-one', 4, 'b1'), ('base', 3, 'uniform(*)')]
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atlas.training.config import RunConfig, naming, run_id
from checked import UserError, overlay

Overlay = Mapping[str, Any]


def each(key: str, values: Iterable[Any]) -> list[Overlay]:
    """An overlay for every value of one setting."""
    return [{key: value} for value in values]


def cross(*sweeps: Sequence[Overlay]) -> list[Overlay]:
    """Every overlay of the first sweep with every one of the others; the last varies fastest. Names are joined."""
    return [_joined(parts) for parts in itertools.product(*sweeps)]


def align(*sweeps: Sequence[Overlay]) -> list[Overlay]:
    """The first overlay of each sweep, the second of each, and so on; raises ValueError for unequal lengths."""
    return [_joined(parts) for parts in zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Overlay]) -> list[Overlay]:
    """One sweep after the other."""
    return list(itertools.chain(*sweeps))


def _joined(overlays: Sequence[Overlay]) -> Overlay:
    joined: dict[str, Any] = {}
    for part in overlays:
        for key in part:
            if key in joined and key != "name":
                raise UserError(f"two parts of a sweep set {key}; leave it to one of them")
        names = [names["name"] for names in (joined, part) if "name" in names]
        joined |= dict(part) | ({"name": "-".join(names)} if names else {})
    return joined


@dataclass(frozen=True)
class Study:
    """A base run, a sweep of it, and a title.

    title: the heading of its report. overlays: one a run. population: so many runs of one shape, at most, train as one
    vmapped step.
    """

    title: str
    base: RunConfig
    overlays: Sequence[Overlay]
    population: int = 1

    @functools.cached_property
    def plan(self) -> list[RunConfig]:
        """All runs; `initialize` may name one of them. Raises UserError naming the run whose settings do not fit."""
        runs = []
        for changes in self.overlays:
            with naming(changes.get("name", self.base.name)):
                runs.append(overlay(self.base, changes))
        return runs

    @functools.cached_property
    def runs(self) -> list[RunConfig]:
        """The plan with ids in place of names in `initialize`, of several runs of a name that with the same seed.

        Raises UserError where a name is ambiguous, or an id depends on text that cannot be reached.
        """
        ids: dict[str, dict[int, list[str]]] = {}  # by name and seed, of the runs so far that others continue
        parents, runs = {run.initialize for run in self.plan}, []
        for run in self.plan:
            by_seed = ids.get(run.initialize, {})
            found = by_seed.get(run.seed) or list(itertools.chain(*by_seed.values())) or [run.initialize]
            if len(found) > 1:
                raise UserError(
                    f"initialize={run.initialize!r} names several runs of the sweep; give them different names"
                )
            runs.append(dataclasses.replace(run, initialize=found[0]))
            if run.name in parents:
                ids.setdefault(run.name, {}).setdefault(run.seed, []).append(run_id(runs[-1]))
        return runs

    def check_overrides(self, keys: Iterable[str]) -> None:
        """Raises UserError for the first setting, changed on the base by a user, that the sweep itself varies."""
        for key in keys:
            count = sum(any(f"{key}.".startswith(f"{varied}.") for varied in changes) for changes in self.overlays)
            if count:
                raise UserError(
                    f"{key} is varied by the sweep itself, in {count} of its {len(self.overlays)} runs, "
                    "so it cannot be set for all: leave it out, or change get_sweep() of the config file"
                )
