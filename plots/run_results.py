"""From a folder of results to curves: metric files in; per algorithm one row per run and one column per task, or per epoch, out.

    runs = read_runs(Path("results"), METRICS["test_accuracy_per_epoch"])      # {"base_deep_learning_system": [Run, ...], ...}
    curves = make_curves(runs, METRICS["test_accuracy_per_epoch"]).curves
    mean, standard_error, num_runs = mean_and_standard_error(curves[0].values)

A task is drawn at the number of its classes: task i (from 0) at 5 (i + 1) of them, at the paper's sizes. The analysis has two
times for a task i: it takes the network as task i - 1 left it (for i = 0 the initial one), and asks it for units and ranks on images
of task i's new classes. It is drawn at task i too, the task about to be trained. So do the paper's figures, and with them
published_curves.csv: at 5 classes all its algorithms have a stable rank of 95.55 to 95.58 % and no dormant unit, which are the numbers of
initial networks; at 10 classes come the networks that know 5.

Results of the released code store no sizes; then the paper's hold. n runs, p points (tasks or epochs). Nothing is unpickled.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from incremental_cifar.config import REPOSITORY, Config, UserError, make_config

# The paper's algorithms by the names of their folders, in the order of legends.
ALGORITHM_LABELS = {
    "base_deep_learning_system": "Base deep learning system",
    "continual_backpropagation": "Continual backpropagation",
    "head_resetting": "Head resetting",
    "shrink_and_perturb": "Shrink and perturb",
    "retrained_network": "Retrained network",
}
RETRAINED = "retrained_network"  # what relative accuracies are relative to

# What of a stored config a figure depends on, and whether it is the paper's problem. `Config`'s defaults are the paper's.
SIZE_KEYS = (
    "dataset",
    "num_tasks",
    "classes_per_task",
    "epochs_per_task",
    "batch_size",
    "train_images_per_class",
    "validation_images_per_class",
    "test_images_per_class",
    "network_width",
)
LAST_LAYER_WIDTHS = 8  # the last layer has 8 x network_width units


class Metric(NamedTuple):
    """One choice of what to draw."""

    folder: str  # where its files are: <algorithm>/<folder>/index-K.npy
    axis_label: str  # {units}: number of units of the last layer
    kind: str  # "fraction" (drawn in percent), "rank" (drawn in percent of the last layer's units) or "plain"
    per_epoch: bool  # stored per epoch; otherwise per task
    best: Callable[..., np.ndarray] = np.max  # which of a task's epochs counts
    is_relative: bool = False  # minus the retrained network of the same index
    has_first_task: bool = True  # False: the first task's value is 0 by convention and is not drawn
    published: str = ""  # its name in published_curves.csv; "": the paper does not show it
    images: str = ""  # which images were analysed


def _analysis_metrics(which: str, images: str) -> dict[str, Metric]:
    def metric(name: str, axis_label: str, kind: str, published: str = "") -> dict[str, Metric]:
        folder = f"{which}_{name}_analysis"
        is_next = which == "next_task"
        return {folder: Metric(folder, axis_label, kind, False, has_first_task=is_next, published=published * is_next, images=images)}

    return (
        metric("dormant_units", "Dormant units (%)", "fraction", "dormant_units")
        | metric("effective_rank", "Effective rank (% of {units})", "rank")
        | metric("stable_rank", "Stable rank (% of {units})", "rank", "stable_rank")
    )


# The released script's choices, by the names they have there.
METRICS = {
    "relative_accuracy_per_epoch": Metric(
        "test_accuracy_per_epoch",
        "Accuracy relative to retrained\nnetwork (percentage points)",
        "fraction",
        True,
        is_relative=True,
        published="relative_accuracy",
    ),
    "test_accuracy_per_epoch": Metric("test_accuracy_per_epoch", "Test accuracy (%)", "fraction", True, published="test_accuracy"),
    "test_loss_per_epoch": Metric("test_loss_per_epoch", "Test loss", "plain", True, best=np.min),
    "weight_magnitude_analysis": Metric("weight_magnitude_analysis", "Mean weight magnitude", "plain", False),
    **_analysis_metrics("next_task", "Images of the next task's classes"),
    **_analysis_metrics("previous_tasks", "Images of the previous tasks' classes"),
}


class Run(NamedTuple):
    """The values of one metric of one run."""

    algorithm: str
    index: int
    sizes: Config  # only the keys of SIZE_KEYS are this run's; the paper's where its config does not say
    values: np.ndarray  # (epochs or tasks so far,) float64, in the unit of the axis; NaN where a task is not analysed yet

    @property
    def config_file(self) -> str:
        return f"{self.algorithm}/config_files/index-{self.index}.json"


class Curve(NamedTuple):
    """One algorithm in one figure."""

    algorithm: str
    indices: tuple[int, ...]  # of the n runs
    positions: np.ndarray  # (p,) number of classes, or epochs from 1
    values: np.ndarray  # (n, p) float64 in the unit of the axis; NaN where a run has no value


class MetricCurves(NamedTuple):
    """What a figure of one metric shows."""

    curves: list[Curve]
    axis: np.ndarray  # the positions of a complete run, which `Curve.positions` begins with
    remarks: list[str]  # what is drawn in part or not at all, one line each
    num_retrained: int  # retrained runs that relative accuracies are relative to
    num_units: str  # of the last layer, for the label of a rank


def mean_and_standard_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard error of the mean and number of runs at every point.

    values: (n, p), NaN where a run has none. Returns (p,) float64 means, NaN without a run; (p,) standard errors, the sample deviation
    (divisor n - 1) over sqrt(n), NaN with less than two runs; (p,) integer counts.
    """
    count = np.isfinite(values).sum(axis=0)
    mean = np.full(values.shape[1], np.nan)
    np.divide(np.nansum(values, axis=0), count, out=mean, where=count > 0)
    variance = np.full(values.shape[1], np.nan)
    np.divide(np.nansum((values - mean) ** 2, axis=0), count - 1, out=variance, where=count > 1)
    return mean, np.sqrt(variance / np.maximum(count, 1)), count


def task_bests(values: np.ndarray, epochs_per_task: int, best: Callable[..., np.ndarray]) -> np.ndarray:
    """The best value of each complete task: (epochs,) in, (epochs // epochs_per_task,) out."""
    num_tasks = len(values) // epochs_per_task
    return best(values[: num_tasks * epochs_per_task].reshape(num_tasks, epochs_per_task), axis=1)


def algorithm_label(algorithm: str) -> str:
    """An algorithm's name in the paper, or its folder's, shortened to what a legend can hold."""
    label = ALGORITHM_LABELS.get(algorithm, algorithm)
    label = label if len(label) <= 40 else label[:39] + "…"
    return f"“{label}”" if label.startswith("_") else label  # Matplotlib leaves labels that begin with _ out of legends


# --- Reading ---------------------------------------------------------------------------------------------------------------------


def add_results_argument(parser: argparse.ArgumentParser) -> None:
    """Give a script's command line the folder of results."""
    help_text = "folder with one folder per algorithm (default results/ beside plots/)"
    parser.add_argument("--results_dir", type=Path, default=REPOSITORY / "results", metavar="DIR", help=help_text)


def read_runs(results_dir: Path, metric: Metric, algorithms: Sequence[str] | None = None) -> dict[str, list[Run]]:
    """All runs that have a metric: algorithm to runs, by rising index; the paper's algorithms first.

    algorithms: which, and in which order; None: all there are. Those without a run are left out. For a relative metric, the retrained
    network's runs come along unasked. Raises UserError naming the folder or the file that cannot be used.
    """
    if not os.path.isdir(results_dir):
        raise UserError(f"{results_dir}: no such folder; --results_dir names the folder that holds one folder per algorithm")
    if os.path.isdir(results_dir / metric.folder) or os.path.isdir(results_dir / "config_files"):
        raise UserError(f"{results_dir}: this folder is one algorithm's; --results_dir names the one above it, {results_dir.parent}")
    if algorithms is None:
        try:
            folders = sorted(entry.name for entry in results_dir.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        except OSError as error:
            raise UserError(f"{results_dir}: cannot read this folder ({error.strerror})") from None
        algorithms = [*ALGORITHM_LABELS, *(name for name in folders if name not in ALGORITHM_LABELS)]
    elif metric.is_relative and RETRAINED not in algorithms:
        algorithms = [*algorithms, RETRAINED]
    runs = {
        algorithm: [_read_run(results_dir, algorithm, i, metric) for i in _indices(results_dir, algorithm, metric)]
        for algorithm in algorithms
    }
    return {algorithm: found for algorithm, found in runs.items() if found}


def _indices(results_dir: Path, algorithm: str, metric: Metric) -> list[int]:
    folder = results_dir / algorithm / metric.folder
    try:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise UserError(f"{folder}: cannot read this folder ({error.strerror})") from None
    return sorted(int(match[1]) for match in map(re.compile(r"index-(0|[1-9]\d{0,8})\.npy").fullmatch, names) if match)


def _read_run(results_dir: Path, algorithm: str, index: int, metric: Metric) -> Run:
    folder = results_dir / algorithm
    sizes = read_sizes(folder / "config_files" / f"index-{index}.json")
    num_units = LAST_LAYER_WIDTHS * sizes.network_width
    longest = sizes.num_tasks * (sizes.epochs_per_task if metric.per_epoch else 1)
    most, scale = {"fraction": (1.0, 100.0), "rank": (float(num_units), 100.0 / num_units), "plain": (np.inf, 1.0)}[metric.kind]
    path = folder / metric.folder / f"index-{index}.npy"
    values = read_values(path, longest, "epochs" if metric.per_epoch else "tasks", most)
    missing = np.flatnonzero(np.isnan(values))
    if metric.per_epoch and len(missing):
        raise UserError(f"{path}: the value of epoch {missing[0] + 1} is not a number")
    if not metric.has_first_task:
        values[:1] = np.nan
    return Run(algorithm, index, sizes, values * scale)


def read_sizes(path: Path) -> Config:
    """The sizes in a stored config; the paper's for keys that are missing, or if there is no such file. Other keys are passed over.

    Raises UserError if the file is there but is no config.
    """
    settings: Any = {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass  # as released
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot read the stored config of this run ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: cannot read the stored config of this run (not an object of keys and values)")
    return make_config({key: settings[key] for key in SIZE_KEYS if key in settings}, source=str(path))


def read_values(path: Path, longest: int, points: str, most: float) -> np.ndarray:
    """One run's stored values: (at most `longest`,) as float64, each NaN or from 0 to `most`.

    points: what a value stands for, "epochs" or "tasks", for messages. Raises UserError naming the file if it is anything else.
    """
    try:
        if not os.path.isfile(path):
            raise ValueError("not a file")
        with open(path, "rb") as file:
            array = np.load(file, allow_pickle=False)
    except Exception as error:  # np.load raises many kinds, depending on where a file is damaged
        raise UserError(f"{path}: cannot read this metric ({error or type(error).__name__})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim != 1:
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"{path}: expected one number for each of the {points}, found {found}")
    if len(array) > longest:
        raise UserError(f"{path}: holds {len(array)} values, but by its config this run has {longest} {points}")
    values = array.astype(np.float64)
    wrong = np.flatnonzero((values < 0) | (values > most * (1 + 1e-6)) | np.isinf(values))
    if len(wrong):
        limit = f"from 0 to {most:g}" if np.isfinite(most) else "finite and 0 or more"
        raise UserError(f"{path}: value {wrong[0]} is {values[wrong[0]]:g}; values of this metric are {limit}")
    return values


# --- Curves ----------------------------------------------------------------------------------------------------------------------


def make_curves(runs: dict[str, list[Run]], metric: Metric, per_epoch: bool = False) -> MetricCurves:
    """A curve per algorithm, in the given order, and what a figure of them says beside.

    Per task, a run's value is its best of the task's epochs, and only complete tasks count; with `per_epoch`, every epoch is a point. A
    relative metric subtracts, run by run, the retrained network of the same index, whose own curve is left out.
    Raises UserError if the runs are of different sizes, so that they have no common axis or no meaningful mean.
    """
    check_sizes(runs)
    series = {
        (run.algorithm, run.index): task_bests(run.values, run.sizes.epochs_per_task, metric.best)
        if metric.per_epoch and not per_epoch
        else run.values
        for run in flattened(runs)
    }
    points = "epochs" if per_epoch else "tasks"
    sizes = [run.sizes for run in flattened(runs)]
    full_length = max((size.num_epochs if per_epoch else size.num_tasks for size in sizes), default=0)
    spacing = 1 if per_epoch or not sizes else sizes[0].classes_per_task
    num_hidden = 0 if metric.has_first_task else 1  # points that a run has but that are not drawn

    curves, remarks = [], []
    for algorithm in runs:
        if metric.is_relative and algorithm == RETRAINED:
            continue
        rows = {index: values for (name, index), values in series.items() if name == algorithm}
        if metric.is_relative:
            alone = [index for index in rows if (RETRAINED, index) not in series]
            rows = {index: _difference(rows[index], series[RETRAINED, index]) for index in rows if index not in alone}
            if alone:
                remarks.append(f"{algorithm_label(algorithm)}: no retrained network of {indices_text(alone)}; left out")
        empty = [index for index, values in rows.items() if not np.isfinite(values).any()]
        rows = {index: values for index, values in rows.items() if index not in empty}
        if empty:
            remarks.append(f"{algorithm_label(algorithm)}: {indices_text(empty)} without a complete {points[:-1]} yet; left out")
        if not rows:
            continue
        done = {index: int(np.isfinite(values).sum()) + num_hidden for index, values in rows.items()}
        short = {index: count for index, count in done.items() if count < full_length}
        if short:
            remarks.append(f"{algorithm_label(algorithm)}: {_short_text(short, len(rows), full_length, points)}")
        length = max(len(values) for values in rows.values())
        values = np.full((len(rows), length), np.nan)
        for row, of_run in zip(values, rows.values(), strict=True):
            row[: len(of_run)] = of_run
        curves.append(Curve(algorithm, tuple(rows), spacing * np.arange(1, length + 1), values))
    partners = {index for curve in curves for index in curve.indices} if metric.is_relative else set()
    return MetricCurves(curves, spacing * np.arange(1, full_length + 1), remarks, len(partners), last_layer_units(runs))


def flattened(runs: dict[str, list[Run]]) -> Iterable[Run]:
    """All runs of all algorithms."""
    return (run for of_algorithm in runs.values() for run in of_algorithm)


def check_sizes(runs: dict[str, list[Run]]) -> None:
    """Raise UserError unless all runs share the axes of a figure, and those of an algorithm the network's width."""
    by_key = {key: list(flattened(runs)) for key in ("dataset", "classes_per_task", "epochs_per_task")}
    groups = [*by_key.items(), *(("network_width", of_algorithm) for of_algorithm in runs.values())]
    for key, group in groups:
        for run in group:
            first, here = getattr(group[0].sizes, key), getattr(run.sizes, key)
            if here != first:
                raise UserError(
                    f"runs of different sizes cannot be averaged in one figure: {key} is {first} in {group[0].config_file} and {here} in "
                    f"{run.config_file}; choose with --algorithms or move runs elsewhere"
                )


def last_layer_units(runs: dict[str, list[Run]]) -> str:
    """The number of last-layer units for axis labels, or words for it where the algorithms' networks differ in width."""
    widths = {run.sizes.network_width for run in flattened(runs)}
    if len(widths) > 1:
        return "the last layer"
    return str(LAST_LAYER_WIDTHS * (widths.pop() if widths else Config().network_width))


def size_differences(sizes: Config) -> str:
    """In which settings a run's problem differs from the paper's, as text; "" if in none."""
    paper = Config()
    return ", ".join(
        f"{key} {getattr(sizes, key)} instead of {getattr(paper, key)}" for key in SIZE_KEYS if getattr(sizes, key) != getattr(paper, key)
    )


def _difference(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    length = min(len(values), len(reference))
    return values[:length] - reference[:length]


def indices_text(indices: Sequence[int]) -> str:
    return ("index " if len(indices) == 1 else "indices ") + ", ".join(map(str, indices))


def _short_text(short: dict[int, int], num_runs: int, full_length: int, points: str) -> str:
    """Say how far runs of unequal length, or in progress, go: index to number of points that are there."""
    if len(short) <= 3:
        where = ", ".join(f"index {index}: {count:,}" for index, count in short.items())
    else:
        least, most = min(short.values()), max(short.values())
        where = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f"{len(short)} of {num_runs} runs drawn in part ({where} of {full_length:,} {points})"
