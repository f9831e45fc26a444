"""Which runs a sweep consists of: configs, values and indices in; a list of experiments out, all checked.

    experiments = plan(["cfg/base_deep_learning_system.json"], [], ["stepsize=0.1,0.01"], [0, 1, 2])
    experiments[1].config.experiment_name                    # "base_deep_learning_system_stepsize=0.01"

An experiment is one config with one name; a run is an experiment and an index. What a run costs on disk is here too.

Does without PyTorch, so that a sweep is there at once.
"""

import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from incremental_cifar.config import FREE_KEYS, REPOSITORY, Config, UserError, check_same_settings, load_config, make_config, read_stored
from incremental_cifar.run_files import RunFiles
from incremental_cifar.safe_files import write_file

EXPERIMENT_SCRIPT = REPOSITORY / "incremental_cifar_experiment.py"
NO_GRID = {"experiment_name", "results_dir", "data_path"}
ONLY_WITH_CBP = {"replacement_rate", "utility_function", "maturity_threshold", "running_average_utility"}


class Experiment(NamedTuple):
    """One config of a sweep under its own name, and its indices."""

    source: str  # path of the config file it was read from
    overrides: tuple[str, ...]  # KEY=VALUE, as they would stand behind --set
    config: Config
    indices: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.config.experiment_name

    @property
    def folder(self) -> Path:
        return Path(self.config.results_dir, self.name)

    @property
    def sweep_folder(self) -> Path:
        """Where a sweep keeps what it needs beyond the run's own files: the config it starts runs with, and a record per run."""
        return self.folder / "sweep"

    @property
    def config_file(self) -> Path:
        return self.sweep_folder / "config.json"

    def files(self, index: int) -> RunFiles:
        return RunFiles(self.folder, index)

    def device(self, has_gpu: bool) -> str:
        """The device of a process of this experiment: one that is given a GPU must use it, which "auto" does only where it can."""
        return "cuda" if has_gpu and self.config.device == "auto" else self.config.device


class Job(NamedTuple):
    """Indices of one experiment that one process runs."""

    experiment: Experiment
    indices: tuple[int, ...]
    has_gpu: bool = False  # whether the process is given one

    @property
    def name(self) -> str:
        return f"{self.experiment.name} {'index' if len(self.indices) == 1 else 'indices'} {indices_text(self.indices)}"

    @property
    def log(self) -> Path:
        """What the process prints; index-0,1.log if it runs indices 0 and 1."""
        return self.experiment.folder / "logs" / f"index-{indices_text(self.indices)}.log"

    def command(self) -> list[str]:
        """What the process is started with: the config as it was when the sweep was checked."""
        script = [sys.executable, str(EXPERIMENT_SCRIPT), "--config", str(self.experiment.config_file)]
        device = self.experiment.device(self.has_gpu)
        return [*script, "--experiment-index", indices_text(self.indices), "--set", f"device={device}"]

    def command_by_hand(self) -> str:
        """The same as one would type it."""
        words = ["python", "incremental_cifar_experiment.py", "--config", self.experiment.source]
        words += ["--experiment-index", indices_text(self.indices)]
        words += ["--set", *self.experiment.overrides] if self.experiment.overrides else []
        return shlex.join(words)


def indices_text(indices: Sequence[int]) -> str:
    """Indices as `--experiment-index` takes them: 0,2,5-7."""
    parts = []
    for _, group in itertools.groupby(enumerate(sorted(indices)), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in group]
        parts += [f"{members[0]}-{members[-1]}"] if len(members) > 2 else map(str, members)
    return ",".join(parts)


def plan(configs: Sequence[str], overrides: Sequence[str], grids: Sequence[str], indices: Sequence[int]) -> list[Experiment]:
    """All experiments of a sweep: every config at every point of the grid. Raises UserError, before anything is started.

    overrides: KEY=VALUE for all. grids: KEY=V1,V2,...; their product is the grid, and a point's values are part of its experiment's name.
    """
    points = grid_points(grids)
    experiments = []
    for source in configs:
        for point in points:
            experiments.append(_experiment(source, list(overrides), point, indices))
    _check_names(experiments)
    for experiment in experiments:
        for index in indices:
            files = experiment.files(index)
            check_same_settings(files.load_config(), experiment.config, files.config_file)
        _check_frozen_config(experiment)
    return experiments


def grid_points(grids: Sequence[str]) -> list[tuple[str, ...]]:
    """The points of a grid, as KEY=VALUE texts each: ["a=1,2", "b=3"] gives ("a=1", "b=3") and ("a=2", "b=3"). Raises UserError."""
    axes: dict[str, list[str]] = {}
    for grid in grids:
        key, equals, text = grid.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not equals or not key or "" in values:
            raise UserError(f'--grid: expected KEY=VALUE1,VALUE2,..., got "{grid}"')
        if key in NO_GRID:
            raise UserError(f"--grid: {key} cannot be part of a grid; every point has its own experiment name")
        if key in axes:
            raise UserError(f'--grid: key "{key}" appears twice; put all its values behind one')
        axes[key] = values
    return [tuple(f"{key}={value}" for key, value in zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _experiment(source: str, overrides: list[str], point: tuple[str, ...], indices: Sequence[int]) -> Experiment:
    """One config at one point of the grid, loaded and checked."""
    keys = [override.partition("=")[0] for override in point]
    if twice := {override.partition("=")[0] for override in overrides} & set(keys):
        raise UserError(f"--grid: {', '.join(sorted(twice))} is also behind --set; keep one of them")
    try:
        config = load_config(source, [*overrides, *point])
    except UserError as error:
        message = str(error)
        if message.startswith("--set: "):
            if any(key in message.split(maxsplit=4)[:4] or f'"{key}"' in message for key in keys):
                message = message.replace("--set: ", "--grid: ", 1)
            elif several := [text for text in overrides if "," in text and message.startswith(f"--set: {text.partition('=')[0]} is ")]:
                message += f"; for several values: --grid {several[0]}"
        raise UserError(message) from None
    if without_effect := [key for key in keys if key in ONLY_WITH_CBP and not config.use_cbp]:
        raise UserError(f"--grid: {without_effect[0]} has no effect in {source}, where use_cbp is false; leave that config out")
    if point:
        name = "_".join([config.experiment_name, *point])
        overrides = [override for override in overrides if not override.startswith("experiment_name=")]
        overrides += [*point, f"experiment_name={name}"]
        config = load_config(source, overrides)
    return Experiment(source, tuple(overrides), config, tuple(indices))


def _check_names(experiments: Sequence[Experiment]) -> None:
    """Raise UserError if two experiments have the same folder, or the same settings under two names of one config's grid."""
    by_folder: dict[Path, Experiment] = {}
    by_settings: dict[tuple, Experiment] = {}
    for experiment in experiments:
        if other := by_folder.get(experiment.folder):
            if other.source == experiment.source:
                raise UserError(f"--configs, --grid: {experiment.source} is there twice as {experiment.name}; keep one of them")
            raise UserError(
                f"{other.source} and {experiment.source}: both have the experiment_name {experiment.name}; give one of them another, as in "
                '"experiment_name": "my_name"'
            )
        by_folder[experiment.folder] = experiment
        settings = {key: value for key, value in experiment.config.to_dict().items() if key not in FREE_KEYS - {"device"}}
        key = (experiment.source, json.dumps(settings, sort_keys=True))
        if other := by_settings.get(key):
            raise UserError(f"--grid: {other.name} and {experiment.name} are the same settings; keep one of them")
        by_settings[key] = experiment


def _check_frozen_config(experiment: Experiment) -> None:
    """Raise UserError if an earlier sweep of this experiment had other settings: runs that it queued may not have started yet."""
    frozen = read_stored(experiment.config_file)
    if frozen is not None:
        stored = make_config(frozen, source=str(experiment.config_file))
        check_same_settings(stored, experiment.config, experiment.config_file)


def freeze_config(experiment: Experiment) -> None:
    """Write the complete config that the sweep's runs start with, so that a file edited later changes none of them."""
    content = {"_source": os.path.abspath(experiment.source), **experiment.config.to_dict()}
    text = (json.dumps(content, indent=1) + "\n").encode()
    if not experiment.config_file.is_file() or experiment.config_file.read_bytes() != text:
        write_file(experiment.config_file, text)


def make_jobs(runs: Sequence[tuple[Experiment, int]], runs_per_job: int) -> list[Job]:
    """Pack runs into jobs of at most so many indices of one experiment each, the lowest indices of all experiments first."""
    indices: dict[Path, list[int]] = {}
    experiments = {experiment.folder: experiment for experiment, _ in runs}
    for experiment, index in runs:
        indices.setdefault(experiment.folder, []).append(index)
    packs = [
        (number, Job(experiments[folder], tuple(sorted(waiting)[first : first + runs_per_job])))
        for folder, waiting in indices.items()
        for number, first in enumerate(range(0, len(waiting), runs_per_job))
    ]
    return [job for _, job in sorted(packs, key=lambda pack: pack[0])]


# --- What runs cost --------------------------------------------------------------------------------------------------------------


def num_parameters(width: int) -> int:
    """Parameters of the network of this width: 11.2 million at 64."""

    def convolution(inputs: int, outputs: int, size: int) -> int:
        return outputs * (inputs * size**2 + 1)

    total, inputs = convolution(3, width, 3) + 2 * width, width
    for stage in range(4):
        outputs = width * 2**stage
        for block in range(2):
            total += convolution(inputs, outputs, 3) + convolution(outputs, outputs, 3) + 4 * outputs
            if block == 0 and stage > 0:
                total += convolution(inputs, outputs, 1) + 2 * outputs
            inputs = outputs
    return total + 100 * (inputs + 1)


def model_bytes(config: Config) -> int:
    """What one stored model takes on disk, without its names and the like: float32 parameters and batch-norm statistics."""
    batch_norm_units = config.network_width * (1 + 4 + 2 * (4 + 1) + 4 * (4 + 1) + 8 * (4 + 1))
    return 4 * (num_parameters(config.network_width) + 2 * batch_norm_units)


def models_bytes(config: Config) -> int:
    """What the stored models of one run take on disk: the initial one, and one per task."""
    return (config.num_tasks + 1) * model_bytes(config)


def checkpoints_bytes(config: Config) -> int:
    """What the newest two checkpoints of a run take at its end: network and momentum each, and the loss and accuracy of every step."""
    return 2 * (2 * model_bytes(config) + 8 * config.steps_before(config.num_epochs))
