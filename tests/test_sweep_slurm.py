"""Sweeps on a real Slurm of one node: what a job does at its end, whatever ends it; whole sweeps, to the bit."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, STRESS, TINY, TINY_ALGORITHM, differing_results, stress_counts
from slurm_cluster import PATIENCE, shell, wait_until, why_unavailable

from incremental_cifar.run_files import RunFiles
from incremental_cifar.safe_files import lock_holder

reason = why_unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

BASE, CBP, DIVERGING = "base_deep_learning_system", "continual_backpropagation", "diverging"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster for all tests of this file, as a function that runs a command there and returns what it prints, errors last."""
    with shell(tmp_path_factory.mktemp("slurm")) as run:
        yield run


# --- slurm_job.sh, with shell commands in place of runs --------------------------------------------------------------------------

# It notes every start, ends at the last of them, and when it is asked to, as our runs do.
COMMAND = """trap 'echo usr1 >> {note}.signals; exit 138' USR1; trap 'echo term >> {note}.signals; exit 143' TERM
echo $$ >> {note}; [ "$(wc -l < {note})" -ge {starts} ] && exit {status}; while sleep 0.1; do :; done"""


class Job:
    """A job by hand. starts: how often its command has to be started to come to its end, with this status."""

    def __init__(self, slurm, note: Path, starts: int = 2, status: int = 0, seconds: int | str = 32, options: tuple = ()):
        self.slurm, self.note = slurm, note
        command = "bash", "-c", COMMAND.format(note=f"{note}$SLURM_ARRAY_TASK_ID", starts=starts, status=status)
        options = f"--output={note}.log", "--open-mode=append", "--requeue", f"--export=ALL,FAKE_SECONDS={seconds}", *options
        self.id = slurm("sbatch", "--parsable", *options, REPOSITORY / "slurm_job.sh", *command)

    def lines(self, suffix: str = "") -> list[str]:
        path = Path(f"{self.note}{suffix}")
        return path.read_text().splitlines() if path.exists() else []

    def states(self) -> set[str]:
        return set(self.slurm("squeue", "--jobs", self.id, "--states=all", "--array", "--noheader", "--format=%T").split())


def test_what_a_job_does_at_its_end(slurm, tmp_path):
    limit = Job(slurm, tmp_path / "limit", options=("--array=0-1",))  # the last task has the array's own id
    fails, no_limit = Job(slurm, tmp_path / "fails", 1, 3), Job(slurm, tmp_path / "none", 1, seconds="")
    killed, cancelled, refused = (Job(slurm, tmp_path / name) for name in ("killed", "cancelled", "refused"))
    wait_until(lambda: killed.lines() and cancelled.lines() and refused.lines())
    os.kill(int(killed.lines()[0]), signal.SIGKILL)
    slurm("scancel", cancelled.id)
    slurm("scontrol", "update", f"JobId={refused.id}", "Requeue=0")
    wait_until(lambda: limit.states() == killed.states() == no_limit.states() == {"COMPLETED"})
    wait_until(lambda: refused.lines(".signals") and len(refused.lines()) == 2)
    assert [len(limit.lines(task)) for task in "01"] == [2, 2] and limit.lines("0.signals") == limit.lines("1.signals") == ["usr1"]
    assert len(killed.lines()) == 2 and len(no_limit.lines()) == 1
    assert "Submitted" not in "".join(limit.lines(".log") + killed.lines(".log"))  # what was queued again is not submitted as well
    assert fails.states() == {"FAILED"} and len(fails.lines()) == 1
    assert cancelled.states() == {"CANCELLED"} and len(cancelled.lines()) == 1 and set(cancelled.lines(".signals")) == {"term"}
    assert "Requested operation is presently disabled" in "".join(refused.lines(".log"))
    assert "Submitted batch job" in "".join(refused.lines(".log"))

    preempted = Job(slurm, tmp_path / "preempted", seconds=600)
    wait_until(preempted.lines)
    slurm("sbatch", "--output=/dev/null", "--partition=urgent", "--exclusive", "--wrap=true")
    wait_until(lambda: preempted.states() == {"COMPLETED"})
    assert len(preempted.lines()) == 2 and set(preempted.lines(".signals")) == {"term"}


@pytest.mark.skipif(not STRESS, reason="takes minutes: make stress")
def test_slurms_own_limit(slurm, tmp_path):
    """It comes before the warning, when somebody has lowered it."""
    job = Job(slurm, tmp_path / "overrun", seconds=600, options=("--time=1",))
    wait_until(lambda: job.states() == {"COMPLETED"})
    assert len(job.lines()) == 2 and "term" in job.lines(".signals") and "usr1" not in job.lines(".signals")


# --- Whole sweeps ----------------------------------------------------------------------------------------------------------------


class Sweep:
    """One command line of a sweep, called with this or that behind it."""

    def __init__(self, slurm, folder: Path, indices: str, settings: dict[str, dict], *options: str):
        self.slurm, self.results = slurm, folder / "results"
        configs = [folder / f"{name}.json" for name in settings]
        for path, own in zip(configs, settings.values(), strict=True):
            base = json.loads((REPOSITORY / "cfg" / f"{BASE}.json").read_text())
            path.write_text(json.dumps(base | TINY | {"results_dir": str(self.results), "experiment_name": path.stem} | own))
        self.command = [sys.executable, REPOSITORY / "run_sweep.py", "--configs", *configs, "--indices", indices, *options]

    def __call__(self, *more: str, status: int = 0) -> str:
        return self.slurm(*self.command, *more, status=status)

    def states(self) -> dict[tuple[str, int], str]:
        """The state of every run, as --status shows it."""
        rows = [line.split() for line in self("--status").splitlines()[:-1]]
        return {(row[0], int(row[1])): row[2] for row in rows}

    def process(self, name: str, index: int, least_epoch: int = 0) -> int:
        """The process that works on a run, if it has come so far; else 0."""
        files = RunFiles(self.results / name, index)
        said, holder = files.load_progress(), lock_holder(files.lock_file) or ""
        return said["process"] if f"process {said.get('process')}," in holder and said["epoch"] >= least_epoch else 0


def test_a_whole_sweep(slurm, tmp_path, uninterrupted):
    """In a folder with a name of its own, packs of two, one config that diverges; the figures follow."""
    (tmp_path / "a b%").mkdir()
    settings = {BASE: {}, DIVERGING: {"stepsize": 1e30}}
    sweep = Sweep(slurm, tmp_path / "a b%", "0,1", settings, "--analyse", "--keep", "models", "--runs-per-gpu", "2")
    runs = [(name, index) for name in settings for index in (0, 1)]
    assert sweep.states() == dict.fromkeys(runs, "never")
    refused = sweep("--slurm", "partition=nonsense", status=2)
    assert refused.count("\n") == 0 and "invalid partition specified: nonsense" in refused
    assert sweep.states() == dict.fromkeys(runs, "never")
    assert "Submitted 4 runs; 0 were queued already." in sweep("--slurm", "time=60", "cpus_per_task=1")
    assert sweep("--slurm") == "Submitted 0 runs; 4 were queued already."
    assert "never" not in sweep.states().values()
    wait_until(lambda: sweep.states() == {run: "failed" if run[0] == DIVERGING else "analysed" for run in runs})
    shown = sweep("--status")
    assert all(shown.count(f"error: index {index}: the loss is no longer finite in epoch 1 (step size 1e+30)") == 1 for index in (0, 1))
    wait_until((sweep.results / "figures" / "previous_tasks_stable_rank_analysis.svg").exists)
    assert os.listdir(sweep.results / BASE / "experiment_checkpoints") == []
    assert differing_results(uninterrupted(BASE), sweep.results / BASE, "_per_epoch/index-0") == []


@pytest.mark.skipif(not STRESS, reason="takes minutes: make stress")
def test_requeued_killed_stopped_and_diverging_runs(slurm, tmp_path, script):
    """With a limit of two minutes, all but the diverging ones finish by themselves, equal to the bit to runs by hand."""
    own = {BASE: {}, CBP: {"use_cbp": True, "utility_function": "contribution", **TINY_ALGORITHM[CBP]}, DIVERGING: {"stepsize": 1e30}}
    settings = {name: {"epochs_per_task": 30, "checkpoint_save_frequency": 1} | more for name, more in own.items()}
    sweep = Sweep(slurm, tmp_path, "0,1", settings, "--analyse")
    runs = [(name, index) for name in settings for index in (0, 1)]
    assert "Submitted 6 runs; 0 were queued already." in sweep("--slurm", "time=2")
    for index in (0, 1):  # both stand still past the limit, one even when it is woken to stop
        wait_until(lambda index=index: sweep.process(CBP, index, 2))
        os.kill(sweep.process(CBP, index), signal.SIGSTOP)
    stuck = sweep.process(CBP, 1)
    wait_until(lambda: sweep.process(BASE, 1, 2))
    os.kill(sweep.process(BASE, 1), signal.SIGKILL)
    wait_until(lambda: sweep.process(BASE, 0, 2))
    slurm("scontrol", "requeue", RunFiles(sweep.results / BASE, 0).load_progress()["slurm_job"])
    wait_until(lambda: sweep.states()[BASE, 0] in ("queued", "running"))
    assert sweep.states()[CBP, 1] == "running"
    assert sweep("--slurm") == f"Submitted 0 runs; {len(runs)} were queued already."

    def keep_still() -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stuck, signal.SIGSTOP)
        return sweep.process(CBP, 1) not in (0, stuck)

    wait_until(keep_still)
    by_hand = [
        script(["--config", str(tmp_path / f"{name}.json"), "--experiment-index", "0,1", "--set", f"results_dir={tmp_path / 'by-hand'}"])
        for name in (BASE, CBP)
    ]
    wait_until(lambda: sweep.states() == {run: "failed" if run[0] == DIVERGING else "analysed" for run in runs})
    assert [run.wait(PATIENCE) for run in by_hand] == [0, 0]
    differing = [differing_results(tmp_path / "by-hand" / name, sweep.results / name, "index-") for name in (BASE, CBP)]
    assert [[name for name in names if "_analysis" not in name and "accuracy_per_class" not in name] for names in differing] == [[], []]
    resumed = [(name, index) for name, index in runs if "Resuming" in (sweep.results / name / "logs" / f"index-{index}.log").read_text()]
    assert resumed == [(name, index) for name in (BASE, CBP) for index in (0, 1)]
    assert "=== stopped by SIG" in (sweep.results / CBP / "logs" / "index-0.log").read_text()
    assert "=== killed by SIGKILL" in (sweep.results / CBP / "logs" / "index-1.log").read_text()
    stress_counts["sweeps on Slurm with runs requeued, killed, stopped past the limit, diverging"] = "1 of 1"
