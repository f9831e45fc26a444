"""The cluster of one node that the tests of sweeps use: it runs a job, and leaves nothing behind."""

import os
import subprocess
import time

import pytest
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
        deadline = time.monotonic() + 30
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
