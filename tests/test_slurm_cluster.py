"""The cluster of one node that the tests of sweeps use: it runs a job, and leaves nothing behind."""

import os
import subprocess
import time

import pytest
from conftest import REPOSITORY
from slurm_cluster import SlurmError, cluster, processes_of, start, why_unavailable

reason = why_unavailable()
needs_slurm = pytest.mark.skipif(reason is not None, reason=str(reason))


@needs_slurm
def test_a_job_runs_and_no_process_is_left(tmp_path):
    folder, result = tmp_path / "cluster", tmp_path / "result"
    with cluster(folder) as variables:
        environment = {**os.environ, **variables}

        def output_of(*command: str) -> str:
            return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

        assert start(folder) == variables  # running already
        script = f"srun hostname > {result}; setsid sleep 1000 & wait"
        job = output_of("sbatch", "--parsable", "--output=/dev/null", f"--wrap={script}")
        second = output_of("sbatch", "--parsable", "--output=/dev/null", f"--dependency=afterany:{job}", "--wrap=true")
        deadline = time.monotonic() + 300
        while not result.exists() or not result.read_text():
            assert time.monotonic() < deadline, output_of("scontrol", "show", "job", job)
            time.sleep(0.1)
        assert output_of("squeue", "--noheader", "--format=%T", f"--jobs={job},{second}").split() == ["PENDING", "RUNNING"]
        output_of("scancel", job)
        while output_of("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={second}") != "COMPLETED":
            assert time.monotonic() < deadline, output_of("scontrol", "show", "job", second)
            time.sleep(0.1)
        output_of("sbatch", "--output=/dev/null", "--wrap=sleep 1000")  # running, or about to, when the cluster stops
        assert processes_of(folder)
    assert not processes_of(folder)
    assert not (folder / "sockets").exists()


@needs_slurm
def test_a_failed_start_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr("slurm_cluster.SLURM_CONF", "ClusterName=nonsense\nNoSuchSetting=1\n")
    with pytest.raises(SlurmError, match=r"slurmctld|slurmd"):
        start(tmp_path)
    assert not processes_of(tmp_path)


@pytest.mark.parametrize(
    ("squeue", "words", "status", "said"),
    [
        ("exit 1", ["echo", "hello"], 0, "hello\n"),  # a controller that does not answer
        ("echo N/A", ["echo", "hello"], 0, "hello\n"),
        ("date -d -1hour +%FT%T", ["echo", "hello"], 0, "hello\n"),
        ("echo N/A", [], 1, "slurm_job.sh: there is no command to run"),
        ("echo N/A", ["echo", "%a"], 1, "slurm_job.sh: %a is the number of a task of an array"),
    ],
)
def test_the_batch_script_without_a_time_limit_or_a_command(squeue, words, status, said, tmp_path):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "5"}
    environment.pop("SLURM_ARRAY_TASK_ID", None)
    done = subprocess.run(["bash", REPOSITORY / "slurm_job.sh", *words], env=environment, capture_output=True, text=True)
    assert bool(done.returncode) == bool(status) and said in done.stdout + done.stderr
