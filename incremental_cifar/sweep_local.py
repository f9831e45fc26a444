"""A sweep on this machine: a queue of runs over its GPUs or its cores, each run in a process of its own.

    places = find_places(experiments, gpus=None, cores_per_run=1)
    with Workers(places, display) as workers:
        all_finished = run_all(runs, workers, runs_per_job=1, retries=1, ...)

Every run's process has its own session, so that Ctrl-C reaches the sweep alone; it passes the signal on, once, and waits for the
checkpoints. If the sweep itself is killed, the runs go on. The next sweep finds them by their locks, waits for them, and starts none of
them twice.
"""

import collections
import contextlib
import datetime
import itertools
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from incremental_cifar.command_line import SECONDS_OF_ONE_SIGNAL, STOP_SIGNALS, warn
from incremental_cifar.config import UserError
from incremental_cifar.safe_files import lock_holder, process_identity
from incremental_cifar.sweep_plan import Experiment, Job, make_jobs
from incremental_cifar.sweep_status import (
    FAILED,
    FINISHED,
    QUEUED,
    RUNNING,
    Run,
    Status,
    counts_text,
    duration_text,
    failure_text,
    log_lines,
    new_record,
    open_log,
    read_record,
    read_status,
    seconds_left,
    started_process,
    status_table,
    sweep_lock_file,
    update_record,
    working_process,
    write_heading,
)

SECONDS_BETWEEN_LOOKS = 1.0  # at the progress of what runs
SECONDS_BETWEEN_LINES = 60.0  # that say how far everything is, where the output is not a terminal
LINES_OF_A_FAILED_LOG = 5
HIDES_GPUS = ("", "-1", "none", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES, on purpose
# What it means that a signal ended a process, where the signal's name does not say so.
MEANINGS = {
    signal.SIGABRT: "a library gave up",
    signal.SIGBUS: "memory that it used was gone; perhaps a disk or /dev/shm is full",
    signal.SIGFPE: "a library divided by zero",
    signal.SIGILL: "an instruction that this processor does not have",
    signal.SIGKILL: "perhaps the system was out of memory",
    signal.SIGSEGV: "a crash in a library",
    signal.SIGXCPU: "a limit on its time",
    signal.SIGXFSZ: "a limit on the size of files",
}


# --- Where runs can be -----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A GPU, or some cores, that one process has to itself."""

    name: str
    environment: dict[str, str]  # what its process has beyond the sweep's own
    has_gpu: bool = False


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them, by number or UUID; only those in it, if it is set."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",")]
        gpus = list(itertools.takewhile(re.compile(r"\d+$|(GPU|MIG)-\S+$").match, names))  # CUDA too passes over what follows another
        if (other := "".join(names[len(gpus) : len(gpus) + 1])) not in HIDES_GPUS:
            warn(f'CUDA_VISIBLE_DEVICES: "{other}" is no number or UUID of a GPU; it hides itself and the GPUs after it')
        return list(dict.fromkeys(gpus))
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        lines = subprocess.run(query, **streams, timeout=60).stdout.split("\n")
    except FileNotFoundError:
        return []
    except (OSError, subprocess.TimeoutExpired) as error:
        lines = [str(error)]
    # Among the numbers it warns of what is damaged, and says so in its exit status too.
    gpus = [line.strip() for line in lines if re.fullmatch(r"\s*\d+\s*", line)]
    if not gpus:
        warn(f"nvidia-smi names no GPU: {' '.join(' '.join(lines).split())}")
    return gpus


def find_places(experiments: Sequence[Experiment], gpus: str | None, cores_per_run: int | None) -> list[Place]:
    """The GPUs chosen, or all there are; cores, if there is none or the configs say `device` "cpu". Raises UserError.

    gpus: names with commas, as `--gpus` has them. cores_per_run: threads of a run on cores; None: 1.
    """
    devices = {experiment.config.device: experiment for experiment in experiments}
    for device, experiment in devices.items():
        if device.startswith("cuda:"):
            raise UserError(f'{experiment.source}: device is "{device}"; a sweep chooses the GPUs itself: set device=auto, and --gpus')
    if "cpu" in devices and len(devices) > 1:
        raise UserError(f'{devices["cpu"].source}: device is "cpu", but not in all configs; a sweep uses GPUs or cores: --set device=cpu')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    present = [] if "cpu" in devices else visible_gpus()
    if gpus is not None:
        chosen = [name.strip() for name in gpus.split(",")]
        if "cpu" in devices:
            raise UserError(f'--gpus: {devices["cpu"].source} has device "cpu"; leave out one of them')
        if missing := [name for name in chosen if name not in present]:
            there = f"there are {', '.join(present)}" if present else "there is none here"
            raise UserError(f'--gpus: no GPU "{missing[0]}"; {there}')
        if len(set(chosen)) < len(chosen):
            raise UserError(f"--gpus: {gpus} names a GPU twice; --runs-per-gpu puts several runs on one")
        present = chosen
    if present:
        if cores_per_run is not None:
            raise UserError("--cores-per-run: these runs use GPUs; for cores: --set device=cpu")
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // len(present)))}
        order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # that of nvidia-smi
        return [Place(f"GPU {name}", {"CUDA_VISIBLE_DEVICES": name, **order, **threads}, has_gpu=True) for name in present]
    if "cuda" in devices:
        raise UserError(f'{devices["cuda"].source}: device is "cuda", but there is no GPU here; set device=cpu')
    wanted = 1 if cores_per_run is None else cores_per_run
    if wanted > cores:
        raise UserError(f"--cores-per-run: got {wanted}; there are {cores} cores here")
    threads = {"OMP_NUM_THREADS": str(wanted), "MKL_NUM_THREADS": str(wanted)}
    return [Place(f"slot {number + 1}", threads) for number in range(cores // wanted)]


# --- What the terminal shows -----------------------------------------------------------------------------------------------------


class Display:
    """Lines for events, and on a terminal a table below them that is redrawn in place; elsewhere a summary now and then."""

    def __init__(self, stream: IO[str]):
        self.stream = stream
        self.is_terminal = stream.isatty()
        self.lines_drawn = 0
        self.last_summary = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._write(self._erased() + f"{datetime.datetime.now():%H:%M:%S} {text}\n")

    def show(self, make_lines: Callable[[int, int], list[str]], summary: Callable[[], str]) -> None:
        """Draw a table anew: `make_lines` gets the terminal's height and width. Elsewhere print the summary, if it is time."""
        if self.is_terminal:
            width, height = shutil.get_terminal_size()
            lines = make_lines(height - 1, width)
            text = self._erased() + "".join(line + "\n" for line in lines)
            self.lines_drawn = len(lines)
            self._write(text)
        elif time.monotonic() - self.last_summary >= SECONDS_BETWEEN_LINES:
            self.last_summary = time.monotonic()
            self.say(summary())

    def end(self) -> None:
        """Leave the table where it is; what is printed from here on comes below it."""
        self.lines_drawn = 0

    def _erased(self) -> str:
        erased = f"\x1b[{self.lines_drawn}F\x1b[J" if self.lines_drawn else ""
        self.lines_drawn = 0
        return erased

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more; the runs go on
            self.stream.write(text)
            self.stream.flush()


# --- Processes -------------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Something to do in a process of its own."""

    name: str
    command: list[str]
    log: Path


class Ended(NamedTuple):
    """How a task's process ended."""

    task: Task
    place: Place
    status: int  # as `subprocess` has it: negative if a signal ended it
    seconds: float


def status_text(status: int) -> str:
    """An exit status in words: negative if a signal ended the process, or as shells report that, 128 more than the signal."""
    try:
        number = signal.Signals(-status if status < 0 else status - 128)
    except ValueError:
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    if status > 0 and number in STOP_SIGNALS:  # our scripts', after a checkpoint
        return f"stopped by {number.name}"
    return f"killed by {number.name}" + (f" ({MEANINGS[number]})" if number in MEANINGS else "")


def is_asked_to_stop(process: int) -> bool:
    """Whether a run's process has had a signal that asks it to stop: from then on it does not catch SIGINT any more (Linux only)."""
    try:
        match = re.search(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return match is not None and not int(match[1], 16) >> (signal.SIGINT - 1) & 1


class Workers:
    """Places and the processes in them. As a context: the first of STOP_SIGNALS asks all processes to stop, the second kills.

    A lost connection (SIGHUP) is not for them: it ends the sweep, and they go on.
    Whoever sends a signal to all processes at once, as Slurm and systemd do, has asked the runs too; those are not asked twice, since that
    would end them without a checkpoint.
    """

    def __init__(self, places: Sequence[Place], display: Display):
        self.places = list(places)
        self.display = display
        self.signals: list[int] = []  # those that came
        self.adopted: dict[int, str] = {}  # processes of an earlier sweep, and the names of their places
        self._processes: dict[subprocess.Popen, Place] = {}
        self._asked: set[int] = set()
        self._first_signal_at = 0.0
        self._events: queue.SimpleQueue[tuple[subprocess.Popen, Ended] | None] = queue.SimpleQueue()  # may be filled by a signal handler
        self._previous: dict[int, object] = {}

    @property
    def stop_signal(self) -> int | None:
        """The signal after which nothing new is to be started; None if there was none."""
        return self.signals[0] if self.signals else None

    def __enter__(self) -> "Workers":
        self._previous = {number: signal.signal(number, self._note_signal) for number in STOP_SIGNALS if number != signal.SIGHUP}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def free_places(self) -> list[Place]:
        used = [place.name for place in self._processes.values()] + list(self.adopted.values())
        return [place for place in self.places if place.name not in used]

    @property
    def num_running(self) -> int:
        return len(self._processes)

    def start(self, task: Task, place: Place) -> int:
        """Start a task's process; return its number. Raises OSError if that is impossible."""
        with open_log(task.log) as log:
            write_heading(log, f"on {socket.gethostname()}, {place.name}: {shlex.join(task.command)}")
            process = subprocess.Popen(
                task.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | place.environment,
                start_new_session=True,
            )
        self._processes[process] = place
        threading.Thread(target=self._wait_for, args=(process, task, place, time.monotonic()), daemon=True).start()
        return process.pid

    def _wait_for(self, process: subprocess.Popen, task: Task, place: Place, start: float) -> None:
        status = process.wait()
        seconds = time.monotonic() - start
        with contextlib.suppress(OSError), open_log(task.log) as log:
            write_heading(log, f"ended after {seconds:.0f} s: {status_text(status)}")
        self._events.put((process, Ended(task, place, status, seconds)))

    def wait(self, seconds: float) -> Ended | None:
        """Wait until a process ends, a signal comes or the time is over; return the process that ended, if one did."""
        self._pass_signals_on()
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if event is None:  # a signal
            time.sleep(0.2)  # perhaps all processes get it: see above
            self._pass_signals_on()
            return None
        process, ended = event
        del self._processes[process]
        return ended

    def _note_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.signals and number != signal.SIGINT and now - self._first_signal_at < SECONDS_OF_ONE_SIGNAL:
            return  # the same request, sent twice
        self._first_signal_at = self._first_signal_at or now
        self.signals.append(number)
        self._events.put(None)

    def _pass_signals_on(self) -> None:
        if not self.signals:
            return
        for process in [process.pid for process in self._processes if process.returncode is None] + list(self.adopted):
            if len(self.signals) > 1:
                _send(process, signal.SIGKILL)
            elif process not in self._asked and not is_asked_to_stop(process):  # not yet: it may be starting, and is looked at again
                self._asked.add(process)
                _send(process, self.signals[0])


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


# --- All runs --------------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a sweep's runs."""

    statuses: list[Status]
    failed: dict[Run, str]  # those given up, and why


def run_all(
    statuses: Sequence[Status],
    workers: Workers,
    runs_per_job: int,
    retries: int,
    measured: Mapping[Path, float],
    on_finish: Callable[[Experiment, int], None],
) -> Outcome:
    """Run all that is neither finished nor running, as often as `retries` says, and wait for what others run.

    statuses: every run of the sweep as it was found. measured: seconds of finished runs, for the time left. on_finish: called with each
    run that has been finished. Ends early if `workers` are stopped.
    """
    runs = _Runs(statuses, workers, runs_per_job, retries, measured, on_finish)
    runs.loop()
    return Outcome(list(runs.statuses.values()), runs.failed)


class _Runs:
    """The queue, and what is known of every run."""

    def __init__(
        self,
        statuses: Sequence[Status],
        workers: Workers,
        runs_per_job: int,
        retries: int,
        measured: Mapping[Path, float],
        on_finish: Callable[[Experiment, int], None],
    ):
        self.statuses: dict[Run, Status] = {(status.experiment, status.index): status for status in statuses}
        self.workers, self.display = workers, workers.display
        self.runs_per_job, self.retries, self.measured, self.on_finish = runs_per_job, retries, measured, on_finish
        self.failures: collections.Counter[Run] = collections.Counter()  # in a row
        self.failed_at: dict[Run, int | None] = {}  # the epoch of the newest checkpoint, at the last failure
        self.failed: dict[Run, str] = {}
        self.me = next((lock_holder(sweep_lock_file(experiment)) for experiment, _ in self.statuses), None)  # as the sweep's lock has it
        self.jobs: dict[Path, Job] = {}  # those in a process, by their logs
        self.place_of: dict[Run, str] = {}
        self.elsewhere: list[Run] = []  # what other processes than ours work on
        waiting = []
        for run, status in self.statuses.items():
            if status.state == RUNNING:
                self._watch(run)
            elif status.state != FINISHED:
                waiting.append(run)
        self.waiting: collections.deque[Job] = collections.deque()
        self._enqueue(waiting)

    def loop(self) -> None:
        """Until all is done, or a signal has come and everything has ended."""
        while True:
            stopping = self.workers.stop_signal is not None
            if not stopping:
                for place in self.workers.free_places():
                    if self.waiting:
                        self._start(self.waiting.popleft(), place)
            ours = self.workers.num_running > 0 or bool(self.workers.adopted)
            if not ours and (stopping or not (self.waiting or self.elsewhere)):
                break
            self._show()
            ended = self.workers.wait(SECONDS_BETWEEN_LOOKS)
            if self.workers.stop_signal is not None and not stopping:
                name = signal.Signals(self.workers.stop_signal).name
                self.display.say(f"{name}: stopping, after the epochs that are running; the same signal again kills")
            if ended is not None:
                self._end(ended)
            self._look_elsewhere()
        if self.workers.stop_signal is not None:
            for job in self.waiting:
                for index in job.indices:
                    self._look((job.experiment, index))
        self._show()
        self.display.end()

    # --- what changes the queue ---

    def _enqueue(self, runs: Sequence[Run]) -> None:
        for job in make_jobs(runs, self.runs_per_job):
            self.waiting.append(job)
        for experiment, index in runs:
            failures = self.failures[experiment, index]
            log = read_record(experiment, index).get("log")
            self._note((experiment, index), new_record, is_waiting=self.me, failures=failures, log=log)
            self._set((experiment, index), self.statuses[experiment, index]._replace(state=QUEUED, seconds_left=None, note=""))

    def _start(self, job: Job, place: Place) -> None:
        job = job._replace(has_gpu=place.has_gpu)
        task = Task(job.name, job.command(), job.log)
        try:
            process = self.workers.start(task, place)
        except OSError as error:
            for index in job.indices:
                self._fail((job.experiment, index), f"cannot be started ({error})")
            return
        self.jobs[task.log] = job
        log = os.path.relpath(job.log, job.experiment.folder)
        for index in job.indices:
            self._note(
                (job.experiment, index),
                is_waiting=False,
                log=log,
                host=socket.gethostname(),
                process=process,
                identity=process_identity(process),
                place=place.name,
                reason="",
            )
            status = self.statuses[job.experiment, index]
            self.place_of[job.experiment, index] = place.name
            self._set((job.experiment, index), status._replace(state=RUNNING, note=f"{place.name}, starting"))
        self.display.say(f"started   {job.name} ({place.name})")

    def _end(self, ended: Ended) -> None:
        job = self.jobs.pop(ended.task.log)
        finished = job.experiment.files(0).finished_indices()
        unfinished = [index for index in job.indices if index not in finished]
        for index in set(job.indices) - set(unfinished):
            self._finish((job.experiment, index), ended)
        was_asked = self.workers.stop_signal is not None or -ended.status in STOP_SIGNALS or ended.status - 128 in STOP_SIGNALS
        again = []
        for index in unfinished:
            run = job.experiment, index
            if lock_holder(job.experiment.files(index).lock_file) is not None:
                self._watch(run)  # somebody else was faster
            elif was_asked:
                self._stop(run, ended)
            else:
                checkpoints = job.experiment.files(index).checkpoints()
                epoch = checkpoints[-1][0] if checkpoints else None
                if self.failed_at.get(run) != epoch:  # it has come further since
                    self.failures[run] = 0
                self.failed_at[run] = epoch
                self.failures[run] += 1
                reason = status_text(ended.status) if ended.status else "ended without an error, but not finished"
                if self.failures[run] <= self.retries:
                    self._note(run, failures=self.failures[run], reason=reason)
                    self.display.say(f"failed    {run[0].name} index {index}: {failure_text(reason, job.log, index)}; trying again")
                    again.append(run)
                else:
                    self._fail(run, reason)
        self._enqueue(again)

    def _finish(self, run: Run, ended: Ended | None) -> None:
        experiment, index = run
        self._note(run, new_record, log=read_record(experiment, index).get("log"))
        self.on_finish(experiment, index)
        self._look(run, is_finished=True)
        seconds = f" after {duration_text(ended.seconds)}" if ended else ""
        self.display.say(f"finished  {experiment.name} index {index}{seconds}")

    def _stop(self, run: Run, ended: Ended) -> None:
        self._note(run, reason=status_text(ended.status) if len(self.workers.signals) < 2 else "killed, as was asked for")
        self._look(run)
        epoch = self.statuses[run].epoch
        where = f"after epoch {epoch}" if epoch else "before its first checkpoint"
        self.display.say(f"stopped   {run[0].name} index {run[1]} {where}")

    def _fail(self, run: Run, reason: str) -> None:
        experiment, index = run
        self.failed[run] = reason
        self._note(run, is_waiting=False, has_failed=True, failures=self.failures[run], reason=reason)
        self._look(run)
        self.display.say(f"gave up   {experiment.name} index {index}: {self.statuses[run].note}")

    def _note(self, run: Run, record: Callable[..., None] = update_record, **content: object) -> None:
        """Note something about a run for `--status`; on a full disk the sweep goes on without, since it knows it itself."""
        with contextlib.suppress(UserError):
            record(*run, **content)

    # --- what others work on ---

    def _watch(self, run: Run) -> None:
        """Wait for a run of another process; one that an earlier sweep of this machine left is stopped with ours."""
        experiment, index = run
        self.elsewhere.append(run)
        record = read_record(experiment, index)
        holder = working_process(experiment, index) or ""
        process = started_process(record)
        if process and holder.startswith(f"host {record.get('host')}, process {process},"):
            self.workers.adopted[process] = str(record.get("place"))
        self.display.say(f"runs      {experiment.name} index {index} already: {holder}")

    def _look_elsewhere(self) -> None:
        again = []
        for run in list(self.elsewhere):
            experiment, index = run
            if working_process(experiment, index) is not None:
                continue
            self.elsewhere.remove(run)
            if index in experiment.files(index).finished_indices():
                self._finish(run, None)
            elif self.workers.stop_signal is None:
                self._look(run)
                note = self.statuses[run].note
                self.display.say(f"ended     {experiment.name} index {index} unfinished{': ' * bool(note)}{note}; trying again")
                again.append(run)
            else:
                self._look(run)
        if again:
            self._enqueue(again)
        held = {started_process(read_record(*run)) for run in self.elsewhere}
        for process in list(self.workers.adopted):
            if process not in held:
                del self.workers.adopted[process]

    # --- what is shown ---

    def _set(self, run: Run, status: Status) -> None:
        self.statuses[run] = status

    def _look(self, run: Run, is_finished: bool = False) -> None:
        self._set(run, read_status(*run, is_finished))

    def _show(self) -> None:
        running = [(job.experiment, index) for job in self.jobs.values() for index in job.indices] + self.elsewhere
        for run in running:
            status = read_status(*run, is_finished=False)
            if status.state == RUNNING:  # else it is starting, or ending
                self._set(run, status if run in self.elsewhere else status._replace(note=self.place_of[run]))
        self.display.show(self._table, self._summary)

    def _summary(self) -> str:
        statuses = list(self.statuses.values())
        text = counts_text(statuses)
        if self.workers.stop_signal is None and any(status.state in (RUNNING, QUEUED) for status in statuses):
            left = seconds_left(statuses, self.measured, len(self.workers.places) * self.runs_per_job)
            text += f"; {duration_text(left)} left" if left is not None else ""
        return text

    def _table(self, height: int, width: int) -> list[str]:
        return [*status_table(list(self.statuses.values()), height - 1, width), self._summary()]


def report_failures(failed: Mapping[Run, str]) -> Iterator[str]:
    """For every run that was given up: its log and the last lines of it."""
    for (experiment, index), reason in failed.items():
        log = experiment.folder / str(read_record(experiment, index).get("log", ""))
        lines = log_lines(log, LINES_OF_A_FAILED_LOG)
        yield f"{FAILED}: {experiment.name} index {index}, {reason}; {f'the end of {log}:' if lines else f'{log} says no more'}"
        yield from (f"    {line}" for line in lines)


def run_tasks(tasks: Sequence[Task], workers: Workers) -> list[Ended]:
    """Other work than runs, over the same places; what has not begun when a signal comes is left out."""
    waiting, ended = collections.deque(tasks), []
    while True:
        for place in workers.free_places():
            if waiting and workers.stop_signal is None:
                task = waiting.popleft()
                try:
                    workers.start(task, place)
                except OSError as error:
                    workers.display.say(f"cannot start {task.name} ({error})")
                    ended.append(Ended(task, place, 1, 0.0))
        if not workers.num_running:
            return ended
        workers.display.show(lambda height, width: [f"{len(ended)} of {len(tasks)} done"], lambda: f"{len(ended)} of {len(tasks)} done")
        if (one := workers.wait(SECONDS_BETWEEN_LOOKS)) is not None:
            ended.append(one)
            result = "finished" if one.status == 0 else f"failed ({status_text(one.status)})"
            workers.display.say(f"{result:9} {one.task.name} after {duration_text(one.seconds)}")
