"""What holds for every algorithm: runs of earlier code go on, and what an algorithm counts is stored."""

import copy
import itertools
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, REFERENCE, TINY, TINY_ALGORITHM, differing_results, tiny_arguments

import incremental_cifar_experiment
import post_run_analysis
from incremental_cifar import learner
from incremental_cifar.algorithms import Algorithm, epoch_metrics
from incremental_cifar.algorithms.continual_backprop import ResetSchedule
from incremental_cifar.config import load_config
from incremental_cifar.learner import Learner
from incremental_cifar.run_files import RunFiles
from incremental_cifar.training import device_name, example_batch, tensors_in

EARLIER_RUNS = sorted((REFERENCE / "interrupted_runs").glob("*.tar.xz"))


@pytest.fixture
def earlier_run(tmp_path):
    """The folder of a finished run of commit 69c2b62, with its checkpoint in the middle of the second of three tasks."""

    def of(archive):
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / "finished", filter="data")
        return tmp_path / "finished" / archive.name.removesuffix(".tar.xz")

    return of


@pytest.mark.parametrize("archive", EARLIER_RUNS, ids=lambda archive: archive.name)
def test_a_checkpoint_of_earlier_code_resumes_to_what_that_code_got(archive, earlier_run, tmp_path):
    """To the bit, if this is the machine and the PyTorch that made it; elsewhere last bits differ, and soon all."""
    finished = earlier_run(archive)
    folder = tmp_path / "resumed" / finished.name
    for name in ("config_files/index-0.json", "class_order/index-0.npy", "experiment_checkpoints/index-0_epoch-6.pt"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(finished / name, folder / name)
    (folder / "model_parameters").mkdir()
    for epoch in (0, 4):
        shutil.copy(finished / f"model_parameters/index-0_epoch-{epoch}.pt", folder / "model_parameters")
    settings = json.loads((finished / "config_files/index-0.json").read_text())
    arguments = [f"{key}={str(value).lower() if type(value) is bool else value}" for key, value in settings.items() if key[0] != "_"]
    config = tiny_arguments(finished.name, folder.parent)[:2]
    assert incremental_cifar_experiment.main([*config, "--set", *arguments, f"results_dir={folder.parent}"]) == 0
    counted = {str(path.relative_to(folder)) for path in folder.glob("*_reset_per_epoch/*")}
    assert bool(counted) == settings["use_cbp"]
    there = settings["_environment"]
    if (there["torch"], there["device"]) == (torch.__version__, device_name(torch.device("cpu"))):
        assert set(differing_results(finished, folder)) == counted
    for path in finished.glob("*_loss_per_epoch/*.npy"):  # the seventh epoch is the first after the checkpoint
        np.testing.assert_allclose(np.load(folder / path.relative_to(finished))[:7], np.load(path)[:7], rtol=0.02)


@pytest.mark.parametrize("archive", EARLIER_RUNS, ids=lambda archive: archive.name)
def test_a_finished_run_of_earlier_code_is_finished_and_can_be_analysed(archive, earlier_run, capsys):
    folder = earlier_run(archive)
    assert post_run_analysis.main(["--results_dir", str(folder)]) == 0
    assert np.isfinite(np.load(folder / "next_task_stable_rank_analysis/index-0.npy")).all()
    assert RunFiles(folder, 0).is_analysed(3)


def test_units_reset_are_counted_per_epoch(uninterrupted):
    """As many as the layers' schedules say, in the steps of each epoch."""
    counts = np.load(uninterrupted("continual_backpropagation") / "units_reset_per_epoch/index-0.npy")
    schedules = [ResetSchedule(size, 0.05, 3) for size in [2] * 5 + [4] * 4 + [8] * 4 + [16] * 4]
    steps = iter(range(1, 97))
    expected = [
        sum(schedule.num_due(next_step) for next_step in itertools.islice(steps, num_steps) for schedule in schedules)
        for num_steps in [4] * 4 + [8] * 4 + [12] * 4
    ]
    assert counts.tolist() == expected and counts.dtype == np.float32
    assert not list(uninterrupted("base_deep_learning_system").glob("*_reset_per_epoch"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_state_taken_anywhere_is_all_that_later_steps_depend_on(algorithm):
    """Within an epoch and within a method's periods, on into the next task, to the bit."""
    values = (TINY | TINY_ALGORITHM.get(algorithm, {})).items()
    config = load_config(f"cfg/{algorithm}.json", [f"{key}={value}" for key, value in values])
    batch = example_batch(10, torch.device("cpu"))

    def learn(learner, steps):
        for step in steps:
            learner.training_step(*batch, step)
            if step == 12:
                learner.begin_task(0)
        return tensors_in(learner.training_step.state_dict())

    whole, first, resumed = (Learner(config, 3, torch.device("cpu")) for _ in range(3))
    learn(first, range(9))
    resumed.training_step.load_state_dict(copy.deepcopy(first.training_step.state_dict()))
    for one, other in zip(learn(resumed, range(9, 20)), learn(whole, range(20)), strict=True):
        assert torch.equal(one, other)


class Own(Algorithm):
    """What somebody may write."""

    def __init__(self, name="own_per_epoch", state=None):
        self.name, self.state = name, state or {}
        self.had_gradients = set()

    def change_gradients(self):
        self.had_gradients.add(torch.is_grad_enabled())

    observe = after_step = end_task = lambda self, argument: self.had_gradients.add(torch.is_grad_enabled())

    def metrics(self):
        self.had_gradients.add(torch.is_grad_enabled())
        return {self.name: 1}

    def state_dict(self):
        return self.state


def own_learner(monkeypatch, *algorithms):
    config = load_config("cfg/base_deep_learning_system.json", [f"{key}={value}" for key, value in TINY.items()])
    monkeypatch.setattr(learner, "make_algorithms", lambda *_: algorithms)
    return Learner(config, 3, torch.device("cpu"))


@pytest.mark.parametrize(
    "name",
    ["clipped", "class_order", "test_accuracy_per_epoch", "train_accuracy_per_checkpoint", "../other_per_epoch", "", "a b_per_epoch"],
)
def test_a_metric_whose_name_could_be_something_elses_is_refused_before_the_run(name, monkeypatch):
    with pytest.raises(ValueError, match=r"Own\.metrics: .* must end in _per_epoch"):
        own_learner(monkeypatch, Own(name))


@pytest.mark.parametrize("state", [{"n": np.float64(3)}, {"n": object()}, {"n": 3}, {"n": [torch.zeros(1)]}])
def test_a_state_that_could_not_be_resumed_from_is_refused_before_the_run(state, monkeypatch):
    with pytest.raises(ValueError, match=r"Own\.state_dict: what it gives cannot be stored and filled in again"):
        own_learner(monkeypatch, Own(state=state))


def test_two_of_a_kind_have_a_state_each_and_no_hook_sees_gradients(monkeypatch):
    two = [Own(state={"n": torch.tensor(number)}) for number in (1, 2)]
    own = own_learner(monkeypatch, *two)
    stored = copy.deepcopy(own.state_dict(0))
    assert epoch_metrics(own.algorithms) == {"own_per_epoch": 2}
    own.training_step(*example_batch(10, torch.device("cpu")), 0)
    own.begin_task(0)
    assert two[0].had_gradients == two[1].had_gradients == {False}
    for algorithm in two:
        algorithm.state["n"].zero_()
    own.load_state_dict(stored)
    assert [algorithm.state["n"].item() for algorithm in two] == [1, 2]
