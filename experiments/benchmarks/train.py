"""The training step on one core, against a plain PyTorch decoder of the same parameters.

The peer (`torch_decoder`, extra `peers`) has the shapes, loss, clipping, AdamW and schedule of our dense decoder, and
begins with its parameters: `loss_gap` is how far the losses of the two are apart at most, in nats a token, over the
first steps. The sparse kinds are compared with it, too, though its attention is dense. Both sides have one thread on
one core and take turns.

  size                      width and layers of byte-level decoders, batches of 16 windows of 128 tokens
  milliseconds, cpu_ms      of a step, medians over the rounds
  tokens_per_cpu_second     of the median
  ratio                     the peer's CPU time over ours, median over the rounds; low, high: the least and the largest
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from atlas.data import DataConfig
from atlas.data.tokenizers import ByteTokenizer
from atlas.training import RunConfig, TrainConfig
from atlas.training.config import MeshConfig, shape_of
from atlas.training.mesh import make_mesh
from atlas.training.program import program_of
from atlas.training.step import NO_COOLDOWN
from checked import UserError
from configs.design import decoder
from experiments.benchmarks.timing import seconds
from models import count_params

SIZES = ((32, 2), (64, 3), (128, 5))
KINDS = ("dense", "gated", "gated_sparse")
_BATCH, _WINDOW = 16, 128
_ROUNDS, _STEPS, _WARM = 10, 5, 10
_PEER = "torch"

Step = Callable[[np.ndarray], float]  # tokens [B, T+1] → the loss before the update


def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows by size and kind; see the module.

    Raises:
      UserError: torch is not installed.
    """
    try:
        from experiments.benchmarks.torch_decoder import VERSION
    except ImportError as error:
        raise UserError("--suite=train needs torch: pip install -e '.[peers]'") from error
    # Threads are counted when a process starts to compute, and cores where it may run.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=_on_one_core) as pool:
        rows = [row for size in tqdm(SIZES, desc="sizes") for row in pool.submit(compare, size).result()]
    facts = {"batch": _BATCH, "window": _WINDOW, "rounds": _ROUNDS, "steps_a_round": _STEPS, "threads": 1}
    return rows, facts | {"peer": f"torch {VERSION}"}


def compare(size: tuple[int, int], kinds: Sequence[str] = KINDS, rounds: int = _ROUNDS) -> list[dict[str, Any]]:
    """Rows of one size: the peer, then each kind of ours."""
    from experiments.benchmarks.torch_decoder import TorchTraining

    batches = np.random.default_rng(0).integers(0, 256, (_WARM, _BATCH, _WINDOW + 1)).astype(np.int32)
    ours = {kind: _Ours(size, kind) for kind in kinds}
    config = ours["dense"].config
    peer = TorchTraining(config.model, config.train, _WINDOW, ours["dense"].params())
    steps: dict[str, Step] = {_PEER: peer.step} | {kind: one.step for kind, one in ours.items()}
    losses = {name: [step(tokens) for tokens in batches] for name, step in steps.items()}
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(lambda step=step: [step(tokens) for tokens in batches[:_STEPS]]))
    counts = {_PEER: peer.count()} | {kind: count_params(one.config.model)["total"] for kind, one in ours.items()}
    rows = []
    for name, of_rounds in times.items():
        cpu_R, wall_R = np.array(of_rounds).T / _STEPS
        ratio_R = np.array(times[_PEER])[:, 0] / _STEPS / cpu_R
        row = {"size": f"{size[0]}x{size[1]}", "path": name, "params": counts[name]}
        row |= {"milliseconds": 1e3 * np.median(wall_R), "cpu_ms": 1e3 * np.median(cpu_R)}
        row |= {"tokens_per_cpu_second": _BATCH * _WINDOW / np.median(cpu_R)}
        row |= {"ratio": np.median(ratio_R), "low": ratio_R.min(), "high": ratio_R.max()}
        gap = np.abs(np.subtract(losses[name], losses[_PEER])).max() if name == "dense" else None
        rows.append(row | {"loss_gap": gap})
    return rows


class _Ours:
    """A run of ours, as `experiments.train` trains it."""

    def __init__(self, size: tuple[int, int], kind: str):
        model = dataclasses.replace(decoder(size, _WINDOW, kind), vocab_size=ByteTokenizer.vocab_size)
        train = TrainConfig(batch_size=_BATCH)
        self.config = RunConfig(model=model, data=DataConfig(window=_WINDOW), train=train)
        ids = (ByteTokenizer.separator, ByteTokenizer.padding, ByteTokenizer.vocab_size)
        self._program = program_of(shape_of(self.config), ids, 1, 1, make_mesh(MeshConfig()))
        self._state = self._program.init(jnp.zeros(1, jnp.int32))

    def params(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(a[0]) for name, a in self._state.params.items()}

    def step(self, tokens_BS: np.ndarray) -> float:
        language_RB = jnp.zeros((1, len(tokens_BS)), jnp.int32)
        self._state, metrics = self._program.step(self._state, jnp.asarray(tokens_BS[None]), language_RB, NO_COOLDOWN)
        return float(metrics["loss"][0])


def _on_one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    jax.config.update("jax_platforms", "cpu")
