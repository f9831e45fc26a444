"""Sweeps on a real Slurm of one node: what a job does at its end, whatever ends it; whole sweeps, to the bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, STRESS, TINY, TINY_ALGORITHM, differing_results, stress_counts
from slurm_cluster import cluster, why_unavailable

from incremental_cifar.run_files import RunFiles
from incremental_cifar.safe_files import lock_holder

reason = why_unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

BASE, CBP, DIVERGING = "base_deep_learning_system", "continual_backpropagation", "diverging"
PATIENCE = 300  # seconds, of which a machine that is not busy needs a tenth


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster for all tests of this file, as a function that runs a command there and returns what it prints."""
    folder = tmp_path_factory.mktemp("slurm")
    with cluster(folder / "cluster", cpus=16) as environment:

        def run(*command: object, check: bool = True) -> str:
            completed = subprocess.run(
                [*map(str, command)], cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE
            )
            assert not check or completed.returncode == 0, completed.stdout + completed.stderr
            return completed.stdout.strip() + completed.stderr.strip() * (not check)

        yield run


# --- slurm_job.sh, with shell commands as runs -----------------------------------------------------------------------------------

# Notes every start, and ends at the third; or when it is asked to, as our runs do.
COMMAND = """echo start >> {0}; [ "$(wc -l < {0})" -gt {1} ] && exit {2}; trap 'echo usr1 >> {0}.signals; exit 138' USR1
trap 'echo term >> {0}.signals; exit 143' TERM; for i in $(seq 3000); do sleep 0.1; done"""


class Job:
    """A job by hand. note: where its command notes its starts. status: with what it ends at the last of them."""

    def __init__(self, slurm, folder: Path, name: str, starts: int = 2, status: int = 0, *options: str):
        self.slurm, self.note = slurm, folder / name
        command = "bash", "-c", COMMAND.format(f"{self.note}-%a", starts - 1, status)
        log = f"--output={folder}/{name}.log", "--open-mode=append"
        self.id = slurm("sbatch", "--parsable", "--requeue", "--time=1", *log, *options, REPOSITORY / "slurm_job.sh", *command)

    def lines(self, task: str = "", what: str = "") -> int:
        path = Path(f"{self.note}-{task}{what}")
        return len(path.read_text().splitlines()) if path.exists() else 0

    def states(self) -> list[str]:
        return self.slurm("squeue", "--jobs", self.id, "--states=all", "--array", "--noheader", "--format=%T").split()
