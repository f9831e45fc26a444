"""Many runs by one command, on this machine or on Slurm.

    python run_sweep.py --configs cfg/*.json --indices 0-14 --analyse
    python run_sweep.py --configs cfg/*.json --indices 0-14 --status

The same command starts a sweep and goes on with it: with what is neither finished nor at work nor queued. docs/sweeps.md tells all.
"""

import argparse
import collections
import itertools
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from incremental_cifar.command_line import OneLineArgumentParser, parse_indices, run_script, warn
from incremental_cifar.config import FIELDS, MOST_RUNS_PER_GPU, REPOSITORY, UserError, differing_keys, grid_points, load_config, make_config
from incremental_cifar.run_files import Runs, how_it_stands
from incremental_cifar.sweep_local import LocalSweep, find_places
from incremental_cifar.sweep_slurm import parse_options, queued_runs, submit

GONE = {
    "--then": "it is --analyse now, and the figures follow",
    "--cluster": "it is --slurm now, with KEY=VALUE behind it or nothing",
    "--runs-per-job": "it is --runs-per-gpu now",
    "--signal-before": "slurm_job.sh says when a job stops",
    "--cores-per-run": "it is OMP_NUM_THREADS in the environment now",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    experiments = plan(parsed.configs, parsed.overrides, parsed.grids, parsed.indices)
    if parsed.pack is not None:  # a task of an array on Slurm
        experiments = [pack for runs in experiments for pack in runs.packs(parsed.runs_per_gpu) if pack.indices[0] == parsed.pack]
        if not experiments:
            raise UserError(f"--pack: got {parsed.pack}; no pack of --indices begins with it")
    queue: dict[tuple[Path, int], str] = {}
    try:
        if parsed.pack is None and (parsed.slurm is not None or shutil.which("squeue")):
            queue = queued_runs(experiments)
    except UserError as error:
        if parsed.slurm is not None and not parsed.status:
            raise
        warn(f"{error}; what is queued on Slurm cannot be seen")
    if parsed.status:
        return show_status(experiments, queue)
    for runs in experiments:
        runs.check()
    places = find_places(experiments, parsed.gpus) if parsed.slurm is None else {}
    packs = make_packs(experiments, queue, parsed)
    if parsed.dry_run:
        print(*[f"Would start {len(packs)} processes on {', '.join(places) or 'Slurm'}:", *packs], sep="\n")
        return 0
    for data_path in {pack.config.data_path for pack in packs if pack.config.dataset == "cifar100"}:
        if not all(Path(data_path, "cifar-100-python", name).is_file() for name in ("train", "test", "meta")):
            from incremental_cifar.cifar100 import fetch_cifar100  # here only: it takes seconds to import

            fetch_cifar100(Path(data_path))
    for runs in experiments:
        runs.tidy(parsed.keep)
    if parsed.slurm is None:
        if queue:
            warn(f"{len(queue)} runs are queued on Slurm, and left to it; --status shows them")
        return sweep_here(experiments, packs, places, parsed)
    options = ["--analyse"] * parsed.analyse + ["--keep", parsed.keep, "--retries", str(parsed.retries)]
    submit(packs, queue, parsed.slurm, [*options, "--runs-per-gpu", str(parsed.runs_per_gpu)])
    print(f"Submitted {sum(len(pack.indices) for pack in packs)} runs; {len(queue)} were queued already.")
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked. Raises UserError."""
    parser = OneLineArgumentParser(allow_abbrev=False, description="Many configs and indices, here or on Slurm; docs/sweeps.md tells more.")
    parser.add_argument("--configs", nargs="+", required=True, metavar="PATH", help="JSON files of settings, as in cfg/*.json")
    parser.add_argument("--indices", required=True, metavar="N", help="the indices of every config: 3, or 0-14, or 0,2,5-7")
    several = {"action": "extend", "metavar": "KEY=VALUE"}
    parser.add_argument("--set", **several, nargs="+", default=[], dest="overrides", help="settings that override those of all configs")
    parser.add_argument("--track", metavar="tensorboard|wandb|trackio", type="track={}".format, action="append", dest="overrides")
    parser.add_argument("--grid", **several, nargs="+", default=[], dest="grids", help="KEY=V1,V2: every combination is an experiment")
    parser.add_argument("--analyse", action="store_true", help="analyse every run when it is finished, and draw the figures at the end")
    parser.add_argument("--keep", choices=("all", "models", "results"), default="all", help="what stays of finished runs (default all)")
    parser.add_argument("--retries", type=int, default=1, metavar="N", help="how often a run that fails is tried again (default 1)")
    parser.add_argument("--runs-per-gpu", type=int, default=1, metavar="N", help="indices of a config that share a process (default 1)")
    parser.add_argument("--gpus", metavar="N", help="those of this machine to use, as in 0,1 (default: all; without one, the cores)")
    parser.add_argument("--slurm", **several, nargs="*", help="submit to Slurm, with these options of sbatch")
    parser.add_argument("--pack", type=int, metavar="N", help="only the runs that share a process with index N, the first of them")
    parser.add_argument("--status", action="store_true", help="show how every run stands, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="show what would be started, and do nothing")
    if gone := [option for word in arguments if (option := word.partition("=")[0]) in GONE]:
        raise UserError(f"{gone[0]}: there is no such option any more; {GONE[gone[0]]}")
    parsed = parser.parse_args(arguments)
    parsed.indices = parse_indices(parsed.indices, "--indices")
    if parsed.retries < 0 or not 1 <= parsed.runs_per_gpu <= MOST_RUNS_PER_GPU:
        raise UserError(f"--retries must be 0 or more, and --runs-per-gpu from 1 to {MOST_RUNS_PER_GPU}")
    if parsed.keep == "results" and not parsed.analyse:
        raise UserError("--keep results: models are deleted once they are analysed; add --analyse")
    if parsed.slurm is not None and parsed.gpus is not None:
        raise UserError("--gpus: these are this machine's; on Slurm, it is --slurm gres=gpu:1")
    parsed.slurm = None if parsed.slurm is None else parse_options(parsed.slurm)
    return parsed


def plan(configs: Sequence[str], overrides: Sequence[str], grids: Sequence[str], indices: Sequence[int]) -> list[Runs]:
    """Every config at every point of the grid, whose values are part of the experiment's name. Raises UserError."""
    experiments: list[Runs] = []
    for source, point in itertools.product(configs, grid_points(grids)):
        config = load_config(source, overrides)
        if point:
            try:
                config = load_config(source, [*overrides, *point])
            except UserError as error:
                raise UserError(str(error).replace("--set: ", "--grid: ", 1)) from None
            for key in (value.partition("=")[0] for value in point):
                if (switch := FIELDS[key].metadata.get("of")) and not getattr(config, switch):
                    raise UserError(f"--grid: {key} has no effect in {source}, where {switch} is off; leave that config out")
            config = make_config(config.to_dict() | {"experiment_name": "_".join([config.experiment_name, *point])}, source="--grid")
        experiments.append(Runs(source, config, tuple(indices)))
    for one, other in itertools.combinations(experiments, 2):
        if one.folder == other.folder:
            raise UserError(f"{one.source}, {other.source}: the experiment_name {one.folder.name} is there twice; give one of them another")
        if one.source == other.source and not differing_keys(one.config, other.config):
            raise UserError(f"--grid: {one.folder.name} and {other.folder.name} are the same settings; keep one of them")
    return experiments


def make_packs(experiments: Sequence[Runs], queue: Mapping[tuple[Path, int], str], parsed: argparse.Namespace) -> list[Runs]:
    """What is to be started, the lowest indices of all configs first: neither done nor queued nor, on Slurm, at work."""
    packs = []
    for runs in experiments:
        todo = runs.unfinished() | (runs.unanalysed() if parsed.analyse else set())
        todo -= {index for folder, index in queue if folder == runs.folder}
        free = [index for index in sorted(todo) if parsed.slurm is None or runs._replace(indices=(index,)).holder() is None]
        packs += enumerate(runs._replace(indices=tuple(free)).packs(parsed.runs_per_gpu))
    return [pack for _, pack in sorted(packs, key=lambda pair: pair[0])]


def sweep_here(experiments: Sequence[Runs], packs: Sequence[Runs], places: Mapping[str, dict[str, str]], parsed: argparse.Namespace) -> int:
    """Train, analyse and draw on this machine; return the exit status."""
    before = [pack.progress() for pack in packs]
    sweep = LocalSweep(packs, places, parsed.retries, parsed.analyse, parsed.keep)
    sweep.run()
    problems = sweep.problems
    if sweep.stop_signal is not None:
        if sweep.stop_signal != signal.SIGUSR1 or [pack.progress() for pack in packs] != before:
            return 128 + sweep.stop_signal
        problems.append("no checkpoint and no analysis within the time limit; ask for more, or set checkpoint_save_frequency")
    elif parsed.analyse and parsed.pack is None:
        for results_dir in sorted({str(runs.folder.parent) for runs in experiments}):
            draw = [sys.executable, str(REPOSITORY / "plots" / "draw_all.py"), "--results_dir", results_dir]
            if subprocess.run(draw).returncode:
                problems.append(f"not all figures of {results_dir} can be drawn")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    return 1 if problems or any(runs.unfinished() or (parsed.analyse and runs.unanalysed()) for runs in experiments) else 0


def show_status(experiments: Sequence[Runs], queue: Mapping[tuple[Path, int], str]) -> int:
    states: collections.Counter[str] = collections.Counter()
    width = max(len(runs.folder.name) for runs in experiments)
    for runs in experiments:
        for files in runs.files:
            state, note = how_it_stands(files, runs.config, queue.get((runs.folder, files.index), ""))
            states[state] += 1
            print(f"{runs.folder.name:{width}} {files.index:5}  {state:13} {note}".rstrip())
    print(", ".join(f"{number} {state}" for state, number in states.items()))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
