"""Training: mesh and sharding, the train step, the loop, checkpoints, metrics, evaluation, sweeps."""

from atlas.training.config import MeshConfig, RunConfig, TrainConfig, run_id
from atlas.training.finished import load_model
from atlas.training.loop import train
from atlas.training.mesh import initialize_distributed, make_mesh
from atlas.training.overlays import Study, align, chain, cross, each
from atlas.training.sweep import check_runs, populations, run_sweep, runs_table, status

__all__ = [
    "MeshConfig",
    "RunConfig",
    "Study",
    "TrainConfig",
    "align",
    "chain",
    "check_runs",
    "cross",
    "each",
    "initialize_distributed",
    "load_model",
    "make_mesh",
    "populations",
    "run_id",
    "run_sweep",
    "runs_table",
    "status",
    "train",
]
