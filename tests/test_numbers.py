"""Numbers where people want them: in a tracker, as one table, from a stored model, with one seed varied and the other kept."""

import functools
import importlib.util
import json
import os
import re
import shutil
import sys
import types

import numpy as np
import pandas
import pytest
import torch
from conftest import REPOSITORY, TINY, differing_results, tiny_arguments

import incremental_cifar_experiment
import post_run_analysis
import run_sweep
from incremental_cifar import cifar100, learner, trackers
from incremental_cifar.command_line import run_script
from incremental_cifar.config import make_config, read_sizes
from incremental_cifar.learning_curves import array_lengths
from incremental_cifar.resnet import BLOCKS_PER_STAGE, build_network
from incremental_cifar.run_files import RunFiles
from incremental_cifar.safe_files import write_note
from incremental_cifar.seeds import draw_class_order, experiment_seed
from incremental_cifar.sweep_local import LocalSweep
from incremental_cifar_experiment import IncrementalCIFARExperiment
from plots import export
from plots.run_results import make_curves, metric_of, read_runs

ALGORITHM = "continual_backpropagation"
NUM_EPOCHS = TINY["num_tasks"] * TINY["epochs_per_task"]
# A run of a part of a second.
SHORT = {"num_tasks": 1, "epochs_per_task": 6, "checkpoint_save_frequency": 3, "batch_size": 5, "train_images_per_class": 5}


class Killed(BaseException):
    """What nobody catches."""


class FakeRun:
    """A run of W&B or of Trackio, or a writer of TensorBoard: keeps what it is told, and kills the process after an epoch."""

    kill_after: int | None = None
    fail_at: int | None = None

    def __init__(self, rows, config=None, held=0):
        self.rows, self.config, self.step, self._next_step = rows, config, held + bool(held), held + bool(held)
        self.is_ended = False

    def log(self, values, step):
        if step == self.fail_at:
            raise OSError(28, "No space left on device")
        self.rows.append((step, values))
        if step == self.kill_after:
            raise Killed

    finish = close = lambda self: setattr(self, "is_ended", True)

    def add_scalar(self, name, value, epoch):
        self.values = {**getattr(self, "values", {}), name: value}
        self.epoch = epoch

    def add_text(self, tag, text):
        self.config = json.loads(text.strip("`"))

    def flush(self):
        values, self.values = self.values, {}
        self.log(values, self.epoch)


@pytest.fixture
def fakes(monkeypatch):
    """The three packages, as far as they are used: a list of FakeRuns, the newest last. A run of Trackio is found by its name again."""
    runs, named = [], {}

    def begin(rows, config=None):
        runs.append(FakeRun(rows, config, held=rows[-1][0] if rows else 0))
        return runs[-1]

    def wandb_init(config, mode, settings, **_):
        assert settings["resume"] == "allow" and mode == (None if os.environ.get("WANDB_MODE") else "offline")
        return begin([], config)

    def trackio_init(project, name, config, resume, **_):
        assert resume == "allow"
        return begin(named.setdefault(name, []), config)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=wandb_init, Settings=dict, login=lambda prompt: False))
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=trackio_init))
    writer = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: begin([]))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace(origin=name))
    monkeypatch.setattr(FakeRun, "kill_after", None)
    monkeypatch.setattr(FakeRun, "fail_at", None)
    return runs


def train(results_dir, *options, **settings):
    arguments = tiny_arguments(ALGORITHM, results_dir, **SHORT | settings)
    return run_script(incremental_cifar_experiment.main, [*arguments, *options])


@pytest.fixture(autouse=True, scope="module")
def same_images():
    """Drawing them is half of what a short run takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar100, "load_images", functools.cache(cifar100.load_images))
        yield


@pytest.fixture(scope="module")
def untracked(same_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untracked")
    assert train(folder) == 0
    return folder / ALGORITHM


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_record_has_every_epoch_once_whatever_was_killed(name, fakes, tmp_path, monkeypatch, untracked):
    for kill_after in (2, 5, None):  # before the first checkpoint, and after one
        monkeypatch.setattr(FakeRun, "kill_after", kill_after)
        if kill_after is None:
            assert train(tmp_path, "--track", name) == 0
        else:
            with pytest.raises(Killed):
                train(tmp_path, "--track", name)
    record, folder = fakes[-1], tmp_path / ALGORITHM
    assert [epoch for epoch, _ in record.rows] == [1, 2, 3, 4, 5, 6] and record.is_ended
    assert record.config["use_cbp"] is True and record.config["index"] == 0 and record.config["num_tasks"] == 1
    for metric in ("test_loss_per_epoch", "test_accuracy_per_epoch", "validation_accuracy_per_epoch", "units_reset_per_epoch"):
        assert np.array_equal(np.load(folder / metric / "index-0.npy"), [values[metric] for _, values in record.rows])
    losses = torch.load(folder / "experiment_checkpoints/index-0_epoch-6.pt", weights_only=True)["curves"]["step_losses"]
    assert record.rows[0][1]["train_loss_per_epoch"] == losses[:2].mean().item()
    assert differing_results(folder, untracked) == []
    key = json.loads((folder / f"tracking/index-0/{name}.json").read_text())["key"]
    offline = folder / f"tracking/index-0/wandb/offline-run-1-{key}"
    offline.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(FakeRun, "kill_after", 1)
    with pytest.raises(Killed):
        train(tmp_path, "--track", name, "--restart")
    assert (
        [epoch for epoch, _ in fakes[-1].rows] == [1]
        and not offline.exists()
        and key not in (folder / f"tracking/index-0/{name}.json").read_text()
    )


def test_what_a_record_lacks_is_put_in_although_nothing_is_left_to_train(fakes, tmp_path, monkeypatch):
    def killed_before_the_last_curves(self, num_epochs, store_curves=IncrementalCIFARExperiment.store_curves):
        if num_epochs == 6:
            raise Killed
        store_curves(self, num_epochs)

    with monkeypatch.context() as patch:
        patch.setattr(IncrementalCIFARExperiment, "store_curves", killed_before_the_last_curves)
        with pytest.raises(Killed):
            train(tmp_path)
    assert train(tmp_path, "--track", "wandb") == 0
    assert [epoch for epoch, _ in fakes[-1].rows] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_fails_says_so_once_and_ends_no_run(fakes, tmp_path, monkeypatch, capsys, untracked):
    monkeypatch.setattr(FakeRun, "fail_at", 4)
    assert train(tmp_path, "--track", "wandb") == 0
    warnings = re.findall(r"warning: .*", capsys.readouterr().err)
    assert len(warnings) == 1 and "--track wandb: [Errno 28] No space left on device; the run goes on without it" in warnings[0]
    assert [epoch for epoch, _ in fakes[-1].rows] == [1, 2, 3]
    assert differing_results(tmp_path / ALGORITHM, untracked) == []


def test_a_tracker_that_exits_ends_no_run(fakes, tmp_path, monkeypatch, capsys, untracked):
    def leave(prompt):
        raise SystemExit(3)

    monkeypatch.setattr(sys.modules["wandb"], "login", leave)
    assert train(tmp_path, "--track", "wandb") == 0
    assert len(re.findall(r"warning: .*--track wandb: 3; the run goes on without it", capsys.readouterr().err)) == 1
    assert fakes == [] and differing_results(tmp_path / ALGORITHM, untracked) == []


def test_of_offline_folders_the_newest_stays_and_disabled_deletes_none(fakes, tmp_path, monkeypatch, capsys):
    folder = tmp_path / ALGORITHM / "tracking/index-0"
    write_note(folder / "wandb.json", {"key": "12ab"})
    for mode, is_there in {"disabled": True, "offline": False}.items():
        (folder / "wandb/offline-run-1-12ab").mkdir(parents=True, exist_ok=True)
        (folder / "wandb/offline-run-1-12ac").mkdir(exist_ok=True)
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setattr(FakeRun, "kill_after", 1)
        with pytest.raises(Killed):
            train(tmp_path, "--track", "wandb")
        assert (folder / "wandb/offline-run-1-12ab").exists() == is_there and (folder / "wandb/offline-run-1-12ac").exists()
    shutil.rmtree(folder)
    folder.touch()  # then W&B would write elsewhere
    monkeypatch.setattr(FakeRun, "kill_after", None)
    assert train(tmp_path, "--track", "wandb") == 0
    assert "--track wandb: [Errno 20] Not a directory" in capsys.readouterr().err and len(fakes) == 2


def test_trackers_are_checked_before_any_work(tmp_path, monkeypatch, capsys):
    assert train(tmp_path, "--track", "tensorboards") == 2
    names = 'it must be a string, one of "", "tensorboard", "wandb", "trackio"'
    assert capsys.readouterr().err == f'error: --set: track is "tensorboards"; {names}\n'
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sweep = ["--configs", str(REPOSITORY / "cfg" / f"{ALGORITHM}.json"), "--indices", "0", "--track", "wandb"]
    for main in (lambda: train(tmp_path, "--track", "wandb"), lambda: run_script(run_sweep.main, sweep)):
        assert main() == 2
        assert capsys.readouterr().err == "error: --track wandb: this package is not installed; python -m pip install wandb\n"
    assert not (tmp_path / ALGORITHM).exists()


def test_a_sweep_passes_the_tracker_on(fakes, tmp_path, monkeypatch):
    commands, jobs = [], []
    monkeypatch.setattr("incremental_cifar.sweep_local.subprocess.Popen", lambda command, **_: commands.append(command))
    monkeypatch.setattr("incremental_cifar.sweep_slurm.sbatch", lambda options, output, script, *command: jobs.append(command) or "7")
    monkeypatch.setattr(run_sweep, "queued_runs", lambda experiments: {})
    file = str(REPOSITORY / "cfg" / f"{ALGORITHM}.json")
    sweep = ["--configs", file, "--indices", "0", "--set", f"results_dir={tmp_path}", "dataset=synthetic"]
    for track in ("", "trackio"):
        arguments = [*sweep, "--track", track] if track else sweep
        parsed = run_sweep.parse_arguments(arguments)
        (runs,) = run_sweep.plan(parsed.configs, parsed.overrides, parsed.grids, parsed.indices)
        with pytest.raises(AttributeError):  # of a process that is none
            LocalSweep([runs], {"slot 1": {}}, 1, False, "all").run_process(runs, "train", "slot 1")
        assert incremental_cifar_experiment.parse_arguments(commands[-1][2:])[0].track == track
        assert run_sweep.main([*arguments, "--slurm"]) == 0
        in_job = run_sweep.parse_arguments([word.replace("%a", "0") for word in jobs[-1][1:]])
        assert run_sweep.plan(in_job.configs, in_job.overrides, in_job.grids, in_job.indices)[0].config.track == track


def test_tensorboards_own_files(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def killed(self, epoch, values, record=trackers.TensorBoard.record):
        record(self, epoch, values)
        if epoch == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trackers.TensorBoard, "record", killed)
        with pytest.raises(Killed):
            train(tmp_path, "--track", "tensorboard")
    assert train(tmp_path, "--track", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / ALGORITHM / "tracking/index-0")).Reload()
    stored = np.load(tmp_path / ALGORITHM / "test_loss_per_epoch/index-0.npy")
    shown = events.Scalars("test_loss_per_epoch")
    assert [event.step for event in shown] == [1, 2, 3, 4, 5, 6] and np.array_equal(stored, [event.value for event in shown])


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train(tmp_path, "--track", "wandb") == 0
    (folder,) = (tmp_path / ALGORITHM / "tracking/index-0/wandb").glob("offline-run-*")
    assert b"test_accuracy_per_epoch" in next(folder.glob("*.wandb")).read_bytes()


# --- The table -------------------------------------------------------------------------------------------------------------------


def test_the_table_has_every_value_of_every_array(tmp_path, rng):
    folder = tmp_path / ALGORITHM
    files, config = RunFiles(folder, 0), make_config(TINY, "here")
    files.save_config(config, {})
    for metric, length in array_lengths(config.steps_before(NUM_EPOCHS), NUM_EPOCHS).items():
        files.save_array(metric, rng.random(length, dtype=np.float32))
    for odd in (folder / ".hidden_per_epoch", tmp_path / ".hidden" / "a_per_epoch"):
        odd.mkdir(parents=True)
        np.save(odd / "index-0.npy", np.zeros(12))
    np.save(folder / "class_order" / "index-00.npy", np.arange(100))
    files.save_array("units_reset_per_epoch", np.float32([np.nan] * 5 + [3] * 7))  # begun in mid-run
    files.save_array("next_task_dormant_units_analysis", np.float32([0, 0.25, np.nan]))
    files.save_array("average_online_accuracy_analysis", np.float32([0.5, 0.25, 0.125]))
    assert run_script(export.main, ["--results_dir", str(tmp_path), "--output", str(tmp_path / "all.csv")]) == 0
    table = export.results_table(tmp_path)
    assert list(table) == ["algorithm", "index", "metric", "task", "number_of_classes", "epoch", "value"]
    pandas.testing.assert_frame_equal(pandas.read_csv(tmp_path / "all.csv"), table, check_dtype=False)
    arrays = {path.parent.name: np.load(path) for path in folder.glob("[!.]*/index-0.npy")}
    assert set(table.metric) == set(arrays)
    for metric, array in arrays.items():
        assert np.array_equal(table[table.metric == metric].value, array, equal_nan=True)

    def places(metric):
        return table[table.metric == metric][["task", "number_of_classes", "epoch"]].values.tolist()

    assert places("test_loss_per_epoch") == [[1 + epoch // 4, 2 * (1 + epoch // 4), epoch + 1] for epoch in range(NUM_EPOCHS)]
    assert places("next_task_dormant_units_analysis") == [[1, 2, 0], [2, 4, 4], [3, 6, 8]]
    assert places("average_online_accuracy_analysis") == [[1, 2, 4], [2, 4, 8], [3, 6, 12]]
    assert places("train_loss_per_checkpoint") == [[2, 4, 6], [3, 6, 9], [3, 6, 11]]  # steps 25, 50, 75: 4, 8 and 12 in an epoch
    assert places("class_order")[:3] == [[1, 1, 12], [1, 2, 12], [2, 3, 12]]


@pytest.mark.parametrize(("output", "message"), [("x.xlsx", "must end in .csv or .parquet"), ("x.parquet", "pip install pyarrow")])
def test_a_table_that_cannot_be_written_is_one_line(output, message, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    assert run_script(export.main, ["--results_dir", str(tmp_path), "--output", str(tmp_path / output)]) == 2
    assert re.fullmatch(rf"error: --output .*{message}.*\n", capsys.readouterr().err)


# --- A stored model --------------------------------------------------------------------------------------------------------------


def test_the_page_of_stored_models_says_what_works(tmp_path, untracked):
    page = (REPOSITORY / "docs" / "look_inside.md").read_text()
    ours, images, accuracy, released = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    folder, names = untracked, {}
    for code in (ours, images, accuracy):  # the last one asserts
        exec(code.replace(f"results/{ALGORITHM}", str(folder)), names)
    assert len(ours.strip().partition("\n\n")[2].splitlines()) == 3
    assert [layer.shape[1] for layer in names["features"]] == [2] * 5 + [4] * 4 + [8] * 4 + [16] * 4
    theirs = tmp_path / "released"
    shutil.copytree(folder, theirs)
    (theirs / "config_files/index-0.json").write_text(json.dumps({"stepsize": 0.1, "current_epoch": 6, **TINY, **SHORT}))
    exec(re.sub(r'RunFiles\(".*?"', f'RunFiles("{theirs}"', released), names)
    measured = names["accuracy"].item()
    exec(images, names)
    exec(accuracy.partition("validation, ")[0], names)
    assert names["accuracy"].item() == measured


def test_any_network_is_found_in_a_file_by_its_first_parameter(tmp_path):
    network, other = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()) for _ in range(2))
    torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, tmp_path / "a.pt")
    assert torch.equal(post_run_analysis.load_model(tmp_path / "a.pt", other)[0].weight, network[0].weight)


def test_a_changed_network_is_trained_and_analysed(tmp_path, monkeypatch):
    """Whoever changes what `network_of` makes of a config need change nothing else."""

    def deeper(config, random_seed=0):
        monkeypatch.setattr("incremental_cifar.resnet.BLOCKS_PER_STAGE", (3, 2, 2, 2) if config.network_width == 3 else BLOCKS_PER_STAGE)
        return build_network(random_seed, config.network_width)

    monkeypatch.setattr(learner, "network_of", deeper)
    monkeypatch.setattr(post_run_analysis, "network_of", deeper)
    assert train(tmp_path, network_width=3, num_tasks=2, epochs_per_task=1, use_cbp=False) == 0
    assert run_script(post_run_analysis.main, ["--results_dir", str(tmp_path / ALGORITHM), "--device", "cpu"]) == 0
    state = torch.load(RunFiles(tmp_path / ALGORITHM, 0).model_file(2), weights_only=True)
    assert "layer1.2.conv1.weight" in state and np.isfinite(np.load(tmp_path / ALGORITHM / "accuracy_per_class_in_order/index-0.npy")).all()


# --- Seeds, and what a run says --------------------------------------------------------------------------------------------------


def test_either_seed_can_be_kept_while_the_other_varies(tmp_path, capsys, uninterrupted):
    short = {"epochs_per_task": 1}
    settings = {"plain": {}, "order": {"class_order_seed": 5}, "training": {"training_seed": 5}}
    for name, seeds in settings.items():
        assert train(tmp_path, experiment_name=name, **short, **seeds) == 0
    files = {name: RunFiles(tmp_path / name, 0) for name in settings}
    orders = {name: np.load(its.array_file("class_order")) for name, its in files.items()}
    models = {name: torch.load(its.model_file(0), weights_only=True)["conv1.weight"] for name, its in files.items()}
    assert np.array_equal(orders["order"], draw_class_order(5)) and np.array_equal(orders["training"], orders["plain"])
    assert np.array_equal(orders["plain"], draw_class_order(experiment_seed(0)))
    assert torch.equal(models["training"], build_network(5, 2).conv1.weight) and torch.equal(models["order"], models["plain"])
    assert read_sizes(files["order"].config_file)[0].class_order_seed == files["order"].load_config().class_order_seed == 5
    capsys.readouterr()
    assert train(tmp_path, experiment_name="order", **short) == 2
    assert "class_order_seed (5 there, null here)" in capsys.readouterr().err
    assert train(tmp_path, experiment_name="order", class_order_seed=-1) == 2
    assert "class_order_seed is -1; it must be an integer or null, from 0 to 4294967295" in capsys.readouterr().err
    metric = metric_of("test_accuracy_per_epoch")
    remarks = make_curves(read_runs(tmp_path, metric, list(settings)), metric).remarks
    assert remarks == ["Order: class_order_seed 5 in index 0", "Training: training_seed 5 in index 0"]


def test_verbose_shows_losses_and_the_time_left(tmp_path, capsys):
    assert train(tmp_path, "--verbose", num_tasks=1, epochs_per_task=2) == 0
    shown = capsys.readouterr().out
    for name, metric in {"validation": "validation", "test": "test"}.items():
        for loss in np.load(tmp_path / ALGORITHM / f"{metric}_loss_per_epoch/index-0.npy"):
            assert re.search(rf"\t{name} accuracy: \d\.\d{{4}}, loss: {loss:.4f}\n", shown)
    for line in (r"training loss: \d+\.\d{4}", r"epoch run time: \d+\.\d\d s", r"time left: \d\d:\d\d"):
        assert len(re.findall(rf"\t{line}\n", shown)) == 2
