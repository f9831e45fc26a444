"""Many runs by one command, on this machine or on Slurm: the paper's figure is 5 algorithms with 15 runs each.

    python run_sweep.py --configs cfg/*.json --indices 0-14 --then analysis,figures
    python run_sweep.py --configs cfg/*.json --indices 0-14 --status

The same command starts a sweep, goes on with it, and says so when it is finished: it starts what is neither finished, running nor queued.
A run that fails does not take others with it; it is tried again, and then reported. `docs/sweeps.md` tells all, and what the paper's worth
of runs costs. The exit status is 0 if all runs are finished (with `--cluster slurm`: submitted), 1 if something failed, 2 if the command
cannot be carried out, and that of the signal (Ctrl-C: 130) if one stopped the sweep.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from incremental_cifar.command_line import OneLineArgumentParser, parse_indices, run_script, warn
from incremental_cifar.config import MOST_RUNS_PER_GPU, UserError
from incremental_cifar.safe_files import lock
from incremental_cifar.sweep_after import KEEP, STEPS, do_steps, tidy
from incremental_cifar.sweep_local import Display, Place, Workers, find_places, report_failures, run_all
from incremental_cifar.sweep_plan import Experiment, checkpoints_bytes, freeze_config, make_jobs, models_bytes, plan
from incremental_cifar.sweep_slurm import after_text, check_slurm, parse_request, queued_runs, submit
from incremental_cifar.sweep_status import (
    FINISHED,
    QUEUED,
    RUNNING,
    Status,
    counts_text,
    duration_text,
    measured_seconds,
    read_statuses,
    seconds_left,
    status_table,
    sweep_lock_file,
)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    experiments = plan(parsed.configs, parsed.overrides, parsed.grids, parsed.indices)
    if parsed.status:
        return show_status(experiments)
    request = parse_request(parsed.slurm, parsed.signal_before) if parsed.cluster == "slurm" else None
    if parsed.dry_run:
        return show_plan(experiments, parsed)
    if request is not None:
        check_slurm()
    places = check_places(experiments, parsed) if request is None else []
    with sweep_locks(experiments):
        queue = queued_runs(experiments)
        statuses = read_statuses(experiments, queue)
        if parsed.cluster == "local" and queue:
            (experiment, index), job = next(iter(queue.items()))
            raise UserError(f"{experiment.name} index {index} is on Slurm: job {job.text}; cancel it (scancel), or leave it out here")
        if any(status.state != FINISHED for status in statuses):
            fetch_data(experiments)
            for experiment in experiments:
                freeze_config(experiment)
        for experiment in experiments:
            for index in experiment.indices:
                tidy(experiment, index, parsed.keep)
        if request is not None:
            return submit(statuses, queue, request, parsed.runs_per_job, parsed.retries, parsed.signal_before, parsed.then, parsed.keep)
        return sweep_here(experiments, statuses, parsed, places)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises UserError."""
    parser = OneLineArgumentParser(description="Run many configs and indices, on this machine or on Slurm; docs/sweeps.md tells more.")
    parser.add_argument("--configs", nargs="+", required=True, metavar="PATH", help="JSON files of settings, as in cfg/*.json")
    parser.add_argument("--indices", required=True, metavar="N", help="the indices of every config: 3, or 0-14, or 0,2,5-7")
    key_value = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--set", **key_value, metavar="KEY=VALUE", dest="overrides", help="settings that override those of all configs")
    parser.add_argument(
        "--grid", **key_value, metavar="KEY=V1,V2", dest="grids", help="values to try, all combinations; each is an experiment of its own"
    )
    parser.add_argument("--retries", type=int, default=1, metavar="N", help="how often a run that fails is tried again (default 1)")
    parser.add_argument("--then", default="", metavar="STEPS", help="what follows when all runs are done: analysis, figures, or both")
    parser.add_argument(
        "--keep",
        choices=KEEP,
        default="all",
        help="of a finished run: all; models: no checkpoints; results: no models either, once they are analysed (default all)",
    )
    parser.add_argument("--status", action="store_true", help="show how every run stands, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="show what would be started, and do nothing")
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local", help="where to run (default local: this machine)")

    local = parser.add_argument_group("on this machine")
    local.add_argument("--gpus", metavar="N", help="GPUs to use, as in 0,1 (default: all; without one, the cores)")
    local.add_argument("--runs-per-gpu", type=int, metavar="N", help="indices of a config that share a GPU, in one process (default 1)")
    local.add_argument("--cores-per-run", type=int, metavar="N", help="threads of a run on cores; decides the last bits (default 1)")

    slurm = parser.add_argument_group("on Slurm")
    slurm.add_argument(
        "--slurm", **key_value, metavar="KEY=VALUE", help="what to ask Slurm for, as sbatch calls it: partition, time, gres, account, ..."
    )
    slurm.add_argument("--runs-per-job", type=int, metavar="N", help="indices of a config that share a job, in one process (default 1)")
    slurm.add_argument(
        "--signal-before",
        type=int,
        metavar="SECONDS",
        help="time before a job's limit at which it stops after an epoch, and is queued again (default 300)",
    )
    parsed = parser.parse_args(arguments)

    try:
        parsed.indices = parse_indices(parsed.indices)
    except UserError as error:
        raise UserError(str(error).replace("--experiment-index", "--indices")) from None
    local_options = {"--gpus": parsed.gpus, "--runs-per-gpu": parsed.runs_per_gpu, "--cores-per-run": parsed.cores_per_run}
    slurm_options = {"--slurm": parsed.slurm, "--runs-per-job": parsed.runs_per_job, "--signal-before": parsed.signal_before}
    is_local = parsed.cluster == "local"
    if out_of_place := [option for option, value in (slurm_options if is_local else local_options).items() if value]:
        raise UserError(f"{out_of_place[0]}: belongs to --cluster {'slurm' if is_local else 'local'}")
    for option, value in (("--runs-per-gpu", parsed.runs_per_gpu), ("--runs-per-job", parsed.runs_per_job)):
        if value is not None and value > MOST_RUNS_PER_GPU:
            raise UserError(f"{option}: got {value}; at most {MOST_RUNS_PER_GPU} runs can share a GPU in one process")
    numbers = {"--runs-per-gpu": 1, "--cores-per-run": 1, "--runs-per-job": 1, "--signal-before": 1, "--retries": 0}
    for option, least in numbers.items():
        value = getattr(parsed, option.removeprefix("--").replace("-", "_"))
        if value is not None and value < least:
            raise UserError(f"{option}: got {value}; it must be {least} or more")
    parsed.runs_per_gpu, parsed.runs_per_job = parsed.runs_per_gpu or 1, parsed.runs_per_job or 1
    parsed.signal_before = parsed.signal_before or 300
    parsed.then = [step.strip() for step in parsed.then.split(",")] if parsed.then else []
    if unknown := [step for step in parsed.then if step not in STEPS]:
        raise UserError(f'--then: no step "{unknown[0]}"; there are {", ".join(STEPS)}')
    if parsed.keep == "results" and "analysis" not in parsed.then:
        raise UserError("--keep results: models are deleted once they are analysed; add --then analysis")
    return parsed


@contextlib.contextmanager
def sweep_locks(experiments: Sequence[Experiment]) -> Iterator[None]:
    """Keep other sweeps from these experiments. Raises UserError, naming the holder, if one is at work."""
    with contextlib.ExitStack() as held:
        for path in sorted({sweep_lock_file(experiment) for experiment in experiments}):
            holder = held.enter_context(lock(path))
            if holder is not None:
                raise UserError(f"{path}: another sweep is at work on this experiment: {holder}; wait for it, or stop it there")
        yield


def fetch_data(experiments: Sequence[Experiment]) -> None:
    """Download CIFAR-100 if it is needed and not there, before any run waits for it. Raises UserError.

    Files with the right names will do: every run checks what is in them, and fetches them again if they are damaged.
    """
    for data_path in {experiment.config.data_path for experiment in experiments if experiment.config.dataset == "cifar100"}:
        if not all(os.path.isfile(Path(data_path, "cifar-100-python", name)) for name in ("train", "test", "meta")):
            from incremental_cifar.cifar100 import fetch_cifar100  # here only: it takes seconds to import

            fetch_cifar100(Path(data_path))


# --- On this machine -------------------------------------------------------------------------------------------------------------


def check_places(experiments: Sequence[Experiment], parsed: argparse.Namespace) -> list[Place]:
    """The GPUs or cores to run on. Raises UserError."""
    places = find_places(experiments, parsed.gpus, parsed.cores_per_run)
    if parsed.runs_per_gpu > 1 and not places[0].name.startswith("GPU"):
        raise UserError("--runs-per-gpu: these runs use no GPU")
    return places


def sweep_here(experiments: Sequence[Experiment], statuses: Sequence[Status], parsed: argparse.Namespace, places: Sequence[Place]) -> int:
    """Run everything on this machine's GPUs or cores, then the steps that follow; return the exit status. Raises UserError."""
    display = Display(sys.stdout)
    with Workers(places, display) as workers:
        outcome = run_all(
            statuses,
            workers,
            parsed.runs_per_gpu,
            parsed.retries,
            measured_seconds(experiments),
            on_finish=lambda experiment, index: tidy(experiment, index, parsed.keep),
        )
        if not display.is_terminal:  # else the table says it
            display.say(counts_text(outcome.statuses))
        unfinished = [status for status in outcome.statuses if status.state != FINISHED]
        problems = list(report_failures(outcome.failed))
        if parsed.then and workers.stop_signal is None:
            if unfinished:
                problems.append(
                    f"{', '.join(parsed.then)}: without {len(unfinished)} of {len(outcome.statuses)} runs, which are not finished"
                )
            problems += do_steps(parsed.then, experiments, parsed.keep, workers)
        for line in problems:
            print(line, file=sys.stderr, flush=True)
        if workers.stop_signal is not None:
            print("The same command goes on.", flush=True)
            return 128 + workers.stop_signal
    return 1 if unfinished or problems else 0


# --- Only to look ----------------------------------------------------------------------------------------------------------------


def show_status(experiments: Sequence[Experiment]) -> int:
    queue, steps = {}, []
    try:
        queue, steps = queued_runs(experiments), after_text(experiments)
    except UserError as error:
        warn(f"{error}; what is queued cannot be seen")
    statuses = read_statuses(experiments, queue)
    print("\n".join([*status_table(statuses), counts_text(statuses), *steps]))
    return 0


def show_plan(experiments: Sequence[Experiment], parsed: argparse.Namespace) -> int:
    """Print what would be started, and what it costs."""
    statuses = read_statuses(experiments, queued_runs(experiments))
    is_local = parsed.cluster == "local"
    places = find_places(experiments, parsed.gpus, parsed.cores_per_run) if is_local else []
    runs_per_job = parsed.runs_per_gpu if is_local else parsed.runs_per_job
    new = [status for status in statuses if status.state not in (FINISHED, RUNNING, QUEUED)]
    jobs = make_jobs([(status.experiment, status.index) for status in new], runs_per_job)
    print("\n".join([*status_table(statuses), counts_text(statuses)]))
    where = f"on {', '.join(place.name for place in places)}" if is_local else "on Slurm"
    print(f"Would start {len(new)} runs in {len(jobs)} processes, {where}:")
    for job in jobs:
        print(f"    {job.command_by_hand()}")
    steps = sum(round((1 - status.done) * status.experiment.config.steps_before(status.experiment.config.num_epochs)) for status in new)
    models = sum(models_bytes(status.experiment.config) for status in statuses)
    checkpoints = sum(checkpoints_bytes(status.experiment.config) for status in statuses)
    print(f"Steps to go: {steps:,}. Disk for all {len(statuses)} runs: models {bytes_text(models)}, checkpoints {bytes_text(checkpoints)}.")
    waiting = [status._replace(state=QUEUED, seconds_left=None) for status in new]
    seconds = seconds_left(waiting, measured_seconds(experiments), 1)
    if seconds is None:
        print("Time: not known, since no run of these experiments is finished here.")
    else:
        at_once = f", {duration_text(seconds / (len(places) * runs_per_job))} here" if places and runs_per_job == 1 else ""
        print(f"Time: {duration_text(seconds)} one after the other{at_once}, as measured in finished runs.")
    return 0


def bytes_text(number: int) -> str:
    """A size as people say it: "944 MB", "70.8 GB"."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(run_script(main))
