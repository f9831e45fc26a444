"""What happened inside the networks of a run: stored models in; dormant units, ranks, gradients, weights and accuracies out.

    python post_run_analysis.py --results_dir results/base_deep_learning_system/ --data_path data/

Analyses every finished run of the experiment in that folder, of this project or of the released code; `--experiment-index` also takes
runs in progress. Of a run with 20 tasks of 200 epochs, the network stored at epoch 200 i (i = 0..19) is shown 1,000 training images of
task i's classes, which it has not met yet ("next task"), and 1,000 of all classes before them ("previous tasks"). About five
minutes for such a run at full width on two CPU cores, three of them for the gradients. What is there, computed with the same settings
from the same models, is not computed again; results that lack a measure get that measure alone. Index K's results appear beside its
metrics, float32, a value per task, NaN where a model is not there (yet):

    weight_magnitude_analysis/index-K.npy                                     mean |parameter|
    distance_to_initial_analysis/index-K.npy                                  2-norm of all parameters less those of the model of epoch 0
    next_task_gradient_norm_analysis/index-K.npy                              2-norm of the loss's gradient, see `loss_gradients`
    next_task_zero_gradients_analysis/index-K.npy                             fraction of that gradient's entries that are exactly 0
    {next_task,previous_tasks}_dormant_units_analysis/index-K.npy             fraction of all units; previous tasks of task 0: 0
    {next_task,previous_tasks}_effective_rank_analysis/index-K.npy            of the last hidden layer (512 units); as above
    {next_task,previous_tasks}_stable_rank_analysis/index-K.npy               likewise
    average_online_accuracy_analysis/index-K.npy                              mean training accuracy over the task's steps; of no model, but
                                                                              of train_accuracy_per_checkpoint: NaN without that
    accuracy_per_class_in_order/index-K.npy                                   of the final network: a fraction per class, in class order
    analysis_settings/index-K.json                                            with which settings, from which models (SHA-256); written last

Source: paper, Methods, "Class-incremental CIFAR-100"; released incremental_cifar/post_run_analysis.py.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from incremental_cifar.cifar100 import ImageSet, load_images
from incremental_cifar.command_line import OneLineArgumentParser, parse_indices, run_script, warn
from incremental_cifar.config import NUM_CLASSES, NUM_SEEDS, REPOSITORY, RULES, SIZE_KEYS, Config, UserError, read_sizes, whole_path
from incremental_cifar.learner import network_of
from incremental_cifar.learning_curves import STEPS_PER_WINDOW
from incremental_cifar.resnet import ResNet18
from incremental_cifar.run_files import RunFiles, array_bytes
from incremental_cifar.safe_files import check_destinations, read_note, write_file
from incremental_cifar.seeds import Purpose, draw_class_order, experiment_seed, generator_for
from incremental_cifar.training import choose_device, set_arithmetic
from incremental_cifar.unit_metrics import (
    IMAGES_PER_CHUNK,
    accuracy_per_class,
    active_share,
    dormant_unit_fraction,
    effective_rank,
    hidden_features,
    loss_gradients,
    singular_values,
    stable_rank,
    two_norm,
    weight_magnitude,
    zero_share,
)

NUM_ANALYSED_IMAGES = 1000  # or all, where the classes have fewer

WEIGHT_MAGNITUDE = "weight_magnitude_analysis"
DISTANCE = "distance_to_initial_analysis"
GRADIENT_METRICS = ("next_task_gradient_norm_analysis", "next_task_zero_gradients_analysis")
UNIT_METRICS = {
    shown: tuple(f"{shown}_{metric}_analysis" for metric in ("dormant_units", "stable_rank", "effective_rank"))
    for shown in ("next_task", "previous_tasks")
}
TASK_METRICS = (WEIGHT_MAGNITUDE, DISTANCE, *GRADIENT_METRICS, *UNIT_METRICS["next_task"], *UNIT_METRICS["previous_tasks"])  # of a model
ONLINE_ACCURACY = "average_online_accuracy_analysis"
ACCURACY_PER_CLASS = "accuracy_per_class_in_order"
ANALYSIS_KEYS = ("dormant_unit_threshold", "batch_norm", "images")  # of the settings, those that are not the run's own


class Run(NamedTuple):
    """A run as it is found on disk, with all that its analysis needs but the models and the images."""

    files: RunFiles
    sizes: Config  # only what `read_sizes` reads is the run's own
    class_order: np.ndarray  # (100,)
    tasks_here: list[int]  # those whose first network is there; the number of tasks stands for the final network
    settings: dict[str, Any]  # what decides whether stored results are those that this command asks for, but the models
    # SHA-256 of the files of tasks 0, 1, ... and, in a finished run, of the final network. Of a model that is gone, as the analysis had it;
    # None if there was none.
    model_digests: list[str | None]

    @property
    def classes(self) -> np.ndarray:
        """All classes of the run, in the order in which it meets them: 100 at the paper's sizes."""
        return self.class_order[: self.sizes.num_classes_seen(self.sizes.num_tasks - 1)]

    @property
    def has_final_network(self) -> bool:
        """Whether the run came to its end, even if that network is gone."""
        return len(self.model_digests) > self.sizes.num_tasks


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    device = choose_device(parsed.device)
    set_arithmetic("fp32", deterministic=True)  # no TF32: full precision on a GPU too

    folder = Path(parsed.results_dir)
    indices = choose_indices(folder, parsed.experiment_index)
    runs = [find_run(folder, index, parsed.dormant_unit_threshold, parsed.batch_norm) for index in indices]
    work = []  # of each run: its results so far, the tasks to analyse, whether anything is to be written
    for run in runs:
        results = load_results(run, parsed.overwrite)
        tasks = [task for task in run.tasks_here if missing_metrics(run, results, task)]
        accuracies = online_accuracies(run, results[ONLINE_ACCURACY])
        is_changed = bool(tasks) or not np.array_equal(accuracies, results[ONLINE_ACCURACY], equal_nan=True)
        results[ONLINE_ACCURACY] = accuracies
        if is_changed:
            check_destinations(settings_file(run.files), *map(run.files.array_file, results))
        work.append((run, results, tasks, is_changed))
    load_images_once = functools.lru_cache(maxsize=1)(load_images)  # the runs of an experiment share them
    num_models = sum(len(tasks) for _, _, tasks, _ in work)
    bar = tqdm(total=num_models, desc="models", unit="", leave=False, disable=None, dynamic_ncols=True)
    with bar as progress, contextlib.ExitStack() as held:
        for run, _, _, is_changed in work:
            if is_changed and run.has_final_network:  # a run in progress holds its lock itself
                held.enter_context(run.files.locked())
        for run, results, tasks, is_changed in work:
            if tasks:
                sizes = run.sizes
                train_images_per_class = sizes.validation_images_per_class + sizes.train_images_per_class
                data_path = parsed.data_path or (sizes.data_path if os.path.isdir(sizes.data_path) else str(REPOSITORY / "data"))
                images = load_images_once(sizes.dataset, data_path, train_images_per_class, sizes.test_images_per_class)
                analyse_run(run, results, tasks, *(ImageSet(split, device) for split in images), progress)
            if is_changed:
                save_results(run, results)
            done = "analysed" if tasks else "analysed before with these settings (--overwrite does it again)"
            tqdm.write(describe_results(run, results, done))
    return 0


# --- What there is to analyse ----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises UserError."""
    parser = OneLineArgumentParser(
        description="Dormant units, ranks, gradients, weights and accuracies of the networks that an experiment's runs stored."
    )
    parser.add_argument(
        "--results_dir",
        default=str(REPOSITORY / "results" / "base_deep_learning_system"),
        metavar="PATH",
        help="the experiment's folder (default results/base_deep_learning_system/ beside this script)",
    )
    parser.add_argument(
        "--data_path",
        metavar="PATH",
        help="folder that holds, or will hold, cifar-100-python/ (default: the run's, or, if that is not there, data/ beside this script)",
    )
    parser.add_argument(
        "--dormant_unit_threshold",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="a unit is dormant if it is active on less than this share of images and positions, from 0 to 1 (default 0.01)",
    )
    parser.add_argument(
        "--experiment-index",
        metavar="N",
        help="the runs to analyse, finished or not: one index, a range as in 0-3, or several as in 0,2,5-7 (default all finished runs)",
    )
    parser.add_argument(
        "--batch_norm",
        choices=("batch", "running"),
        default="batch",
        help="statistics that normalise features: of the images shown, as in the paper, or those learned (default batch)",
    )
    parser.add_argument("--device", default="auto", help='"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N" (default auto)')
    parser.add_argument("--overwrite", action="store_true", help="analyse again what is analysed already")
    parsed = parser.parse_args(arguments)

    if not 0 <= parsed.dormant_unit_threshold <= 1:
        raise UserError(f"--dormant_unit_threshold: got {parsed.dormant_unit_threshold}; it must be a number from 0 to 1")
    is_valid_device, valid_devices = RULES["device"]
    if not is_valid_device(parsed.device):
        raise UserError(f'--device: got "{parsed.device}"; it must be {valid_devices}')
    parsed.results_dir = whole_path(parsed.results_dir, "--results_dir")
    parsed.data_path = parsed.data_path and whole_path(parsed.data_path, "--data_path")
    return parsed


def choose_indices(folder: Path, wanted: str | None) -> list[int]:
    """The indices asked for, or those of all finished runs in the folder. Raises UserError if there is nothing to analyse."""
    wanted_indices = None if wanted is None else parse_indices(wanted)
    stored_indices = sorted(stored_models(folder))
    if not stored_indices:
        what = "no stored models in model_parameters/" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}; --results_dir is the folder of one experiment, as in results/base_deep_learning_system")
    if wanted_indices is not None:
        if missing := [index for index in wanted_indices if index not in stored_indices]:
            raise UserError(
                f"{folder}: no stored models of index {_listed(missing)} in model_parameters/; there are those of {_listed(stored_indices)}"
            )
        return wanted_indices
    finished = finished_indices(folder)
    if not finished:
        raise UserError(
            f"{folder}: no run is listed as finished; there are models of {_listed(stored_indices)}; name them, to analyse what is "
            f"there, as in --experiment-index {stored_indices[0]}"
        )
    with_models = [index for index in finished if index in stored_indices]
    if without_models := [index for index in finished if index not in stored_indices]:
        what = (
            f"{RunFiles(folder, 0).indices_file}: names index {_listed(without_models)} as finished, but model_parameters/ holds no "
            f"index-{without_models[0]}_epoch-*.pt"
        )
        if not with_models:
            raise UserError(f"{what}; restore the models, or name the runs to analyse, as in --experiment-index {stored_indices[0]}")
        warn(f"{what}; the others are analysed")
    return with_models


def finished_indices(folder: Path) -> list[int]:
    """The indices that an experiment's list names as finished, sorted. Raises UserError if it cannot be read or one cannot be an index."""
    files = RunFiles(folder, 0)
    finished = files.finished_indices()
    if impossible := [index for index in finished if index not in range(NUM_SEEDS)]:
        raise UserError(
            f"{files.indices_file}: the list of finished runs names {_listed(impossible)}; an index is an integer from 0 to {NUM_SEEDS - 1}"
        )
    return finished


def _listed(numbers: Sequence[int]) -> str:
    """Numbers with commas, the middle ones left out where there are many."""
    names = [str(number) for number in numbers]
    return ", ".join(names if len(names) <= 12 else [*names[:9], "...", names[-1]])


def stored_models(folder: Path) -> dict[int, set[int]]:
    """The epochs of the models stored in an experiment's folder, by index. One of 0 bytes, as a broken copy leaves it, is none."""
    epochs: dict[int, set[int]] = {}
    models = folder / "model_parameters"
    for name in os.listdir(models) if models.is_dir() else []:
        if (models / name).is_file() and (models / name).stat().st_size == 0:
            continue
        if match := re.fullmatch(r"index-(0|[1-9][0-9]*)_epoch-(0|[1-9][0-9]*)\.pt", name):
            epochs.setdefault(int(match[1]), set()).add(int(match[2]))
    return epochs


def find_run(folder: Path, index: int, dormant_unit_threshold: float, batch_norm: str) -> Run:
    """Read and check everything of a run but the contents of its models. Raises UserError, naming the file."""
    files = RunFiles(folder, index)
    experiment_seed(index)  # raises for an index that cannot be
    sizes, stored_keys = read_sizes(files.config_file)
    is_finished = index in finished_indices(folder)
    class_order = load_class_order(files, sizes, is_finished)

    epochs = stored_models(folder).get(index, set())
    expected = [task * sizes.epochs_per_task for task in range(sizes.num_tasks + 1)]
    if unexpected := sorted(epochs - set(expected)):
        source = "is not there, so the paper's sizes hold" if not files.config_file.is_file() else "says"
        raise UserError(
            f"{files.model_file(unexpected[0])}: a model of epoch {unexpected[0]} cannot be in a run of {sizes.num_tasks} tasks of "
            f"{sizes.epochs_per_task} epochs, as config_files/{files.config_file.name} {source}"
        )
    last = expected[-1] if is_finished else max(epochs)
    digests = [model_digest(files.model_file(epoch)) if epoch in epochs else None for epoch in expected if epoch <= last]
    settings = {
        "dormant_unit_threshold": dormant_unit_threshold,
        "batch_norm": batch_norm,
        "images": NUM_ANALYSED_IMAGES,
        **{key: getattr(sizes, key) for key in SIZE_KEYS if key != "batch_size"},  # which no result depends on
        "network_width": sizes.network_width if "network_width" in stored_keys else None,
        "class_order_sha256": hashlib.sha256(class_order.tobytes()).hexdigest(),
    }
    tasks_here = [task for task, digest in enumerate(digests) if digest is not None]
    earlier = load_digests(files, settings)
    if len(earlier) <= len(digests) and all(here in (None, then) for here, then in zip(digests, earlier, strict=False)):
        digests = [here or then for here, then in itertools.zip_longest(digests, earlier)]  # what is known of models that are gone
    if gone := [epoch for epoch, digest in zip(expected, digests, strict=False) if digest is None]:
        warn(f"{files.model_file(gone[0])}: this model is not there; index {index} is analysed without epoch {_listed(gone)}")
    return Run(files, sizes, class_order, tasks_here, settings, digests)


def load_class_order(files: RunFiles, sizes: Config, is_finished: bool) -> np.ndarray:
    """The order in which a run met the classes: (100,) int64. Raises UserError if the file is not such an order.

    The released code stores it when a run ends; of a run in progress without it, the order is what its seed says.
    """
    path = files.array_file("class_order")
    if not is_finished and not path.exists():
        return draw_class_order(experiment_seed(files.index) if sizes.class_order_seed is None else sizes.class_order_seed)
    try:
        class_order = _load_array(path)
    except Exception as error:
        reason = f"cannot be read ({type(error).__name__})"
        if isinstance(error, FileNotFoundError):
            reason = "is not a file" if path.exists() else "is not there"
        raise UserError(f"{path}: the class order of this run {reason}") from None
    is_numeric = isinstance(class_order, np.ndarray) and class_order.dtype.kind in "iuf"
    if not is_numeric or not np.array_equal(np.sort(class_order, axis=None), np.arange(NUM_CLASSES)) or class_order.ndim != 1:
        raise UserError(f"{path}: not a class order; it must hold the labels 0 to {NUM_CLASSES - 1}, each once")
    return class_order.astype(np.int64)


def _load_array(path: Path) -> np.ndarray:
    """An array in a file; np.load raises many kinds of exceptions, depending on where a file is damaged."""
    if not path.is_file():  # a pipe, say, would keep its reader waiting
        raise FileNotFoundError(path)
    return np.load(path, allow_pickle=False)


def model_digest(path: Path) -> str:
    """SHA-256 of a model's file. Raises UserError if it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: this model is not a file")
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: this model cannot be read ({error.strerror})") from None


def load_model(path: Path, network: ResNet18) -> ResNet18:
    """Fill a network with a stored state dict, and return it.

    The state dict may lie in other dicts, and all its names may begin alike, as those of wrapped networks do ("module.", "_orig_mod.").
    Raises UserError if the file cannot be read, holds no network of this kind and size or several, or a value that is not finite. Nothing
    in the file is executed.
    """
    try:
        with warnings.catch_warnings():  # a damaged file is one error, without warnings beside it
            warnings.simplefilter("ignore")
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, depending on where a file is damaged
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({type(error).__name__})"
        if match := re.search(r"GLOBAL ([\w.]+)|(TorchScript)", str(error)):
            what = match[1] or match[2]
            reason = f"cannot be read: restoring its {what} takes running code from the file; store the network's state_dict() instead"
        raise UserError(f"{path}: this model {reason}") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: not a state dict, that is, tensors by name, but a {type(stored).__name__}")
    if "sha256" in stored:  # the end of a task may have reset its network already
        raise UserError(f"{path}: a checkpoint, which a run resumes from, and not a model")
    values = dict(_values_by_name(stored))
    anchor = next(iter(network.state_dict()))
    pattern = re.compile(rf"(?:.*\.)?(?<!layer\d\.\d\.){re.escape(anchor)}")  # of a network, not of its blocks
    starts = [name.removesuffix(anchor) for name in values if pattern.fullmatch(name)]
    if not starts:
        items = [f"{key} ({type(value).__name__})" for key, value in stored.items()]
        found = ", ".join(items[:5]) + ", ..." * (len(items) > 5) or "nothing"
        raise UserError(f"{path}: no network was found in this file, since {anchor} is not there; it holds {found}")
    if len(starts) > 1:
        names = ", ".join(f"{start}*" for start in starts)
        raise UserError(f"{path}: holds {len(starts)} networks ({names}); store the one to be analysed alone")
    state = {name.removeprefix(starts[0]): value for name, value in values.items() if name.startswith(starts[0])}
    expected = network.state_dict()
    state = {name: value for name, value in state.items() if name in expected or isinstance(value, Tensor)}  # no epoch, say
    for name in [*expected, *state]:
        mine, value = expected.get(name), state.get(name)
        if _shape(mine) != _shape(value):
            is_another = mine is None or not _is_plain_tensor(value) or mine.shape != value.shape
            what = "of another network" if is_another else "in another precision"
            raise UserError(f"{path}: a model {what}; {name} is {_shape(value)}, expected {_shape(mine)}")
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} holds values that are not finite; the run diverged, or the file is damaged")
    network.load_state_dict(state)
    return network


def _values_by_name(value: object, name: str = "", depth: int = 4) -> Iterator[tuple[str, object]]:
    """What is in a dict, and in the dicts in it down to this depth, None excepted, each under the names that lead to it, joined by dots."""
    if isinstance(value, dict) and depth > 0:
        for key, item in value.items():
            yield from _values_by_name(item, f"{name}.{key}" if name else str(key), depth - 1)
    elif value is not None:
        yield name, value


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _shape(value: object) -> str:
    if value is None:
        return "not there"
    return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}" if _is_plain_tensor(value) else "no plain tensor"


# --- The analysis ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def analyse_run(
    run: Run, results: dict[str, np.ndarray], tasks: Sequence[int], train_set: ImageSet, test_set: ImageSet, progress: tqdm
) -> None:
    """Fill in what is missing in the results of a run for these tasks: see `load_results` and `missing_metrics`.

    train_set, test_set: the images of all classes, on the device of the analysis. The images shown to a network are drawn from a generator
    of the run's seed and the task: the same for every algorithm, and every time. Raises UserError if a model cannot be used.
    """
    sizes, threshold, batch_norm = run.sizes, run.settings["dormant_unit_threshold"], run.settings["batch_norm"]
    random_seed = experiment_seed(run.files.index)
    network, initial = network_of(sizes).to(train_set.device, memory_format=torch.channels_last), None
    if 0 in run.tasks_here:
        load_model(run.files.model_file(0), network)
        initial = [parameter.clone() for parameter in network.parameters()]
    for task in tasks:
        path = run.files.model_file(task * sizes.epochs_per_task)
        load_model(path, network)
        if task == sizes.num_tasks:
            results[ACCURACY_PER_CLASS] = final_accuracies(network, test_set, run.classes, path)
            progress.update()
            continue
        missing = missing_metrics(run, results, task)
        values = {WEIGHT_MAGNITUDE: weight_magnitude(network)}
        if initial is not None:
            values[DISTANCE] = two_norm(now - then for now, then in zip(network.parameters(), initial, strict=True))
        num_previous = sizes.classes_per_task * task
        seen = run.class_order[: sizes.num_classes_seen(task)]
        generator = generator_for(random_seed, Purpose.ANALYSIS, task)
        for shown, classes in (("next_task", seen[num_previous:]), ("previous_tasks", seen[:num_previous])):
            images, labels = draw_images(train_set, classes, generator)
            if not missing.isdisjoint(UNIT_METRICS[shown]):
                measures = unit_measures(network, images, threshold, batch_norm, path)
                values |= zip(UNIT_METRICS[shown], measures, strict=True)
            if shown == "next_task" and not missing.isdisjoint(GRADIENT_METRICS):
                gradients = loss_gradients(network, images, labels, seen, batch_norm)
                measures = (two_norm(gradients), zero_share(gradients))
                if not np.isfinite(measures).all():
                    raise UserError(f"{path}: the gradients of this network are not finite; the run diverged")
                values |= zip(GRADIENT_METRICS, measures, strict=True)
        for metric, value in values.items():
            results[metric][task] = value
        progress.update()


def draw_images(image_set: ImageSet, classes: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """1,000 images of these classes, or all if there are fewer, drawn without repeats: see `ImageSet.get`; not transformed."""
    indices = image_set.indices_of(classes)
    chosen = torch.randperm(len(indices), generator=generator)[:NUM_ANALYSED_IMAGES]
    return image_set.get(indices[chosen].to(image_set.device))


def unit_measures(
    network: ResNet18, images: Tensor, dormant_unit_threshold: float, batch_norm: str, path: Path
) -> tuple[float, float, float]:
    """Share of dormant units, stable and effective rank of the last hidden layer on these images; if there are none, zeros.

    Raises UserError, naming the network's file, if its activations are not finite.
    """
    if len(images) == 0:
        return 0.0, 0.0, 0.0
    active_shares = []
    for layer in hidden_features(network, images, batch_norm):
        active_shares.append(active_share(layer))
    last_layer = torch.cat(layer)  # (n, 512)
    if not torch.isfinite(last_layer).all():
        raise UserError(f"{path}: the activations of this network are not finite, so they have no rank; the run diverged")
    spectrum = singular_values(last_layer)
    return dormant_unit_fraction(active_shares, dormant_unit_threshold), stable_rank(spectrum), effective_rank(spectrum)


def final_accuracies(network: ResNet18, test_set: ImageSet, classes: np.ndarray, path: Path) -> np.ndarray:
    """Accuracy on the test images of each of these classes, in their order, with the running statistics: (k,) float32.

    Raises UserError, naming the network's file, if its outputs are not finite.
    """
    network.eval()
    indices = test_set.indices_of(classes).to(test_set.device)
    logits = torch.cat([network(test_set.get(batch)[0])[0] for batch in indices.split(IMAGES_PER_CHUNK)])  # (n, 100)
    if not torch.isfinite(logits).all():
        raise UserError(f"{path}: the outputs of this network are not finite, so it has no accuracy; the run diverged")
    return accuracy_per_class(logits, test_set.labels(indices), classes)


# --- Results ---------------------------------------------------------------------------------------------------------------------


def settings_file(files: RunFiles) -> Path:
    return files.folder / "analysis_settings" / f"index-{files.index}.json"


def load_results(run: Run, overwrite: bool) -> dict[str, np.ndarray]:
    """The stored results that were computed from the models there now, with the settings asked for; NaN where there are none.

    By the names of their folders, (num_tasks,) float32 each; of a final network, a value per class.
    overwrite: only those that cannot be computed again, since a model is gone.
    """
    num_tasks = run.sizes.num_tasks
    lengths = dict.fromkeys((*TASK_METRICS, ONLINE_ACCURACY), num_tasks)
    if run.has_final_network:
        lengths[ACCURACY_PER_CLASS] = len(run.classes)
    results = {metric: np.full(length, np.nan, dtype=np.float32) for metric, length in lengths.items()}
    is_same = np.zeros(num_tasks + 1, dtype=bool)  # per task, and the final network
    stored_digests = load_digests(run.files, run.settings)
    if len(stored_digests) <= len(run.model_digests):  # there may be more models by now; if fewer, the run was started again
        is_same[: len(stored_digests)] = [stored == here for stored, here in zip(stored_digests, run.model_digests, strict=False)]
    is_kept = is_same.copy()
    if overwrite:
        is_kept[run.tasks_here] = False
    has_initial = 0 in run.tasks_here
    kept_by_metric = {
        DISTANCE: (is_kept if has_initial else is_same)[:num_tasks] & is_same[0],
        ONLINE_ACCURACY: bool(load_digests(run.files, run.settings, but=ANALYSIS_KEYS)),  # of no model: see `online_accuracies`
        ACCURACY_PER_CLASS: is_kept[num_tasks],
    }
    for metric, array in results.items():
        with contextlib.suppress(Exception):  # not there, or damaged in one of many ways: it is computed again
            stored = _load_array(run.files.array_file(metric))
            if stored.shape == array.shape and stored.dtype == array.dtype:
                array[:] = np.where(kept_by_metric.get(metric, is_kept[:num_tasks]), stored, array)
    return results


def load_digests(files: RunFiles, settings: dict[str, Any], but: Sequence[str] = ()) -> list[str | None]:
    """SHA-256 of the models that the stored results were computed from; none if that was with other settings, `but` these."""
    stored = read_note(settings_file(files))
    digests = stored.pop("model_sha256", None)
    is_same = stored | {key: settings[key] for key in but} == settings
    return digests if is_same and isinstance(digests, list) else []


def missing_metrics(run: Run, results: dict[str, np.ndarray], task: int) -> set[str]:
    """What is not there, or not finite, of a task whose model is; distances only where the initial network is there too.

    task: their number stands for the final network.
    """
    if task == run.sizes.num_tasks:
        return set() if np.isfinite(results[ACCURACY_PER_CLASS]).all() else {ACCURACY_PER_CLASS}
    expected = (metric for metric in TASK_METRICS if metric != DISTANCE or 0 in run.tasks_here)
    return {metric for metric in expected if not np.isfinite(results[metric][task])}


def online_accuracies(run: Run, stored: np.ndarray) -> np.ndarray:
    """Mean training accuracy over each task's steps, from the means over 25 steps that the run stored: (num_tasks,) float32.

    A window that reaches over a task's border counts in both tasks, with as many steps as it has in each. Steps after the run's last
    window, which are stored nowhere, do not count. NaN for tasks that the windows do not cover (yet). Where there are none, or what is
    there cannot be a curve of this run, a warning says so, and the accuracies are those of an earlier analysis. stored: these, or NaN.
    """
    path, sizes = run.files.array_file("train_accuracy_per_checkpoint"), run.sizes
    accuracies = np.full(sizes.num_tasks, np.nan, dtype=np.float32)
    borders = [sizes.steps_before(task * sizes.epochs_per_task) for task in range(sizes.num_tasks + 1)]
    num_windows = borders[-1] // STEPS_PER_WINDOW  # of the whole run
    try:
        windows = _load_array(path).astype(np.float64)
        if windows.ndim != 1 or len(windows) > num_windows:
            raise ValueError
    except Exception as error:
        is_gone = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if is_gone else f"not training accuracies of this run, of which there are {num_windows} at most"
        outcome = "is analysed without its" if np.isnan(stored).all() else "keeps its earlier"
        warn(f"{path}: {reason}; index {run.files.index} {outcome} average online accuracy")
        return stored
    steps = np.repeat(windows, STEPS_PER_WINDOW)
    borders[-1] = num_windows * STEPS_PER_WINDOW
    for task, (start, stop) in enumerate(itertools.pairwise(borders)):
        if start < stop <= len(steps):
            accuracies[task] = steps[start:stop].mean()
    return accuracies


def save_results(run: Run, results: dict[str, np.ndarray]) -> None:
    """Write the results of a run, its settings last. Raises UserError if a file cannot be written."""
    path = settings_file(run.files)
    if path.exists():
        write_file(path, b"{}\n")  # until the new results are there whole, what is stored belongs to no settings
    for metric, array in results.items():
        write_file(run.files.array_file(metric), array_bytes(array))
    if not run.has_final_network:
        with contextlib.suppress(OSError):  # of an earlier run: this one has no such accuracy yet
            run.files.array_file(ACCURACY_PER_CLASS).unlink(missing_ok=True)
    content = {**run.settings, "model_sha256": run.model_digests}
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def describe_results(run: Run, results: dict[str, np.ndarray], done: str) -> str:
    """A table of a run's results for the terminal: a line per task, and lines that say what is missing."""
    sizes = run.sizes
    columns = [(WEIGHT_MAGNITUDE, 1, "8.5f"), (DISTANCE, 1, "8.2f"), (ONLINE_ACCURACY, 100, "8.2f")]
    columns += zip(GRADIENT_METRICS, (1, 100), ("9.3g", "7.2f"), strict=True)
    for metrics in UNIT_METRICS.values():
        columns += zip(metrics, (100, 1, 1), ("9.2f", "9.0f", "10.1f"), strict=True)
    lines = [
        f"Index {run.files.index} of {run.files.folder}: {done}.",
        "               mean    from    train. on images of the next task                       of previous tasks",
        "task classes |weight|  start accur. %  gradient zeros % dormant % stable r. effect. r. dormant % stable r. effect. r.",
    ]
    for task in np.flatnonzero(np.isfinite(results[WEIGHT_MAGNITUDE])):
        line = f"{task + 1:4} {sizes.num_classes_seen(task):7}"
        for metric, factor, form in columns:
            is_there = np.isfinite(results[metric][task]) and (task > 0 or metric not in UNIT_METRICS["previous_tasks"])
            line += " " + (format(factor * results[metric][task], form) if is_there else "-".rjust(int(form.split(".")[0])))
        lines.append(line)
    if np.isnan(results[DISTANCE][np.isfinite(results[WEIGHT_MAGNITUDE])]).any():
        lines.append(f"Some distances are missing, since the initial network, {run.files.model_file(0).name}, is not there.")
    if not run.files.config_file.is_file():
        lines.append(f"There is no config_files/{run.files.config_file.name}: taken to be of the paper's sizes.")
    if run.has_final_network and np.isfinite(results[ACCURACY_PER_CLASS]).all():
        lines.append(f"Test accuracy of the final network: {100 * results[ACCURACY_PER_CLASS].mean():.2f} %")
    elif not run.has_final_network:
        first, last = len(run.model_digests) + 1, sizes.num_tasks
        missing = "" if first > last else f"task {last} and " if first == last else f"tasks {first} to {last} and "
        lines.append(f"Missing, since the run is not finished: {missing}the accuracy per class; the same command fills them in later.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
