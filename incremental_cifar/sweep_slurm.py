"""A sweep on Slurm: an array of jobs per config, a task per pack with the number of the pack's first index; slurm_job.sh is what it runs.

submit(packs, queued_runs(experiments), parse_options(["partition=gpu", "time=4:00:00", "gres=gpu:1"]), ["--analyse"])
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from incremental_cifar.config import REPOSITORY, UserError, overrides_of
from incremental_cifar.run_files import Runs
from incremental_cifar.safe_files import make_folder

OURS = ("array", "comment", "dependency", "error", "job-name", "open-mode", "output", "parsable", "requeue", "wrap")  # of its options


def slurm(*command: str, text: str = "") -> str:
    """The output of one of Slurm's commands, given a text to read. Raises UserError if it is not there or fails."""
    if shutil.which(command[0]) is None:
        raise UserError(f"--slurm: there is no {command[0]} on this machine; it needs Slurm's commands, as on a login node")
    outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}  # of any job
    completed = subprocess.run(command, input=text, capture_output=True, text=True, env=outside)
    if completed.returncode != 0:
        raise UserError(f"{command[0]}: {' '.join(completed.stderr.split()) or 'failed without a message'}")
    return completed.stdout


def queued_runs(experiments: Sequence[Runs]) -> dict[tuple[Path, int], str]:
    """Job and state of every run that Slurm has not ended, by folder and index: its comment tells packs of several. Raises UserError."""
    folders, queue = {runs.job_name: runs.folder for runs in experiments}, {}
    for line in slurm("squeue", f"--name={','.join(folders)}", "--array", "--noheader", "--format=%j|%K|%i|%T|%r|%k").splitlines():
        name, task, job, state, reason, packs = line.split("|", 5)
        pack = next((pack for pack in (text.split(",") for text in packs.strip().split("/")) if pack[0] == task), [task])
        queue |= {(folders[name], int(index)): f"{job}, {state.lower()} ({reason})".replace(" (None)", "") for index in pack}
    return queue


def parse_options(texts: Sequence[str]) -> list[str]:
    """sbatch's options, of `--slurm KEY=VALUE ...`. Raises UserError."""
    options: dict[str, str] = {}
    for text in texts:
        if (match := re.fullmatch("(?:--)?([a-z][a-z_-]*)=(.+)", text)) is None:
            raise UserError(f'--slurm: expected KEY=VALUE with the name of an option of sbatch, got "{text}"')
        key, value = match[1].replace("_", "-"), match[2]
        if key in OURS or key in options:
            raise UserError(f"--slurm: {key} is {'there twice' if key in options else 'what the sweep decides itself'}; leave it out")
        options[key] = f"--{key}" if value == "true" else f"--{key}={value}"
    return list(options.values())


def sbatch(options: Sequence[str], output: Path, script: str, *command: str) -> str:
    """Submit a script, with its options in it, that runs one of ours; return the job's number. Raises UserError."""
    make_folder(output.parent)
    options = [*options, f"--output={str(output.parent).replace('%', '%%')}/{output.name}", "--open-mode=append", "--requeue"]
    text = "".join(["#!/bin/bash\n", *(f"#SBATCH {shlex.quote(option)}\n" for option in options), script])
    return slurm("sbatch", "--parsable", "/dev/stdin", sys.executable, *command, text=text).partition(";")[0].strip()


def submit(packs: Sequence[Runs], queue: Mapping[tuple[Path, int], str], options: Sequence[str], sweep_options: Sequence[str]) -> None:
    """Submit packs that are not queued, and a job for the figures that waits for all of their folder of results. Raises UserError."""
    has_gpu = any(re.match("--(gpus|(gres|tres-per-[a-z]+)=.*gpu)", option) for option in options)
    jobs = [(folder.parent, job.partition("_")[0]) for (folder, _), job in queue.items()]
    for folder in dict.fromkeys(pack.folder for pack in packs):
        mine = [pack.for_gpu(has_gpu) for pack in packs if pack.folder == folder]
        array, texts = ",".join(str(pack.indices[0]) for pack in mine), [pack.indices_text for pack in mine]
        sweep = [str(REPOSITORY / "run_sweep.py"), "--indices", ",".join(texts), "--pack", "%a", *sweep_options]
        ours = [f"--job-name={mine[0].job_name}", f"--array={array}", f"--comment={'/'.join(text for text in texts if ',' in text)}"]
        script, output = (REPOSITORY / "slurm_job.sh").read_text(), folder / "logs" / "slurm-%A_%a.out"
        job = sbatch([*options, *ours], output, script, *sweep, "--configs", mine[0].source, "--set", *overrides_of(mine[0].config))
        print(f"Submitted job {job}: {folder.name}, index {' and '.join(texts)}")
        jobs.append((folder.parent, job))
    for results_dir in {pack.folder.parent for pack in packs} if "--analyse" in sweep_options else ():
        after = "--dependency=afterany:" + ":".join(sorted({job for folder, job in jobs if folder == results_dir}))
        draw = str(REPOSITORY / "plots" / "draw_all.py"), "--results_dir", str(results_dir)
        job = sbatch([*options, "--job-name=figures", after], results_dir / "figures" / "slurm-%j.out", 'exec "$@"\n', *draw)
        print(f"Submitted job {job}: the figures in {results_dir}, after all others")
