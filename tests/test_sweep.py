"""Sweeps on this machine: what is planned and refused, run, stopped, gone on with, tried again, analysed and shown."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, ForkedScript, ScriptRun, differing_results, everything_in, tiny_arguments

import run_sweep
from incremental_cifar import sweep_local
from incremental_cifar.command_line import run_script
from incremental_cifar.config import Config
from incremental_cifar.run_files import RunFiles, Runs, how_it_stands
from incremental_cifar.safe_files import lock_holder
from incremental_cifar.sweep_local import LocalSweep, find_places

BASE, CBP = "base_deep_learning_system", "continual_backpropagation"


# --- Sweeps in processes of their own --------------------------------------------------------------------------------------------


def as_a_sweep(environment: dict[str, str]) -> None:
    """Its runs start at once, and it has a process group of its own, and two cores."""
    os.setsid()
    os.environ.update(environment)
    sweep_local.subprocess = types.SimpleNamespace(Popen=ForkedScript, DEVNULL=subprocess.DEVNULL)
    sweep_local.os.sched_getaffinity = lambda process: {0, 1}


def trained(sweep: ScriptRun) -> list[str]:
    """The runs whose training it began, in order."""
    return re.findall(r"^\S+ train +(\S+ index \S+)", sweep.output(), re.MULTILINE)


@pytest.fixture
def sweep(tmp_path, script):
    """Start a sweep of tiny runs: `sweep(arguments)`; what still runs at the end of the test is killed."""
    yield lambda arguments, **environment: script(arguments, functools.partial(as_a_sweep, environment), script="run_sweep")
    for path in tmp_path.rglob(".index-*.lock"):
        if match := re.search(r"process (\d+)", lock_holder(path) or ""):
            os.kill(int(match[1]), signal.SIGKILL)


def config_files(folder: Path, *algorithms: str, **settings: object) -> list[str]:
    """`--configs` and a tiny config of each algorithm, in files with its name; results go to results/ in the folder."""
    paths = []
    for algorithm in algorithms:
        arguments = tiny_arguments(algorithm, folder / "results", **settings)
        (runs,) = run_sweep.plan([arguments[1]], arguments[3:], [], [0])
        paths.append(folder / f"{algorithm}.json")
        paths[-1].write_text(json.dumps(runs.config.to_dict()))
    return ["--configs", *map(str, paths)]


def hold(files: RunFiles, sweep: ScriptRun) -> int:
    """Wait until a run has begun, and have its process stand still; return its number."""
    said = {}

    def has_begun() -> bool:
        said.update(files.load_progress())
        return f"process {said.get('process')}," in (lock_holder(files.lock_file) or "")

    sweep.wait_until(has_begun)
    os.kill(said["process"], signal.SIGSTOP)
    sweep.wait_until(lambda: ") T " in Path(f"/proc/{said['process']}/stat").read_text())
    return said["process"]


@pytest.mark.parametrize(
    ("to_all", "signals"),
    [(True, [signal.SIGINT]), (True, [signal.SIGTERM, signal.SIGTERM]), (False, [signal.SIGHUP, signal.SIGTERM])],
    ids=["Ctrl-C", "a doubled SIGTERM to all", "two signals to the sweep alone"],
)
def test_a_stopped_sweep_and_the_same_command_again(to_all, signals, tmp_path, sweep, uninterrupted):
    """The runs under way stop with checkpoints, no other begins, and in the end all results are those of runs by hand, to the bit."""
    arguments = [*config_files(tmp_path, BASE, CBP), "--indices", "0,1"]
    first = sweep(arguments)
    runs = [RunFiles(tmp_path / "results" / name, 0) for name in (BASE, CBP)]
    held = [hold(files, first) for files in runs]
    for number in signals:
        (os.killpg if to_all else os.kill)(first.process.pid, number)
    for process in held:
        first.wait_until(lambda process=process: has_pending(process, signal.SIGTERM))
        os.kill(process, signal.SIGCONT)
    assert first.wait() == 128 + signals[0], first.output()
    assert sorted(trained(first)) == [f"{BASE} index 0", f"{CBP} index 0"]
    assert first.output().count("with a checkpoint; the same command resumes") == 2
    assert all(how_it_stands(files, files.load_config())[0] == "interrupted" and files.checkpoints() for files in runs)

    second = sweep(arguments)
    assert second.wait() == 0, second.output()
    assert [differing_results(uninterrupted(files.folder.name), files.folder, "index-0") for files in runs] == [[], []]
    assert all("Resuming index 0" in (files.folder / "logs" / "index-0.log").read_text() for files in runs)
    before = everything_in(tmp_path / "results")
    third = sweep(arguments)
    assert third.wait() == 0 and trained(third) == []
    assert everything_in(tmp_path / "results") == before


def has_pending(process: int, number: int) -> bool:
    """Whether a signal waits for a process that stands still (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in pending)


def test_a_failing_run_is_tried_again_reported_and_takes_no_other_with_it(tmp_path, sweep, capsys):
    diverging = config_files(tmp_path, "head_resetting", stepsize=1e30)
    arguments = [*config_files(tmp_path, BASE, num_tasks=1), diverging[1], "--indices", "0,1", "--retries", "2", "--analyse"]
    run = sweep(arguments)
    assert run.wait() == 1, run.output()
    assert trained(run).count("head_resetting index 0") == 3 and trained(run).count(f"{BASE} index 0") == 1
    log = tmp_path / "results" / "head_resetting" / "logs" / "index-1.log"
    reason = "error: the loss is no longer finite in epoch 1"
    assert re.search(rf"\nerror: train head_resetting index 1: exit status 2: {reason} .* \({log}\)\n", run.output())
    assert log.read_text().count("=== started: ") == 3
    assert (tmp_path / "results" / "figures" / "next_task_stable_rank_analysis.svg").exists()
    assert run_script(run_sweep.main, [*arguments, "--status"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"head_resetting +1 +failed +{reason}", shown) and shown.endswith("\n2 analysed, 2 failed\n")


def test_runs_of_a_killed_sweep_go_on_and_are_not_started_twice(tmp_path, sweep, uninterrupted):
    arguments = [*config_files(tmp_path, BASE), "--indices", "0-2"]
    first = sweep(arguments)
    runs = [RunFiles(tmp_path / "results" / BASE, index) for index in (0, 1)]
    held = [hold(files, first) for files in runs]
    os.kill(first.process.pid, signal.SIGKILL)
    first.wait()
    second = sweep(arguments)
    for index, process in enumerate(held):
        second.wait_until(lambda index=index: f"waiting   {BASE} index {index}: left to host " in second.output())
        os.kill(process, signal.SIGCONT)
    assert second.wait() == 0, second.output()
    assert trained(second) == [f"{BASE} index 2"] and runs[0].finished_indices() == [0, 1, 2]
    assert differing_results(uninterrupted(BASE), runs[0].folder, "index-0") == []


def test_two_sweeps_at_once_share(tmp_path, sweep, uninterrupted):
    arguments = [*config_files(tmp_path, BASE), "--indices", "0-3", "--analyse", "--keep", "results"]
    both = [sweep(arguments), sweep(arguments)]
    assert [one.wait() for one in both] == [0, 0], "".join(one.output() for one in both)
    folder = tmp_path / "results" / BASE
    for index in range(4):
        log = (folder / "logs" / f"index-{index}.log").read_text()
        assert log.count("is finished; its results are in") == log.count(": analysed.\n") == 1
    assert os.listdir(folder / "model_parameters") == os.listdir(folder / "experiment_checkpoints") == []
    assert differing_results(uninterrupted(BASE), folder, "_per_epoch/index-0") == []


@pytest.mark.parametrize("is_stuck", [True, False])
def test_a_time_limit_without_progress_is_an_error(is_stuck, tmp_path, sweep):
    """In a job of Slurm: exit status 138 has it queued again, 1 ends it."""
    arguments = [*config_files(tmp_path, BASE, epochs_per_task=4000), "--indices", "0,1", "--pack", "1"]
    run = sweep(arguments, SECONDS_TO_STOP="1" if is_stuck else "600")
    files = RunFiles(tmp_path / "results" / BASE, 1)
    process = hold(files, run)
    if not is_stuck:
        os.kill(process, signal.SIGCONT)
    os.kill(run.process.pid, signal.SIGUSR1)
    assert run.wait() == (1 if is_stuck else 138), run.output()
    assert trained(run) == [f"{BASE} index 1"]
    assert ("error: no checkpoint and no analysis within the time limit" in run.output()) == is_stuck
    assert bool(files.checkpoints()) != is_stuck


def test_a_limit_during_the_analysis_is_progress_once(tmp_path, sweep):
    """The first time the run has been finished before it, the second time nothing."""
    arguments = [*config_files(tmp_path, BASE, num_tasks=1), "--indices", "0", "--pack", "0", "--analyse"]
    for status in (138, 1):
        run = sweep(arguments, SECONDS_TO_STOP="1")
        run.wait_for_output("analyse   ")
        tasks = Path(f"/proc/{run.process.pid}/task")
        run.wait_until(lambda tasks=tasks: any(path.read_text() for path in tasks.glob("*/children")))
        os.kill(int("".join(path.read_text() for path in tasks.glob("*/children"))), signal.SIGSTOP)
        run.send(signal.SIGUSR1)
        assert run.wait() == status, run.output()
    assert sweep(arguments).wait() == 0
    files = RunFiles(tmp_path / "results" / BASE, 0)
    assert how_it_stands(files, files.load_config()) == ("analysed", "")


def machine_with_gpus(folder: Path, nvidia_smi: str) -> dict[str, str]:
    """The environment on a machine whose nvidia-smi is these lines of shell."""
    write_program(folder / "bin" / "nvidia-smi", nvidia_smi)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment


def write_program(path: Path, lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def test_from_the_command_to_the_figures(tmp_path):
    """Real processes, two indices packed into one, on GPUs for which the CPU stands in; only results are kept."""
    environment = machine_with_gpus(tmp_path, "echo 0; echo 1")
    stand_in = "import sys; sys.argv[1:] = [{'device=cuda': 'device=cpu', 'cuda': 'cpu'}.get(word, word) for word in sys.argv[1:]]"
    (tmp_path / "sitecustomize.py").write_text(stand_in)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(REPOSITORY / "run_sweep.py"), *config_files(tmp_path, BASE, "retrained_network", num_tasks=2)]
    command += ["--indices", "0,1", "--set", "device=auto", "--runs-per-gpu", "2", "--analyse", "--keep", "results"]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert f"train     {BASE} index 0,1 (GPU 0)" in completed.stdout
    results = tmp_path / "results"
    for name in (BASE, "retrained_network"):
        assert len(os.listdir(results / name / "next_task_stable_rank_analysis")) == 2
        assert os.listdir(results / name / "model_parameters") == os.listdir(results / name / "experiment_checkpoints") == []
        assert json.loads((results / name / "config_files" / "index-0.json").read_text())["device"] == "cpu"  # where there is a GPU, too
    assert {"paper_figure.png", "test_accuracy_figure.svg", "next_task_stable_rank_analysis.svg"} <= set(os.listdir(results / "figures"))
    again = subprocess.run([*command, "--dry-run"], env=environment, capture_output=True, text=True)
    assert "Would start 0 processes on GPU 0, GPU 1" in again.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be used")
def test_a_run_that_is_given_a_gpu_does_not_do_without(tmp_path):
    command = [sys.executable, str(REPOSITORY / "run_sweep.py"), *config_files(tmp_path, BASE), "--indices", "0", "--retries", "0"]
    environment = machine_with_gpus(tmp_path, "echo 0")
    completed = subprocess.run([*command, "--set", "device=auto"], env=environment, capture_output=True, text=True)
    assert completed.returncode == 1
    assert re.search(rf'gave up   {BASE} index 0: exit status 2: error: device: "cuda" is not here', completed.stdout)
    assert not (tmp_path / "results" / BASE / "model_parameters").exists()


# --- What is planned, and what is refused ----------------------------------------------------------------------------------------


def test_a_grid_gives_every_point_its_own_experiment(tmp_path, capsys):
    """And of all of them, the lowest indices come first, in packs."""
    arguments = [*config_files(tmp_path, CBP), "--set", "momentum=0.5", "--grid", "replacement_rate=1e-4,1e-5", "stepsize=0.1,0.01"]
    names = [f"{CBP}_replacement_rate={rate}_stepsize={size}" for rate in ("1e-4", "1e-5") for size in ("0.1", "0.01")]
    experiments = run_sweep.plan([arguments[1]], ["momentum=0.5"], arguments[-2:], [0, 1])
    assert [runs.folder for runs in experiments] == [tmp_path / "results" / name for name in names]
    assert [runs.config.replacement_rate for runs in experiments] == [1e-4, 1e-4, 1e-5, 1e-5]
    assert all(runs.config.momentum == 0.5 and runs.indices == (0, 1) for runs in experiments)
    RunFiles(experiments[1].folder, 0).mark_finished()
    assert run_script(run_sweep.main, [*arguments, "--indices", "0-2", "--runs-per-gpu", "2", "--dry-run"]) == 0
    packs = [f"{names[0]} index 0,1", f"{names[1]} index 1,2", *(f"{name} index 0,1" for name in names[2:])]
    assert capsys.readouterr().out.splitlines()[1:] == [*packs, *(f"{names[n]} index 2" for n in (0, 2, 3))]


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
        ("echo 0; echo 1", "0,x,1", ["GPU 0"], ""),
        ("echo 0; echo 1", "1, 0,0", ["GPU 1", "GPU 0"], ""),
    ],
)
def test_only_numbers_and_uuids_are_gpus(nvidia_smi, visible, places, warning, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", machine_with_gpus(tmp_path, nvidia_smi)["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(sweep_local.os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert list(find_places([Runs("x", Config(), (0,))], None)) == places
    error = capsys.readouterr().err
    assert warning in error if warning else not error


@pytest.mark.parametrize(("threads", "num_places"), [(None, 4), ("2", 2), ("8", 1), ("many", 1)])
def test_places_on_cores(threads, num_places, monkeypatch):
    monkeypatch.setattr(sweep_local.os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS") if threads is None else monkeypatch.setenv("OMP_NUM_THREADS", threads)
    places = find_places([Runs("x", Config(device="cpu"), (0,))], None)
    assert [place["OMP_NUM_THREADS"] for place in places.values()] == [threads or "1"] * num_places


OK = ["--configs", "cfg/base_deep_learning_system.json", "--indices", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (OK[:2], "--indices"),
        ([*OK[:2], "--indices", "3-1"], '--indices: got "3-1"'),
        ([*OK, "--configs", "cfg/nothing.json"], "cfg/nothing.json: cannot read this config file"),
        ([*OK[:2], OK[1], *OK[2:]], "the experiment_name base_deep_learning_system is there twice"),
        ([*OK[:2], "cfg/retrained_network.json", *OK[2:], "--set", "experiment_name=x"], "the experiment_name x is there twice"),
        ([*OK, "--set", "stepsiz=0.1"], 'did you mean "stepsize"?'),
        (
            [*OK, "--grid", "stepsize"],
            '--grid: expected KEY=VALUE1,VALUE2,... of a setting that is there once and names no place, got "stepsize"',
        ),
        ([*OK, "--grid", "stepsize=0.1,x"], '--grid: stepsize is "x"; it must be a number'),
        ([*OK, "--grid", "stepsiz=0.1"], '--grid: unknown key "stepsiz"'),
        ([*OK, "--grid", "stepsize=0.1,1e-1"], "stepsize=0.1 and base_deep_learning_system_stepsize=1e-1 are the same settings"),
        ([*OK, "--grid", "stepsize=0.1", "stepsize=0.2"], "--grid: expected KEY=VALUE1,VALUE2"),
        ([*OK, "--grid", "stepsize=0.1", "--set", "stepsize=0.2"], '--grid: key "stepsize" appears twice'),
        ([*OK, "--grid", "experiment_name=a,b"], "--grid: expected KEY=VALUE1,VALUE2"),
        ([*OK, "--grid", "replacement_rate=1e-4"], "--grid: replacement_rate has no effect in cfg/base_deep_learning_system.json"),
        ([*OK, "--retries", "-1"], "--retries must be 0 or more"),
        ([*OK, "--runs-per-gpu", "11"], "--runs-per-gpu from 1 to 10"),
        ([*OK, "--pack", "1"], "--pack: got 1; no pack of --indices begins with it"),
        ([*OK, "--keep", "results"], "add --analyse"),
        ([*OK, "--gpus", "7"], '--gpus: no GPU "7"'),
        ([*OK, "--set", "device=cuda"], 'device is "cuda", but there is no GPU here'),
        ([*OK, "--set", "device=cuda:1"], 'device is "cuda:1"; a sweep chooses the GPUs itself'),
        ([*OK, "--grid", "momentum=0.1,0.2", "--set", "results_dir=/dev/null"], "/dev/null/base_deep_learning_system_momentum=0.1/logs"),
        ([*OK, "--then", "analysis"], "--then: there is no such option any more; it is --analyse now"),
        ([*OK, "--cluster=slurm"], "--cluster: there is no such option any more; it is --slurm now"),
        ([*OK, "--slurm", "--gpus", "0"], "--gpus: these are this machine's"),
        ([*OK, "--slurm", "partition"], '--slurm: expected KEY=VALUE with the name of an option of sbatch, got "partition"'),
        ([*OK, "--slurm", "array=0-3"], "--slurm: array is what the sweep decides itself"),
        ([*OK, "--slurm", "time=1", "time=2"], "--slurm: time is there twice"),
        ([*OK, "--slurm", "time=10"], "--slurm: there is no squeue on this machine"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing-here"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    results = tmp_path / "results"
    overrides = ["--set", f"results_dir={results}"] if "results_dir" not in str(arguments) and arguments[:1] == ["--configs"] else []
    assert run_script(run_sweep.main, [*arguments, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not results.exists()


def test_a_run_that_was_started_with_other_settings_is_refused(uninterrupted, capsys):
    folder = uninterrupted(BASE)
    before = everything_in(folder)
    arguments = tiny_arguments(BASE, folder.parent, stepsize=0.3)
    assert run_script(run_sweep.main, ["--configs", *arguments[1:], "--indices", "0,1"]) == 2
    assert "this run was started with other settings: stepsize (0.1 there, 0.3 here)" in capsys.readouterr().err
    assert everything_in(folder) == before


def test_an_unreadable_folder_does_not_hide_how_the_others_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_sweep.shutil, "which", lambda program: None)
    arguments = [*config_files(tmp_path, BASE, CBP), "--indices", "0"]
    for name in ("experiment_indices.npy", "config_files/index-0.json"):
        path = tmp_path / "results" / BASE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("nonsense")
    assert run_script(run_sweep.main, [*arguments, "--status"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "  unusable " in shown[0] and "index-0.json: cannot read the stored" in shown[0] and shown[1].endswith("  never started")
    assert run_script(run_sweep.main, arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- Parts -----------------------------------------------------------------------------------------------------------------------


def test_a_run_queued_on_slurm_is_left_to_it(tmp_path, monkeypatch, capsys):
    arguments = [*config_files(tmp_path, BASE), "--indices", "0-4"]
    (runs,) = run_sweep.plan(arguments[1:2], [], [], [0])
    name = runs.job_name
    lines = [f"{name}|0|7_0|PENDING|Resources|0,1/3", f"{name}|3|7_3|RUNNING|None|0,1/3"]
    write_program(tmp_path / "bin" / "squeue", "\n".join(f"echo '{line}'" for line in lines))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert run_script(run_sweep.main, [*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"{BASE} index 2", f"{BASE} index 4"]
    assert run_script(run_sweep.main, [*arguments, "--status"]) == 0
    assert re.findall(r" (\d)  (queued|running) +(.+)", capsys.readouterr().out) == [
        ("0", "queued", "7_0, pending (Resources)"),
        ("1", "queued", "7_0, pending (Resources)"),
        ("3", "running", "starting, 7_3, running"),
    ]
    for index in (2, 4):
        RunFiles(runs.folder, index).mark_finished()
    assert run_script(run_sweep.main, arguments) == 1  # not all is finished
    assert "warning: 3 runs are queued on Slurm, and left to it" in capsys.readouterr().err


def test_failures_are_counted_anew_after_progress(tmp_path, monkeypatch):
    """Three attempts, of which the second comes further, are within one retry; the fourth is not."""
    attempts = []
    runs = Runs("x", Config(results_dir=str(tmp_path), experiment_name="a"), (0,))
    monkeypatch.setattr(LocalSweep, "run_process", lambda *arguments: attempts.append(1) or "why")
    monkeypatch.setattr(Runs, "progress", lambda self: len(attempts) >= 2)
    sweep = LocalSweep([runs], {"slot 1": {}}, retries=1, analyse=False, keep="all")
    sweep.work("slot 1")
    assert len(attempts) == 3 and sweep.problems == ["train a index 0: why"]
    handler = signal.getsignal(signal.SIGTERM)
    sweep.run()  # nothing is left: signals are the figures' again
    assert signal.getsignal(signal.SIGTERM) == handler
