"""From a folder of results to curves: metric files in; per algorithm one row per run and one column per task, or per epoch, out.

    metric = metric_of("test_accuracy_per_epoch")
    runs = read_runs(Path("results"), metric)      # {"base_deep_learning_system": [Run, ...], ...}
    curves = make_curves(runs, metric).curves
    mean, standard_error, num_runs = mean_and_standard_error(curves[0].values)

A task is drawn at the number of its classes: task i (from 0) at 5 (i + 1) of them, at the paper's sizes. The analysis has two
times for a task i: it takes the network as task i - 1 left it (for i = 0 the initial one), and asks it for units and ranks on images
of task i's new classes. It is drawn at task i too, the task about to be trained. So do the paper's figures, and with them
published_curves.csv: at 5 classes all its algorithms have a stable rank of 95.55 to 95.58 % and no dormant unit, which are the numbers of
initial networks; at 10 classes come the networks that know 5.

Config files of the released code store no sizes; then the paper's hold. Without a config file, only arrays of the paper's length are taken,
with a remark. n runs, p points (tasks or epochs). Nothing is unpickled.
"""

import argparse
import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from incremental_cifar.command_line import OneLineArgumentParser
from incremental_cifar.config import METHODS, REPOSITORY, SEED_KEYS, SIZE_KEYS, Config, UserError, read_sizes, read_stored, whole_path
from incremental_cifar.safe_files import broken_link

# The paper's algorithms by the names of their folders, in the order of legends.
ALGORITHM_LABELS = {
    "base_deep_learning_system": "Base deep learning system",
    "continual_backpropagation": "Continual backpropagation",
    "head_resetting": "Head resetting",
    "shrink_and_perturb": "Shrink and perturb",
    "retrained_network": "Retrained network",
}
RETRAINED = "retrained_network"  # what relative accuracies are relative to

# What the config calls its methods, by the folder's name that this makes: "Self-normalized resets" is self_normalized_resets.
METHOD_LABELS = {re.sub(r"\W+", "_", label.lower()): label for label in METHODS}

LAST_LAYER_WIDTHS = 8  # the last layer has 8 x network_width units


class Metric(NamedTuple):
    """One choice of what to draw."""

    folder: str  # where its files are: <algorithm>/<folder>/index-K.npy
    axis_label: str  # without the unit of a rank
    kind: str  # "fraction" (drawn in percent), "rank" (drawn in percent of the last layer's units) or "plain"
    per_epoch: bool  # stored per epoch; otherwise per task
    best: Callable[..., np.ndarray] = np.max  # what of a task's epochs counts
    is_relative: bool = False  # minus the retrained network of the same index
    has_first_task: bool = True  # False: the first task's value is 0 by convention and is not drawn
    images: str = ""  # which images were analysed, with settings that its values depend on; "": none


RELATIVE, TEST_ACCURACY = "relative_accuracy_per_epoch", "test_accuracy_per_epoch"
METRIC_ENDINGS = ("_per_epoch", "_analysis")  # of the folders that can be drawn
WITHOUT_GAPS = [f"{images}_{what}_per_epoch" for images in ("test", "validation") for what in ("accuracy", "loss")]  # of any run
# The paper's metrics, and their names in published_curves.csv.
PUBLISHED = {
    RELATIVE: "relative_accuracy",
    TEST_ACCURACY: "test_accuracy",
    "next_task_dormant_units_analysis": "dormant_units",
    "next_task_stable_rank_analysis": "stable_rank",
}
IMAGES = {"next_task_": "Images of the next task's classes", "previous_tasks_": "Images of the previous tasks' classes"}
RANKS = ("effective_rank", "stable_rank")
FRACTIONS = ("dormant_units", "zero_gradients")  # and whatever ends in accuracy
# Where a name alone would not say what it is.
METRIC_LABELS = {
    "weight_magnitude": "Mean weight magnitude",
    "average_online_accuracy": "Mean training accuracy of a task",
    "distance_to_initial": "Distance to the initial weights",
    "gradient_norm": "Norm of the gradient",
    "zero_gradients": "Gradients that are exactly 0",
}


def as_text(name: str) -> str:
    """A folder's name in words: soft_reset is "Soft reset". A name of other characters stays as it is."""
    return name.replace("_", " ").capitalize() if re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) else name


def mean_of_those_there(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean along an axis of the values that are not NaN; NaN if there are none."""
    count = (~np.isnan(values)).sum(axis=axis)
    return np.nansum(values, axis=axis) / np.where(count, count, np.nan)


def metric_of(name: str) -> Metric:
    """What a folder of a run holds and how it is drawn, by its name; RELATIVE is what the released script calls test accuracies so drawn.

    Of a task's epochs the highest of a name that ends in accuracy counts, the lowest of one that ends in loss, and of anything else, as of
    units that were reset, the mean of those that have a value.
    """
    if name == RELATIVE:
        label = "Accuracy relative to retrained\nnetwork (percentage points)"
        return Metric(TEST_ACCURACY, label, "fraction", True, is_relative=True)
    per_epoch = name.endswith("_per_epoch")
    which = next((start for start in IMAGES if name.startswith(start)), "")
    stem = name.removeprefix(which).removesuffix("_per_epoch").removesuffix("_analysis")
    is_accuracy, is_loss = (re.search(rf"(^|_){word}$", stem) for word in ("accuracy", "loss"))
    kind = "rank" if stem in RANKS else "fraction" if is_accuracy or stem in FRACTIONS else "plain"
    best = np.max if is_accuracy else np.min if is_loss else mean_of_those_there
    unit = {"fraction": " (%)", "rank": "", "plain": "" if is_loss or not per_epoch else " per epoch"}[kind]
    label = METRIC_LABELS.get(stem, as_text(stem)) + unit
    return Metric(name, label, kind, per_epoch, best, has_first_task=which != "previous_tasks_", images=IMAGES.get(which, ""))


# The released script's choices, by the names they have there.
METRICS = {
    name: metric_of(name)
    for name in (
        *(RELATIVE, TEST_ACCURACY, "test_loss_per_epoch", "weight_magnitude_analysis"),
        *(f"{which}{what}_analysis" for which in IMAGES for what in ("dormant_units", *RANKS)),
    )
}


class AnalysisSettings(NamedTuple):
    """The settings of post_run_analysis.py that its values depend on; the defaults are the released script's."""

    batch_norm: str = "batch"
    dormant_unit_threshold: float = 0.01

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self._asdict().items())


class Run(NamedTuple):
    """The values of one metric of one run."""

    algorithm: str
    index: int
    sizes: Config  # only the keys of SIZE_KEYS and SEED_KEYS are this run's; the paper's where its config does not say
    has_config: bool  # whether there is a config file
    analysis: AnalysisSettings | None  # None for metrics that do not depend on them
    values: np.ndarray  # (epochs or tasks so far,) float64, in the unit of the axis; NaN where the run has none

    def per_task(self, best: Callable[..., np.ndarray]) -> "Run":
        """The same run with the best value of each complete task, of the values of its epochs."""
        epochs = self.sizes.epochs_per_task
        num_tasks = len(self.values) // epochs
        return self._replace(values=best(self.values[: num_tasks * epochs].reshape(num_tasks, epochs), axis=1))

    def file(self, folder: str) -> str:
        """The run's file in one of its algorithm's folders, for messages."""
        return f"{self.algorithm}/{folder}/index-{self.index}.json"


class Curve(NamedTuple):
    """One algorithm in one figure."""

    algorithm: str
    indices: tuple[int, ...]  # of the n runs
    positions: np.ndarray  # (p,) number of classes, or epochs from 1
    values: np.ndarray  # (n, p) float64 in the unit of the axis; NaN where a run has no value


class MetricCurves(NamedTuple):
    """What a figure of one metric shows."""

    metric: Metric
    curves: list[Curve]
    axis: np.ndarray  # the positions of a complete run, which `Curve.positions` begins with
    remarks: list[str]  # what is drawn in part or not at all, one line each
    axis_label: str  # in lines that fit


def mean_and_standard_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard error of the mean and number of runs at every point.

    values: (n, p), NaN where a run has none. Returns (p,) float64 means, NaN without a run; (p,) standard errors, the sample deviation
    (divisor n - 1) over sqrt(n), NaN with less than two runs; (p,) integer counts.
    """
    count = np.isfinite(values).sum(axis=0)
    mean = mean_of_those_there(values, axis=0)
    variance = np.nansum((values - mean) ** 2, axis=0) / np.where(count > 1, count - 1, np.nan)
    return mean, np.sqrt(variance / np.maximum(count, 1)), count


def legible(name: str) -> str:
    """A name in which what the figures' font cannot show, or only in the wrong order, is escaped, as in \\u5b9e."""
    from plots.plain_matplotlib import CHARACTERS  # here: export.py reads values, and draws nothing

    def shown(character: str) -> str:
        is_right_to_left = unicodedata.bidirectional(character) in ("R", "AL", "AN")
        is_legible = character in CHARACTERS and character.isprintable() and not is_right_to_left
        return character if is_legible else character.encode("unicode_escape").decode()

    return "".join(map(shown, name))


def algorithm_label(algorithm: str) -> str:
    """An algorithm's name in the paper or in the config, or else its folder's, legible and shortened to what a legend can hold."""
    label = (METHOD_LABELS | ALGORITHM_LABELS).get(algorithm) or legible(as_text(algorithm))
    label = label if len(label) <= 40 else f"{label[:20]}…{label[-19:]}"  # long names often differ in their ends only
    return f"“{label}”" if label.startswith("_") else label  # Matplotlib leaves labels that begin with _ out of legends


def axis_text(metric: Metric, num_units: str) -> str:
    """A metric's name and unit beside an axis, in lines that fit it. num_units: of the last layer."""
    label = metric.axis_label + f" (% of {num_units})" * (metric.kind == "rank")
    return "\n".join(part for line in label.split("\n") for part in textwrap.wrap(legible(line), 36))


# --- Reading ---------------------------------------------------------------------------------------------------------------------


def results_parser(description: str) -> argparse.ArgumentParser:
    """A parser of a script's command line, which has the folder of results."""

    def results_folder(text: str) -> Path:
        return Path(whole_path(text, "--results_dir"))

    parser = OneLineArgumentParser(description=description)
    help_text = "folder with one folder per algorithm (default results/ beside plots/)"
    parser.add_argument("--results_dir", type=results_folder, default=REPOSITORY / "results", metavar="DIR", help=help_text)
    return parser


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Give a script's command line the folder to write to."""
    help_text = "where to write (default: beside this script)"
    parser.add_argument("--output-dir", type=Path, default=REPOSITORY / "plots", metavar="DIR", help=help_text)


def add_algorithms_argument(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Give a script's command line the choice of algorithms: their folders' names, each once. Parsing it raises UserError."""

    def folder_names(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
                raise UserError(f'--algorithms: expected names of folders in --results_dir, separated by commas, got "{text}"')
            if names.count(name) > 1:
                raise UserError(f"--algorithms: {name} appears twice")
        return names

    parser.add_argument("--algorithms", type=folder_names, metavar="A,B,C", help=help_text)


def read_runs(results_dir: Path, metric: Metric, algorithms: Sequence[str] | None = None) -> dict[str, list[Run]]:
    """All runs that have a metric: algorithm to runs, by rising index; the paper's algorithms first.

    algorithms: which, and in which order; None: all there are. Those without a run are left out. For a relative metric, the retrained
    network's runs come along unasked. Raises UserError naming the folder or the file that cannot be used.
    """
    folders = algorithm_folders(results_dir)
    if algorithms is None:
        algorithms = [*ALGORITHM_LABELS, *(name for name in folders if name not in ALGORITHM_LABELS)]
    elif metric.is_relative and RETRAINED not in algorithms:
        algorithms = [*algorithms, RETRAINED]
    return {
        algorithm: [_read_run(results_dir, algorithm, index, metric) for index in indices]
        for algorithm in algorithms
        if (indices := _indices(results_dir / algorithm / metric.folder))
    }


def algorithm_folders(results_dir: Path) -> list[str]:
    """The names of the folders in a folder of results, sorted. Raises UserError if it cannot be one."""
    if not os.path.isdir(results_dir):
        raise UserError(
            broken_link(results_dir) or f"{results_dir}: no such folder; --results_dir names the folder that holds one folder per algorithm"
        )
    folders = _folders(results_dir)
    if any(name == "config_files" or name.endswith(METRIC_ENDINGS) for name in folders):
        raise UserError(f"{results_dir}: this folder is one algorithm's; --results_dir names the one above it, {results_dir.parent}")
    return folders


def find_metrics(results_dir: Path) -> dict[str, list[str]]:
    """All metrics that can be drawn of what is there, and the algorithms that have them, sorted.

    The released script's metrics are first, in its order, then others, sorted. Raises UserError if a folder cannot be read.
    """
    having: dict[str, list[str]] = {}
    for algorithm in algorithm_folders(results_dir):
        for name in _folders(results_dir / algorithm):
            if name.endswith(METRIC_ENDINGS) and _indices(results_dir / algorithm / name):
                having.setdefault(name, []).append(algorithm)
    with_accuracy = having.get(TEST_ACCURACY, [])
    if RETRAINED in with_accuracy and len(with_accuracy) > 1:
        having[RELATIVE] = with_accuracy
    return {name: having[name] for name in (*METRICS, *sorted(having.keys() - METRICS.keys())) if name in having}


def _folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, hidden ones left out."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot read this folder ({error.strerror})") from None


def _indices(folder: Path) -> list[int]:
    """The indices of the runs in a metric's folder, rising; none if it is not there."""
    for path in (folder.parent, folder):
        if os.path.lexists(path) and not os.path.isdir(path):
            raise UserError(broken_link(path) or f"{path}: expected a folder here")
    try:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise UserError(f"{folder}: cannot read this folder ({error.strerror})") from None
    return sorted(int(match[1]) for match in map(re.compile(r"index-(0|[1-9]\d{0,8})\.npy").fullmatch, names) if match)


def _read_run(results_dir: Path, algorithm: str, index: int, metric: Metric) -> Run:
    folder = results_dir / algorithm
    config_file = folder / "config_files" / f"index-{index}.json"
    sizes, _ = read_sizes(config_file)
    has_config = config_file.is_file()
    num_units = LAST_LAYER_WIDTHS * sizes.network_width
    longest = sizes.num_tasks * (sizes.epochs_per_task if metric.per_epoch else 1)
    least, most, scale = {
        "fraction": (0.0, 1.0, 100.0),
        "rank": (0.0, float(num_units), 100.0 / num_units),
        "plain": (-np.inf, np.inf, 1.0),
    }[metric.kind]
    path = folder / metric.folder / f"index-{index}.npy"
    points = "epochs" if metric.per_epoch else "tasks"
    values = read_values(path, longest if has_config else sys.maxsize, points, least, most)
    if len(values) != longest and not has_config:
        raise UserError(
            f"{path}: holds {len(values):,} values, not the paper's {longest:,} {points}, and there is no {config_file} to say what they "
            "are; copy it too"
        )
    missing = np.flatnonzero(np.diff(np.isnan(values), prepend=True) & np.isnan(values))
    if metric.folder in WITHOUT_GAPS and len(missing):  # not those before the first value, of epochs that did not measure it yet
        raise UserError(f"{path}: the value of epoch {missing[0] + 1} is not a number")
    if not metric.has_first_task:
        values[:1] = np.nan
    analysis = read_analysis_settings(folder / "analysis_settings" / f"index-{index}.json") if metric.images else None
    return Run(algorithm, index, sizes, has_config, analysis, values * scale)


def read_analysis_settings(path: Path) -> AnalysisSettings:
    """What a run was analysed with; the released script's settings if there is no such file. Raises UserError if it says nothing."""
    settings = read_stored(path, "analysis settings")
    if settings is None:
        return AnalysisSettings()
    batch_norm, threshold = (settings.get(key) for key in AnalysisSettings._fields)
    if batch_norm not in ("batch", "running") or type(threshold) not in (int, float):
        raise UserError(f"{path}: does not say what this run was analysed with; run post_run_analysis.py on it again")
    return AnalysisSettings(batch_norm, float(threshold))


def read_values(path: Path, longest: int, points: str, least: float, most: float) -> np.ndarray:
    """One run's stored values: (at most `longest`,) as float64, each NaN or finite and from `least` to `most`.

    points: what a value stands for, "epochs" or "tasks", for messages. Raises UserError naming the file if it is anything else.
    """
    try:
        if not os.path.isfile(path):
            raise ValueError("not a file")
        array = np.lib.format.open_memmap(path, mode="r")  # unlike np.load, it refuses a shape that is negative or larger than the file
    except Exception as error:  # of many kinds, depending on where a file is damaged
        raise UserError(f"{path}: cannot read this metric ({error or type(error).__name__})") from None
    if array.dtype.kind not in "fiu" or array.ndim != 1:
        raise UserError(f"{path}: expected one number for each of the {points}, found {array.dtype} of shape {array.shape}")
    if len(array) > longest:
        raise UserError(f"{path}: holds {len(array)} values, but by its config this run has {longest} {points}")
    values = np.array(array, dtype=np.float64)
    wrong = np.flatnonzero((values < least) | (values > most * (1 + 1e-6)) | np.isinf(values))
    if len(wrong):
        limit = f"from {least:g} to {most:g}" if np.isfinite(most) else "finite"
        raise UserError(f"{path}: value {wrong[0]} is {values[wrong[0]]:g}; values of this metric are {limit}")
    return values


# --- Curves ----------------------------------------------------------------------------------------------------------------------


def make_curves(runs: dict[str, list[Run]], metric: Metric, per_epoch: bool = False) -> MetricCurves:
    """A curve per algorithm, in the given order, and what a figure of them says beside.

    Per task, a run's value is its best of the task's epochs, and only complete tasks count; with `per_epoch`, every epoch is a point. A
    relative metric subtracts, run by run, the retrained network of the same index, whose own curve is left out.
    Raises UserError if the runs are of different sizes or analyses, so that they have no common axis or no meaningful mean.
    """
    check_alike(runs)
    if metric.per_epoch and not per_epoch:
        runs = {algorithm: [run.per_task(metric.best) for run in of_algorithm] for algorithm, of_algorithm in runs.items()}
    points = "epochs" if per_epoch else "tasks"
    spacing = 1 if per_epoch else next((run.sizes.classes_per_task for run in flattened(runs)), 1)
    num_hidden = 0 if metric.has_first_task else 1  # points that a run has but that are not drawn
    retrained = {run.index: run.values for run in runs.get(RETRAINED, [])}

    def full_length(run: Run) -> int:
        return run.sizes.num_epochs if per_epoch else run.sizes.num_tasks

    without_config = [
        f"{algorithm_label(algorithm)} {indices_text(indices)}"
        for algorithm, of_algorithm in runs.items()
        if (indices := [run.index for run in of_algorithm if not run.has_config])
    ]
    curves = []
    remarks = [f"Taken to be of the paper's sizes, as config_files/ holds none of: {', '.join(without_config)}"] if without_config else []
    short_retrained: dict[int, tuple[int, int]] = {}
    for algorithm, of_algorithm in runs.items():
        label = algorithm_label(algorithm)
        seeds = {(key, seed) for run in of_algorithm for key in SEED_KEYS if (seed := getattr(run.sizes, key)) is not None}
        for key, seed in sorted(seeds):
            of_seed = indices_text([run.index for run in of_algorithm if getattr(run.sizes, key) == seed])
            remarks.append(f"{label}: {key} {seed} in {of_seed}")
        if metric.is_relative and algorithm == RETRAINED:
            continue
        alone = [run.index for run in of_algorithm if metric.is_relative and run.index not in retrained]
        if alone:
            remarks.append(f"{label}: no retrained network of {indices_text(alone)}; left out")
        empty = [run.index for run in of_algorithm if run.index not in alone and not np.isfinite(run.values).any()]
        if empty:
            remarks.append(f"{label}: {indices_text(empty)} without a complete {points[:-1]} yet; left out")
        rows, short = {}, {}
        for run in of_algorithm:
            if run.index in (*alone, *empty):
                continue
            values, count, full = run.values, int(np.isfinite(run.values).sum()) + num_hidden, full_length(run)
            reference = retrained[run.index] if metric.is_relative else np.zeros(len(values))
            if len(reference) < count:
                short_retrained[run.index] = len(reference), full
            elif count < full:
                short[run.index] = count, full
            values = values[: len(reference)] - reference[: len(values)]
            if np.isfinite(values).any():
                rows[run.index] = values
        if short:
            remarks.append(f"{label}: {_short_text(short, points)}")
        if rows:
            length = max(map(len, rows.values()))
            values = np.array([np.pad(row, (0, length - len(row)), constant_values=np.nan) for row in rows.values()])
            curves.append(Curve(algorithm, tuple(rows), spacing * np.arange(1, length + 1), values))
    if short_retrained:
        remarks.append(f"{algorithm_label(RETRAINED)}: {_short_text(short_retrained, points)}")
    axis = spacing * np.arange(1, max(map(full_length, flattened(runs)), default=0) + 1)
    return MetricCurves(metric, curves, axis, remarks, axis_text(metric, last_layer_units(runs)))


def flattened(runs: dict[str, list[Run]]) -> Iterable[Run]:
    """All runs of all algorithms."""
    return (run for of_algorithm in runs.values() for run in of_algorithm)


def check_alike(runs: dict[str, list[Run]]) -> None:
    """Raise UserError unless all runs share the axes of a figure and an analysis, and those of an algorithm all but the number of tasks."""
    everything = list(flattened(runs))
    groups = [(key, everything) for key in ("dataset", "classes_per_task", "epochs_per_task")]
    groups += [(key, of_algorithm) for of_algorithm in runs.values() for key in SIZE_KEYS if key != "num_tasks"]
    for key, group in groups:
        for run in group:
            first, here = getattr(group[0].sizes, key), getattr(run.sizes, key)
            if here != first:
                raise UserError(
                    f"runs of different sizes cannot be averaged in one figure: {key} is {first} in {group[0].file('config_files')} and "
                    f"{here} in {run.file('config_files')}; choose with --algorithms or move runs elsewhere"
                )
    for run in everything:
        if run.analysis != everything[0].analysis:
            raise UserError(
                f"runs analysed with different settings do not belong in one figure: {everything[0].analysis} in "
                f"{everything[0].file('analysis_settings')} and {run.analysis} in {run.file('analysis_settings')}; "
                "run post_run_analysis.py again"
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


def indices_text(indices: Sequence[int]) -> str:
    return ("index " if len(indices) == 1 else "indices ") + ", ".join(map(str, indices))


def _short_text(short: dict[int, tuple[int, int]], points: str) -> str:
    """Say how far runs in progress are: index to number of points that are there, and of a complete run."""
    counts, full_lengths = (sorted(set(numbers)) for numbers in zip(*short.values(), strict=True))
    some = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    full = " or ".join(f"{length:,}" for length in full_lengths)
    return f"{indices_text(list(short))} {'has' if len(short) == 1 else 'have'} only {some} of {full} {points}"
