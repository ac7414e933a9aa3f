"""Installs ATLAS: pip install . or pip install .[cuda|tpu|compile|test|peers|tensorboard|notebooks]."""

import pathlib
import re

from setuptools import find_packages, setup

INIT = pathlib.Path(__file__).parent / "atlas" / "__init__.py"

setup(
    name="atlas-scaling",
    version=re.search(r'__version__ = "(.+)"', INIT.read_text())[1],
    description="Multilingual scaling laws in JAX: train a sweep, fit the law and the transfer matrix, plan, decode.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["checked*", "atlas*", "models*", "experiments*", "configs*"]),
    package_data={
        "atlas": ["py.typed"],
        "atlas.report": ["*.css", "*.js", "*.mplstyle"],
        "checked": ["py.typed"],
        "models": ["*.csv", "py.typed"],
        "experiments.benchmarks": ["*.csv", "*.json"],
        "atlas.scaling.table.published": ["*.csv", "*.md"],
    },
    install_requires=[
        # Lower bounds; an upper cap is for a version that was seen to break something. `.ci/newest` tries the newest.
        "jax>=0.10",
        "flax>=0.12.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "numpy>=2.1",
        "fsspec>=2024.6",  # corpora on gs:// and other remote paths
        "pandas>=2.2",
        "scipy>=1.13",  # jax requires it too: quantiles of Student's t, monotone regression and interpolation
        "absl-py>=2.1",
        "grain>=0.2.15",
        "array-record>=0.8",
        "tensorflow-datasets>=4.9.9",
        "importlib-resources>=6.4",  # tensorflow-datasets uses it and does not declare it
        "tokenizers>=0.21",
        "safetensors>=0.8",  # 0.7 does not read bfloat16 into numpy
        "jinja2>=3.1",  # chat templates
        "matplotlib>=3.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "tensorboard": ["tensorboardX>=2.6"],  # writes its files; they are shown by tensorboard itself
        "cuda": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        # To compile for TPUs and GPUs that are not here: compilers alone, without NVIDIA's libraries. Beside a run on a
        # CPU libtpu complains unless JAX_PLATFORMS=cpu, so this is no part of the default.
        "compile": ["jax[tpu]>=0.10", "jax-cuda12-plugin>=0.10"],
        "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff==0.17.*", "mypy==2.4.*"],
        # What ours is compared with: off-the-shelf models, assisted generation. On Linux torch comes
        # from PyPI with CUDA, a download of 3 GB; the CPU build, 0.2 GB, is enough if it is installed first:
        # pip install "torch==2.13.*" --index-url https://download.pytorch.org/whl/cpu
        "peers": ["torch==2.13.*", "transformers==5.23.*", "lightgbm==4.*"],
        "notebooks": ["jupyterlab>=4", "nbclient>=0.10"],
    },
)
