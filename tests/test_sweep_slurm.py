"""Sweeps on a real Slurm of one node: what is requeued, runs into its limit, is killed or diverges, and what is refused."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY, TINY_ALGORITHM, stored_results
from slurm_cluster import cluster, why_unavailable

from incremental_cifar.run_files import RunFiles
from incremental_cifar.safe_files import lock_holder


def reason_to_skip() -> str | None:
    try:
        import submitit  # noqa: F401
    except ImportError:
        return "submitit is not installed: pip install -r requirements-slurm.txt"
    return why_unavailable()


reason = reason_to_skip()
needs_slurm = pytest.mark.skipif(reason is not None, reason=str(reason))

# A run of 3 tasks x 16 epochs: some seconds, so that there is time to disturb it.
SETTINGS = TINY | {"epochs_per_task": 16, "checkpoint_save_frequency": 3}
BASE, CBP, DIVERGING = "base_deep_learning_system", "continual_backpropagation", "diverging"


class Sweep:
    """One command line of a sweep, called with this or that behind it."""

    def __init__(self, arguments: list[str], environment: dict[str, str]):
        self.command = [sys.executable, str(REPOSITORY / "run_sweep.py"), *arguments]
        self.environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment

    def __call__(self, *more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*self.command, *more], env=self.environment, capture_output=True, text=True, timeout=120)

    def states(self) -> dict[tuple[str, int], str]:
        """The state of every run, as --status shows it."""
        shown = self("--status")
        assert shown.returncode == 0, shown.stderr
        rows = [line.split() for line in shown.stdout.splitlines()[1:]]
        names = (BASE, CBP, DIVERGING)
        return {(row[0], int(row[1])): "never" if row[2] == "never" else row[2] for row in rows if row[0] in names}

    def slurm(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout.strip()


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@needs_slurm
def test_requeued_timed_out_killed_and_diverging_runs(tmp_path, script):
    """Three configs with two indices: all but the diverging one finish by themselves, equal to the bit to runs by hand."""
    results = tmp_path / "results"
    for name, settings in {
        BASE: {},
        CBP: {"use_cbp": True, "utility_function": "contribution", **TINY_ALGORITHM[CBP]},
        DIVERGING: {"stepsize": 1e30},
    }.items():
        content = SETTINGS | {"experiment_name": name, "results_dir": str(results)} | settings
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    configs = [str(tmp_path / f"{name}.json") for name in (BASE, CBP, DIVERGING)]
    runs = [(name, index) for name in (BASE, CBP, DIVERGING) for index in (0, 1)]

    def progress(name: str, index: int) -> dict:
        """What a run that is at work says; empty before and after."""
        files = RunFiles(results / name, index)
        said = files.load_progress()
        holder = lock_holder(files.lock_file) or ""
        return said if f"process {said.get('process')}," in holder and said["epoch"] > 0 else {}

    def record(name: str, index: int) -> dict:
        return json.loads((results / name / "sweep" / f"index-{index}.json").read_text())

    with cluster(tmp_path / "slurm", cpus=6) as environment:
        sweep = Sweep(["--configs", *configs, "--indices", "0,1"], environment)
        request = ["--cluster", "slurm", "--slurm", "time=1", "--signal-before", "20", "--then", "figures"]
        assert sweep.states() == dict.fromkeys(runs, "never")
        refused = sweep("--cluster", "slurm", "--slurm", "time=1", "partition=nonsense", "--signal-before", "25")
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "invalid partition specified: nonsense" in refused.stderr
        assert sweep.states() == dict.fromkeys(runs, "never")
        submitted = sweep(*request)
        assert submitted.returncode == 0, submitted.stderr
        assert "Submitted 6 runs in 6 jobs" in submitted.stdout
        assert set(sweep.states().values()) <= {"queued", "running"}
        again = sweep(*request)
        assert again.returncode == 0 and "Nothing to submit" in again.stdout and "queued already" in again.stdout

        # Two that will run into the time limit, since they stand still: one goes on when it is asked to stop, the other does not.
        stopped = {}
        for index in (0, 1):
            wait_until(lambda index=index: sweep.states()[CBP, index] == "running" and progress(CBP, index))
            stopped[index] = progress(CBP, index)["process"]
            os.kill(stopped[index], signal.SIGSTOP)
        # One that is pre-empted.
        wait_until(lambda: progress(BASE, 0))
        first = progress(BASE, 0)
        sweep.slurm("scontrol", "requeue", first["slurm_job"])
        wait_until(lambda: sweep.states()[BASE, 0] == "queued")
        # One whose process is killed.
        wait_until(lambda: progress(BASE, 1))
        killed = progress(BASE, 1)["process"]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: progress(BASE, 1).get("process", killed) != killed)
        assert record(BASE, 1)["failures"] == 1

        # And, when it goes on, the process that watches over it.
        wait_until(lambda: progress(BASE, 0).get("process", first["process"]) != first["process"])
        assert 0 < RunFiles(results / BASE, 0).checkpoints()[-1][0] < 48
        watcher = Path(f"/proc/{progress(BASE, 0)['process']}/stat").read_text().rpartition(")")[2].split()[1]
        os.kill(int(watcher), signal.SIGKILL)
        by_hand = [
            script(["--config", path, "--experiment-index", "0,1", "--set", f"results_dir={tmp_path / 'by-hand'}"]) for path in configs[:2]
        ]

        wait_until(lambda: record(CBP, 0).get("reason") == "stopped by Slurm")
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped[0], signal.SIGCONT)
        wait_until(lambda: sweep.states()[CBP, 1] == "queued")

        finished = {run: "failed" if run[0] == DIVERGING else "finished" for run in runs}
        wait_until(lambda: sweep.states() == finished, 180)
        shown = sweep("--status").stdout
        assert shown.count("error: the loss is no longer finite in epoch 1 (step size 1e+30)") == 2
        wait_until(lambda: "figures: without 2 of 6 runs, which are not finished\n" in sweep("--status").stdout)
        assert (results / "figures" / "test_accuracy_figure.png").exists()
        again = sweep("--dry-run")
        assert "Would start 2 runs" in again.stdout

    for index in (0, 1):
        for name in (BASE, CBP):
            log = (results / name / "logs" / f"index-{index}.log").read_text()
            assert "Resuming index" in log, log
    assert "SIGINT: stopped after epoch" in (results / CBP / "logs" / "index-0.log").read_text()
    assert [run.wait() for run in by_hand] == [0, 0]
    for name in (BASE, CBP):
        expected = stored_results(tmp_path / "by-hand" / name)
        actual = {path: content for path, content in stored_results(results / name).items() if path in expected}
        assert actual == expected
