"""Training: mesh and sharding, the train step, the loop, checkpoints, metrics, evaluation, sweeps."""

from atlas.training.config import MeshConfig, RunConfig, TrainConfig, run_id, vary
from atlas.training.loop import load_model, train
from atlas.training.mesh import initialize_distributed, make_mesh
from atlas.training.sweep import SweepConfig, run_sweep, runs_table, status

__all__ = [
    "MeshConfig",
    "RunConfig",
    "SweepConfig",
    "TrainConfig",
    "initialize_distributed",
    "load_model",
    "make_mesh",
    "run_id",
    "run_sweep",
    "runs_table",
    "status",
    "train",
    "vary",
]
