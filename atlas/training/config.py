"""What one training run is: frozen settings and their identity."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from atlas.data import DataConfig, fingerprint
from checked import Checked, UserError, field, leaves
from models import ModelConfig
from models.config import ATTENTION_KINDS


@dataclass(frozen=True)
class MeshConfig(Checked, section="mesh"):
    """Devices along each mesh axis; -1 (at most once) takes what the others leave."""

    run: int = field(1, "over the runs of a population", unit="devices", least=-1)
    data: int = field(-1, "over the windows of a batch", unit="devices", least=-1)
    fsdp: int = field(1, "over the windows of a batch and the parameters", unit="devices", least=-1)
    context: int = field(1, "over the tokens of a window and the parameters", unit="devices", least=-1)
    tensor: int = field(1, "over heads, feed-forward width and vocabulary", unit="devices", least=-1)

    def check(self) -> None:
        sizes = {name: getattr(self, name) for name in ("run", "data", "fsdp", "context", "tensor")}
        for name, size in sizes.items():
            self.require(size != 0, name, "must be positive, or -1 for the rest")
            self.require(size > 0 or list(sizes.values()).count(-1) == 1, name, "can be -1 for one axis only")


@dataclass(frozen=True)
class TrainConfig(Checked, section="train"):
    """How a run trains: AdamW on a warmup–stable–decay schedule whose decays are branches off one trunk.

    Every entry of `steps` is the end of one cooldown branch, so one trunk of constant learning rate serves several
    numbers of training tokens D = steps × batch_size × window.
    """

    batch_size: int = field(16, "of a step, over all devices", unit="windows", least=1)
    microbatches: int = field(
        0,
        "parts of a batch whose gradients are added up, to save memory; 0: what is quickest on one CPU, else 1",
        least=0,
    )
    steps: tuple[int, ...] = field((500,), "ends of the cooldown branches, ascending", unit="steps", least=1)
    warmup_steps: int = field(20, "linear rise of the learning rate", unit="steps", least=0)
    cooldown_fraction: float = field(0.2, "share of a branch's steps in its linear decay to 0", least=0, below=1)
    learning_rate: float = field(3e-3, "of the trunk", above=0)
    indexer_rate: float = field(1.0, "the indexer's learning rate, over that of the model", above=0)
    beta1: float = field(0.9, "decay of Adam's mean", least=0, below=1)
    beta2: float = field(0.95, "decay of Adam's mean square", least=0, below=1)
    weight_decay: float = field(0.1, "on matrices only", least=0)
    clip_norm: float = field(1.0, "of the gradient, the indexer's apart", above=0)
    most_skipped: float = field(
        0.5, "share of the steps so far that a run may skip, since loss or gradient are not finite", least=0, most=1
    )
    evaluation_windows: int = field(64, "of validation, a language, at most", unit="windows", least=1)
    evaluate_every: int = field(
        0,
        "on the trunk, of a run that continues another also at its start; 0: only where branches end",
        unit="steps",
        least=0,
    )
    checkpoint_every: int = field(0, "0: only where branches begin", unit="steps", least=0)
    sample_tokens: int = field(
        0, "that an evaluation writes behind a piece of text, to be read", unit="tokens", least=0
    )
    tensorboard: bool = field(False, "event files for TensorBoard, beside the logs")

    def check(self) -> None:
        ascending = self.steps and all(a < b for a, b in zip(self.steps, self.steps[1:], strict=False))
        self.require(bool(ascending), "steps", "must be one or more ascending numbers")

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


@dataclass(frozen=True)
class RunConfig(Checked):
    """One run: which text, in which mixture, into which model, how."""

    name: str = field("run", "the first part of its id", pattern=r"[A-Za-z0-9][\w.-]{0,99}")
    group: str = field("", "label in listings")
    seed: int = field(0, "of the initial parameters and the order of the data", least=0, below=2**31)
    mixture: str = field("uniform(*)", "shares of the languages, see atlas.data.mixtures")
    initialize: str = field(
        "", "run that this one continues with a fresh schedule: an id, or a name in the sweep", pattern=r"(\w[\w.-]*)?"
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def check(self) -> None:
        in_blocks = self.model.is_sparse and self.model.selection == "block"
        fits = not in_blocks or self.data.window % self.model.block == 0
        self.data.require(fits, "window", f"must be a multiple of model.block={self.model.block}")
        decoded = self.model.attention in ATTENTION_KINDS  # one that was added reads no cache
        needed = f"must be 0 with model.attention={self.model.attention!r}, whose models are not decoded"
        self.train.require(decoded or not self.train.sample_tokens, "sample_tokens", needed)

    @property
    def tokens(self) -> int:
        """D: training tokens of the longest branch."""
        return self.train.steps[-1] * self.train.batch_size * self.data.window


FLOPS_PER_PARAMETER_TOKEN = 6.0  # of training: C = 6·N·D

# What changes no number of a run: labels, how it is executed, and the vocabulary, which is the tokenizer's.
_NOT_IDENTITY = (
    "name", "group", "mesh.", "train.checkpoint_every", "train.microbatches", "train.tensorboard",
    "train.sample_tokens", "model.vocab_size",
    "data.",
)  # fmt: skip


@functools.cache
def run_id(config: RunConfig) -> str:
    """The run's name and a hash of all that determines its result: settings, and the content of its corpus.

    The same from any binary, and wherever the text lies; raises UserError where the text cannot be reached.

    >>> run_id(RunConfig(name="a")) == run_id(RunConfig(name="a", group="b", mesh=MeshConfig(data=8)))
    True
    >>> run_id(RunConfig(seed=1)) == run_id(RunConfig(seed=2))
    False
    """
    identity = {key: value for key, value in leaves(config).items() if not key.startswith(_NOT_IDENTITY)}
    return f"{config.name}-{digest_of(identity | {'corpus': corpus_key(config.data)})}"


# Once a process: the text of a corpus does not change under a running sweep.
corpus_key = functools.cache(fingerprint)


def population_name(ids: Sequence[str]) -> str:
    """The name under which runs that train together keep their checkpoints."""
    return ids[0] if len(ids) == 1 else f"population-{digest_of(list(ids))}"


def shape_of(config: RunConfig) -> RunConfig:
    """Runs of equal shape differ only in seed, mixture and start: they compile once and can train as one population."""
    return dataclasses.replace(config, name="run", group="", seed=0, mixture="", initialize="")


@contextlib.contextmanager
def naming(run: str) -> Iterator[None]:
    """Puts the run's name before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"run {run}: {error}") from error


def digest_of(value: Any) -> str:
    """Eight hexadecimal digits of a JSON value's hash."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
