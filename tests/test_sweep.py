"""Sweeps on this machine: what is planned and refused, run, stopped, gone on with, tried again, analysed and shown."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ALGORITHMS, REPOSITORY, everything_in, processes, stored_results, tiny_arguments

import run_sweep
from incremental_cifar import safe_files, sweep_local, sweep_plan
from incremental_cifar.command_line import run_script
from incremental_cifar.config import Config, UserError
from incremental_cifar.resnet import build_network
from incremental_cifar.run_files import RunFiles
from incremental_cifar.safe_files import lock, lock_holder
from incremental_cifar.sweep_local import Display, Workers
from incremental_cifar.sweep_plan import (
    Experiment,
    Job,
    freeze_config,
    grid_points,
    indices_text,
    make_jobs,
    model_bytes,
    num_parameters,
    plan,
)
from incremental_cifar.sweep_slurm import JobSignals, _run_once, parse_request
from incremental_cifar.sweep_status import (
    FINISHED,
    NEVER,
    QUEUED,
    RUNNING,
    Status,
    duration_text,
    new_record,
    read_status,
    seconds_left,
    status_table,
)

BASE = "base_deep_learning_system"


# --- Sweeps in processes of their own --------------------------------------------------------------------------------------------


class ForkedScript:
    """In place of `subprocess.Popen`: the experiment script in a fork, which has imported already what takes seconds."""

    def __init__(self, command, stdin, stdout, stderr, env, start_new_session):
        assert start_new_session
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                for number in (1, 2):
                    os.dup2(stdout.fileno(), number)
                os.closerange(3, 256)  # the sweep's locks too
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number in (signal.SIGTERM, signal.SIGUSR1):
                    signal.signal(number, signal.SIG_DFL)
                os.environ.update(env)
                import incremental_cifar_experiment

                status = run_script(incremental_cifar_experiment.main, command[2:])
            except SystemExit as leaving:
                status = leaving.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def wait(self):
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def popen(command, **options):
    is_run = command[1].endswith("incremental_cifar_experiment.py")
    return ForkedScript(command, **options) if is_run else subprocess.Popen(command, **options)


def _run_sweep(arguments: list[str], log: str) -> None:
    os.setsid()
    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sweep_local.subprocess = types.SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    sweep_local.os.sched_getaffinity = lambda process: {0, 1}  # two cores
    sys.exit(run_script(run_sweep.main, arguments))


class SweepProcess:
    """A sweep whose runs start at once, in a process of its own."""

    def __init__(self, arguments: list[str], log: Path):
        self.log = log
        self.process = processes.Process(target=_run_sweep, args=(arguments, str(log)))
        self.process.start()

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self) -> int:
        self.process.join(120)
        assert self.process.exitcode is not None, self.output()
        return self.process.exitcode

    def wait_for(self, text: str, count: int = 1) -> None:
        deadline = time.monotonic() + 60
        while self.output().count(text) < count:
            assert self.process.is_alive() and time.monotonic() < deadline, f"{text!r} did not appear {count} times in: {self.output()}"
            time.sleep(0.01)

    def send(self, signal_number: int) -> None:
        os.kill(self.process.pid, signal_number)


@pytest.fixture
def sweep(tmp_path):
    """Start a sweep of tiny runs: `sweep(arguments)`; what still runs at the end of the test is killed."""
    started = []

    def start(arguments: list[str]) -> SweepProcess:
        started.append(SweepProcess(arguments, tmp_path / f"sweep-{len(started)}.txt"))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.join()
    for path in tmp_path.rglob(".index-*.lock"):
        if match := re.search(r"process (\d+)", lock_holder(path) or ""):
            os.kill(int(match[1]), signal.SIGKILL)


def settings_text(results_dir: Path, **settings: object) -> list[str]:
    return tiny_arguments(BASE, results_dir, **settings)[3:]


def config_files(folder: Path, *algorithms: str, **settings: object) -> list[str]:
    """A tiny config of each algorithm, in files with its name; results go to results/ in the folder."""
    paths = []
    for algorithm in algorithms:
        arguments = tiny_arguments(algorithm, folder / "results", **settings)
        config = run_sweep.plan([arguments[1]], arguments[3:], [], [0])[0].config
        paths.append(folder / f"{algorithm}.json")
        paths[-1].write_text(json.dumps(config.to_dict()))
    return [str(path) for path in paths]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def started_runs(output: str) -> list[str]:
    return re.findall(r"started   (\S+ index \d+)", output)


def machine_with_gpus(folder: Path, nvidia_smi: str) -> dict[str, str]:
    """The environment on a machine whose nvidia-smi is these lines of shell."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment


def has_pending(process, number):
    """Whether a signal waits for a process that stands still (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in pending)


def test_ctrl_c_and_the_same_command_again(tmp_path, sweep, script):
    """5 configs x 3 indices on two cores: all stop with checkpoints, the rest is run afterwards, nothing is run twice."""
    arguments = ["--configs", *config_files(tmp_path, *ALGORITHMS, num_tasks=2, epochs_per_task=3), "--indices", "0-2"]
    by_hand = [script(tiny_arguments(algorithm, tmp_path / "by-hand", num_tasks=2, epochs_per_task=3)) for algorithm in ALGORITHMS]
    assert [run.wait() for run in by_hand] == [0] * 5
    first = sweep(arguments)
    first.wait_for("finished ", 5)
    first.wait_for("started ", 7)
    name, index = started_runs(first.output())[6].split(" index ")
    files = RunFiles(tmp_path / "results" / name, int(index))
    wait_until(files.load_progress)
    running = files.load_progress()["process"]
    os.kill(running, signal.SIGSTOP)  # it is soon over: it shall not be before it is asked to stop
    first.send(signal.SIGINT)
    wait_until(lambda: has_pending(running, signal.SIGINT))
    os.kill(running, signal.SIGCONT)
    assert first.wait() == 130, first.output()
    finished = re.findall(r"finished  (\S+ index \d)", first.output())
    stopped = dict(re.findall(r"stopped   (\S+ index \d) (after epoch \d+|before its first checkpoint)", first.output()))
    assert 1 <= len(stopped) <= 2 and 5 <= len(finished) <= 8
    assert sorted(started_runs(first.output())) == sorted([*finished, *stopped])
    resumable = [run for run, where in stopped.items() if where.startswith("after")]
    for run in resumable:
        name, index = run.split(" index ")
        assert RunFiles(tmp_path / "results" / name, int(index)).checkpoints()

    second = sweep(arguments)
    assert second.wait() == 0, second.output()
    everything = [f"{algorithm} index {index}" for algorithm in ALGORITHMS for index in range(3)]
    assert sorted(started_runs(second.output())) == sorted(set(everything) - set(finished))
    assert "15 finished" in second.output()
    for algorithm in ALGORITHMS:
        expected = stored_results(tmp_path / "by-hand" / algorithm)  # of index 0
        results = stored_results(tmp_path / "results" / algorithm)
        del expected["experiment_indices.npy"]
        assert {path: results[path] for path in expected} == expected
        for index in range(3):
            log = (tmp_path / "results" / algorithm / "logs" / f"index-{index}.log").read_text()
            assert log.count("is finished; its results") == 1 and "nothing to do" not in log
            assert ("Resuming index" in log) == (f"{algorithm} index {index}" in resumable)

    before = everything_in(tmp_path / "results")
    third = sweep(arguments)
    assert third.wait() == 0 and started_runs(third.output()) == []
    assert everything_in(tmp_path / "results") == before


def test_a_failed_run_is_tried_again_reported_and_takes_no_other_with_it(tmp_path, sweep):
    diverging = config_files(tmp_path, "head_resetting", stepsize=1e30)
    base = config_files(tmp_path, BASE, num_tasks=1)
    arguments = ["--configs", *diverging, *base, "--indices", "0,1", "--retries", "2", "--then", "figures"]
    run = sweep(arguments)
    assert run.wait() == 1
    output = run.output()
    assert output.count("started   head_resetting index 0") == 3 and output.count(f"started   {BASE}") == 2
    assert "2 finished, 2 failed" in output
    log = tmp_path / "results" / "head_resetting" / "logs" / "index-1.log"
    assert re.search(
        rf"failed: head_resetting index 1, exit status 2; the end of {log}:\n(    .*\n)*    error: the loss is no longer", output
    )
    assert "figures: without 2 of 4 runs, which are not finished" in output

    status = subprocess.run([sys.executable, "run_sweep.py", *arguments, "--status"], cwd=REPOSITORY, capture_output=True, text=True)
    assert status.returncode == 0
    assert re.search(r"head_resetting +1  failed .*exit status 2: error: the loss is no longer finite in epoch 1", status.stdout)


def test_runs_of_a_killed_sweep_go_on_and_are_not_started_twice(tmp_path, sweep):
    arguments = ["--configs", *config_files(tmp_path, BASE, epochs_per_task=8, num_tasks=2), "--indices", "0-2"]
    first = sweep(arguments)
    first.wait_for("started ", 2)
    for index in (0, 1):  # here, a run is known by its lock alone: its process is a fork without the script's name
        wait_until(RunFiles(tmp_path / "results" / BASE, index).load_progress)
    first.send(signal.SIGKILL)
    first.wait()
    second = sweep(arguments)
    assert second.wait() == 0, second.output()
    assert f"runs      {BASE} index 0 already: host" in second.output()
    assert set(started_runs(second.output())) & set(started_runs(first.output())) == set()
    assert "3 finished" in second.output()


def test_two_sweeps_at_once_are_one_too_many(tmp_path, capsys):
    arguments = ["--configs", *config_files(tmp_path, BASE), "--indices", "0"]
    folder = tmp_path / "results" / BASE
    with lock(folder / ".sweep.lock"):
        before = everything_in(tmp_path)
        assert run_script(run_sweep.main, arguments) == 2
        assert everything_in(tmp_path) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"another sweep is at work on this experiment: host {os.uname().nodename}" in error


def test_from_the_command_to_the_figures(tmp_path):
    """Real processes, two indices packed into one, on GPUs for which the CPU stands in; only results are kept."""
    environment = machine_with_gpus(tmp_path, "echo 0; echo 1")
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.argv[1:] = [word.replace('cuda', 'cpu') for word in sys.argv[1:]]")
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        str(REPOSITORY / "run_sweep.py"),
        "--configs",
        *config_files(tmp_path, BASE, "retrained_network", num_tasks=2),
    ]
    command += ["--indices", "0,1", "--set", "device=auto", "--runs-per-gpu", "2"]
    command += ["--then", "analysis,figures", "--keep", "results"]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert f"started   {BASE} indices 0,1 (GPU 0)" in completed.stdout
    results = tmp_path / "results"
    for name in (BASE, "retrained_network"):
        assert len(os.listdir(results / name / "next_task_stable_rank_analysis")) == 2
        assert os.listdir(results / name / "model_parameters") == os.listdir(results / name / "experiment_checkpoints") == []
        assert "GPU " in (results / name / "logs" / "index-0,1.log").read_text()
        assert json.loads((results / name / "config_files" / "index-0.json").read_text())["device"] == "cpu"  # where there is a GPU, too
    assert {"paper_figure.png", "test_accuracy_figure.svg", "next_task_stable_rank_analysis.svg"} <= set(os.listdir(results / "figures"))
    again = subprocess.run([*command, "--dry-run"], env=environment, capture_output=True, text=True)
    assert "Would start 0 runs" in again.stdout and "4 finished" in again.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be used")
def test_a_run_that_is_given_a_gpu_does_not_do_without(tmp_path):
    arguments = ["--configs", *config_files(tmp_path, BASE), "--indices", "0", "--set", "device=auto", "--retries", "0"]
    command = [sys.executable, str(REPOSITORY / "run_sweep.py"), *arguments]
    environment = machine_with_gpus(tmp_path, "echo 0")
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert completed.returncode == 1
    assert re.search(rf'gave up   {BASE} index 0: exit status 2: error: device: "cuda" is not here', completed.stdout)
    assert not (tmp_path / "results" / BASE / "model_parameters").exists()


# --- What is planned, and what is refused ----------------------------------------------------------------------------------------


def test_a_grid_gives_every_point_its_own_experiment(tmp_path):
    cbp = str(REPOSITORY / "cfg" / "continual_backpropagation.json")
    grids = ["replacement_rate=1e-4,1e-5", "stepsize=0.1,0.01"]
    experiments = plan([cbp], [f"results_dir={tmp_path}", "momentum=0.5"], grids, [0, 1])
    assert [experiment.name for experiment in experiments] == [
        f"continual_backpropagation_replacement_rate={rate}_stepsize={size}" for rate in ("1e-4", "1e-5") for size in ("0.1", "0.01")
    ]
    assert [experiment.config.replacement_rate for experiment in experiments] == [1e-4, 1e-4, 1e-5, 1e-5]
    assert all(experiment.config.momentum == 0.5 and experiment.indices == (0, 1) for experiment in experiments)
    assert grid_points([]) == [()]


def test_jobs_take_the_lowest_indices_of_all_experiments_first():
    first, second = (Experiment("x", (), Config(experiment_name=name), (0, 1, 2)) for name in "ab")
    runs = [(experiment, index) for experiment in (first, second) for index in (0, 1, 2)]
    assert [(job.experiment.name, job.indices) for job in make_jobs(runs, 2)] == [("a", (0, 1)), ("b", (0, 1)), ("a", (2,)), ("b", (2,))]
    assert indices_text([0, 1, 2, 5, 7, 8]) == "0-2,5,7,8"


@pytest.mark.parametrize("width", [2, 64])
def test_sizes_of_models(width):
    state = build_network(1, width).state_dict()
    assert num_parameters(width) == sum(tensor.numel() for name, tensor in state.items() if not re.search("running|tracked", name))
    assert 0 <= sum(tensor.numel() * tensor.element_size() for tensor in state.values()) - model_bytes(Config(network_width=width)) < 300


@pytest.mark.parametrize(
    ("nvidia_smi", "visible", "places", "warning"),
    [
        ("echo 0; echo 1", None, ["GPU 0", "GPU 1"], ""),
        ("echo 0; echo 1; echo 'WARNING: infoROM is corrupted at gpu 0000:3B:00.0'; exit 14", None, ["GPU 0", "GPU 1"], ""),
        ("echo No devices were found", None, ["slot 1"], "nvidia-smi names no GPU: No devices were found"),
        ("echo 'Failed to initialize NVML: Unknown Error'; exit 255", None, ["slot 1"], "Failed to initialize NVML"),
        ("echo 0; echo 1", "1,GPU-8932f937-d72c,MIG-GPU-8932/1/0", ["GPU 1", "GPU GPU-8932f937-d72c", "GPU MIG-GPU-8932/1/0"], ""),
        ("echo 0; echo 1", "1,-1,0", ["GPU 1"], ""),  # as CUDA has it
        ("echo 0; echo 1", "none", ["slot 1"], ""),
        ("echo 0; echo 1", "garbage", ["slot 1"], 'CUDA_VISIBLE_DEVICES: "garbage" is no number or UUID of a GPU; it hides itself and the'),
        ("echo 0; echo 1", "0,x,1", ["GPU 0"], 'CUDA_VISIBLE_DEVICES: "x" is no number or UUID'),
        ("echo 0; echo 1", "1, 0,0", ["GPU 1", "GPU 0"], ""),
        ("echo 0; echo 1", "", ["slot 1"], ""),
    ],
)
def test_only_numbers_and_uuids_are_gpus(nvidia_smi, visible, places, warning, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", machine_with_gpus(tmp_path, nvidia_smi)["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(sweep_local.os, "sched_getaffinity", lambda process: {0}, raising=False)
    experiment = Experiment("x", (), Config(), (0,))
    assert [place.name for place in sweep_local.find_places([experiment], None, None)] == places
    error = capsys.readouterr().err
    assert warning in error if warning else not error


OK = ["--configs", "cfg/base_deep_learning_system.json", "--indices", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--indices", "0"], "--configs"),
        (OK[:2], "--indices"),
        ([*OK[:2], "--indices", "3-1"], '--indices: got "3-1"'),
        ([*OK, "--configs", "cfg/nothing.json"], "cfg/nothing.json: cannot read this config file"),
        ([*OK[:2], OK[1], *OK[2:]], "is there twice as base_deep_learning_system"),
        ([*OK[:2], "cfg/retrained_network.json", *OK[2:], "--set", "experiment_name=x"], "both have the experiment_name x"),
        ([*OK, "--set", "stepsize=0.1,0.2"], "for several values: --grid stepsize=0.1,0.2"),
        ([*OK, "--set", "stepsiz=0.1"], 'did you mean "stepsize"?'),
        ([*OK, "--grid", "stepsize"], '--grid: expected KEY=VALUE1,VALUE2,..., got "stepsize"'),
        ([*OK, "--grid", "stepsize=0.1,"], "--grid: expected KEY=VALUE1,VALUE2"),
        ([*OK, "--grid", "stepsize=0.1,x"], '--grid: stepsize is "x"; it must be a number'),
        ([*OK, "--grid", "stepsiz=0.1"], '--grid: unknown key "stepsiz"'),
        ([*OK, "--grid", "stepsize=0.1,1e-1"], "stepsize=0.1 and base_deep_learning_system_stepsize=1e-1 are the same settings"),
        ([*OK, "--grid", "stepsize=0.1", "stepsize=0.2"], '--grid: key "stepsize" appears twice'),
        ([*OK, "--grid", "stepsize=0.1", "--set", "stepsize=0.2"], "--grid: stepsize is also behind --set"),
        ([*OK, "--grid", "experiment_name=a,b"], "--grid: experiment_name cannot be part of a grid"),
        ([*OK, "--grid", "replacement_rate=1e-4"], "--grid: replacement_rate has no effect in cfg/base_deep_learning_system.json"),
        ([*OK, "--retries", "-1"], "--retries: got -1; it must be 0 or more"),
        ([*OK, "--retries", "x"], "--retries"),
        ([*OK, "--then", "analysis,dinner"], '--then: no step "dinner"; there are analysis, figures'),
        ([*OK, "--keep", "results"], "add --then analysis"),
        ([*OK, "--gpus", "7"], '--gpus: no GPU "7"'),
        ([*OK, "--runs-per-gpu", "2", "--set", "device=cpu"], "--runs-per-gpu: these runs use no GPU"),
        ([*OK, "--cores-per-run", "1000", "--set", "device=cpu"], "--cores-per-run: got 1000; there are"),
        ([*OK, "--set", "device=cuda:1"], 'device is "cuda:1"; a sweep chooses the GPUs itself'),
        ([*OK, "--cluster", "cloud"], "--cluster"),
        ([*OK, "--slurm", "partition=x"], "--slurm: belongs to --cluster slurm"),
        ([*OK, "--cluster", "slurm", "--gpus", "0"], "--gpus: belongs to --cluster local"),
        (
            [*OK, "--cluster", "slurm", "--slurm", "partition"],
            '--slurm: expected KEY=VALUE with the name of an option of sbatch, got "partition"',
        ),
        ([*OK, "--cluster", "slurm", "--slurm", "array=0-3"], "--slurm: array is what the sweep decides itself"),
        ([*OK, "--cluster", "slurm", "--slurm", "time=soon"], '--slurm: time is "soon"; it must be minutes'),
        ([*OK, "--cluster", "slurm", "--slurm", "time=1", "--signal-before", "60"], "do not fit into the jobs' time limit of 60 s"),
        ([*OK, "--cluster", "slurm", "--slurm", "time=10"], "--cluster slurm: there is no sbatch on this machine"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing-here"))
    results = tmp_path / "results"
    results.mkdir()
    overrides = ["--set", f"results_dir={results}", "dataset=synthetic"] if arguments[:1] == ["--configs"] else []
    assert run_script(run_sweep.main, [*arguments, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not [path for path in everything_in(results) if "config.json" not in path]


def test_a_run_that_was_started_with_other_settings_is_refused(uninterrupted, capsys):
    folder = uninterrupted(BASE)
    before = everything_in(folder)
    arguments = [
        "--configs",
        str(REPOSITORY / "cfg" / f"{BASE}.json"),
        "--indices",
        "0,1",
        "--set",
        *settings_text(folder.parent, stepsize=0.3),
    ]
    assert run_script(run_sweep.main, arguments) == 2
    assert "this run was started with other settings: stepsize (0.1 there, 0.3 here)" in capsys.readouterr().err
    assert everything_in(folder) == before


def test_requests_to_slurm():
    request = parse_request(["partition=gpu", "time=1-02:30:30", "cpus_per_task=4", "--exclusive=true", "array_parallelism=8"], 60)
    assert request == (26 * 60 + 31, {"partition": "gpu", "cpus-per-task": "4", "exclusive": True}, 8)
    minutes = {"90": 90, "90:30": 91, "1:30:00": 90, "1-12": 36 * 60, "1-12:30": 36 * 60 + 30}
    assert {text: parse_request([f"time={text}"], 30).minutes for text in minutes} == minutes


@pytest.mark.parametrize(
    ("option", "has_gpu"),
    [
        *[(option, True) for option in ("gpus=2", "gpus_per_node=a100:1", "gres=gpu", "gres=shard:1,gpu:a100:10", "gres=gpu:0,gpu:1")],
        *[(option, True) for option in ("tres_per_task=cpu:4,gres/gpu=1", "tres_per_job=gres/gpu:1")],
        *[(option, False) for option in ("gpus=0", "gpus_per_task=0", "gpus=a100:0", "gres=gpu:0", "gres=gpu:a100:0", "gres=none")],
        *[(option, False) for option in ("gres_flags=one-task-per-sharing,allow-gpu-task-sharing", "gpu_bind=closest", "cpus_per_gpu=4")],
        *[(option, False) for option in ("tres_per_task=cpu:4,gres/gpu=0", "partition=gpu")],
    ],
)
def test_which_requests_ask_for_a_gpu(option, has_gpu):
    assert parse_request([option], 30).has_gpu == has_gpu


# --- Parts -----------------------------------------------------------------------------------------------------------------------


def test_a_run_in_a_job_that_does_not_stop_in_time_is_killed(tmp_path, monkeypatch):
    """Slurm's warning came long ago, and the process has not ended its epoch: it is killed, so that the job can be queued again."""
    experiment = Experiment("x", (), Config(results_dir=str(tmp_path), experiment_name="a"), (0,))
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    monkeypatch.setattr(Job, "command", lambda self: [sys.executable, "-c", deaf])
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    signals = JobSignals()
    signals.warned_at = time.monotonic()
    assert _run_once(Job(experiment, (0,)), signals, signal_before=16) == -signal.SIGKILL
    log = (tmp_path / "a" / "logs" / "index-0.log").read_text()
    assert "killed by SIGKILL" in log


def test_who_was_asked_to_stop_is_seen(script, tmp_path):
    run = script([*tiny_arguments(BASE, tmp_path, epochs_per_task=100), "--verbose"])
    run.wait_for_output("Epoch 2/")
    assert not sweep_local.is_asked_to_stop(run.process.pid)
    run.send(signal.SIGTERM)
    wait_until(lambda: sweep_local.is_asked_to_stop(run.process.pid))
    assert run.wait() == 143


def a_status(name: str, state: str, epoch: int | None = None, **more) -> Status:
    return Status(Experiment("x", (), Config(experiment_name=name, num_tasks=4, epochs_per_task=5), (0,)), 0, state, epoch, **more)


def test_time_left_counts_steps_not_epochs():
    """Of 4 tasks the first two are 3/10 of the steps. Two places: one goes on for 70 s, the other takes the two that wait."""
    running = a_status("a", RUNNING, 10, seconds_left=70.0)
    assert running.done == pytest.approx(0.3)
    waiting = [a_status("a", QUEUED), a_status("b", QUEUED, 10)]
    assert seconds_left([running, *waiting], {}, 2) == pytest.approx(140)  # 100 in the second place, 70 after the first's 70
    assert seconds_left([*waiting, a_status("c", FINISHED, 20)], {}, 2) is None
    folder = waiting[0].experiment.folder
    assert seconds_left(waiting, {folder: 10.0}, 1) == pytest.approx(17)
    assert [duration_text(seconds) for seconds in (None, 45, 700, 4000, 200_000)] == ["-", "45 s", "12 min", "1 h 07 min", "2 d 7 h"]


def test_a_table_that_does_not_fit_leaves_out_what_is_over():
    statuses = [a_status(f"finished{n}", FINISHED, 20, test_accuracy=0.5) for n in range(10)]
    statuses += [a_status("running", RUNNING, 7, test_accuracy=0.25, seconds_left=100.0, note="GPU 0"), a_status("new", NEVER)]
    lines = status_table(statuses)
    assert len(lines) == 13
    assert lines[11].split() == ["running", "0", "running", "2/4", "7/20", "25.0", "%", "2", "min", "GPU", "0"]
    short = status_table(statuses, max_lines=6)
    assert len(short) == 6 and short[-1] == "... and 8 finished" and "running" in short[3]
    assert all(len(line) <= 20 for line in status_table(statuses, width=20))


def test_the_table_is_redrawn_in_place():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    display = sweep_local.Display(terminal)
    display.show(lambda height, width: ["a", "b"], str)
    display.say("event")
    display.show(lambda height, width: ["c"], str)
    display.end()
    display.say("over")
    assert re.fullmatch(r"a\nb\n\x1b\[2F\x1b\[J\d\d:\d\d:\d\d event\nc\n\d\d:\d\d:\d\d over\n", terminal.getvalue())


def test_holders_of_locks(tmp_path):
    path = tmp_path / "lock"
    assert lock_holder(path) is None
    with lock(path):
        assert lock_holder(path).startswith(f"host {os.uname().nodename}, process {os.getpid()}, since ")
    assert lock_holder(path) is None
    path.write_text(f"host {os.uname().nodename}, process {os.getpid()}, since long ago")  # of a killed process; its number is taken again
    assert lock_holder(path) is None


def test_other_settings_than_those_of_runs_that_may_still_wait_are_refused(tmp_path):
    (source,) = config_files(tmp_path, ALGORITHMS[0])
    (experiment,) = plan([source], [], [], [0])
    freeze_config(experiment)
    assert plan([source], ["device=cpu"], [], [1])  # what changes no result may change
    with pytest.raises(UserError, match=r"config\.json: this run was started with other settings: stepsize \(0\.1 there, 0\.2 here\)"):
        plan([source], ["stepsize=0.2"], [], [1])


def test_a_run_whose_process_has_not_got_its_lock_yet_is_running(tmp_path):
    (experiment,) = plan(config_files(tmp_path, ALGORITHMS[0]), [], [], [0])
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "incremental_cifar_experiment.py"])
    try:
        record = {"host": socket.gethostname(), "process": process.pid, "identity": safe_files.process_identity(process.pid)}
        new_record(experiment, 0, **record)
        assert read_status(experiment, 0, is_finished=False).note.endswith(f"process {process.pid}, starting")
        new_record(experiment, 0, **record | {"process": os.getpid()})  # another program with the number of an ended one
        assert read_status(experiment, 0, is_finished=False).state == NEVER
        new_record(experiment, 0, **record)
    finally:
        process.kill()
        wait_until(lambda: read_status(experiment, 0, is_finished=False).state == NEVER)  # though its parent has not asked for it
        process.wait()


@pytest.mark.parametrize("identity", [None, "", "boot 1, pid:[1], start 1", "own"])
def test_only_a_process_that_is_certainly_an_earlier_sweeps_is_stopped_with_ours(identity, tmp_path):
    """Of a container with the same host name, a process may have the number of another here."""
    (experiment,) = plan(config_files(tmp_path, BASE), [], [], [0])
    ours = {"host": socket.gethostname(), "process": os.getpid(), "place": "slot 1"}
    if identity is not None:  # else the record is an older version's
        ours["identity"] = safe_files.process_identity(os.getpid()) if identity == "own" else identity
    new_record(experiment, 0, **ours)
    workers = Workers([], Display(io.StringIO()))
    with lock(experiment.files(0).lock_file):
        sweep_local._Runs([read_status(experiment, 0, is_finished=False)], workers, 1, 1, {}, lambda *run: None)
    assert workers.adopted == ({os.getpid(): "slot 1"} if identity == "own" else {})


BAR = b"\rindex 0, task 1/2 (5 classes):   3.1% |          | 00:01, 01:02 left, epoch 2, test accuracy 0.100"
SEVERAL_BARS = b"\r  0.0% |          | 00:00, ? left\n\r  0.0% |          | 00:00, ? left\x1b[A" + BAR + b"\x1b[A"
ABORTED = "killed by SIGABRT (a library gave up)"
TRACEBACK = b'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n    f()\n    ^^^\nRuntimeError: CUDA error: no\n'


@pytest.mark.parametrize(
    ("status", "log", "text"),
    [
        (-6, b"begin\n" + BAR + b"double free or corruption (!prev)\n", f"{ABORTED}: double free or corruption (!prev)"),
        (134, BAR + b"\nfree(): invalid pointer\n" + SEVERAL_BARS, f"{ABORTED}: free(): invalid pointer"),
        (-6, BAR + b"terminate called\n  what():  out of range\nframe #0: f\n", f"{ABORTED}: out of range"),
        (-11, SEVERAL_BARS, "killed by SIGSEGV (a crash in a library)"),
        (139, b"Killed\nResuming index 0 after epoch 1 of 4.\n" + SEVERAL_BARS, "killed by SIGSEGV (a crash in a library): Killed"),
        (
            -11,
            b"index 0: Resuming index 0 after epoch 1 of 4.\nEpoch 2/4: task 1\n\tstep 25: a\n",
            "killed by SIGSEGV (a crash in a library)",
        ),
        (-9, BAR * 1000, "killed by SIGKILL (perhaps the system was out of memory)"),
        (137, b"", "killed by SIGKILL (perhaps the system was out of memory)"),
        (-7, BAR, "killed by SIGBUS (memory that it used was gone; perhaps a disk or /dev/shm is full)"),
        (-15, BAR, "killed by SIGTERM"),
        (143, b"SIGTERM: stopped after epoch 3\n", "stopped by SIGTERM: SIGTERM: stopped after epoch 3"),
        (1, SEVERAL_BARS + b"\n" + TRACEBACK + BAR, "exit status 1: RuntimeError: CUDA error: no"),
        (1, TRACEBACK + b"For debugging consider passing X=1\nindex 1: goes on\n", "exit status 1: RuntimeError: CUDA error: no"),
        (2, TRACEBACK + b"error: index 1: of another\nerror: index 0: mine\nend\n", "exit status 2: error: index 0: mine"),
        (-11, b"begin\nerror: index 1: of another\n", "killed by SIGSEGV (a crash in a library): begin"),
        (255, b"", "exit status 255"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_what_a_process_died_of_is_said_in_words(status, log, text, tmp_path):
    (experiment,) = plan(config_files(tmp_path, ALGORITHMS[0]), [], [], [0])
    path = experiment.folder / "logs" / "index-0.log"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"=== 2026-01-01 00:00:00 on here: python\n" + log)
    new_record(experiment, 0, has_failed=True, reason=sweep_local.status_text(status), log="logs/index-0.log")
    assert read_status(experiment, 0, is_finished=False).note == text


def test_a_crash_is_reported_with_its_last_words(tmp_path, monkeypatch, capsys):
    """In place of the experiment, a script that draws a bar and crashes as a library does."""
    script = tmp_path / "incremental_cifar_experiment.py"
    script.write_text(f"import os; os.write(2, {BAR + b'double free or corruption (!prev)' + BAR!r}); os.abort()")
    monkeypatch.setattr(sweep_plan, "EXPERIMENT_SCRIPT", script)
    (config,) = config_files(tmp_path, BASE)
    arguments = ["--configs", config, "--indices", "0"]
    assert run_script(run_sweep.main, arguments) == 1
    output, errors = capsys.readouterr()
    reason = ABORTED
    assert f"failed    {BASE} index 0: {reason}: double free or corruption (!prev); trying again" in output
    assert f"gave up   {BASE} index 0: {reason}: double free or corruption (!prev)" in output
    assert re.search(rf"failed: {BASE} index 0, {re.escape(reason)}; the end of .*:\n    double free or corruption \(!prev\)\n", errors)
    assert run_script(run_sweep.main, [*arguments, "--status"]) == 0
    assert f"{reason}: double free or corruption (!prev)" in capsys.readouterr().out
    # A run that dies while no sweep watches it.
    (experiment,) = plan([config], [], [], [0])
    new_record(experiment, 0, log="logs/index-0.log", reason="")
    assert read_status(experiment, 0, is_finished=False).note == "double free or corruption (!prev)"


def test_runs_that_wait_do_so_for_the_sweep_that_queued_them(tmp_path):
    (experiment,) = plan(config_files(tmp_path, ALGORITHMS[0]), [], [], [0])
    new_record(experiment, 0, is_waiting="host a, process 1, since then")
    assert read_status(experiment, 0, is_finished=False, sweep="host a, process 1, since then").state == QUEUED
    assert read_status(experiment, 0, is_finished=False, sweep="host a, process 2, since now").state == NEVER


def test_a_sigterm_that_comes_twice_at_once_stops_and_does_not_kill(monkeypatch):
    clock = [50.0]
    monkeypatch.setattr(sweep_local.time, "monotonic", lambda: clock[0])
    workers = Workers([], Display(io.StringIO()))
    for seconds in (0, 0.001, 1.5):
        clock[0] = 50.0 + seconds
        workers._note_signal(signal.SIGTERM, None)
    assert workers.signals == [signal.SIGTERM]
    workers._note_signal(signal.SIGINT, None)
    assert workers.signals == [signal.SIGTERM, signal.SIGINT]


def test_a_record_that_cannot_be_written_is_one_line(tmp_path):
    (experiment,) = plan(config_files(tmp_path, ALGORITHMS[0]), [], [], [0])
    experiment.folder.parent.mkdir(parents=True, exist_ok=True)
    experiment.folder.write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        new_record(experiment, 0, is_waiting="me")
