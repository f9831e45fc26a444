"""Shared by the tests: tiny settings, and runs of the experiment script in processes of their own that can be stopped."""

import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = Path(__file__).resolve().parent / "reference"
ALGORITHMS = tuple(sorted(path.stem for path in (REPOSITORY / "cfg").glob("*.json")))

# A run of 3 tasks x 4 epochs with 4, 8 and 12 steps per epoch: about a second.
TINY = {
    "dataset": "synthetic",
    "num_tasks": 3,
    "classes_per_task": 2,
    "epochs_per_task": 4,
    "batch_size": 5,
    "train_images_per_class": 10,
    "validation_images_per_class": 5,
    "test_images_per_class": 5,
    "network_width": 2,
    "device": "cpu",
}
# So that every algorithm does in a tiny run what it does in a long one; those that do so by themselves need no entry.
TINY_ALGORITHM = {
    "continual_backpropagation": {"replacement_rate": 0.05, "maturity_threshold": 3},
    "shrink_and_perturb": {"noise_std": 0.001},
    "selective_weight_reinitialization": {"reinit_freq": 7, "reinit_factor": 0.1},
    "l2_init": {"l2_init": 0.01},
    "redo": {"redo_reinit_frequency": 3, "redo_reinit_threshold": 0.5},
    # A step size with which units fall silent.
    "self_normalized_resets": {"stepsize": 1, "snr_first_threshold": 2, "snr_max_threshold": 4, "snr_update_frequency": 10},
}

GPU = torch.device("cuda", 0)  # of the tests marked `gpu`
# Of their runs: smaller batches beside replayed ones, and channels as cuDNN likes them. What is compiled has tests of its own.
GPU_SETTINGS = {"device": GPU, "batch_size": 12, "network_width": 8, "compile_network": False}

# Tiny tensors: a second thread costs more than it brings, here and in the processes that tests start, above all beside other work.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["incremental_cifar_experiment"])


# How often the tests of crash safety try: a few times, or with STRESS=1 (`make stress`) as often as docs/reliability.md says.
STRESS = os.environ.get("STRESS") == "1"
stress_counts: dict[str, str] = {}  # what they count, for the table at the end


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter):
    if STRESS and stress_counts:
        width = max(map(len, stress_counts))
        lines = [f"| {'what':{width}} | count |", f"| {'-' * width} | ----- |"]
        lines += [f"| {what:{width}} | {count} |" for what, count in stress_counts.items()]
        terminalreporter.write_line("\n".join(["", *lines, ""]))


def tiny_arguments(algorithm: str, results_dir: Path, **settings: object) -> list[str]:
    """Command-line arguments of a tiny run of an algorithm."""
    values = TINY | TINY_ALGORITHM.get(algorithm, {}) | {"results_dir": results_dir} | settings
    overrides = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    return ["--config", str(REPOSITORY / "cfg" / f"{algorithm}.json"), "--set", *overrides]


def _run_script(arguments: list[str], log: str, prepare: Callable[[], None] | None, script: str) -> None:
    from incremental_cifar.command_line import run_script

    main = importlib.import_module(script).main

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.exit(run_script(main, arguments))


class ScriptRun:
    """The experiment script, or another, in a process of its own, its output in a file. Exit status negative: ended by that signal.

    prepare: called in that process before the script; can be pickled.
    """

    def __init__(
        self, arguments: list[str], log: Path, prepare: Callable[[], None] | None = None, script: str = "incremental_cifar_experiment"
    ):
        self.log = log
        self.process = processes.Process(target=_run_script, args=(arguments, str(log), prepare, script))
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.output()}"
        return self.process.exitcode

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for_output(self, text: str, seconds: float = 120) -> None:
        self.wait_until(lambda: text in self.output(), f"{text!r} did not appear", seconds)

    def wait_until(self, condition: Callable[[], object], complaint: str = "waited in vain", seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive() and time.monotonic() < deadline, f"{complaint}: {self.output()}"
            time.sleep(0.005)

    def send(self, signal_number: int) -> None:
        os.kill(self.process.pid, signal_number)


class ForkedScript:
    """In place of `subprocess.Popen`: one of our scripts in a fork, which has imported already what takes seconds."""

    def __init__(self, command, stdin, stdout, stderr, env):
        from incremental_cifar.command_line import STOP_SIGNALS, run_script

        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                for number in (1, 2):
                    os.dup2(stdout.fileno(), number)
                os.closerange(3, 256)  # the sweep's locks too
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
                for number in STOP_SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                os.environ.update(env)
                status = run_script(importlib.import_module(Path(command[1]).stem).main, command[2:])
            except SystemExit as leaving:
                status = leaving.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def script(tmp_path):
    """Start the experiment script: `script(arguments)` returns a ScriptRun; what still runs at the end of the test is killed."""
    runs = []

    def start(arguments: list[str], prepare: Callable[[], None] | None = None, **options: str) -> ScriptRun:
        runs.append(ScriptRun(arguments, tmp_path / f"output-{len(runs)}.txt", prepare, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.join()


def stored_results(folder: Path) -> dict[str, bytes]:
    """The content of every .npy and model file of an experiment by relative path, run times excepted."""
    files = [*folder.rglob("*.npy"), *folder.glob("model_parameters/*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if "runtime" not in file.parent.name}


def differing_results(one: Path, other: Path, pattern: str = "") -> list[str]:
    """The names of the results that two experiments do not share, or that differ; pattern: only of files with this in their names."""
    mine, theirs = stored_results(one), stored_results(other)
    assert mine
    return sorted(name for name in mine.keys() | theirs.keys() if pattern in name and mine.get(name) != theirs.get(name))


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file below a folder, locks excepted."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The folder of an uninterrupted tiny run of each algorithm, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    def of(algorithm: str) -> Path:
        if not (folder / algorithm).exists():
            run = ScriptRun(tiny_arguments(algorithm, folder), folder / f"{algorithm}.txt")
            assert run.wait() == 0, run.output()
        return folder / algorithm

    return of


@pytest.fixture
def rng():
    return np.random.default_rng(0)
