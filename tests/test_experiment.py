"""The experiment script from its command line: what it writes, and that an interruption changes none of it."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, REPOSITORY, TINY, everything_in, stored_results, tiny_arguments

import post_run_analysis
from incremental_cifar import stored_run
from incremental_cifar.cifar100 import draw_synthetic_images
from incremental_cifar.command_line import run_script
from incremental_cifar.config import UserError
from incremental_cifar.learning_curves import METRICS, LearningCurves
from incremental_cifar.progress import work_before
from incremental_cifar.resnet import build_network
from incremental_cifar.run_files import RunFiles, state_digest
from incremental_cifar.seeds import draw_class_order, experiment_seed
from plots.run_results import METRICS as PLOTTED_METRICS
from plots.run_results import make_curves, read_runs

NUM_EPOCHS = 12
NUM_STEPS = 4 * (4 + 8 + 12)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_files_of_a_finished_run(uninterrupted, algorithm):
    folder = uninterrupted(algorithm)
    lengths = {name: NUM_EPOCHS for name in METRICS} | {
        "train_loss_per_checkpoint": NUM_STEPS // 25,
        "train_accuracy_per_checkpoint": NUM_STEPS // 25,
        "class_order": 100,
    }
    for name, metric in METRICS.items():
        array = np.load(folder / name / "index-0.npy", allow_pickle=False)
        assert array.shape == (lengths[name],) and array.dtype == metric.dtype and np.isfinite(array).all(), name
        if "accuracy" in name:
            assert (array >= 0).all() and (array <= 1).all()
        if "runtime" in name:
            assert (array > 0).all()
    assert np.array_equal(np.load(folder / "class_order" / "index-0.npy"), draw_class_order(experiment_seed(0)))
    assert np.load(folder / "experiment_indices.npy").tolist() == [0]
    assert sorted(os.listdir(folder / "model_parameters")) == [f"index-0_epoch-{epoch}.pt" for epoch in (0, 12, 4, 8)]
    config = json.loads((folder / "config_files" / "index-0.json").read_text())
    assert config["num_tasks"] == 3 and config["_environment"]["torch"] == torch.__version__
    initial = torch.load(folder / "model_parameters" / "index-0_epoch-0.pt", weights_only=True)
    for name, tensor in build_network(experiment_seed(0), width=2).state_dict().items():
        assert torch.equal(initial[name], tensor)
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "base_deep_learning_system"])
def test_algorithms_differ_where_they_should(uninterrupted, algorithm):
    """Every one differs from the base system in the end; those that reset something after a task share the first one."""
    base, other = (stored_results(uninterrupted(name)) for name in ("base_deep_learning_system", algorithm))
    first, last = ("model_parameters/index-0_epoch-4.pt", "model_parameters/index-0_epoch-12.pt")
    differs = other[last] != base[last]
    assert differs, f"{algorithm} does nothing in a tiny run: TINY_ALGORITHM in tests/conftest.py needs an entry for it"
    assert other[first] == base[first] or algorithm not in ("head_resetting", "retrained_network")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(uninterrupted, algorithm, tmp_path, script):
    """Stopped by SIGTERM, Ctrl-C and SIGUSR1 in three epochs and by SIGKILL in one of them, anywhere in a task, resumed each time."""
    expected = stored_results(uninterrupted(algorithm))
    choice = random.Random(algorithm)
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    epochs = sorted(choice.sample(range(1, NUM_EPOCHS), 3))
    killed_after = choice.randrange(3)
    arguments = [*tiny_arguments(algorithm, tmp_path, checkpoint_save_frequency=3), "--verbose"]
    for number, epoch in enumerate(epochs):
        if number == killed_after:
            run = script(arguments)
            run.wait_for_output(f"Epoch {epoch}/")
            run.send(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
        signal_number = signals[number]
        run = script(arguments)
        run.wait_for_output(f"Epoch {epoch}/")
        run.send(signal_number)
        assert run.wait() == 128 + signal_number, run.output()
        assert f"stopped after epoch {epoch} with a checkpoint; the same command resumes" in run.output()
        assert f"index-0_epoch-{epoch}.pt" in os.listdir(tmp_path / algorithm / "experiment_checkpoints")
    run = script(arguments)
    assert run.wait() == 0 and f"Resuming index 0 after epoch {epochs[-1]} of 12" in run.output()
    actual = stored_results(tmp_path / algorithm)
    assert actual.keys() == expected.keys()
    assert [name for name in actual if actual[name] != expected[name]] == []


def test_every_signal_that_asks_a_run_to_stop_is_answered_at_once_and_leaves_a_checkpoint(uninterrupted, tmp_path, script):
    """A lost connection and SIGUSR2 like SIGTERM; the answer comes while the epoch is still running, on a line of its own."""
    algorithm = "base_deep_learning_system"
    arguments = tiny_arguments(algorithm, tmp_path)
    for epoch, (number, hint, restart) in enumerate(
        [(signal.SIGHUP, "", ["--restart"]), (signal.SIGUSR2, "", []), (signal.SIGINT, "; Ctrl-C again ends it now", [])], 1
    ):
        run = script([*arguments, "--verbose", *restart], prepare=functools.partial(signal_in_epoch, epoch, number))
        assert run.wait() == 128 + number, run.output()
        lines = run.output().splitlines()
        answer = lines.index(f"{signal.Signals(number).name}: stopping after this epoch{hint}")
        assert any(line.startswith("\tvalidation accuracy") for line in lines[answer:]), lines
        command = f"the same command{' without --restart' if restart else ''} resumes"
        assert f"stopped after epoch {epoch} with a checkpoint; {command}." in lines[-1]
    run = script(arguments, prepare=ignore_and_lose_connection)
    assert run.wait() == 0, run.output()
    assert stored_results(tmp_path / algorithm) == stored_results(uninterrupted(algorithm))


def signal_in_epoch(number, signal_number):
    """Have this process get a signal when the so-many-th epoch begins, from 1."""
    import incremental_cifar_experiment as script_module

    train = script_module.IncrementalCIFARExperiment.train

    def train_with_signal(self, epoch, classes, stepsize):
        if epoch + 1 == number:
            signal.raise_signal(signal_number)
        train(self, epoch, classes, stepsize)

    script_module.IncrementalCIFARExperiment.train = train_with_signal


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
@pytest.mark.parametrize("indices", ["0", "0-1"])
def test_a_signal_before_the_first_epoch_ends_a_run_at_once(number, status, indices, tmp_path, script):
    run = script([*tiny_arguments(BASE, tmp_path), "--experiment-index", indices], prepare=functools.partial(signal_in_preparation, number))
    assert run.wait() == status
    assert run.output() == ""


def signal_in_preparation(number):
    import incremental_cifar_experiment as script_module

    def wait(*_):
        signal.raise_signal(number)
        raise UserError("it went on")

    script_module.load_image_sets = wait


def ignore_and_lose_connection():
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_in_epoch(5, signal.SIGHUP)


def test_a_terminal_that_vanishes_takes_no_epoch_along(tmp_path):
    """Its output cannot be written any more, and the run still ends its epoch and writes the checkpoint."""
    controller, terminal = os.openpty()
    command = [sys.executable, str(REPOSITORY / "incremental_cifar_experiment.py"), "--verbose"]
    command += tiny_arguments("base_deep_learning_system", tmp_path, epochs_per_task=1000)
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    output = b""
    while b"Epoch 2/" not in output:
        output += os.read(controller, 1000)
    os.close(controller)
    process.send_signal(signal.SIGHUP)  # as the shell passes it on
    assert process.wait(60) == 129
    assert len(list((tmp_path / "base_deep_learning_system" / "experiment_checkpoints").iterdir())) == 1


def test_two_processes_give_the_same_results(uninterrupted, tmp_path, script):
    assert script(tiny_arguments("shrink_and_perturb", tmp_path)).wait() == 0
    assert stored_results(tmp_path / "shrink_and_perturb") == stored_results(uninterrupted("shrink_and_perturb"))


def test_a_finished_run_is_left_alone(uninterrupted, script):
    folder = uninterrupted("base_deep_learning_system")
    before = everything_in(folder)
    run = script(tiny_arguments("base_deep_learning_system", folder.parent))
    assert run.wait() == 0 and "is finished; nothing to do" in run.output()
    assert everything_in(folder) == before


def test_other_settings_are_refused_and_named(uninterrupted, script):
    folder = uninterrupted("base_deep_learning_system")
    before = everything_in(folder)
    run = script(tiny_arguments("base_deep_learning_system", folder.parent, stepsize=0.2, batch_size=11))
    assert run.wait() == 2
    assert "batch_size (5 there, 11 here), stepsize (0.1 there, 0.2 here)" in run.output() and run.output().count("\n") == 1
    assert everything_in(folder) == before


def test_indices_share_an_experiment(uninterrupted, tmp_path, script):
    runs = [script([*tiny_arguments("base_deep_learning_system", tmp_path, num_tasks=1), "--experiment-index", str(n)]) for n in (5, 2)]
    assert [run.wait() for run in runs] == [0, 0]
    folder = tmp_path / "base_deep_learning_system"
    assert np.load(folder / "experiment_indices.npy").tolist() == [2, 5]
    losses = [np.load(folder / "test_loss_per_epoch" / f"index-{index}.npy") for index in (2, 5)]
    assert not np.array_equal(*losses)


def alone(algorithm, index, folder, script):
    run = script([*tiny_arguments(algorithm, folder), "--experiment-index", str(index)])
    assert run.wait() == 0, run.output()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_beside_another_in_one_process_is_the_run_alone(algorithm, tmp_path, script, uninterrupted):
    run = script([*tiny_arguments(algorithm, tmp_path), "--experiment-index", "0-1"])
    assert run.wait() == 0, run.output()
    of_index_0 = {name: content for name, content in stored_results(tmp_path / algorithm).items() if "index-0" in name}
    assert of_index_0 == {name: content for name, content in stored_results(uninterrupted(algorithm)).items() if "index-0" in name}


@pytest.mark.parametrize("algorithm", ["continual_backpropagation", "shrink_and_perturb"])
def test_runs_side_by_side_stopped_and_resumed_are_those_alone(algorithm, tmp_path, script):
    """Three indices in one process, stopped by a signal on the way and resumed together, against each index in a process of its own."""
    for index in range(3):
        alone(algorithm, index, tmp_path / "alone", script)
    arguments = [*tiny_arguments(algorithm, tmp_path / "together"), "--experiment-index", "0-2"]
    run = script([*arguments, "--verbose"])
    run.wait_for_output("index 1: Epoch 4/")
    run.send(signal.SIGTERM)
    assert run.wait() == 143, run.output()
    assert run.output().count("SIGTERM: stopped after epoch") == 3
    folder = tmp_path / "together" / algorithm
    assert not (folder / "experiment_indices.npy").exists()
    run = script(arguments)
    assert run.wait() == 0, run.output()
    assert stored_results(folder) == stored_results(tmp_path / "alone" / algorithm)
    assert np.load(folder / "experiment_indices.npy").tolist() == [0, 1, 2]
    run = script(arguments)
    assert run.wait() == 0 and run.output().count("is finished; nothing to do") == 3


def test_a_run_that_fails_does_not_take_those_beside_it_along(tmp_path, script):
    """Of four runs side by side, one diverges, one is already at work elsewhere, and one is finished; the fourth finishes as alone."""
    algorithm = "base_deep_learning_system"
    folder = tmp_path / algorithm
    alone(algorithm, 3, tmp_path, script)
    with RunFiles(folder, 1).locked():
        run = script([*tiny_arguments(algorithm, tmp_path), "--experiment-index", "0-3"], prepare=make_index_2_diverge)
        assert run.wait() == 2, run.output()
    errors = [line for line in run.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "Traceback" not in run.output()
    assert any(line.startswith("error: index 1: ") and "another process is working on index 1" in line for line in errors), errors
    assert any(line.startswith("error: index 2: the loss is no longer finite in epoch 1 ") for line in errors), errors
    assert np.load(folder / "experiment_indices.npy").tolist() == [0, 3]
    alone(algorithm, 0, tmp_path / "alone", script)
    theirs = stored_results(tmp_path / "alone" / algorithm)
    theirs.pop("experiment_indices.npy")
    ours = stored_results(folder)
    assert {name: ours[name] for name in theirs} == theirs


def make_index_2_diverge():
    import incremental_cifar_experiment as script_module

    record_steps = script_module.IncrementalCIFARExperiment.record_steps

    def spoil(self):
        record_steps(self)
        if self.run_index == 2:
            torch.nn.init.constant_(self.learner.network.fc.weight, torch.inf)

    script_module.IncrementalCIFARExperiment.record_steps = spoil


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(tmp_path, script):
    arguments = tiny_arguments("base_deep_learning_system", tmp_path, stepsize=1e30, checkpoint_save_frequency=1)
    run = script(arguments)
    assert run.wait() == 2
    assert "the loss is no longer finite in epoch 1 (step size 1e+30)" in run.output()
    assert "Traceback" not in run.output()
    assert not (tmp_path / "base_deep_learning_system" / "experiment_indices.npy").exists()


@pytest.mark.parametrize("augment_test_data", [False, True])
def test_each_epoch_gets_the_right_images_classes_and_step_size(tmp_path, monkeypatch, augment_test_data):
    """What a run hands to training and evaluation: the split of each class, the classes seen so far in this run's order."""
    import incremental_cifar_experiment as script_module

    trained, evaluated = [], []
    train, evaluate = script_module.train_one_epoch, script_module.evaluate

    def record_training(train_batch, image_set, classes, *arguments, **keywords):
        trained.append((image_set, classes.tolist(), arguments[2], keywords.get("first_step", arguments[-1]), train_batch.optimizer))
        trained[-1] += (trained[-1][4].param_groups[0]["lr"].item(),)
        return train(train_batch, image_set, classes, *arguments, **keywords)

    def record_evaluation(evaluation_step, image_set, classes, generator):
        evaluated.append((image_set, classes.tolist(), generator is not None))
        return evaluate(evaluation_step, image_set, classes, generator)

    monkeypatch.setattr(script_module, "train_one_epoch", record_training)
    monkeypatch.setattr(script_module, "evaluate", record_evaluation)
    settings = TINY | {"num_tasks": 2, "augment_test_data": augment_test_data}
    script_module.IncrementalCIFARExperiment(settings, str(tmp_path / "run"), 3, verbose=False).run()

    order = draw_class_order(experiment_seed(3)).tolist()
    images, test_images = draw_synthetic_images(15, 5)
    assert [classes for _, classes, *_ in trained] == [order[:2]] * 4 + [order[:4]] * 4
    assert [epoch for _, _, epoch, *_ in trained] == list(range(8))
    assert [first_step for *_, first_step, _, _ in trained] == [0, 4, 8, 12, 16, 24, 32, 40]
    assert [stepsize for *_, stepsize in trained] == pytest.approx([0.1, 0.1, 0.02, 0.004] * 2)
    assert all(np.array_equal(image_set.pixels.numpy(), images[:, 5:].reshape(-1, 3)) for image_set, *_ in trained)
    assert [classes for _, classes, _ in evaluated] == [order[:2]] * 8 + [order[:4]] * 8
    for number, (image_set, _, transformed) in enumerate(evaluated):
        is_test = number % 2 == 0
        expected = test_images if is_test else images[:, :5]
        assert np.array_equal(image_set.pixels.numpy(), expected.reshape(-1, 3))
        assert transformed == (is_test and augment_test_data)


def test_a_network_that_is_lost_in_the_last_step_is_not_called_finished(tmp_path):
    """The loss before the update is finite; that of the evaluation after it is not."""
    from incremental_cifar_experiment import IncrementalCIFARExperiment

    class Lost(IncrementalCIFARExperiment):
        def train(self, epoch, classes, stepsize):
            super().train(epoch, classes, stepsize)
            if epoch == 3:
                torch.nn.init.constant_(self.learner.network.fc.weight, torch.nan)

    with pytest.raises(UserError, match="no longer finite in epoch 4"):
        Lost(TINY | {"num_tasks": 1}, str(tmp_path / "run"), 0, verbose=False).run()
    assert not (tmp_path / "run" / "experiment_indices.npy").exists()


def test_a_signal_at_any_moment_is_honoured_with_a_checkpoint(tmp_path, monkeypatch):
    """Even between the question whether to write a checkpoint and the question whether to stop."""
    import incremental_cifar_experiment as script_module

    class Late(script_module.StopRequest):
        questions = 0

        def __bool__(self):
            self.questions += 1
            if self.questions == 2:
                self.signal_number = signal.SIGTERM
            return super().__bool__()

    monkeypatch.setattr(script_module, "stop_requests", lambda: contextlib.nullcontext(Late()))
    experiment = script_module.IncrementalCIFARExperiment(dict(TINY), str(tmp_path / "run"), 0, verbose=False)
    with pytest.raises(SystemExit):
        experiment.run()
    assert [epoch for epoch, _ in experiment.files.checkpoints()] == [2]


@pytest.mark.parametrize(
    ("deleted", "changes", "message"),
    [
        ("config_files", {"stepsize": 0.3}, "is of a run with other settings: stepsize (0.1 there, 0.3 here)"),
        ("config_files", {"network_width": 3}, "is of a run with other settings"),
        ("config_files", {"use_cbp": True, "replacement_rate": 0.1, "maturity_threshold": 3}, "is of a run with other settings"),
        ("model_parameters", {}, "index-0_epoch-4.pt: this model is not there any more"),
        ("config_files", {}, ""),
        ("class_order", {}, ""),
    ],
)
def test_files_deleted_before_a_run_is_resumed(deleted, changes, message, tmp_path, uninterrupted, capsys):
    """What can be written again is; settings that then cannot be compared with the config are compared with the checkpoint."""
    import incremental_cifar_experiment as script_module

    class Stopped(script_module.IncrementalCIFARExperiment):
        def train(self, epoch, classes, stepsize):
            if epoch == 6:
                raise KeyboardInterrupt
            super().train(epoch, classes, stepsize)

    algorithm = "base_deep_learning_system"
    arguments = tiny_arguments(algorithm, tmp_path, checkpoint_save_frequency=6)
    config, indices, _ = script_module.parse_arguments(arguments)
    with pytest.raises(KeyboardInterrupt):
        Stopped(config.to_dict(), str(tmp_path / algorithm), indices[0], verbose=False).run()
    shutil.rmtree(tmp_path / algorithm / deleted)
    before = everything_in(tmp_path)
    status = run_script(script_module.main, tiny_arguments(algorithm, tmp_path, checkpoint_save_frequency=6, **changes))
    error = capsys.readouterr().err.splitlines()[-1]
    if message:
        assert status == 2 and error.startswith("error: ") and message in error
        assert not (tmp_path / algorithm / "experiment_indices.npy").exists()
        assert not changes or everything_in(tmp_path) == before
    else:
        assert status == 0
        assert stored_results(tmp_path / algorithm) == stored_results(uninterrupted(algorithm))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The results of a run that was interrupted in its seventh epoch, after its checkpoint. Not to be changed."""
    import incremental_cifar_experiment as script_module

    class Interrupted(script_module.IncrementalCIFARExperiment):
        def train(self, epoch, classes, stepsize):
            if epoch == 6:
                raise KeyboardInterrupt
            super().train(epoch, classes, stepsize)

    folder = tmp_path_factory.mktemp("interrupted") / BASE
    config, *_ = script_module.parse_arguments(arguments_of(folder.parent))
    with pytest.raises(KeyboardInterrupt):
        Interrupted(config.to_dict(), str(folder), 0, verbose=False).run()
    return folder.parent


BASE = "base_deep_learning_system"


def arguments_of(results_dir, *more):
    return [*tiny_arguments(BASE, results_dir, checkpoint_save_frequency=6), *more]


def start(results_dir, *more):
    import incremental_cifar_experiment as script_module

    return run_script(script_module.main, arguments_of(results_dir, *more))


@pytest.fixture
def results(interrupted, tmp_path):
    """A copy of the interrupted run's results."""
    return shutil.copytree(interrupted, tmp_path / "results")


def delete(*patterns):
    def change(folder):
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink()

    return change


def make_released(folder, with_checkpoint):
    """What the released code has in a run in progress: its own checkpoints, the config as it was given, and no metrics."""
    delete("*_per_epoch/*", "*_runtime/*", "*_per_checkpoint/*", "class_order/*", "experiment_checkpoints/*")(folder)
    if with_checkpoint:
        (folder / "experiment_checkpoints" / "index-0_current_epoch-6.p").write_bytes(b"pickled")
    path = folder / "config_files" / "index-0.json"
    config = json.loads(path.read_text())
    del config["_environment"]
    path.write_text(json.dumps(config))


LEFT_WITHOUT_CHECKPOINTS = {
    "checkpoints deleted": (delete("experiment_checkpoints/*"), "/index-0.npy", "its checkpoints are gone; restore them"),
    "all but models deleted": (delete("[!m]*/*"), "index-0_epoch-0.pt", "its checkpoints are gone; restore them"),
    "released": (lambda folder: make_released(folder, True), "index-0_current_epoch-6.p", "it is one of the released code"),
    "released, its checkpoint deleted": (lambda folder: make_released(folder, False), "index-0.json", "it is one of the released code"),
}


@pytest.mark.parametrize(("change", "named", "reason"), LEFT_WITHOUT_CHECKPOINTS.values(), ids=LEFT_WITHOUT_CHECKPOINTS)
def test_a_run_that_cannot_be_resumed_is_not_overwritten(change, named, reason, results, capsys):
    change(results / BASE)
    before = everything_in(results)
    assert start(results) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{named}: a run of index 0 was begun here" in error and reason in error and "--restart" in error
    assert everything_in(results) == before


def test_a_run_that_cannot_be_resumed_does_not_stop_those_beside_it(results, capsys):
    delete("experiment_checkpoints/*")(results / BASE)
    assert start(results, "--experiment-index", "0,1") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: index 0: ") and "its checkpoints are gone" in errors[0]
    assert np.load(results / BASE / "experiment_indices.npy").tolist() == [1]


@pytest.mark.parametrize("content", ["{", '{"stepsize": 0.3}'])
def test_a_stored_config_that_cannot_be_used_does_not_stop_those_beside_it(content, results, capsys):
    (results / BASE / "config_files" / "index-0.json").write_text(content)
    assert start(results, "--experiment-index", "0,1") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: index 0: ") and "config_files/index-0.json: " in errors[0]
    assert np.load(results / BASE / "experiment_indices.npy").tolist() == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:99"}, 'device: "cuda:99" is not here'),
        ({"dataset": "cifar100", "data_path": "/dev/null/data"}, "CIFAR-100 is not there"),
    ],
)
def test_what_keeps_all_indices_from_running_is_said_once(settings, message, tmp_path, capsys):
    import incremental_cifar_experiment as script_module

    arguments = [*tiny_arguments(BASE, tmp_path, **settings), "--experiment-index", "0-2"]
    assert run_script(script_module.main, arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: index 0, 1, 2: ") and message in error


def make_kept(folder, keep):
    """Of a finished run, what a sweep keeps."""
    gone = ["experiment_checkpoints/*", *(["model_parameters/*"] if keep == "results" else [])]
    if keep == "results":
        assert run_script(post_run_analysis.main, ["--results_dir", str(folder), "--device", "cpu"]) == 0
    delete(*gone)(folder)


@pytest.mark.parametrize("keep", ["all", "models", "results"])
def test_a_finished_run_that_is_not_in_the_list_is_recognised(keep, tmp_path, uninterrupted, monkeypatch, capsys):
    """Its list was damaged or deleted: the run goes into it again, and is neither refused nor trained."""
    import incremental_cifar_experiment as script_module

    folder = shutil.copytree(uninterrupted(BASE), tmp_path / BASE)
    make_kept(folder, keep)
    before = everything_in(folder)
    (folder / "experiment_indices.npy").unlink()
    monkeypatch.setattr(script_module.IncrementalCIFARExperiment, "record_steps", lambda *_: pytest.fail("it was begun"))
    capsys.readouterr()
    assert run_script(script_module.main, tiny_arguments(BASE, tmp_path)) == 0
    output = capsys.readouterr()
    assert output.out.count("\n") == 1 and "is finished, by its arrays; it is in experiment_indices.npy again" in output.out
    assert output.err == "" and before.keys() == everything_in(folder).keys()
    assert np.load(folder / "experiment_indices.npy").tolist() == [0]


def test_what_has_not_all_its_arrays_and_models_is_not_taken_for_finished(tmp_path, uninterrupted, capsys):
    import incremental_cifar_experiment as script_module

    folder = shutil.copytree(uninterrupted(BASE), tmp_path / BASE)
    delete("experiment_indices.npy", "model_parameters/index-0_epoch-8.pt", "experiment_checkpoints/*")(folder)
    arguments = tiny_arguments(BASE, tmp_path)
    assert run_script(script_module.main, arguments) == 2
    assert "index-0_epoch-8.pt: this model is not there" in capsys.readouterr().err
    assert run_script(script_module.main, [*arguments, "--without-models"]) == 0
    delete("experiment_indices.npy")(folder)
    np.save(folder / "test_loss_per_epoch" / "index-0.npy", np.zeros(11, dtype=np.float32))
    assert run_script(script_module.main, [*arguments, "--without-models"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "its checkpoints are gone" in error and "by incremental_cifar_experiment.py --restart" in error


@pytest.mark.parametrize("state", ["finished", "checkpoints gone"])
def test_restart_begins_anew_and_leaves_other_indices_alone(state, results, uninterrupted, capsys):
    folder = results / BASE
    for number, path in enumerate(path for path in sorted(folder.rglob("index-0*")) if path.suffix != ".lock"):
        path.with_name(path.name.replace("index-0", "index-10")).write_bytes(b"of another index")
        if number % 2:
            path.write_bytes(b"damaged")
    np.save(folder / "experiment_indices.npy", [0, 10] if state == "finished" else [10])
    (folder / "next_task_stable_rank_analysis").mkdir()
    (folder / "next_task_stable_rank_analysis" / "index-0.npy").write_bytes(b"of the run before")
    if state == "checkpoints gone":
        delete("experiment_checkpoints/index-0_*")(folder)
    others = {path: content for path, content in everything_in(folder).items() if "index-10" in path}
    assert start(results, "--restart") == 0, capsys.readouterr().err
    ours = {name: content for name, content in stored_results(folder).items() if "index-10" not in name}
    expected = stored_results(uninterrupted(BASE))
    assert {name for name in ours if ours[name] != expected.get(name)} == {"experiment_indices.npy"} and ours.keys() == expected.keys()
    assert np.load(folder / "experiment_indices.npy").tolist() == [0, 10]
    assert others == {path: content for path, content in everything_in(folder).items() if "index-10" in path}


@pytest.mark.parametrize("content", [None, b""], ids=["deleted", "empty"])
def test_models_that_are_gone_are_noticed_when_a_run_is_resumed(content, results, uninterrupted, monkeypatch, capsys):
    """Before any epoch is trained; and the run can go on without, and is finished then."""
    import incremental_cifar_experiment as script_module

    folder = results / BASE
    delete("model_parameters/index-0_epoch-4.pt")(folder)
    if content is not None:
        (folder / "model_parameters" / "index-0_epoch-4.pt").write_bytes(content)
    monkeypatch.setattr(script_module.IncrementalCIFARExperiment, "run_tasks", lambda *_: pytest.fail("an epoch was trained"))
    assert start(results) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "index-0_epoch-4.pt: this model is not there" in error
    assert error.endswith("go on without it by incremental_cifar_experiment.py --without-models")
    monkeypatch.undo()
    assert start(results, "--without-models") == 0
    assert capsys.readouterr().err.count("warning: going on without index-0_epoch-4.pt in ") == 1
    expected = stored_results(uninterrupted(BASE))
    expected["model_parameters/index-0_epoch-4.pt"] = content
    assert stored_results(folder) == {name: bytes_ for name, bytes_ in expected.items() if bytes_ is not None}
    assert start(results) == 0 and "is finished; nothing to do" in capsys.readouterr().out


OTHER_CODE = {  # commit and digest of the checkpoint's environment and of this one, and what the warning names; None: there is none
    "another commit": (("a" * 40, "1"), ("b" * 40, "2"), f"commit {'a' * 40} -> {'b' * 40}"),
    "another commit of the same code": (("a" * 40, "1"), ("b" * 40, "1"), None),
    "two states that are not committed": (("a-dirty", "1"), ("a-dirty", "2"), "digest of the files 1 -> 2"),
    "no commits": ((None, "1"), (None, "2"), "digest of the files 1 -> 2"),
    "before there was a digest": (("a", None), ("b", "2"), "commit a -> b"),
    "before there was a digest, no commit": (("a", None), (None, "2"), None),
}


def rewrite_checkpoint(results_dir, change):
    """Change the newest checkpoint, as another version of the code would have written it."""
    path = RunFiles(results_dir / BASE, 0).checkpoints()[-1][1]
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["sha256"]
    change(checkpoint)
    torch.save(checkpoint | {"sha256": state_digest(checkpoint)}, path)


@pytest.mark.parametrize(("before", "here", "named"), OTHER_CODE.values(), ids=OTHER_CODE)
def test_other_code_than_the_last_checkpoints_is_named(before, here, named, results, monkeypatch, capsys):
    import incremental_cifar_experiment as script_module

    def change(checkpoint):
        checkpoint["environment"] |= {"commit": before[0], "code": before[1]}
        if before[1] is None:
            del checkpoint["environment"]["code"]

    rewrite_checkpoint(results, change)
    describe = script_module.describe_environment
    present = {"commit": here[0], "code": here[1]}
    monkeypatch.setattr(script_module, "describe_environment", lambda *arguments: describe(*arguments) | present)
    monkeypatch.setattr(stored_run, "code_difference", lambda: b"changed")
    config_file = results / BASE / "config_files" / "index-0.json"
    started = json.loads(config_file.read_text())
    monkeypatch.setattr(script_module.IncrementalCIFARExperiment, "run_tasks", lambda *_: 1 / 0)
    for _ in range(2):  # every resumption is recorded
        with pytest.raises(ZeroDivisionError):
            start(results)
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        expected = [f"warning: resuming with other code ({named}): results may differ from either's"]
        assert warnings == (expected if named else [])
    stored = json.loads(config_file.read_text())
    resumptions = stored.pop("_resumptions")
    assert stored == started
    assert [(entry["epoch"], entry["commit"], entry["code"]) for entry in resumptions] == [(6, *here)] * 2
    assert config_file.with_name("index-0_epoch-6.diff").read_bytes() == b"changed"


def test_the_code_of_a_run_is_known_without_commits(results):
    environment = json.loads((results / BASE / "config_files" / "index-0.json").read_text())["_environment"]
    assert len(environment["code"]) == 12 and int(environment["code"], 16) >= 0
    assert [len(part) for part in environment["date"].split("-")] == [4, 2, 2]


def test_a_checkpoint_of_another_version_is_resumed(results, uninterrupted):
    def change(checkpoint):
        checkpoint["curves"]["per_epoch"]["another_metric_per_epoch"] = torch.zeros(6)
        del checkpoint["environment"]

    rewrite_checkpoint(results, change)
    assert start(results) == 0
    assert stored_results(results / BASE) == stored_results(uninterrupted(BASE))


@pytest.mark.parametrize(
    ("key", "value"), [("network", {"conv1.weight": torch.zeros(1)}), ("curves", []), ("epoch", "six"), ("momentum", [torch.zeros(1)])]
)
def test_a_checkpoint_that_does_not_fit_the_code_is_one_line(results, key, value, capsys):
    """As after a change of the network; what is there stays."""
    rewrite_checkpoint(results, lambda checkpoint: checkpoint.update({key: value, "environment": []}))
    before = stored_results(results / BASE)
    assert start(results) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: "))
    assert "the newest checkpoint of index 0 does not fit this code (" in line and "--restart" in line
    assert stored_results(results / BASE) == before


def test_a_metric_that_a_run_did_not_have_from_its_start_is_missing_before(results):
    """NaN in the array, and no point in a figure; not 0."""
    rewrite_checkpoint(results, lambda checkpoint: checkpoint["curves"]["per_epoch"].pop("test_accuracy_per_epoch"))
    assert start(results) == 0
    values = np.load(results / BASE / "test_accuracy_per_epoch" / "index-0.npy")
    assert np.isnan(values[:6]).all() and np.isfinite(values[6:]).all()
    metric = PLOTTED_METRICS["test_accuracy_per_epoch"]
    runs = read_runs(results, metric)
    (curve,) = make_curves(runs, metric, per_epoch=True).curves
    assert curve.values[0] == pytest.approx(100 * values.astype(float), nan_ok=True)
    (curve,) = make_curves(runs, metric).curves
    assert np.isnan(curve.values[0]).tolist() == [True, True, False]


def test_early_stopping_goes_back_to_the_first_best_epoch(tmp_path, monkeypatch):
    """The stored network is the one of the epoch with the task's best validation accuracy; of equals, the first."""
    import incremental_cifar_experiment as script_module

    accuracies = iter([0.3, 0.6, 0.6, 0.5, 0.2, 0.2, 0.1, 0.2])
    states = []

    class Recorded(script_module.IncrementalCIFARExperiment):
        def measure(self, epoch, classes, stepsize):
            super().measure(epoch, classes, stepsize)
            states.append({name: tensor.clone() for name, tensor in self.learner.network.state_dict().items()})
            return next(accuracies)

    settings = TINY | {"num_tasks": 2, "early_stopping": True}
    experiment = Recorded(settings, str(tmp_path / "run"), 0, verbose=False)
    experiment.run()
    for epoch, best in ((4, 1), (8, 4)):
        stored = torch.load(tmp_path / "run" / "model_parameters" / f"index-0_epoch-{epoch}.pt", weights_only=True)
        assert all(torch.equal(stored[name], tensor) for name, tensor in states[best].items())


@pytest.mark.parametrize(("setting", "kept"), [("reset_head", True), ("reset_network", False)])
def test_resets_at_the_end_of_a_task(tmp_path, setting, kept):
    """After the model is stored, the head or the network is drawn anew, but not after the last task; momentum is kept."""
    from incremental_cifar_experiment import IncrementalCIFARExperiment

    after = []

    class Recorded(IncrementalCIFARExperiment):
        def end_task(self, task):
            super().end_task(task)
            after.append({name: tensor.clone() for name, tensor in self.learner.network.state_dict().items()})
            self.largest_momentum = max(state["momentum_buffer"].abs().max() for state in self.learner.optimizer.state.values())

    settings = TINY | {"num_tasks": 2, setting: True}
    experiment = Recorded(settings, str(tmp_path / "run"), 0, verbose=False)
    experiment.run()
    stored = [torch.load(tmp_path / "run" / "model_parameters" / f"index-0_epoch-{epoch}.pt", weights_only=True) for epoch in (4, 8)]
    assert not torch.equal(after[0]["fc.weight"], stored[0]["fc.weight"]) and (after[0]["fc.bias"] == 0).all()
    assert torch.equal(after[0]["layer3.0.conv1.weight"], stored[0]["layer3.0.conv1.weight"]) == kept
    assert torch.equal(after[0]["bn1.weight"], torch.ones(2)) != kept
    assert torch.equal(after[0]["bn1.running_mean"], stored[0]["bn1.running_mean"])  # as released
    assert all(torch.equal(after[1][name], tensor) for name, tensor in stored[1].items())
    assert experiment.largest_momentum > 0


def test_a_full_gpu_is_one_line(tmp_path, monkeypatch, capsys):
    import incremental_cifar_experiment as script_module

    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore advice.")

    monkeypatch.setattr(script_module.IncrementalCIFARExperiment, "record_steps", full)
    assert run_script(script_module.main, tiny_arguments("base_deep_learning_system", tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "memory is full (CUDA out of memory. Tried to allocate 2 GiB.)" in error and "More" not in error


def no_memory(*_, **__):
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 90 bytes.\nMore."
    )


def no_memory_for_python(*_, **__):
    raise MemoryError


def no_memory_for_a_convolution(*_, **__):
    raise RuntimeError("could not create a primitive")


def no_memory_to_save(*_, **__):
    """As torch.save ends: what it says last is not what was wrong."""
    try:
        raise MemoryError
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


@pytest.mark.parametrize(
    ("place", "failure"),
    [
        ("incremental_cifar_experiment.load_image_sets", no_memory_for_python),
        ("incremental_cifar_experiment.train_one_epoch", no_memory_for_a_convolution),
        ("torch.save", no_memory_to_save),
        ("torch.load", no_memory),
        ("torch.load in the analysis", no_memory),
        ("post_run_analysis.hidden_features in the analysis", no_memory),
    ],
)
def test_a_full_memory_is_one_line_and_does_no_harm(place, failure, results, monkeypatch, capsys):
    """Above all, a checkpoint that there is no memory to read is not a damaged one."""
    monkeypatch.setattr(place.split(" ")[0], failure)
    if "analysis" in place:
        arguments = ["--results_dir", str(results / BASE), "--device", "cpu", "--experiment-index", "0"]
        assert run_script(post_run_analysis.main, arguments) == 2
    else:
        assert start(results) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and " memory" in lines[0] and "is full (" in lines[0], lines
    assert [epoch for epoch, _ in RunFiles(results / BASE, 0).checkpoints()] == [6]


def test_resuming_in_another_environment_warns(tmp_path, script):
    arguments = tiny_arguments("base_deep_learning_system", tmp_path, num_tasks=1, checkpoint_save_frequency=1)
    run = script([*arguments, "--verbose"])
    run.wait_for_output("Epoch 2/")
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    path = RunFiles(tmp_path / "base_deep_learning_system", 0).checkpoints()[-1][1]
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["sha256"]
    checkpoint["environment"]["torch"] = "1.13.0"
    torch.save(checkpoint | {"sha256": state_digest(checkpoint)}, path)
    run = script(arguments)
    assert run.wait() == 0
    assert f"warning: resuming in another environment (torch 1.13.0 -> {torch.__version__})" in run.output()


def test_verbose_output(tmp_path, script):
    arguments = [*tiny_arguments("base_deep_learning_system", tmp_path, num_tasks=1, train_images_per_class=65), "--verbose"]
    run = script(arguments)
    assert run.wait() == 0
    output = run.output()
    assert output.count("step 25: training accuracy") == 1  # 26 steps an epoch: the windows end at steps 25, 24, 23 and 22
    assert output.count("training accuracy") == 4
    assert output.count("validation accuracy: 0.") + output.count("validation accuracy: 1.") == 4
    assert output.count("epoch run time:") == 4


def test_progress_counts_work_not_epochs(tmp_path, capsys):
    """After the first of three tasks, a third of the epochs but a sixth of the work is done."""
    from incremental_cifar_experiment import IncrementalCIFARExperiment

    experiment = IncrementalCIFARExperiment(dict(TINY), str(tmp_path / "run"), 0, verbose=False)
    assert work_before(experiment.config, 4) / work_before(experiment.config, 12) == pytest.approx(1 / 6)
    experiment.run()
    assert experiment.progress.bar.n == experiment.progress.bar.total == (2 + 4 + 6) * 4 * (3 * 10 + 5 + 5)
    assert "100.0%" in capsys.readouterr().err


def test_windows_of_training_curves():
    curves = LearningCurves(num_steps=60, num_epochs=2, device=torch.device("cpu"))
    curves.step_losses[:] = torch.arange(60.0)
    assert curves.arrays(2, 60)["train_loss_per_checkpoint"].tolist() == [12.0, 37.0]
    assert curves.arrays(1, 30)["train_loss_per_checkpoint"].tolist() == [12.0]


def test_through_mlproj_managers_runner(uninterrupted, tmp_path):
    """`python -m mlproj_manager.experiments.experiment_runner` from another folder gives the script's results."""
    settings = json.loads((uninterrupted("head_resetting") / "config_files" / "index-0.json").read_text())
    settings |= {"index": 0, "verbose": False}
    # Its registry of experiments is a file inside the installed package; this one is put into the test's folder.
    start = (
        "import runpy, sys; import mlproj_manager.definitions as definitions; definitions.ROOT = sys.argv.pop(1); "
        "runpy.run_module('mlproj_manager.experiments.experiment_runner', run_name='__main__')"
    )
    command = [sys.executable, "-c", start, str(tmp_path), "--json_config_string", json.dumps(settings)]
    command += ["--exp_file_path", str(REPOSITORY / "incremental_cifar_experiment.py"), "--exp_class_name", "IncrementalCIFARExperiment"]
    command += ["--exp_name", "incremental_cifar_test", "--results_dir", str(tmp_path / "head_resetting")]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert stored_results(tmp_path / "head_resetting") == stored_results(uninterrupted("head_resetting"))
