"""What one training run is: typed configs, their identity, and how a sweep varies them."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from atlas.data import DataConfig
from atlas.errors import UserError, unknown
from models import ModelConfig


@dataclass
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) takes what the others leave."""

    run: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


TRAINED = ("all", "indexer")


@dataclass
class TrainConfig:
    """How a run trains: AdamW on a warmup–stable–decay schedule whose decays are branches off one trunk.

    Every entry of `steps` is the end of one cooldown branch, so one trunk of constant learning rate serves several
    numbers of training tokens D = steps × batch_size × window.
    """

    batch_size: int = 16  # windows a step, over all devices
    steps: tuple[int, ...] = (500,)  # ends of the cooldown branches, ascending
    warmup_steps: int = 20
    cooldown_fraction: float = 0.2  # share of a branch's steps in its linear decay to 0
    learning_rate: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0
    indexer_learning_rate_multiplier: float = 1.0
    trained: str = "all"  # or "indexer": all else stands still; with k of a whole window it is the dense warm-up
    evaluation_windows: int = 64  # validation windows a language, at most
    evaluate_every: int = 0  # steps between evaluations of the trunk; 0: only the branches' ends
    checkpoint_every: int = 0  # steps between checkpoints; 0: only where branches begin

    def validate(self) -> None:
        """Raises UserError naming the first field that cannot be trained with."""
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise UserError(f"train.steps={self.steps}: give one or more ascending positive numbers of steps")
        if not 0 <= self.cooldown_fraction < 1:
            raise UserError(f"train.cooldown_fraction={self.cooldown_fraction}: must lie in [0, 1)")
        if self.trained not in TRAINED:
            raise unknown("train.trained", self.trained, TRAINED)
        for name in ("batch_size", "learning_rate", "clip_norm", "evaluation_windows"):
            if getattr(self, name) <= 0:
                raise UserError(f"train.{name}={getattr(self, name)}: must be positive")

    def branch_step(self, end: int) -> int:
        """The trunk's step at which the branch that ends at `end` begins to cool down."""
        return end - round(self.cooldown_fraction * end)

    @property
    def planned_steps(self) -> int:
        """Steps of the trunk and all its branches.

        >>> TrainConfig(steps=(100, 200), cooldown_fraction=0.2).planned_steps
        220
        """
        branches = [end - self.branch_step(end) for end in self.steps]
        return self.branch_step(self.steps[-1]) + sum(branches)


@dataclass
class RunConfig:
    """One run: which text, in which mixture, into which model, how."""

    name: str = "run"
    group: str = ""  # label in listings
    seed: int = 0  # initial parameters and data order
    mixture: str = "uniform(*)"  # see atlas.data.mixtures.parse
    initialize: str = ""  # run id whose final parameters this run continues from, with a fresh schedule
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def validate(self) -> None:
        """Raises UserError for the first field that is wrong."""
        try:
            self.data.validate()
            self.model.validate()
        except ValueError as error:
            raise UserError(str(error)) from error
        self.train.validate()


# What changes neither the numbers of a run nor its place in a study.
_NOT_IDENTITY = ("group", "mesh")
# Fields younger than the first runs: at their defaults they are left out, so that finished runs keep their ids.
_YOUNGER = {
    "data": ("tasks",),
    "model": ("architecture", "selection", "block", "query_chunk"),
    "train": ("trained",),
}


def run_id(config: RunConfig) -> str:
    """A stable name: the run's name and a hash of everything that determines its result.

    >>> run_id(RunConfig(name="a")) == run_id(RunConfig(name="a", mesh=MeshConfig(data=8)))
    True
    >>> run_id(RunConfig(seed=1)) == run_id(RunConfig(seed=2))
    False
    """
    identity = dataclasses.asdict(config)
    for key in _NOT_IDENTITY:
        del identity[key]
    del identity["train"]["checkpoint_every"]
    for part, keys in _YOUNGER.items():
        default = dataclasses.asdict(type(getattr(config, part))())
        for key in keys:
            if identity[part][key] == default[key]:
                del identity[part][key]
    return f"{config.name}-{digest_of(identity)}"


def population_name(ids: Sequence[str]) -> str:
    """The name under which runs that train together keep their checkpoints."""
    return ids[0] if len(ids) == 1 else f"population-{digest_of(list(ids))}"


def shape_key(config: RunConfig) -> str:
    """Runs with equal keys differ only in seed and mixture: they compile once and can train as one population."""
    varying = {"name": "", "group": "", "seed": 0, "mixture": "", "initialize": ""}
    return json.dumps(dataclasses.asdict(dataclasses.replace(config, **varying)), sort_keys=True)


def vary(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """A deep copy of the RunConfig part of `config` with dotted fields replaced.

    >>> vary(RunConfig(), {"seed": 3, "train.batch_size": 8}).train.batch_size
    8
    >>> vary(RunConfig(), {"train.batchsize": 8})
    Traceback (most recent call last):
    atlas.errors.UserError: unknown config key 'train.batchsize'; did you mean 'batch_size'? ...
    """
    names = [f.name for f in dataclasses.fields(RunConfig)]
    varied = RunConfig(**{name: copy.deepcopy(getattr(config, name)) for name in names})
    for key, value in changes.items():
        *parents, last = key.split(".")
        target = varied
        for parent in parents:
            target = getattr(target, parent)
        fields = [f.name for f in dataclasses.fields(target)]
        if last not in fields:
            raise unknown("config key", key, fields)
        setattr(target, last, value)
    return varied


def digest_of(value: Any) -> str:
    """Eight hexadecimal digits of a JSON value's hash."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
