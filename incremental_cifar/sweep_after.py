"""What follows a sweep's runs: their analysis, figures, and the deletion of what is not to be kept.

    problems = do_steps(["analysis", "figures"], experiments, keep="models", workers)

The steps take what is finished and say what is not. They are the scripts that one can call by hand, in processes of their own.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from incremental_cifar.command_line import warn
from incremental_cifar.config import REPOSITORY, SIZE_KEYS, Config
from incremental_cifar.sweep_local import Task, Workers, run_tasks, status_text
from incremental_cifar.sweep_plan import Experiment, indices_text
from incremental_cifar.sweep_status import failure_text

STEPS = ("analysis", "figures")
# What is left on disk of a finished run: everything, all but its checkpoints, or (once it is analysed) all but checkpoints and models.
KEEP = ("all", "models", "results")


def do_steps(steps: Sequence[str], experiments: Sequence[Experiment], keep: str, workers: Workers) -> list[str]:
    """Analyse the finished runs and draw figures; return what went wrong, a line each. Ends early if `workers` are stopped."""
    problems: list[str] = []
    if "analysis" in steps:
        problems += analyse(experiments, keep, workers)
    if "figures" in steps and workers.stop_signal is None:
        problems += draw_figures(experiments, workers)
    return problems


# --- Analysis --------------------------------------------------------------------------------------------------------------------


def analyse(experiments: Sequence[Experiment], keep: str, workers: Workers) -> list[str]:
    """Analyse all finished runs that are not analysed, an experiment per process; return what went wrong."""
    tasks, problems = [], []
    for experiment in experiments:
        finished = set(experiment.files(0).finished_indices())
        indices = []
        for index in experiment.indices:
            if index in finished and has_models(experiment, index):
                indices.append(index)
            elif index in finished and not is_analysed(experiment, index):
                problems.append(f"{experiment.folder}: index {index} cannot be analysed, since its models are gone")
        if indices:
            device = experiment.device(workers.places[0].has_gpu)
            command = [sys.executable, str(REPOSITORY / "post_run_analysis.py"), "--results_dir", str(experiment.folder)]
            command += ["--experiment-index", indices_text(indices), "--data_path", experiment.config.data_path, "--device", device]
            name = f"analysis of {experiment.name} {indices_text(indices)}"
            tasks.append(Task(name, command, experiment.folder / "logs" / "analysis.log"))
    problems += _problems(run_tasks(tasks, workers))
    for experiment in experiments:
        for index in experiment.indices:
            tidy(experiment, index, keep)
    return problems


def has_models(experiment: Experiment, index: int) -> bool:
    """Whether models of a finished run are there: what can be analysed is."""
    return any(path.exists() for path in model_files(experiment, index))


def model_files(experiment: Experiment, index: int) -> list[Path]:
    config = experiment.config
    return [experiment.files(index).model_file(task * config.epochs_per_task) for task in range(config.num_tasks + 1)]


def is_analysed(experiment: Experiment, index: int) -> bool:
    return experiment.files(index).is_analysed(experiment.config.num_tasks)


def tidy(experiment: Experiment, index: int, keep: str) -> None:
    """Delete of a finished run what `keep` does not name (see KEEP); models only after the whole analysis. Warns of what it cannot."""
    if keep == "all" or index not in experiment.files(index).finished_indices():
        return
    unwanted = [path for _, path in experiment.files(index).checkpoints()]
    if keep == "results" and is_analysed(experiment, index):
        unwanted += model_files(experiment, index)
    for path in unwanted:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            warn(f"{path}: cannot delete this file ({error.strerror})")


# --- Figures ---------------------------------------------------------------------------------------------------------------------


def draw_figures(experiments: Sequence[Experiment], workers: Workers) -> list[str]:
    """Draw the paper's figure, where an experiment bears the name of one of its algorithms, and every metric that is there.

    Everything goes into figures/ in each folder of results. Returns what went wrong.
    """
    from plots.run_results import ALGORITHM_LABELS, METRICS, RETRAINED

    tasks = []
    for results_dir in dict.fromkeys(experiment.config.results_dir for experiment in experiments):
        names = [experiment.name for experiment in experiments if experiment.config.results_dir == results_dir]
        output = Path(results_dir, "figures")

        def add(script: str, *arguments: str, what: str, output: Path = output, results_dir: str = results_dir) -> None:
            command = [sys.executable, str(REPOSITORY / "plots" / script), "--results_dir", results_dir, *arguments]
            tasks.append(Task(what, command, output / "logs" / f"{what.replace(' ', '_')}.log"))

        if set(names) & set(ALGORITHM_LABELS):
            add("plot_paper_figure.py", "--output-dir", str(output), what="paper figure")
            if any(is_papers_problem(experiment.config) for experiment in experiments if experiment.name in ALGORITHM_LABELS):
                add("compare_with_paper.py", "--output-dir", str(output), what="comparison with the paper")
        for name, metric in METRICS.items():
            drawn = [folder for folder in names if _has_arrays(Path(results_dir, folder, metric.folder))]
            if metric.is_relative and not (RETRAINED in drawn and len(drawn) > 1):
                continue
            if drawn:
                arguments = ["--metric", name, "--algorithms", ",".join(drawn), "--output", str(output / f"{name}.svg")]
                add("plot_incremental_cifar_results.py", *arguments, what=f"figure of {name}")
    return _problems(run_tasks(tasks, workers))


def _has_arrays(folder: Path) -> bool:
    return folder.is_dir() and any(name.endswith(".npy") for name in os.listdir(folder))


def is_papers_problem(config: Config) -> bool:
    paper = Config()
    return all(getattr(config, key) == getattr(paper, key) for key in SIZE_KEYS)


def _problems(ended: Sequence) -> list[str]:
    failed = [one for one in ended if one.status != 0]
    return [f"{one.task.name}: {failure_text(status_text(one.status), one.task.log)} (log: {one.task.log})" for one in failed]
