"""Sweeps on a real Slurm of one node: what is requeued, runs into its limit, is killed or diverges; and with a Slurm that fails."""

import contextlib
import datetime
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

from incremental_cifar import sweep_after, sweep_plan, sweep_slurm
from incremental_cifar.config import Config, UserError
from incremental_cifar.run_files import RunFiles
from incremental_cifar.safe_files import lock_holder, read_note, write_note
from incremental_cifar.sweep_plan import Experiment, Job, freeze_config
from incremental_cifar.sweep_slurm import JobRuns, JobSignals, MayBeQueued, QueuedJob, Request, parse_request, run_indices, submit
from incremental_cifar.sweep_status import FINISHED, NEVER, Status, new_record, read_record, update_record


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
        self.environment = os.environ | environment

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

    def has_ended_once(name: str, index: int) -> bool:
        return " ended after " in (results / name / "logs" / f"index-{index}.log").read_text()

    with cluster(tmp_path / "slurm", cpus=6) as environment:
        sweep = Sweep(["--configs", *configs, "--indices", "0,1"], environment)
        request = ["--cluster", "slurm", "--slurm", "time=1", "--signal-before", "30", "--then", "figures"]
        assert sweep.states() == dict.fromkeys(runs, "never")
        refused = sweep("--cluster", "slurm", "--slurm", "time=1", "partition=nonsense", "--signal-before", "35")
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

        # Slurm itself wakes what stands still when it warns, sooner or later: perhaps this is over already.
        wait_until(lambda: record(CBP, 0).get("reason") == "stopped by Slurm" or has_ended_once(CBP, 0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped[0], signal.SIGCONT)
        wait_until(lambda: sweep.states()[CBP, 1] == "queued" or has_ended_once(CBP, 1))

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


# --- Without a Slurm, or with one that fails -------------------------------------------------------------------------------------

ENTRY = {"name": "sweep-1", "task": 0}
REQUEST = Request(1, {}, None)


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    """An experiment of three indices that belong to one job."""
    experiment = Experiment("x", (), Config(results_dir=str(tmp_path), experiment_name="a"), (0, 1, 2))
    freeze_config(experiment)
    for index in experiment.indices:
        new_record(experiment, index, slurm=ENTRY)
    return experiment


@pytest.fixture
def failing(monkeypatch) -> None:
    """In place of experiments, processes that fail."""
    monkeypatch.setattr(Job, "command", lambda job: ["false"])
    monkeypatch.setenv("SLURM_JOB_ID", "1")


@pytest.mark.parametrize(
    ("option", "device", "used"),
    [
        ("gres=gpu:a100:1", "auto", "cuda"),
        ("gpus_per_task=1", "auto", "cuda"),
        ("tres_per_job=gres/gpu:1", "auto", "cuda"),
        ("partition=gpu", "auto", "auto"),
        ("gres=gpu:1", "cpu", "cpu"),
    ],
)
def test_a_job_that_asked_for_a_gpu_does_not_do_without(option, device, used, tmp_path, monkeypatch):
    """In place of the experiment and its analysis, scripts that say which device they are given."""
    for name in ("incremental_cifar_experiment.py", "post_run_analysis.py"):
        (tmp_path / name).write_text("import sys; sys.exit('devices: ' + ' '.join(sys.argv))")
    monkeypatch.setattr(sweep_plan, "EXPERIMENT_SCRIPT", tmp_path / "incremental_cifar_experiment.py")
    monkeypatch.setattr(sweep_after, "REPOSITORY", tmp_path)
    monkeypatch.setattr(sweep_after, "has_models", lambda experiment, index: True)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    calls = []
    monkeypatch.setattr(sweep_slurm, "_sbatch", lambda name, new, *arguments: calls.extend(new) or "1")
    monkeypatch.setattr(sweep_slurm, "squeue", lambda names: {})
    experiment = Experiment("x", (), Config(results_dir=str(tmp_path), experiment_name="a", device=device), (0, 1))
    freeze_config(experiment)
    RunFiles(experiment.folder, 1).mark_finished()
    submit([Status(experiment, 0, NEVER)], {}, parse_request([option], 30), 1, 0, 30, ["analysis"], "all")
    submit([Status(experiment, 1, FINISHED)], {}, parse_request([option], 30), 1, 0, 30, ["analysis"], "all")
    (run, of_run), *_, (steps, of_steps) = calls
    for function, arguments in ((run, of_run), (steps, of_steps)):
        with pytest.raises(RuntimeError):
            function(*arguments)
    run_log, analysis_log = ((experiment.folder / "logs" / name).read_text() for name in ("index-0.log", "analysis.log"))
    assert ("device=cuda" in run_log) == (used == "cuda")
    assert f"--device {used}" in analysis_log


def refuse_records(monkeypatch) -> None:
    def update_record(experiment: Experiment, index: int, **changes: object) -> None:
        raise UserError("no space left on device")

    monkeypatch.setattr(sweep_slurm, "update_record", update_record)


def work(experiment: Experiment, retries: int = 1) -> None:
    run_indices(str(experiment.config_file), experiment.indices, retries, 30, "all", ENTRY)


def test_failures_are_counted_where_records_cannot_be_written(experiment, failing, monkeypatch):
    refuse_records(monkeypatch)
    with pytest.raises(RuntimeError, match="a, index 0: exit status 1; index 1: exit status 1"):
        work(experiment)
    assert (experiment.folder / "logs" / "index-0-2.log").read_text().count(": false\n") == 2


def test_a_log_that_cannot_be_opened_is_a_failure(experiment, failing):
    (experiment.folder / "logs").write_text("")
    with pytest.raises(RuntimeError, match="File exists"):
        work(experiment)
    assert read_record(experiment, 2)["failures"] == 2


def test_a_job_at_its_limit_is_not_queued_again_where_records_cannot_be_written(experiment, monkeypatch):
    monkeypatch.setattr(sweep_slurm, "requeue", lambda job_id: pytest.fail("queued again"))
    refuse_records(monkeypatch)
    runs, signals = JobRuns(experiment, 1, ENTRY), JobSignals()
    signals.warned_at = 0.0
    sweep_slurm._leave(runs, signals)
    assert len(runs.problems()) == 3 and "its record cannot be written" in runs.problems()[0]


def test_a_job_leaves_alone_what_another_has_got(experiment, failing):
    new_record(experiment, 0, slurm={"name": "sweep-2", "task": 0}, is_running=True)
    update_record(experiment, 2, has_failed=True, reason="before")
    with pytest.raises(RuntimeError, match="a, index 1: exit status 1; index 2: before"):
        work(experiment, retries=0)
    assert os.listdir(experiment.folder / "logs") == ["index-1.log"]
    assert "failures" not in read_record(experiment, 0)


def test_failures_are_counted_anew_after_a_checkpoint(experiment, monkeypatch):
    epoch = 0
    monkeypatch.setattr(RunFiles, "checkpoints", lambda files: [(epoch, files.folder)] if epoch else [])
    for epoch, failures in ((0, 1), (3, 1), (3, 2), (4, 1)):  # noqa: B007
        runs = JobRuns(experiment, 5, ENTRY)
        runs.count_failure(0, "why")
        assert read_record(experiment, 0)["failures"] == runs.failures[0] == failures
    runs = JobRuns(experiment, 0, ENTRY)
    runs.count_failure(0, "why")
    assert runs.unfinished() == [1, 2] and read_record(experiment, 0)["has_failed"]


@pytest.mark.parametrize("analysed_before", [None, 0])
def test_steps_that_run_into_their_limit(experiment, monkeypatch, analysed_before):
    """Their job is queued again, but not if it got no further than the last time."""
    requeued = []
    monkeypatch.setattr(sweep_slurm, "do_steps", lambda *arguments: signal.raise_signal(signal.SIGUSR1) or [])
    monkeypatch.setattr(sweep_slurm, "requeue", requeued.append)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    path = sweep_slurm.after_file(experiment.config.results_dir)
    write_note(path, {"name": "sweep-1", "analysed_at_limit": analysed_before})
    with pytest.raises((SystemExit, RuntimeError)):
        sweep_slurm.run_steps([(str(experiment.config_file), (0, 1))], ("analysis",), "all", "sweep-1")
    assert requeued == (["1"] if analysed_before is None else [])
    assert ("nothing more done" in read_note(path).get("result", "")) == (analysed_before == 0)


def test_a_busy_slurm_is_asked_again(monkeypatch):
    asked = []

    def slurm(*command: str) -> str:
        asked.append(command[0])
        if len(asked) in (1, 3):
            raise UserError(f"{command[0]}: Socket timed out")
        return "RUNNING|None\n" if command[0] == "squeue" else ""

    monkeypatch.setattr(sweep_slurm, "slurm", slurm)
    monkeypatch.setattr(sweep_slurm, "SECONDS_BETWEEN_REQUESTS", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(SystemExit) as left:
        sweep_slurm._queue_again(lambda: True)
    assert left.value.code == 0 and asked == ["squeue", "squeue", "scontrol", "squeue", "scontrol"]


def test_a_cancelled_job_is_not_queued(monkeypatch):
    """Both are "completing": the one that was cancelled has ended, the one that is queued again will."""
    past, future = (datetime.datetime.now() + datetime.timedelta(hours=hours) for hours in (-1, 1))
    lines = [f"{number}_0|COMPLETING|None|{end:%Y-%m-%dT%H:%M:%S}|sweep-{number}" for number, end in ((1, past), (2, future))]
    monkeypatch.setattr(sweep_slurm, "slurm", lambda *command: "\n".join(lines))
    assert sweep_slurm.squeue(["sweep-1", "sweep-2"]) == {"sweep-2": [QueuedJob("2_0", "completing", "")]}


@pytest.mark.parametrize(
    ("option", "signal_before", "message"),
    [
        *((f"{option}=true", 300, f"--slurm: {option} is what the sweep decides") for option in ("wait", "no-requeue", "parsable")),
        ("time=1", 29, "--signal-before: got 29; it must be 30 or more"),
    ],
)
def test_refused_requests(option, signal_before, message):
    with pytest.raises(UserError, match=message):
        parse_request([option], signal_before)


@pytest.mark.parametrize("is_answering", [True, False])
def test_a_submission_that_slurm_took_in_silence(experiment, tmp_path, monkeypatch, is_answering):
    """It is cancelled, and all is as it was; if that is impossible too, the records say what may be queued."""
    pytest.importorskip("submitit")
    programs = tmp_path / "programs"
    programs.mkdir()
    scripts = {
        "sbatch": f"env | grep ^SLURM_ > {programs}/variables; echo 'Socket timed out' >&2; exit 1",
        "srun": "",
        "scancel": f'echo "$@" >> {programs}/cancelled; exit {0 if is_answering else 1}',
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", "/conf")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    statuses = [Status(experiment, index, NEVER) for index in experiment.indices]
    with pytest.raises(UserError, match=r"sbatch: .*Socket timed out") as refused:
        submit(statuses, {}, REQUEST, 3, 1, 30, [], "all")
    assert isinstance(refused.value, MayBeQueued) != is_answering
    (name,) = (programs / "cancelled").read_text().removeprefix("--name=").split()
    assert [read_record(experiment, index)["slurm"]["name"] for index in (0, 1, 2)] == ["sweep-1" if is_answering else name] * 3
    assert (programs / "variables").read_text() == "SLURM_CONF=/conf\n"
    assert os.environ["SLURM_ARRAY_TASK_ID"] == "7"
    assert is_answering != (tmp_path / ".sweep" / name).exists()


def test_steps_after_two_sweeps_are_one_job(experiment, monkeypatch, capsys):
    """The second sweep's job takes the place of the first one's, with the runs and steps of both; the same command does nothing."""
    submitted, cancelled, dependencies = [], [], []

    def sbatch(name, calls, folder, request, signal_before, retries, dependency=None) -> str:
        submitted.append((name, calls[0][1]))
        dependencies.append(dependency)
        return str(len(submitted))

    def squeue(names) -> dict[str, list[QueuedJob]]:
        after = {name: [QueuedJob(f"9{number}", "pending", "Dependency")] for number, (name, _) in enumerate(submitted)}
        return {name: jobs for name, jobs in {**after, "sweep-1": [QueuedJob("50_0", "running", "")]}.items() if name in names}

    monkeypatch.setattr(sweep_slurm, "_sbatch", sbatch)
    monkeypatch.setattr(sweep_slurm, "squeue", squeue)
    monkeypatch.setattr(sweep_slurm, "slurm", lambda *command: cancelled.append(command))
    monkeypatch.setattr(sweep_slurm.shutil, "which", lambda name: name)

    def follow(indices: tuple[int, ...], job_ids: list[str], steps: list[str], keep: str, is_new: bool = True) -> tuple:
        part = experiment._replace(indices=indices)
        sweep_slurm._submit_after([Status(part, i, NEVER) for i in indices], job_ids, REQUEST, 30, 1, steps, keep, is_new)
        return submitted[-1][1][:3]

    file = str(experiment.config_file)
    assert follow((0, 1), ["50"], ["figures"], "models") == ([(file, [0, 1])], ("figures",), "models")
    both = ([(file, [0, 1, 2])], ("analysis", "figures"), "all")
    assert follow((2,), ["60"], ["analysis"], "all") == both
    assert dependencies == ["afterany:50", "afterany:50:60"]
    assert cancelled == [("scancel", f"--name={submitted[0][0]}")]
    follow((2,), [], ["analysis"], "all", is_new=False)
    assert len(submitted) == 2 and "queued already, as job 91" in capsys.readouterr().out
    assert follow((0, 1, 2), ["70"], ["figures"], "models") == ([(file, [0, 1, 2])], ("figures",), "models")
