"""Shared by the tests: tiny settings, and runs of the experiment script in processes of their own that can be stopped."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = Path(__file__).resolve().parent / "reference"
ALGORITHMS = ("base_deep_learning_system", "continual_backpropagation", "head_resetting", "retrained_network", "shrink_and_perturb")

# A run of 3 tasks x 4 epochs with 4, 8 and 12 steps per epoch: about two seconds.
TINY = {
    "dataset": "synthetic",
    "num_tasks": 3,
    "classes_per_task": 2,
    "epochs_per_task": 4,
    "batch_size": 10,
    "train_images_per_class": 20,
    "validation_images_per_class": 5,
    "test_images_per_class": 5,
    "network_width": 2,
    "device": "cpu",
}
# So that every algorithm does in a tiny run what it does in a long one.
TINY_ALGORITHM = {
    "continual_backpropagation": {"replacement_rate": 0.05, "maturity_threshold": 3},
    "shrink_and_perturb": {"noise_std": 0.001},
}

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["incremental_cifar_experiment"])


def tiny_arguments(algorithm: str, results_dir: Path, **settings: object) -> list[str]:
    """Command-line arguments of a tiny run of an algorithm."""
    values = TINY | TINY_ALGORITHM.get(algorithm, {}) | {"results_dir": results_dir} | settings
    overrides = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]
    return ["--config", str(REPOSITORY / "cfg" / f"{algorithm}.json"), "--set", *overrides]


def _run_script(arguments: list[str], log: str) -> None:
    import incremental_cifar_experiment
    from incremental_cifar.command_line import run_script

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.exit(run_script(incremental_cifar_experiment.main, arguments))


class ScriptRun:
    """The experiment script in a process of its own, its output in a file. Exit status negative: ended by that signal."""

    def __init__(self, arguments: list[str], log: Path):
        self.log = log
        self.process = _processes.Process(target=_run_script, args=(arguments, str(log)))
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.output()}"
        return self.process.exitcode

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for_output(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert self.process.is_alive() and time.monotonic() < deadline, f"{text!r} did not appear in: {self.output()}"
            time.sleep(0.005)

    def send(self, signal_number: int) -> None:
        os.kill(self.process.pid, signal_number)


@pytest.fixture
def script(tmp_path):
    """Start the experiment script: `script(arguments)` returns a ScriptRun; what still runs at the end of the test is killed."""
    runs = []

    def start(arguments: list[str]) -> ScriptRun:
        runs.append(ScriptRun(arguments, tmp_path / f"output-{len(runs)}.txt"))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.join()


def stored_results(folder: Path) -> dict[str, bytes]:
    """The content of every .npy and model file of an experiment by relative path, run times excepted."""
    files = [*folder.rglob("*.npy"), *folder.glob("model_parameters/*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if "runtime" not in file.parent.name}


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file below a folder."""
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def rng():
    return np.random.default_rng(0)
