import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, REPOSITORY, TINY, everything_in, tiny_arguments

import incremental_cifar_experiment
import post_run_analysis
from incremental_cifar.cifar100 import draw_synthetic_images, normalise
from incremental_cifar.command_line import run_script
from incremental_cifar.config import Config, UserError
from incremental_cifar.resnet import ResNet18, build_network, hidden_layers
from incremental_cifar.run_files import RunFiles
from incremental_cifar.seeds import draw_class_order, experiment_seed
from plots import plot_incremental_cifar_results
from post_run_analysis import ACCURACY_PER_CLASS, DISTANCE, GRADIENT_METRICS, ONLINE_ACCURACY, TASK_METRICS, UNIT_METRICS

NUM_TASKS, EPOCHS, CLASSES = TINY["num_tasks"], TINY["epochs_per_task"], TINY["classes_per_task"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The folder of a finished tiny run of index 0: three tasks, models of epochs 0, 4, 8 and 12. Not to be changed."""
    folder = tmp_path_factory.mktemp("results")
    assert run_script(incremental_cifar_experiment.main, tiny_arguments("base_deep_learning_system", folder)) == 0
    return folder / "base_deep_learning_system"


@pytest.fixture
def experiment(tiny_run, tmp_path):
    """A copy of the tiny run's folder."""
    return Path(shutil.copytree(tiny_run, tmp_path / "base_deep_learning_system"))


def analyse(folder, *arguments) -> int:
    return run_script(post_run_analysis.main, ["--results_dir", str(folder), "--device", "cpu", *arguments])


def analysis_of(folder, index=0) -> dict[str, np.ndarray]:
    """All analysis arrays of an index that are there, by metric."""
    metrics = (*TASK_METRICS, ONLINE_ACCURACY, ACCURACY_PER_CLASS)
    files = {metric: folder / metric / f"index-{index}.npy" for metric in metrics}
    return {metric: np.load(file, allow_pickle=False) for metric, file in files.items() if file.exists()}


def make_unfinished(folder, last_epoch=EPOCHS) -> None:
    (folder / "experiment_indices.npy").unlink()
    for epoch in range(last_epoch + EPOCHS, NUM_TASKS * EPOCHS + 1, EPOCHS):
        (folder / "model_parameters" / f"index-0_epoch-{epoch}.pt").unlink()


def test_two_analyses_of_a_run_are_not_at_work_at_once(experiment, capsys):
    """Not even if one was left behind by a sweep that was killed; what is analysed can be shown all the same."""
    with RunFiles(experiment, 0).locked():
        assert analyse(experiment) == 2
        assert "another process is working on index 0" in capsys.readouterr().err
    assert analyse(experiment) == 0
    with RunFiles(experiment, 0).locked():
        assert analyse(experiment) == 0


# --- What it computes ------------------------------------------------------------------------------------------------------------


def test_a_finished_run_gets_all_metrics(experiment, capsys):
    assert analyse(experiment) == 0
    results = analysis_of(experiment)
    assert len(results) == 12 and all(array.dtype == np.float32 and np.isfinite(array).all() for array in results.values())
    assert all(results[metric].shape == (NUM_TASKS,) for metric in TASK_METRICS)
    assert results[ACCURACY_PER_CLASS].shape == (NUM_TASKS * CLASSES,)
    assert all(results[metric][0] == 0 for metric in (DISTANCE, *UNIT_METRICS["previous_tasks"]))
    output = capsys.readouterr().out
    assert "gradient zeros % dormant % stable r. effect. r. dormant" in output and "issing" not in output
    row = [float(cell) for cell in output.splitlines()[4].split()]  # of the second task
    assert row[:2] == [2, 2 * CLASSES] and len(row) == 13
    for metrics, cells in (
        ((DISTANCE, ONLINE_ACCURACY, *GRADIENT_METRICS), row[3:7]),
        *zip(UNIT_METRICS.values(), (row[7:10], row[10:]), strict=True),
    ):
        percent = [100 if "accuracy" in metric or "zero" in metric or "dormant" in metric else 1 for metric in metrics]
        assert cells == pytest.approx([factor * results[metric][1] for factor, metric in zip(percent, metrics, strict=True)], abs=0.051)


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_the_numbers_are_those_of_a_plain_computation(batch_norm, experiment):
    """All 15 images of a class are fewer than 1,000, so the computation can be done again without any drawing."""
    assert analyse(experiment, "--batch_norm", batch_norm, "--dormant_unit_threshold", "0.2") == 0
    results = analysis_of(experiment)
    num_validation = TINY["validation_images_per_class"]
    train, _ = draw_synthetic_images(TINY["train_images_per_class"] + num_validation, TINY["test_images_per_class"])
    class_order = np.load(experiment / "class_order" / "index-0.npy")
    for task in range(NUM_TASKS):
        network = ResNet18(TINY["network_width"])
        network.load_state_dict(torch.load(experiment / "model_parameters" / f"index-0_epoch-{task * EPOCHS}.pt", weights_only=True))
        values = torch.cat([parameter.detach().flatten() for parameter in network.parameters()]).numpy()
        if task == 0:
            initial = values
        assert results[DISTANCE][task] == pytest.approx(np.linalg.norm(values - initial), rel=1e-6)
        assert results["weight_magnitude_analysis"][task] == pytest.approx(np.abs(values).mean(dtype=np.float64), rel=1e-6)
        start = task * CLASSES
        for shown, classes in (("next_task", class_order[start : start + CLASSES]), ("previous_tasks", class_order[:start])):
            if len(classes) == 0:
                continue
            network.train(batch_norm == "batch").double()
            logits, features = network(normalise(torch.from_numpy(train[classes].reshape(-1, 32, 32, 3))).double())
            if shown == "next_task":  # 30 images, so one batch
                seen = class_order[: start + CLASSES].tolist()
                labels = torch.arange(start, start + CLASSES).repeat_interleave(15)
                gradients = torch.autograd.grad(F.cross_entropy(logits[:, seen], labels), list(network.parameters()))
                values = torch.cat([g[seen].flatten() if len(g) == 100 else g.flatten() for g in gradients]).numpy()
                norm, zero_share = (results[metric][task] for metric in GRADIENT_METRICS)
                assert norm == pytest.approx(np.linalg.norm(values), rel=5e-3)  # rounding moves some activations past a ReLU's kink
                assert zero_share == pytest.approx((values == 0).mean(), abs=0.005)  # and decides whether some gradients are exactly 0
            features = [feature.detach().numpy() for feature in features]
            network.load_state_dict(torch.load(experiment / "model_parameters" / f"index-0_epoch-{task * EPOCHS}.pt", weights_only=True))
            active = np.concatenate([(f != 0).mean(axis=tuple(axis for axis in range(f.ndim) if axis != 1)) for f in features])
            assert results[f"{shown}_dormant_units_analysis"][task] == pytest.approx((active < 0.2).mean(), abs=1e-7)
            spectrum = np.linalg.svd(features[-1], compute_uv=False)
            shares = spectrum[spectrum > 0] / spectrum.sum()
            assert results[f"{shown}_effective_rank_analysis"][task] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
            assert results[f"{shown}_stable_rank_analysis"][task] == (np.cumsum(shares) < 0.99).sum() + 1


def test_accuracy_per_class_is_the_final_networks_test_accuracy(experiment):
    assert analyse(experiment) == 0
    curves = {name: np.load(experiment / f"{name}_accuracy_per_epoch" / "index-0.npy")[-EPOCHS:] for name in ("validation", "test")}
    best = np.argmax(curves["validation"])  # early stopping stored this epoch's network
    assert analysis_of(experiment)[ACCURACY_PER_CLASS].mean() == pytest.approx(curves["test"][best], abs=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_on_a_gpu_the_numbers_are_the_cpus(batch_norm, experiment):
    """But for what rounding may do: a unit, a singular value or an image on the edge falls on the other side."""
    analysed = []
    for device in ("cpu", GPU):
        assert analyse(experiment, "--batch_norm", batch_norm, "--device", str(device), "--overwrite") == 0
        analysed.append(analysis_of(experiment))
    expected, results = analysed
    num_units = sum(layer.num_units for layer in hidden_layers(ResNet18(TINY["network_width"])))
    assert results.keys() == expected.keys() and len(results) == 12
    for metric, array in results.items():
        edge = 1 / num_units if "dormant" in metric else 1 if "stable_rank" in metric else 1 / TINY["test_images_per_class"]
        edge = 3 / num_units if "zero" in metric else edge  # biases in front of batch norm too: exactly 0 or not, as rounding has it
        is_smooth = any(word in metric for word in ("magnitude", "effective_rank", "norm", "distance", "online"))
        tolerance = {"rtol": 1e-2 if "norm" in metric else 1e-4} if is_smooth else {"rtol": 0, "atol": 1.01 * edge}
        np.testing.assert_allclose(array, expected[metric], err_msg=metric, **tolerance)


def test_images_depend_on_index_and_task_alone():
    images = post_run_analysis.ImageSet(draw_synthetic_images(15, 1)[0], torch.device("cpu"))
    classes = np.arange(100)

    def drawn(seed, task):
        generator = post_run_analysis.generator_for(seed, post_run_analysis.Purpose.ANALYSIS, task)
        return post_run_analysis.draw_images(images, classes, generator)[0]

    first = drawn(1, 0)
    assert first.shape == (1000, 3, 32, 32) and len(first.flatten(1).unique(dim=0)) == 1000
    torch.manual_seed(77)
    assert torch.equal(first, drawn(1, 0))
    assert not torch.equal(first, drawn(1, 1)) and not torch.equal(first, drawn(2, 0))


# --- Which runs, and which again -------------------------------------------------------------------------------------------------


def test_the_same_command_skips_what_is_there_and_overwrite_gives_the_same_bits(experiment, capsys):
    assert analyse(experiment) == 0
    before = everything_in(experiment)
    table = capsys.readouterr().out.splitlines()[1:]
    assert analyse(experiment) == 0
    assert everything_in(experiment) == before
    output = capsys.readouterr().out
    assert "analysed before" in output and output.splitlines()[1:] == table
    assert analyse(experiment, "--overwrite") == 0
    after = everything_in(experiment)
    assert {path: content for path, (content, _) in after.items()} == {path: content for path, (content, _) in before.items()}
    rewritten = {Path(path).parent.name for path in before if after[path] != before[path]}
    assert rewritten == {*TASK_METRICS, ONLINE_ACCURACY, ACCURACY_PER_CLASS, "analysis_settings"}


def test_other_settings_and_damaged_results_are_computed_again(experiment, capsys):
    def is_skipped(*arguments):
        assert analyse(experiment, *arguments) == 0
        return "analysed before" in capsys.readouterr().out

    assert not is_skipped()
    first = analysis_of(experiment)
    assert not is_skipped("--dormant_unit_threshold", "0.9")
    assert (analysis_of(experiment)["next_task_dormant_units_analysis"] > first["next_task_dormant_units_analysis"]).all()
    assert is_skipped("--dormant_unit_threshold", "0.9")
    assert not is_skipped("--dormant_unit_threshold", "0.9", "--batch_norm", "running")
    assert not is_skipped()
    path = experiment / "weight_magnitude_analysis" / "index-0.npy"
    path.write_bytes(path.read_bytes()[:-3])
    assert not is_skipped() and is_skipped()
    path.unlink()
    assert not is_skipped()
    assert all(np.array_equal(array, first[metric]) for metric, array in analysis_of(experiment).items())


@pytest.fixture
def analysed_tasks(monkeypatch):
    """The tasks that each call of the analysis computed, three being the final network of a tiny run; each call adds a list."""
    calls = []
    analyse_run = post_run_analysis.analyse_run

    def noting_analyse_run(run, results, tasks, *arguments):
        calls.append(list(tasks))
        analyse_run(run, results, tasks, *arguments)

    monkeypatch.setattr(post_run_analysis, "analyse_run", noting_analyse_run)
    return calls


def test_other_models_are_analysed_again_and_only_they(experiment, capsys, analysed_tasks):
    assert analyse(experiment) == 0
    change_model(experiment, lambda state: {**state, "fc.weight": 2 * state["fc.weight"]})
    assert analyse(experiment) == 0
    assert "analysed before" not in capsys.readouterr().out
    part = analysis_of(experiment)
    change_model(experiment, lambda state: {**state, "fc.weight": 3 * state["fc.weight"]}, NUM_TASKS * EPOCHS)
    assert analyse(experiment) == 0
    assert analysed_tasks == [[0, 1, 2, 3], [1], [3]]
    after = analysis_of(experiment)
    assert all(np.array_equal(part[metric], after[metric]) for metric in TASK_METRICS)
    assert analyse(experiment, "--overwrite") == 0
    assert all(np.array_equal(array, after[metric]) for metric, array in analysis_of(experiment).items())


def test_a_run_started_again_keeps_nothing_of_the_one_before(experiment, analysed_tasks):
    assert analyse(experiment) == 0
    before = analysis_of(experiment)
    make_unfinished(experiment, last_epoch=0)  # the initial network is the same one
    assert analyse(experiment, "--experiment-index", "0") == 0
    results = analysis_of(experiment)
    assert set(results) == {*TASK_METRICS, ONLINE_ACCURACY}
    for metric in TASK_METRICS:
        assert results[metric][0] == before[metric][0] and np.isnan(results[metric][1:]).all()
    assert analyse(experiment, "--experiment-index", "0") == 0
    assert analysed_tasks == [[0, 1, 2, 3], [0]]


def test_another_class_order_is_analysed_again(experiment, analysed_tasks):
    assert analyse(experiment) == 0
    save_class_order(experiment, np.load(experiment / "class_order" / "index-0.npy")[::-1])
    assert analyse(experiment) == 0
    assert analysed_tasks == [[0, 1, 2, 3]] * 2


def test_results_that_are_not_finite_are_computed_again(experiment, analysed_tasks):
    assert analyse(experiment) == 0
    first = analysis_of(experiment)
    for metric, place in (("weight_magnitude_analysis", 1), (ACCURACY_PER_CLASS, 0)):
        array = first[metric].copy()
        array[place] = np.nan
        np.save(experiment / metric / "index-0.npy", array)
    assert analyse(experiment) == 0
    assert analysed_tasks == [[0, 1, 2, 3], [1, 3]]
    assert all(np.array_equal(array, first[metric]) for metric, array in analysis_of(experiment).items())


def test_results_of_before_a_measure_existed_get_it_alone(experiment, monkeypatch):
    assert analyse(experiment) == 0
    first = analysis_of(experiment)
    for metric in (DISTANCE, ONLINE_ACCURACY, *GRADIENT_METRICS):
        shutil.rmtree(experiment / metric)
    assert RunFiles(experiment, 0).is_analysed(NUM_TASKS)  # no sweep does it again by itself
    monkeypatch.delattr(post_run_analysis, "hidden_features")
    assert analyse(experiment) == 0
    for metric, array in analysis_of(experiment).items():
        assert array.tobytes() == first[metric].tobytes()


def test_distances_are_to_the_initial_network_that_is_there(experiment, monkeypatch):
    assert analyse(experiment) == 0
    first = analysis_of(experiment)
    change_model(experiment, lambda state: {**state, "fc.bias": state["fc.bias"] + 3}, 0)
    monkeypatch.delattr(post_run_analysis, "accuracy_per_class")
    assert analyse(experiment) == 0
    second = analysis_of(experiment)
    assert second[DISTANCE][0] == 0 and second[DISTANCE][1:] == pytest.approx(np.hypot(first[DISTANCE][1:], 30), rel=0.05)
    assert all(np.array_equal(second[metric][1:], first[metric][1:]) for metric in TASK_METRICS if metric != DISTANCE)


# Steps 16, 32 and 48 per task; of the 96, the windows of 25 hold 75.
@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([0.2, 0.4, 0.9], [0.2, (9 * 0.2 + 23 * 0.4) / 32, (2 * 0.4 + 25 * 0.9) / 27]),
        ([0.2, 0.4], [0.2, (9 * 0.2 + 23 * 0.4) / 32, np.nan]),  # of a run in progress
        ([0.2], [0.2, np.nan, np.nan]),
        ([0.2, np.nan, 0.9], [0.2, np.nan, np.nan]),
        ([], [np.nan] * 3),
        (None, "there is no such file; index 0 keeps its earlier"),
        ("folder", "there is no such file; index 0 keeps its earlier"),
        ([0.2, 0.4, 0.9, 0.9], "there are 3 at most; index 0 keeps"),
        ([[0.2, 0.4, 0.9]], "there are 3 at most"),
        (["a"], "there are 3 at most"),
    ],
)
def test_average_online_accuracy_shares_windows_out_to_tasks(windows, expected, experiment, capsys, analysed_tasks):
    """By the steps that they have in each; found out anew without any model when the curve has changed, and kept when it is gone."""
    assert analyse(experiment) == 0
    first = analysis_of(experiment)[ONLINE_ACCURACY]
    assert np.isfinite(first).all()
    path = experiment / "train_accuracy_per_checkpoint" / "index-0.npy"
    path.unlink()
    if windows == "folder":
        path.mkdir()
    elif windows is not None:
        np.save(path, np.array(windows, dtype=None if windows == ["a"] else np.float32))
    capsys.readouterr()
    for _ in range(2):
        before = everything_in(experiment)
        assert analyse(experiment) == 0
        warning = capsys.readouterr().err
    assert everything_in(experiment) == before and analysed_tasks == [[0, 1, 2, 3]]
    if isinstance(expected, str):
        assert warning.startswith(f"warning: {path}: ") and expected in warning and warning.count("\n") == 1
        expected = first
    else:
        assert warning == ""
    assert analysis_of(experiment)[ONLINE_ACCURACY] == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_an_online_accuracy_without_its_curve_is_kept_while_the_run_is_the_same(experiment, capsys):
    assert analyse(experiment) == 0
    first = analysis_of(experiment)[ONLINE_ACCURACY]
    shutil.rmtree(experiment / "train_accuracy_per_checkpoint")
    for arguments in (["--dormant_unit_threshold", "0.9"], ["--batch_norm", "running"], ["--overwrite"]):
        assert analyse(experiment, *arguments) == 0
        assert "keeps its earlier average online accuracy" in capsys.readouterr().err
        assert np.array_equal(analysis_of(experiment)[ONLINE_ACCURACY], first)
    save_class_order(experiment, np.load(experiment / "class_order" / "index-0.npy")[::-1])
    assert analyse(experiment) == 0
    assert "index 0 is analysed without its average online accuracy" in capsys.readouterr().err
    assert np.isnan(analysis_of(experiment)[ONLINE_ACCURACY]).all()


@pytest.mark.parametrize("blocked", ["folder", "file", "settings"])
def test_what_cannot_be_written_is_known_before_the_work(blocked, experiment, capsys, analysed_tasks):
    assert analyse(experiment) == 0
    path = experiment / "previous_tasks_stable_rank_analysis"
    if blocked == "folder":
        shutil.rmtree(path)
        path.write_text("a file where a folder belongs")
    else:
        path = experiment / "analysis_settings" / "index-0.json" if blocked == "settings" else path / "index-0.npy"
        path.unlink()
        path.mkdir()
    message = refused(experiment, capsys, "--batch_norm", "running")
    assert str(path) in message and "cannot write this file" in message
    assert len(analysed_tasks) == 1


def test_a_pipe_among_the_results_keeps_nobody_waiting(experiment, capsys):
    assert analyse(experiment) == 0
    path = experiment / "weight_magnitude_analysis" / "index-0.npy"
    path.unlink()
    os.mkfifo(path)
    assert "what has its name is not a file" in refused(experiment, capsys)


def test_a_write_that_fails_leaves_no_settings_that_claim_the_old_results(experiment, capsys, monkeypatch):
    assert analyse(experiment) == 0
    write_file = post_run_analysis.write_file

    def full_disk(path, content):
        if path.parent.name == "previous_tasks_stable_rank_analysis":
            raise UserError(f"{path}: cannot write this file (no space)")
        write_file(path, content)

    monkeypatch.setattr(post_run_analysis, "write_file", full_disk)
    assert analyse(experiment, "--batch_norm", "running") == 2
    assert "no space" in capsys.readouterr().err
    assert json.loads((experiment / "analysis_settings" / "index-0.json").read_text()) == {}


def test_a_run_in_progress_is_analysed_as_far_as_it_is(experiment, capsys, analysed_tasks):
    assert analyse(experiment) == 0
    whole = analysis_of(experiment)
    finished = Path(shutil.copytree(experiment, experiment.parent / "finished"))
    make_unfinished(experiment)
    for folder in (*TASK_METRICS, ONLINE_ACCURACY, ACCURACY_PER_CLASS, "analysis_settings"):
        shutil.rmtree(experiment / folder)
    (experiment / "class_order" / "index-0.npy").unlink()  # the released code stores it when a run ends
    capsys.readouterr()

    assert analyse(experiment, "--experiment-index", "0") == 0
    assert "Missing, since the run is not finished: task 3 and the accuracy per class" in capsys.readouterr().out
    part = analysis_of(experiment)
    assert set(part) == {*TASK_METRICS, ONLINE_ACCURACY}
    for metric in TASK_METRICS:
        assert np.array_equal(part[metric][:2], whole[metric][:2]) and np.isnan(part[metric][2]) and part[metric].dtype == np.float32

    assert analyse(experiment, "--experiment-index", "0") == 0
    assert "analysed before" in capsys.readouterr().out
    shutil.copytree(finished / "model_parameters", experiment / "model_parameters", dirs_exist_ok=True)  # the run goes on
    assert analyse(experiment, "--experiment-index", "0") == 0
    assert "analysed before" not in capsys.readouterr().out
    assert all(np.array_equal(array, whole[metric]) for metric, array in analysis_of(experiment).items())
    assert analysed_tasks == [[0, 1, 2, 3], [0, 1], [2, 3]]  # three: the final network


def test_runs_are_chosen_by_index_and_the_others_left_alone(experiment, capsys):
    for index in (1, 2):
        network = build_network(experiment_seed(index), TINY["network_width"])
        RunFiles(experiment, index).save_model(0, network)
        shutil.copy(experiment / "config_files" / "index-0.json", experiment / "config_files" / f"index-{index}.json")
    assert analyse(experiment) == 0
    assert len(analysis_of(experiment, 0)) == 12 and not analysis_of(experiment, 1)  # by default, what is finished
    assert analyse(experiment, "--experiment-index", "0,2") == 0
    assert len(analysis_of(experiment, 2)) == 11 and not analysis_of(experiment, 1)
    assert analyse(experiment, "--experiment-index", "1-2") == 0
    assert len(analysis_of(experiment, 1)) == 11
    (experiment / "experiment_indices.npy").unlink()
    capsys.readouterr()
    assert analyse(experiment) == 2
    assert "no run is listed as finished; there are models of 0, 1, 2" in capsys.readouterr().err


@pytest.mark.parametrize("gone", [(4,), (0, 8), (12,)])
def test_models_that_are_gone_leave_the_others_to_be_analysed(gone, experiment, tiny_run, capsys):
    """In a line; what was found out while they were there stays, and what could not be is filled in when they are back."""
    assert analyse(Path(shutil.copytree(experiment, experiment.parent / "whole"))) == 0
    whole = analysis_of(experiment.parent / "whole")
    for folder in (experiment, experiment.parent / "whole"):
        for epoch in gone:
            model(folder, epoch).unlink()
            if epoch == 4:
                model(folder, epoch).touch()  # of 0 bytes, as a broken copy leaves it
    capsys.readouterr()
    assert analyse(experiment) == 0
    output = capsys.readouterr()
    warnings = output.err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith(
        f"warning: {model(experiment, gone[0])}: this model is not there; index 0 is analysed"
    )
    assert ("Some distances are missing" in output.out) == (0 in gone)
    results = analysis_of(experiment)
    for metric in TASK_METRICS:
        needed = [{0, task * EPOCHS} if metric == DISTANCE else {task * EPOCHS} for task in range(NUM_TASKS)]
        expected = [value if models.isdisjoint(gone) else np.nan for models, value in zip(needed, whole[metric], strict=True)]
        assert np.array_equal(results[metric], np.array(expected, dtype=np.float32), equal_nan=True)
    assert np.isnan(results[ACCURACY_PER_CLASS]).all() == (12 in gone)
    for overwrite in ([], ["--overwrite"]):
        assert analyse(experiment.parent / "whole", *overwrite) == 0
        assert "warning" not in capsys.readouterr().err
        assert all(np.array_equal(array, whole[metric]) for metric, array in analysis_of(experiment.parent / "whole").items())
    shutil.copytree(tiny_run / "model_parameters", experiment / "model_parameters", dirs_exist_ok=True)
    assert analyse(experiment) == 0
    assert all(np.array_equal(array, whole[metric]) for metric, array in analysis_of(experiment).items())


def test_a_listed_run_without_models_leaves_the_others_to_be_analysed(experiment, capsys):
    np.save(experiment / "experiment_indices.npy", np.array([0, 4, 7]))
    assert analyse(experiment) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "experiment_indices.npy: names index 4, 7 as finished, but model_parameters/ holds no index-4_epoch-*.pt" in line
    assert len(analysis_of(experiment)) == 12
    np.save(experiment / "experiment_indices.npy", np.array([4, 7]))
    assert "restore the models, or name the runs to analyse, as in --experiment-index 0" in refused(experiment, capsys)


def test_folders_are_put_together_as_everywhere(experiment, monkeypatch, capsys):
    """Of the analysis and of plots, as in configs."""
    monkeypatch.setenv("SCRATCH", str(experiment.parent))
    assert analyse("$SCRATCH/base_deep_learning_system", "--data_path", "$SCRATCH/data") == 0
    arguments = ["--metric", "test_accuracy_per_epoch", "--output", str(experiment / "x.svg"), "--results_dir"]
    assert run_script(plot_incremental_cifar_results.main, [*arguments, "${SCRATCH}"]) == 0, capsys.readouterr().err
    assert run_script(plot_incremental_cifar_results.main, [*arguments, "$NOPE/x"]) == 2
    assert '--results_dir is "$NOPE/x"; the environment variable NOPE is not set' in capsys.readouterr().err
    assert analyse(experiment, "--data_path", "~nobody-here/x") == 2
    assert '--data_path is "~nobody-here/x"; there is no user "nobody-here"' in capsys.readouterr().err


# --- The released code's results -------------------------------------------------------------------------------------------------


def test_of_a_run_in_progress_without_a_class_order_it_is_that_of_its_seed(experiment):
    files = RunFiles(experiment, 0)
    files.array_file("class_order").unlink()
    for seed, expected in {None: experiment_seed(0), 5: 5}.items():
        order = post_run_analysis.load_class_order(files, Config(class_order_seed=seed), is_finished=False)
        assert np.array_equal(order, draw_class_order(expected))


def test_images_are_by_default_where_the_run_had_them(experiment, tmp_path, monkeypatch, capsys):
    def nowhere(dataset, data_path, *_):
        raise UserError(data_path)

    monkeypatch.setattr(post_run_analysis, "load_images", nowhere)
    (tmp_path / "there").mkdir()
    beside_the_script = str(REPOSITORY / "data")
    for stored, place in {str(tmp_path / "there"): str(tmp_path / "there"), str(tmp_path / "gone"): beside_the_script}.items():
        change_config(experiment, data_path=stored)
        assert analyse(experiment) == 2
        assert capsys.readouterr().err == f"error: {place}\n"


def test_results_in_the_released_layout_are_analysed(tmp_path, monkeypatch, capsys):
    """Full-width models, no stored sizes, keys that this project does not know, and one finished run in an array without a dimension."""
    index, num_images = 3, 4
    folder = tmp_path / "base_deep_learning_system"
    models = folder / "model_parameters"
    models.mkdir(parents=True)
    seed = experiment_seed(index)
    torch.save(build_network(seed).state_dict(), models / f"index-{index}_epoch-0.pt")
    for epoch in range(200, 4001, 200):
        os.link(models / f"index-{index}_epoch-0.pt", models / f"index-{index}_epoch-{epoch}.pt")
    released = {"stepsize": 0.1, "weight_decay": 0.0005, "noise_std": 0.0, "debug": False, "num_epochs": 4000, "plot_results": []}
    (folder / "config_files").mkdir()
    (folder / "config_files" / f"index-{index}.json").write_text(json.dumps(released))
    (folder / "class_order").mkdir()
    np.save(folder / "class_order" / f"index-{index}.npy", draw_class_order(seed))
    np.save(folder / "experiment_indices.npy", np.array(index))
    (folder / "train_accuracy_per_checkpoint").mkdir()
    of_task = np.repeat(np.arange(20), 200 * np.arange(1, 21)).astype(np.float32)  # task t has 25 (t + 1) steps per epoch, one window each
    np.save(folder / "train_accuracy_per_checkpoint" / f"index-{index}.npy", of_task)

    asked = []

    def synthetic_images(dataset, data_path, train_images_per_class, test_images_per_class):
        asked.append((dataset, data_path, train_images_per_class, test_images_per_class))
        return draw_synthetic_images(2, 1)

    monkeypatch.setattr(post_run_analysis, "load_images", synthetic_images)
    monkeypatch.setattr(post_run_analysis, "NUM_ANALYSED_IMAGES", num_images)
    assert analyse(folder, "--data_path", str(tmp_path)) == 0
    assert asked == [("cifar100", str(tmp_path), 500, 100)]
    results = analysis_of(folder, index)
    assert all(results[metric].shape == (20,) and np.isfinite(results[metric]).all() for metric in TASK_METRICS)
    assert results[ACCURACY_PER_CLASS].shape == (100,)
    assert results["weight_magnitude_analysis"] == pytest.approx(0.02161, abs=1e-5)
    assert (results["next_task_stable_rank_analysis"] <= num_images).all()
    assert (results[DISTANCE] == 0).all() and np.array_equal(results[ONLINE_ACCURACY], np.arange(20))
    (folder / "config_files" / f"index-{index}.json").unlink()
    assert "There is no config_files/" not in capsys.readouterr().out
    assert analyse(folder, "--data_path", str(tmp_path)) == 0  # without any stored config the paper's sizes hold as well
    output = capsys.readouterr().out
    assert "analysed before" in output and f"There is no config_files/index-{index}.json: taken to be of the paper's sizes.\n" in output
    assert len(asked) == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: started(state, "module."),
        lambda state: started(state, "_orig_mod."),
        lambda state: {"state_dict": started(state, "_orig_mod.module."), "optimizer": {"state": {0: torch.ones(2)}}, "epoch": 4},
        lambda state: {**started(state, "module."), "n_averaged": torch.tensor(3)},
        lambda state: {"checkpoint": {"model_state_dict": state, "loss": [0.5]}},
        lambda state: {"network": state, "epoch": 4, "scheduler": None},
        lambda state: {**state, "ema": None},
        lambda state: {**state, "epoch": 4, "loss": [0.5], "config": {"name": "x"}},
    ],
)
def test_models_of_wrapped_networks_are_those_networks(wrap, experiment):
    assert analyse(experiment) == 0
    results = analysis_of(experiment)
    for epoch in range(0, NUM_TASKS * EPOCHS + 1, EPOCHS):
        change_model(experiment, wrap, epoch)
    assert analyse(experiment, "--overwrite") == 0
    for metric, array in analysis_of(experiment).items():
        assert array.tobytes() == results[metric].tobytes()


# --- What it refuses -------------------------------------------------------------------------------------------------------------


class Malicious:
    """An object that, when it is unpickled, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def change_model(folder, change, epoch=EPOCHS):
    path = folder / "model_parameters" / f"index-0_epoch-{epoch}.pt"
    state = torch.load(path, weights_only=True)
    torch.save(change(state), path)


def started(state, start):
    """A state dict whose names begin with this."""
    return {start + name: tensor for name, tensor in state.items()}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def save_class_order(folder, content, allow_pickle=False):
    np.save(folder / "class_order" / "index-0.npy", content, allow_pickle=allow_pickle)


def save_indices(folder, indices):
    np.save(folder / "experiment_indices.npy", np.array(indices))


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def change_config(folder, **settings):
    path = folder / "config_files" / "index-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def model(folder, epoch):
    return folder / "model_parameters" / f"index-0_epoch-{epoch}.pt"


# What is done to the folder, and what the message must contain.
BAD_FOLDERS = {
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "no models": (lambda f: shutil.rmtree(f / "model_parameters"), "no stored models"),
    "nothing finished": (lambda f: (f / "experiment_indices.npy").unlink(), "there are models of 0; name them,"),
    "list of finished runs damaged": (lambda f: (f / "experiment_indices.npy").write_bytes(b"\x93NUMPY"), "experiment_indices.npy"),
    "list of finished runs is a pipe": (lambda f: make_pipe(f / "experiment_indices.npy"), "there is something else in the place of"),
    "list of finished runs with -1": (lambda f: save_indices(f, [0, -1]), "experiment_indices.npy: the list of finished runs names -1;"),
    "list of finished runs with 10^9": (
        lambda f: save_indices(f, [10**9]),
        "experiment_indices.npy: the list of finished runs names 1000000000",
    ),
    "list of finished runs with 0.5": (
        lambda f: save_indices(f, [0.5]),
        "experiment_indices.npy: cannot read the list of finished runs (expected integers",
    ),
    "model is a pipe": (lambda f: make_pipe(model(f, 8)), "index-0_epoch-8.pt: this model is not a file"),
    "model truncated": (lambda f: truncate(model(f, 8)), "index-0_epoch-8.pt: this model cannot be read"),
    "model is text": (lambda f: model(f, 8).write_text("hello"), "index-0_epoch-8.pt: this model cannot be read"),
    "model is a list": (lambda f: change_model(f, lambda state: list(state.values())), "not a state dict"),
    "model is a checkpoint": (
        lambda f: shutil.copy(f / "experiment_checkpoints" / "index-0_epoch-12.pt", model(f, 8)),
        "index-0_epoch-8.pt: a checkpoint, which a run resumes from, and not a model",
    ),
    "two wrapped models": (
        lambda f: change_model(f, lambda s: {"model": s, "ema": s}, 0),
        "index-0_epoch-0.pt: holds 2 networks (model.*, ema.*); store the one to be analysed alone",
    ),
    "two models": (lambda f: change_model(f, lambda s: {**s, **started(s, "module.")}), "holds 2 networks (*, module.*)"),
    "model of modules": (
        lambda f: change_model(f, lambda s: ResNet18(2)),
        "cannot be read: restoring its incremental_cifar.resnet.ResNet18 takes running code from the file; store the network's",
    ),
    "model of TorchScript": (
        lambda f: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), model(f, 8)),
        "index-0_epoch-8.pt: this model cannot be read: restoring its TorchScript takes",
    ),
    "wrapped model of another width": (
        lambda f: change_model(f, lambda s: {"state_dict": started(ResNet18(4).state_dict(), "module.")}, 0),
        "another network; conv1.weight is (4, 3, 3, 3)",
    ),
    "first model of another network": (lambda f: change_model(f, lambda s: {"fc.bias": s["fc.bias"]}, 0), "conv1.weight is not there"),
    "model lacks a layer": (
        lambda f: change_model(f, lambda s: {k: v for k, v in s.items() if k != "fc.bias"}),
        "fc.bias is not there, expected (100,)",
    ),
    "model has a layer more": (lambda f: change_model(f, lambda s: {**s, "more": s["fc.bias"]}), "more is (100,) of float32, expected not"),
    "model of another width": (
        lambda f: change_model(f, lambda s: ResNet18(4).state_dict()),
        "another network; conv1.weight is (4, 3, 3, 3)",
    ),
    "model in half precision": (
        lambda f: change_model(f, lambda s: {k: v.half() for k, v in s.items()}),
        "a model in another precision; conv1.weight is (2, 3, 3, 3) of float16, expected (2, 3, 3, 3) of float32",
    ),
    "model with a number in a layer's place": (
        lambda f: change_model(f, lambda s: {**s, "fc.bias": 4}),
        "fc.bias is no plain tensor, expected (100,)",
    ),
    "models in a list": (
        lambda f: change_model(f, lambda s: {"models": [s], "epoch": 3}),
        "no network was found in this file, since conv1.weight is not there; it holds models (list), epoch (int)",
    ),
    "model too deep": (
        lambda f: change_model(f, lambda s: {"a": {"b": {"c": {"d": s}}}, **dict.fromkeys("efghi", 1)}, 0),
        "no network was found in this file, since conv1.weight is not there; it holds a (dict), e (int), f (int), g (int), h (int), ...",
    ),
    "model is an empty dict": (lambda f: change_model(f, lambda s: {}), "conv1.weight is not there; it holds nothing"),
    "sparse model": (
        lambda f: change_model(f, lambda s: {**s, "fc.bias": s["fc.bias"].to_sparse()}),
        "fc.bias is no plain tensor, expected",
    ),
    "model not finite": (
        lambda f: change_model(f, lambda s: {**s, "fc.weight": s["fc.weight"] * torch.nan}),
        "fc.weight holds values that",
    ),
    "activations not finite": (
        lambda f: change_model(f, lambda s: {**s, "layer4.1.conv2.weight": torch.full_like(s["layer4.1.conv2.weight"], 3e38)}),
        "activations of this network are not finite",
    ),
    "gradients not finite": (
        lambda f: change_model(f, lambda s: {**s, "fc.weight": torch.full_like(s["fc.weight"], 3e38)}),
        "index-0_epoch-4.pt: the gradients of this network are not finite; the run diverged",
    ),
    "outputs not finite": (
        lambda f: change_model(f, lambda s: {**s, "fc.weight": torch.full_like(s["fc.weight"], 3e38)}, 12),
        "index-0_epoch-12.pt: the outputs of this network are not finite",
    ),
    "class order is a pipe": (
        lambda f: make_pipe(f / "class_order" / "index-0.npy"),
        "index-0.npy: the class order of this run is not a file",
    ),
    "class order missing": (lambda f: (f / "class_order" / "index-0.npy").unlink(), "class order of this run is not there"),
    "class order truncated": (lambda f: truncate(f / "class_order" / "index-0.npy"), "class order of this run cannot be read"),
    "class order with a repeat": (lambda f: save_class_order(f, np.arange(100) // 2 * 2), "not a class order"),
    "class order too short": (lambda f: save_class_order(f, np.arange(99)), "not a class order"),
    "class order with two dimensions": (lambda f: save_class_order(f, np.arange(100).reshape(10, 10)), "not a class order"),
    "class order of words": (lambda f: save_class_order(f, np.array(["a"] * 100)), "not a class order"),
    "config not JSON": (lambda f: (f / "config_files" / "index-0.json").write_text("{"), "cannot read the stored config"),
    "config is a pipe": (
        lambda f: make_pipe(f / "config_files" / "index-0.json"),
        "cannot read the stored config of this run (not a file)",
    ),
    "config of another width": (
        lambda f: change_config(f, network_width=4),
        "conv1.weight is (2, 3, 3, 3) of float32, expected (4,",
    ),
    "config with a wrong width": (lambda f: change_config(f, network_width="wide"), 'network_width is "wide"'),
    "config with a wrong size": (lambda f: change_config(f, num_tasks="three"), 'num_tasks is "three"'),
    "config of a shorter run": (lambda f: change_config(f, num_tasks=2), "a model of epoch 12 cannot be in a run of 2 tasks of 4 epochs"),
    "no config": (lambda f: shutil.rmtree(f / "config_files"), "the paper's sizes hold"),
    "a file where a folder belongs": (lambda f: (f / "weight_magnitude_analysis").write_text(""), "cannot write this file"),
}


def refused(folder, capsys, *arguments) -> str:
    """The one line with which the analysis ends; it must leave everything as it was."""
    before = everything_in(folder.parent)
    capsys.readouterr()
    assert analyse(folder, *arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and output.out == ""
    assert everything_in(folder.parent) == before
    return output.err


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_line_and_writes_nothing(case, experiment, capsys):
    damage, message = BAD_FOLDERS[case]
    damage(experiment)
    assert message in refused(experiment, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dormant_unit_threshold", "1.5"], "--dormant_unit_threshold: got 1.5; it must be a number from 0 to 1"),
        (["--dormant_unit_threshold", "nan"], "--dormant_unit_threshold: got nan"),
        (["--dormant_unit_threshold", "few"], "--dormant_unit_threshold"),
        (["--batch_norm", "none"], "--batch_norm"),
        (["--device", "gpu"], '--device: got "gpu"'),
        (["--device", "cuda:99"], "cuda:99"),
        (["--experiment-index", "first"], '--experiment-index: got "first"'),
        (["--experiment-index", "0-2"], "no stored models of index 1, 2 in model_parameters/; there are those of 0"),
        (["--threshold", "0.1"], "--threshold"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_argument_is_one_line_and_writes_nothing(arguments, message, experiment, capsys):
    assert message in refused(experiment, capsys, *arguments)


def test_results_of_earlier_indices_stay_when_a_later_one_cannot_be_used(experiment, capsys):
    shutil.copy(experiment / "config_files" / "index-0.json", experiment / "config_files" / "index-1.json")
    (experiment / "model_parameters" / "index-1_epoch-0.pt").write_bytes(b"no model")
    assert analyse(experiment, "--experiment-index", "0-1") == 2
    assert "index-1_epoch-0.pt" in capsys.readouterr().err
    assert len(analysis_of(experiment, 0)) == 12 and not analysis_of(experiment, 1)
    assert analyse(experiment) == 0
    assert "analysed before" in capsys.readouterr().out


@pytest.mark.filterwarnings("error")  # a warning would be a second line
def test_nothing_in_a_file_is_executed(experiment, tmp_path, capsys):
    trace = tmp_path / "trace"
    content = model(experiment, EPOCHS).read_bytes()
    torch.save({"conv1.weight": Malicious(trace)}, model(experiment, EPOCHS))
    assert "cannot be read" in refused(experiment, capsys)
    model(experiment, EPOCHS).write_bytes(pickle.dumps(Malicious(trace)))
    assert "cannot be read" in refused(experiment, capsys)
    model(experiment, EPOCHS).write_bytes(content)

    class_order = np.load(experiment / "class_order" / "index-0.npy")
    save_class_order(experiment, np.array([Malicious(trace)]), allow_pickle=True)
    assert "cannot be read" in refused(experiment, capsys)
    (experiment / "class_order" / "index-0.npy").write_bytes(pickle.dumps(Malicious(trace)))
    assert "cannot be read" in refused(experiment, capsys)
    save_class_order(experiment, class_order)
    np.save(experiment / "experiment_indices.npy", np.array([Malicious(trace)]), allow_pickle=True)
    assert "cannot read the list of finished runs" in refused(experiment, capsys)
    assert not trace.exists()
