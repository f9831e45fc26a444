"""How every run of a sweep stands, read off the disk: finished, running, queued, failed, stopped or never started; and tables of it.

    statuses = read_statuses(plan([...], [], [], [0, 1]), queue={})
    print("\n".join(status_table(statuses)))

The truth is what the runs themselves leave: the list of finished indices, their locks, their checkpoints, and how far they say they are.
A record per run, `sweep/index-K.json`, adds what only the sweep knows: that it waits for its turn, or failed, and where its log is.
"""

import collections
import contextlib
import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from incremental_cifar.config import Config
from incremental_cifar.safe_files import lock_holder, make_folder, process_identity, read_note, share, write_file
from incremental_cifar.sweep_plan import Experiment

FINISHED, RUNNING, QUEUED, FAILED, STOPPED, NEVER = "finished", "running", "queued", "failed", "stopped", "never started"
STATES = (FINISHED, RUNNING, QUEUED, FAILED, STOPPED, NEVER)

Run = tuple[Experiment, int]  # an experiment and one of its indices
RUNTIMES = ("epoch_runtime", "test_evaluation_runtime", "validation_evaluation_runtime")
RUNS_MEASURED = 3  # of an experiment, for the time that others will take
HEADING = "=== "  # begins the lines that a sweep writes into a log
# A state of a run's progress bar. What another library writes begins right behind it.
BAR = re.compile(r"[^\r]*\| [\d:]+, [\d:?]+ left(?:, epoch \d+, test accuracy \d\.\d{3})?")
# What an exception, the interpreter or the C++ library says went wrong, before lines that say where.
RAISED = re.compile(r"^Traceback .*\n(?: .*\n)*(\S.*)|^(Fatal Python error: .*)|^  what\(\): (.*)", re.MULTILINE)
# What a run says while nothing is wrong.
ORDINARY = re.compile(r"(index \d+: )?(Resuming index \d|Epoch \d+/\d|\tstep \d|Index \d+ is finished)")


class Status(NamedTuple):
    """How one run stands."""

    experiment: Experiment
    index: int
    state: str  # one of STATES
    epoch: int | None = None  # epochs done; of a run that is not running, those that its newest checkpoint holds
    test_accuracy: float | None = None  # a fraction
    seconds_left: float | None = None
    note: str = ""  # where it runs, what it waits for, why it failed

    @property
    def done(self) -> float:
        """Share of the run's steps that are done, 0 to 1."""
        config = self.experiment.config
        if self.state == FINISHED:
            return 1.0
        return config.steps_before(self.epoch) / config.steps_before(config.num_epochs) if self.epoch else 0.0


# --- Records ---------------------------------------------------------------------------------------------------------------------


def record_file(experiment: Experiment, index: int) -> Path:
    return experiment.sweep_folder / f"index-{index}.json"


def read_record(experiment: Experiment, index: int) -> dict[str, Any]:
    """What a sweep noted about a run: "failures" (in a row), "has_failed" (it was given up), "reason", "log", "is_waiting", "slurm"."""
    return read_note(record_file(experiment, index))


def update_record(experiment: Experiment, index: int, **changes: Any) -> None:
    """Change what is noted about a run. Raises UserError if it cannot be written."""
    new_record(experiment, index, **read_record(experiment, index) | changes)


def new_record(experiment: Experiment, index: int, **content: Any) -> None:
    """Forget what is left of this run's earlier sweeps, and note this. Raises UserError if it cannot be written."""
    write_file(record_file(experiment, index), (json.dumps(content) + "\n").encode())


def working_process(experiment: Experiment, index: int) -> str | None:
    """Who works on a run: the holder of its lock, or the process that a sweep on this machine has just started for it; else None."""
    holder = lock_holder(experiment.files(index).lock_file)
    if holder is not None:
        return holder
    record = read_record(experiment, index)
    process = started_process(record)
    return f"host {record.get('host')}, process {process}, starting" if process else None


def started_process(record: Mapping[str, Any]) -> int | None:
    """The number of the process that a sweep started for a run, if it is there: that one, and no other with its number (Linux)."""
    process, identity = record.get("process"), record.get("identity")
    return process if identity and identity == process_identity(process) else None


# --- The state of a run ----------------------------------------------------------------------------------------------------------


def sweep_lock_file(experiment: Experiment) -> Path:
    return experiment.folder / ".sweep.lock"


class Queued(Protocol):
    """A job that Slurm has queued or started."""

    @property
    def text(self) -> str: ...

    @property
    def has_started(self) -> bool: ...


def read_statuses(experiments: Sequence[Experiment], queue: Mapping[Run, Queued]) -> list[Status]:
    """How all runs stand. queue: the jobs of those that Slurm has queued or started. Raises UserError for a damaged list."""
    statuses = []
    for experiment in experiments:
        finished = set(experiment.files(0).finished_indices())
        sweep = lock_holder(sweep_lock_file(experiment))
        statuses += [read_status(experiment, index, index in finished, queue, sweep) for index in experiment.indices]
    return statuses


def read_status(
    experiment: Experiment, index: int, is_finished: bool, queue: Mapping[Run, Queued] | None = None, sweep: str | None = None
) -> Status:
    """How one run stands. queue: as in `read_statuses`. sweep: who holds the sweep's lock of this experiment."""
    files, config = experiment.files(index), experiment.config
    progress = files.load_progress()
    if is_finished:
        return Status(experiment, index, FINISHED, config.num_epochs, _number(progress.get("test_accuracy")), 0.0)
    checkpoints = files.checkpoints()
    epoch = checkpoints[-1][0] if checkpoints else None
    holder = working_process(experiment, index)
    if holder is None and index in files.finished_indices():  # finished since the list was read
        return Status(experiment, index, FINISHED, config.num_epochs, _number(progress.get("test_accuracy")), 0.0)
    if holder is not None:
        host, process = _host_and_process(holder)
        where = f"{host}, process {process}" if process else holder
        if (progress.get("host"), str(progress.get("process"))) != (host, process):
            return Status(experiment, index, RUNNING, epoch, note=f"{where}, starting")
        where += f", job {progress['slurm_job']}" if progress.get("slurm_job") else ""
        accuracy, seconds_left = _number(progress.get("test_accuracy")), _number(progress.get("seconds_left"))
        return Status(experiment, index, RUNNING, _whole(progress.get("epoch"), epoch), accuracy, seconds_left, where)
    accuracy = _number(progress.get("test_accuracy")) if progress.get("epoch") == epoch else None
    record = read_record(experiment, index)
    log = experiment.folder / str(record.get("log", ""))
    if record.get("has_failed"):
        return Status(experiment, index, FAILED, epoch, accuracy, note=failure_text(str(record.get("reason", "failed")), log, index))
    if queue and (job := queue.get((experiment, index))):
        state, note = (RUNNING, f"job {job.text}, starting") if job.has_started else (QUEUED, f"job {job.text}")
        return Status(experiment, index, state, epoch, accuracy, note=note)
    if sweep is not None and record.get("is_waiting") == sweep:
        return Status(experiment, index, QUEUED, epoch, accuracy, note=f"by {sweep.rpartition(', since ')[0] or sweep}")
    state = STOPPED if epoch is not None or record.get("log") else NEVER
    reason = "its job was killed" if record.get("is_running") else str(record.get("reason", ""))
    return Status(experiment, index, state, epoch, accuracy, note=reason or failure_text("", log, index))


def _host_and_process(holder: str) -> tuple[str, str]:
    match = re.match(r"host (.+), process (\d+)", holder)
    return (match[1], match[2]) if match else ("", "")


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _whole(value: object, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) else otherwise


# --- Logs ------------------------------------------------------------------------------------------------------------------------


def open_log(log: Path) -> IO[bytes]:
    """A log to append to, and for a process to write into."""
    make_folder(log.parent)
    file = open(log, "a+b", buffering=0)  # noqa: SIM115 (it is handed on)
    share(file.fileno(), log.parent)
    return file


def write_heading(file: IO[bytes], text: str) -> None:
    """Write a line of the sweep's own into an open log."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    line_end = "" if file.read(1) in (b"", b"\n") else "\n"  # a progress bar leaves its line open
    file.write(f"{line_end}{HEADING}{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}\n".encode())


def log_lines(log: Path, count: int) -> list[str]:
    """The last lines of a log's last attempt, oldest first, progress bars left out. Empty if there is no log."""
    try:
        with open(log, "rb") as file:
            start = max(0, file.seek(0, 2) - 65536)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    if start:
        text = re.sub(r"\A[^\r\n]*", "", text)  # the rest of a line, or of a state of the bar
    lines: list[str] = []
    for line in text.split("\n"):
        if line.startswith(HEADING):
            lines = lines if " ended " in line else []
        else:
            shown = [part.rstrip() for part in BAR.sub("\r", line.replace("\x1b[A", "\r")).split("\r") if part.strip()]
            lines += shown[-1:]
    return lines[-count:]


def failure_text(reason: str, log: Path, index: int | None = None) -> str:
    """Why a process failed, in one line: the reason and, of its log, the last error (of this index), or else the last line."""
    lines = log_lines(log, 1000)
    mine = [line for line in lines if line.startswith(f"error: index {index}: ")]
    others = [line for line in lines if not re.match(r"error: index \d+: ", line)]
    errors = [line for line in others if line.startswith("error: ")]
    others = [line for line in others if not ORDINARY.match(line)]
    raised = ["".join(groups).strip() for groups in RAISED.findall("\n".join(others))]
    return ": ".join(filter(None, [reason, *(mine or errors or raised or others)[-1:]]))


# --- Time ------------------------------------------------------------------------------------------------------------------------


def duration_text(seconds: float | None) -> str:
    """A duration as people say it: "45 s", "12 min", "3 h 05 min", "2 d 4 h"; a dash if it is not known."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def measured_seconds(experiments: Sequence[Experiment]) -> dict[Path, float]:
    """How long finished runs of each experiment took, seconds of training and evaluation, a mean; by its folder, where there is one."""
    seconds = {}
    for experiment in experiments:
        durations = []
        for index in experiment.files(0).finished_indices()[:RUNS_MEASURED]:
            with contextlib.suppress(Exception):  # an array that is damaged in one of many ways says nothing
                arrays = [np.load(experiment.files(index).array_file(metric), allow_pickle=False) for metric in RUNTIMES]
                durations.append(float(sum(array.sum(dtype=np.float64) for array in arrays)))
        if durations:
            seconds[experiment.folder] = sum(durations) / len(durations)
    return seconds


def seconds_of_full_runs(statuses: Sequence[Status], measured: Mapping[Path, float]) -> dict[Path, float]:
    """How long a run of each experiment takes from start to end, by its folder: measured, from those that run, or by steps from others.

    measured: seconds of finished runs. What nothing is known about is left out.
    """
    samples: dict[Path, list[float]] = collections.defaultdict(list)
    for status in statuses:
        if status.state == RUNNING and status.seconds_left is not None and status.done < 1:
            samples[status.experiment.folder].append(status.seconds_left / (1 - status.done))
    known = {folder: sum(values) / len(values) for folder, values in samples.items()} | dict(measured)
    configs: dict[Path, Config] = {status.experiment.folder: status.experiment.config for status in statuses}
    work = {folder: config.steps_before(config.num_epochs) * config.network_width**2 for folder, config in configs.items()}
    rates = [seconds / work[folder] for folder, seconds in known.items() if folder in work]
    others = {folder: amount * sum(rates) / len(rates) for folder, amount in work.items() if folder not in known} if rates else {}
    return known | others


def seconds_left(statuses: Sequence[Status], measured: Mapping[Path, float], num_slots: int) -> float | None:
    """How long the queued and running ones of these runs take, so many at a time; None if that is not known."""
    full = seconds_of_full_runs(statuses, measured)
    durations: dict[str, list[float]] = {RUNNING: [], QUEUED: []}
    for status in statuses:
        if status.state in durations:
            seconds = status.seconds_left
            if seconds is None:
                if status.experiment.folder not in full:
                    return None
                seconds = full[status.experiment.folder] * (1 - status.done)
            durations[status.state].append(seconds)
    slots = sorted(durations[RUNNING]) + [0.0] * (num_slots - len(durations[RUNNING]))
    for seconds in durations[QUEUED]:
        slots.sort()
        slots[0] += seconds
    return max(slots, default=0.0)


# --- Tables ----------------------------------------------------------------------------------------------------------------------


def counts_text(statuses: Sequence[Status]) -> str:
    """How many runs are in which state: "12 finished, 2 running, 1 failed"."""
    counts = collections.Counter(status.state for status in statuses)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) or "no runs"


def status_table(statuses: Sequence[Status], max_lines: int | None = None, width: int | None = None) -> list[str]:
    """A line per run under a heading. max_lines: leave out finished, then queued runs, and say so. width: cut longer lines off."""
    left_out: list[Status] = []
    if max_lines is not None:
        for states in ((FINISHED,), (QUEUED, NEVER), (STOPPED,), (FAILED,), (RUNNING,)):
            excess = len(statuses) + 1 + bool(left_out) - max_lines
            if excess > 0:
                droppable = [status for status in statuses if status.state in states]
                left_out += droppable[-(excess + (not left_out)) :]
                statuses = [status for status in statuses if status not in left_out]
    rows = [("experiment", "index", "state", "task", "epoch", "accuracy", "time left", "")]
    for status in statuses:
        config, epoch = status.experiment.config, status.epoch
        task = None if epoch is None else min(epoch // config.epochs_per_task + 1, config.num_tasks)
        rows.append(
            (
                status.experiment.name,
                str(status.index),
                status.state,
                "-" if task is None else f"{task}/{config.num_tasks}",
                "-" if epoch is None else f"{epoch}/{config.num_epochs}",
                "-" if status.test_accuracy is None else f"{100 * status.test_accuracy:.1f} %",
                "" if status.state == FINISHED else duration_text(status.seconds_left),
                status.note,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    is_text = (True, False, True, False, False, False, False)
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(row[:7], widths, is_text, strict=True)]
        lines.append("  ".join([*cells, row[7]]).rstrip())
    if left_out:
        lines.append(f"... and {counts_text(left_out)}")
    return [line if width is None or len(line) <= width else line[: width - 1] + "…" for line in lines]
