import os
import subprocess
import sys

import pytest

from tests.experiments.binaries import host_devices
from tests.models.attention.sharded import KERNELS, VARIANTS

QUICK = ["tiles", "blocks", "kernel"]


@pytest.mark.parametrize(
    "variants",
    [QUICK, pytest.param([name for name in VARIANTS | KERNELS if name not in QUICK], marks=pytest.mark.thorough)],
)
def test_eight_devices_give_the_results_of_one(variants):
    command = [sys.executable, "-m", "tests.models.attention.sharded", *variants]
    done = subprocess.run(command, env=os.environ | host_devices(8), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"equal: {name}" for name in variants]
