"""A sweep on Slurm: an array of jobs, each for some indices of one experiment, that queue themselves again until these are finished.

    queue = queued_runs(experiments)                      # what Slurm knows of them
    submit(statuses, queue, ["partition=gpu", "time=4:00:00", "gres=gpu:1"], ...)

submitit writes the batch script and starts `run_indices` in each job, which starts the experiment as its child and sees to it that

- before the time limit (Slurm's SIGUSR1), or when the job is pre-empted (SIGTERM), the runs stop with a checkpoint;
- a job that ran into its limit is queued again (`scontrol requeue`), as Slurm itself does with one that was pre-empted;
- a run that fails is tried again, at once and in the same job; if that gets it no further, it is given up.

If that process is killed too, the batch script queues the job again. Slurm sends its signals to all processes of a job, some of them twice,
and the experiment takes a second one as "at once": so its child does not hear them, and gets a single SIGINT instead.

Which runs a job has is known before it is submitted: the sweep writes the job's name and the task's number into the runs' records, and
compares them with `squeue`. So whatever happens in between, nothing that is queued is submitted again; and a job leaves alone what a later
submission has given to another.
"""

import contextlib
import ctypes
import datetime
import functools
import io
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from incremental_cifar.command_line import STOP_SIGNALS, warn
from incremental_cifar.config import REPOSITORY, UserError, load_config
from incremental_cifar.safe_files import lock_holder, read_note, write_file, write_note
from incremental_cifar.sweep_after import KEEP, STEPS, do_steps, is_analysed, tidy
from incremental_cifar.sweep_local import Display, Place, Workers, is_asked_to_stop, status_text
from incremental_cifar.sweep_plan import Experiment, Job, freeze_config, make_jobs
from incremental_cifar.sweep_status import (
    FINISHED,
    QUEUED,
    RUNNING,
    Run,
    Status,
    counts_text,
    new_record,
    open_log,
    read_record,
    read_statuses,
    record_file,
    update_record,
    write_heading,
)

DEFAULT_MINUTES = 240  # a job's time limit, if none is given; what is not finished by then goes on in the next one
# What of sbatch's options the sweep decides itself, since it would not work with another choice.
OURS = {
    "array",
    "clusters",
    "dependency",
    "error",
    "job-name",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "quiet",
    "requeue",
    "signal",
    "test-only",
    "wait",
    "wrap",
}
NOT_HEARD = set(STOP_SIGNALS) - {signal.SIGINT}  # by the experiment in a job
SECONDS_FOR_REQUEUE = 15  # before a job's limit: then it is queued again even if its epoch has not ended
LEAST_SIGNAL_BEFORE = 2 * SECONDS_FOR_REQUEUE
SECONDS_BETWEEN_REQUESTS = 5  # to a Slurm that does not answer
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent ends
SECONDS_FOR_LOCKS = 120  # until a file server drops the locks of a node that has died
KILLED = (128 + signal.SIGKILL, 128 + signal.SIGUSR1)  # exit statuses of a job's process that was killed, or warned while it started


# --- What Slurm knows ------------------------------------------------------------------------------------------------------------


class QueuedJob(NamedTuple):
    """A job, or a task of an array, that has not ended."""

    id: str  # "12" or "12_3"
    state: str  # as squeue says it, in small letters: "pending", "running", "completing", ...
    reason: str

    @property
    def array_id(self) -> str:
        return self.id.partition("_")[0]

    @property
    def text(self) -> str:
        return f"{self.id}, {self.state}" + (f" ({self.reason})" if self.reason else "")

    @property
    def has_started(self) -> bool:
        return self.state in ("running", "configuring")

    @property
    def task(self) -> int:
        return int(self.id.partition("_")[2] or 0)


def slurm(*command: str) -> str:
    """The output of one of Slurm's commands. Raises UserError if it is not there or fails."""
    if shutil.which(command[0]) is None:
        raise UserError(f"--cluster slurm: there is no {command[0]} on this machine; it needs Slurm's commands, as on a login node")
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer from Slurm within two minutes; try again later") from None
    if completed.returncode != 0:
        raise UserError(f"{command[0]}: {_last_error(completed.stderr)}")
    return completed.stdout


def _last_error(text: str) -> str:
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line.strip()) for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines[-2:])) or "failed without a message"


def squeue(names: Collection[str]) -> dict[str, list[QueuedJob]]:
    """The jobs of these names that have not ended, whoever submitted them. Raises UserError."""
    jobs: dict[str, list[QueuedJob]] = {}
    if not names:
        return jobs
    for line in slurm("squeue", f"--name={','.join(sorted(names))}", "--array", "--noheader", "--format=%i|%T|%r|%e|%j").splitlines():
        number, state, reason, end, name = line.strip().split("|", 4)
        # Both a job that was cancelled and one that is queued again are "completing" for a while; the end of the second is to come.
        if state == "COMPLETING" and reason != "TimeLimit" and _is_over(end):
            continue
        jobs.setdefault(name, []).append(QueuedJob(number, state.lower(), "" if reason == "None" else reason))
    return jobs


def _is_over(time_text: str) -> bool:
    try:
        return datetime.datetime.fromisoformat(time_text) <= datetime.datetime.now()
    except ValueError:  # "N/A", or as SLURM_TIME_FORMAT has it
        return False


def check_slurm() -> None:
    """Raise UserError unless jobs can be submitted from here."""
    slurm("sbatch", "--version")
    try:
        import submitit  # noqa: F401
    except ImportError:
        requirements = REPOSITORY / "requirements-slurm.txt"
        raise UserError(f"--cluster slurm: submitit is not installed: {sys.executable} -m pip install -r {requirements}") from None


def queued_runs(experiments: Sequence[Experiment]) -> dict[Run, QueuedJob]:
    """The jobs of those runs that Slurm has queued or started. Raises UserError if Slurm does not answer.

    On a machine without Slurm, what was submitted elsewhere cannot be known; a warning says so.
    """
    submitted: dict[Run, tuple[str, int]] = {}
    for experiment in experiments:
        finished = experiment.files(0).finished_indices()
        for index in experiment.indices:
            job = read_record(experiment, index).get("slurm")
            if isinstance(job, dict) and index not in finished:
                submitted[experiment, index] = str(job.get("name")), int(job.get("task", 0))
    if not submitted:
        return {}
    if shutil.which("squeue") is None:
        warn(f"{len(submitted)} unfinished runs were submitted to Slurm; without squeue, it cannot be seen here whether they are queued")
        return {}
    found = {(name, job.task): job for name, jobs in squeue({name for name, _ in submitted.values()}).items() for job in jobs}
    return {run: found[key] for run, key in submitted.items() if key in found}


def requeue(job_id: str) -> None:
    """Have Slurm queue this job again, and end it if it runs. Raises UserError if Slurm refuses, or does not answer."""
    slurm("scontrol", "requeue", job_id)


def own_job_id() -> str:
    """The job this process runs in, as squeue names it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


# --- Submission ------------------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What every job of a sweep asks for."""

    minutes: int  # time limit
    options: dict[str, str | bool]  # of sbatch, without their dashes
    jobs_at_once: int | None

    @property
    def has_gpu(self) -> bool:
        """Whether it asks for GPUs: --gpus, --gpus-per-..., --gres=gpu:..., --tres-per-...=gres/gpu:..."""
        parts = [f"{key}={part}" for key, value in self.options.items() for part in str(value).split(",")]
        return any(re.match(r"(gpus|(gres|tres-[\w-]+)=(gres[/:])?gpu\b)(?!.*[:=]0+$)", part) for part in parts)


def parse_request(texts: Sequence[str], signal_before: int) -> Request:
    """Read `--slurm KEY=VALUE ...`; signal_before: seconds. Raises UserError."""
    options: dict[str, str | bool] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().removeprefix("--").replace("_", "-")
        if not equals or not re.fullmatch(r"[a-z][a-z-]*", key) or not value or "\n" in value:
            raise UserError(f'--slurm: expected KEY=VALUE with the name of an option of sbatch, got "{text}"')
        if key in OURS:
            raise UserError(f"--slurm: {key} is what the sweep decides itself; leave it out")
        if key in options:
            raise UserError(f'--slurm: key "{key}" appears twice; keep one of them')
        options[key] = True if value == "true" else value
    minutes = _minutes(str(options.pop("time", DEFAULT_MINUTES)))
    if signal_before < LEAST_SIGNAL_BEFORE:
        raise UserError(f"--signal-before: got {signal_before}; it must be {LEAST_SIGNAL_BEFORE} or more, time to end an epoch in")
    if signal_before >= 60 * minutes:
        raise UserError(f"--signal-before: {signal_before} s do not fit into the jobs' time limit of {60 * minutes} s")
    jobs_at_once = options.pop("array-parallelism", None)
    if jobs_at_once is not None and not re.fullmatch(r"[1-9]\d{0,5}", str(jobs_at_once)):
        raise UserError(f'--slurm: array_parallelism is "{jobs_at_once}"; it must be the number of jobs that may run at once')
    return Request(minutes, options, None if jobs_at_once is None else int(jobs_at_once))


def _minutes(text: str) -> int:
    """A time limit as sbatch takes it: "90", "90:00", "1:30:00", "1-12", "1-12:30" or "1-12:30:00". Raises UserError."""
    match = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2}))?", text)
    if match is None:
        raise UserError(f'--slurm: time is "{text}"; it must be minutes, or as in 4:00:00 or 1-12:00:00')
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        seconds = 86400 * days + 3600 * first + 60 * (second or 0) + (third or 0)
    elif third is not None:
        seconds = 3600 * first + 60 * (second or 0) + third
    else:
        seconds = 60 * first + (second or 0)
    if seconds == 0:
        raise UserError(f'--slurm: time is "{text}"; it must be more than nothing')
    return math.ceil(seconds / 60)


def submit(
    statuses: Sequence[Status],
    queue: Mapping[Run, QueuedJob],
    request: Request,
    runs_per_job: int,
    retries: int,
    signal_before: int,
    steps: Sequence[str],
    keep: str,
) -> int:
    """Submit what is neither finished nor running nor queued, and a job for the steps that follow; return the exit status.

    Raises UserError if Slurm does not take it; then all is as it was.
    """
    new = [(status.experiment, status.index) for status in statuses if status.state not in (FINISHED, RUNNING, QUEUED)]
    job_ids = {job.array_id for job in queue.values()}
    if new:
        jobs = make_jobs(new, runs_per_job)
        name = f"sweep-{secrets.token_hex(4)}"
        before = {run: record_file(*run).read_bytes() if record_file(*run).exists() else None for run in new}
        calls = []
        try:
            for task, job in enumerate(jobs):
                entry = {"name": name, "task": task}
                arguments = str(job.experiment.config_file), job.indices, retries, signal_before, keep, entry, request.has_gpu
                calls.append((run_indices, arguments))
                for index in job.indices:
                    new_record(job.experiment, index, slurm=entry, log=read_record(job.experiment, index).get("log"))
            job_id = _sbatch(name, calls, _folder(jobs[0].experiment), request, signal_before, retries)
        except MayBeQueued:
            raise
        except Exception:  # not Ctrl-C: then the jobs may be queued, and are known by these records; if they are not, no harm is done
            for run, content in before.items():
                with contextlib.suppress(OSError, UserError):
                    record_file(*run).unlink(missing_ok=True) if content is None else write_file(record_file(*run), content)
            raise
        job_ids.add(job_id)
        print(f"Submitted {len(new)} runs in {len(jobs)} jobs: {job_id} ({name}).")
    text = counts_text([status for status in statuses if (status.experiment, status.index) not in new])
    print(f"{'Besides: ' if new else 'Nothing to submit: '}{text}.")
    if steps:
        _submit_after(statuses, sorted(job_ids), request, signal_before, retries, steps, keep, is_new=bool(new))
    return 0


class MayBeQueued(UserError):
    """A submission went wrong, and Slurm did not say whether anything of it is queued."""


def _folder(experiment: Experiment) -> Path:
    """Where batch scripts and what jobs print are kept."""
    folder = Path(experiment.config.results_dir, ".sweep")
    if "%" in str(folder):
        raise UserError(f"{folder}: for Slurm, results_dir must be without %")
    return folder


def _sbatch(
    name: str,
    calls: Sequence[tuple[Any, tuple]],
    folder: Path,
    request: Request,
    signal_before: int,
    retries: int,
    dependency: str | None = None,
) -> str:
    """Submit an array of function calls, a task each; return its number.

    Raises UserError if Slurm or submitit refuses, and then nothing is queued; MayBeQueued if that is not known. What watches over a task's
    runs may be killed once more than `retries`, so that it comes back to say that they failed.
    """
    import submitit

    folder = folder / name
    options: dict[str, str | bool] = {**request.options, "requeue": True, "signal": f"USR1@{signal_before}"}
    if dependency is not None:
        options["dependency"] = dependency
    threads = options.get("cpus-per-task")
    parameters = {
        "job_name": name,
        "time": request.minutes,
        "array_parallelism": request.jobs_at_once or len(calls),
        "setup": [f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}${{PYTHONPATH:+:$PYTHONPATH}}"],
        "teardown": [
            "status=$?",
            "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
            "job=${job:-$SLURM_JOB_ID}",
            f"kills={shlex.quote(str(folder))}/kills-$job",
            f"case $status in {'|'.join(map(str, KILLED))})",
            f'    if echo "$status" >> "$kills" && [ "$(wc -l < "$kills")" -le {retries + 1} ]; then',
            f'        for _ in {{1..60}}; do scontrol requeue "$job" && break; sleep {SECONDS_BETWEEN_REQUESTS}; done',
            "    fi",
            "esac",
            "exit $status",
        ],
        # srun does not take this over from sbatch.
        "srun_args": [f"--cpus-per-task={threads}"] if threads else None,
        "additional_parameters": options,
    }
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints), _outside_of_jobs():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)  # who could write into it could have a job do anything
            executor = submitit.SlurmExecutor(folder=folder)
            executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
            with executor.batch():
                submitted = [executor.submit(function, *arguments) for function, arguments in calls]
    except Exception as error:
        is_expected = isinstance(error, (OSError, RuntimeError, submitit.core.utils.UncompletedJobError))
        message = f"sbatch: {_last_error(str(error)) if is_expected else repr(error)}"
        try:
            slurm("scancel", f"--name={name}")  # Slurm may have taken it before things went wrong
        except UserError as second:
            raise MayBeQueued(f"{message}; and {second}; later, --status tells whether {name} is queued") from None
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(message) from None
    return submitted[0].job_id.partition("_")[0]


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Without the variables of a job that this process may be in, which sbatch would take as wishes, or pass on to the new jobs."""
    variables = {key: value for key, value in os.environ.items() if key.startswith("SLURM_") and key != "SLURM_CONF"}
    for key in variables:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(variables)


# --- In a job --------------------------------------------------------------------------------------------------------------------


class JobSignals:
    """What Slurm has told this process."""

    def __init__(self) -> None:
        self.warned_at: float | None = None  # SIGUSR1: the time limit is near; time.monotonic()
        self.is_ending = False  # SIGTERM: the job is being ended

    def __bool__(self) -> bool:
        return self.is_ending or self.warned_at is not None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM:
            self.is_ending = True
        elif self.warned_at is None:
            self.warned_at = time.monotonic()


class JobRuns:
    """Which runs are left to a job, and how often each has failed in a row.

    The records have that too, for when the job is queued again; but a full disk takes no records, and must not make it try for ever.
    """

    def __init__(self, experiment: Experiment, retries: int, entry: Mapping[str, Any]):
        self.experiment, self.retries, self.entry = experiment, retries, dict(entry)
        records = {index: read_record(experiment, index) for index in experiment.indices}
        self.failures = {index: int(record.get("failures", 0)) for index, record in records.items()}
        self.epochs = {index: int(record.get("epoch_at_failure", 0)) for index, record in records.items()}
        self.given_up = {index: str(record.get("reason")) for index, record in records.items() if record.get("has_failed")}

    def unfinished(self) -> list[int]:
        """Indices that are neither finished nor given up."""
        return [index for index in self._left() if index not in self.given_up]

    def problems(self) -> list[str]:
        """The runs that were given up, a text each."""
        return [f"index {index}: {self.given_up[index]}" for index in self._left() if index in self.given_up]

    def _left(self) -> list[int]:
        """Indices that are not finished, and that no later submission gave to another job."""
        finished = self.experiment.files(0).finished_indices()
        unfinished = [index for index in self.experiment.indices if index not in finished]
        return [index for index in unfinished if read_record(self.experiment, index).get("slurm", self.entry) == self.entry]

    def count_failure(self, index: int, reason: str) -> None:
        epoch = self._epoch(index)
        self.failures[index] = 1 if epoch > self.epochs[index] else self.failures[index] + 1
        self.epochs[index] = epoch
        if has_failed := self.failures[index] > self.retries:
            self.given_up[index] = reason
        changes = {"failures": self.failures[index], "epoch_at_failure": epoch, "has_failed": has_failed, "reason": reason}
        _note(self.experiment, index, is_running=False, **changes)

    def count_limit(self, index: int) -> None:
        """Note how far this run was when its job ran into the time limit; it is a failure if it was as far the last time."""
        epoch = self._epoch(index)
        if read_record(self.experiment, index).get("epoch_at_limit") == epoch:
            self.count_failure(index, "no checkpoint within a job's time limit")
        if not _note(self.experiment, index, epoch_at_limit=epoch, failures=self.failures[index]):
            self.given_up[index] = "its record cannot be written"

    def _epoch(self, index: int) -> int:
        """The epoch of the newest checkpoint."""
        checkpoints = self.experiment.files(index).checkpoints()
        return checkpoints[-1][0] if checkpoints else 0


def run_indices(
    config_file: str,
    indices: Sequence[int],
    retries: int,
    signal_before: int,
    keep: str,
    entry: Mapping[str, Any],
    has_gpu: bool = False,
) -> None:
    """What a job does: run these indices to the end, or until it has to end; then see to it that it is queued again.

    entry: the job's name and task, as in the records of its runs. has_gpu: whether the job asked for one. Raises RuntimeError if a run is
    given up, so that Slurm has the job as failed.
    """
    experiment = Experiment(config_file, (), load_config(config_file), tuple(indices))
    signals = JobSignals()
    with signals.heard():
        runs = JobRuns(experiment, retries, entry)
        for index in runs.unfinished():
            if read_record(experiment, index).get("is_running"):  # this job was here before, and was killed without a word
                runs.count_failure(index, "its job was killed")
        while (to_do := _runs_to_do(runs, signals)) and not signals:
            try:
                reason = status_text(_run_once(Job(experiment, tuple(to_do), has_gpu), signals, signal_before))
            except OSError as error:  # it cannot be started, or its log not be opened
                reason = str(error)
            for index in to_do:
                tidy(experiment, index, keep)
            for index in [] if signals else runs.unfinished():
                if index in to_do and lock_holder(experiment.files(index).lock_file) is None:
                    runs.count_failure(index, reason)
        if signals:
            _leave(runs, signals)
    if problems := runs.problems():
        raise RuntimeError(f"{experiment.name}, {'; '.join(problems)}")


def _runs_to_do(runs: JobRuns, signals: JobSignals) -> list[int]:
    """Unfinished indices that nobody else works on; waits a while for the locks of processes on nodes that have just died."""
    deadline = time.monotonic() + SECONDS_FOR_LOCKS
    while True:
        unfinished = runs.unfinished()
        free = [index for index in unfinished if lock_holder(runs.experiment.files(index).lock_file) is None]
        if free or not unfinished or signals or time.monotonic() > deadline:
            return free
        time.sleep(1)


def _note(experiment: Experiment, index: int, **changes: Any) -> bool:
    """Change a run's record; whether that was possible. It is no reason to end a run that it was not."""
    try:
        update_record(experiment, index, **changes)
    except UserError as error:
        warn(str(error))
        return False
    return True


def _run_once(job: Job, signals: JobSignals, signal_before: int) -> int:
    """Run a process to its end, which comes after its current epoch if there is a signal; return its exit status.

    Raises OSError if it cannot be started.
    """
    experiment = job.experiment
    threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}

    def note(**changes: Any) -> None:
        for index in job.indices:
            _note(experiment, index, **changes)

    note(is_running=True, log=os.path.relpath(job.log, experiment.folder), reason="")
    start = time.monotonic()
    with open_log(job.log) as log:
        with contextlib.suppress(OSError):
            write_heading(log, f"on {socket.gethostname()}, job {own_job_id()}: {shlex.join(job.command())}")
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        become_child = functools.partial(_become_child_of_a_job, os.getpid())
        process = subprocess.Popen(job.command(), **streams, env=environment, preexec_fn=become_child)
        is_asked = False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=0.5)
                break
            if signals and not is_asked and not is_asked_to_stop(process.pid):  # until it has started, it may not hear
                note(is_running=False, reason="stopped by Slurm")  # now: there may be no time later
                process.send_signal(signal.SIGINT)
                is_asked = True
            if signals.warned_at is not None and time.monotonic() > signals.warned_at + signal_before - SECONDS_FOR_REQUEUE:
                process.kill()  # it goes on from the checkpoint before
        with contextlib.suppress(OSError):
            write_heading(log, f"ended after {time.monotonic() - start:.0f} s: {status_text(status)}")
    note(is_running=False)
    return status


def _become_child_of_a_job(parent: int) -> None:
    """In the experiment's process, before it starts: do not hear Slurm's signals, and end with the process that watches over it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NOT_HEARD)
    with contextlib.suppress(OSError, AttributeError):  # Linux only, as Slurm is
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os.kill(os.getpid(), signal.SIGKILL)


def _leave(runs: JobRuns, signals: JobSignals) -> None:
    """Have the job queued again, if something is left to do, and end the process."""
    if signals.warned_at is not None:
        for index in runs.unfinished():
            runs.count_limit(index)
    if runs.unfinished():
        _queue_again(lambda: signals.is_ending)


def _queue_again(is_ending: Callable[[], bool]) -> NoReturn:
    """Have this job queued again, unless Slurm does so itself or somebody cancelled it, and end the process.

    is_ending: whether there was a SIGTERM. A Slurm that is too busy to answer is asked again until it kills the job.
    """
    while True:
        try:
            if is_ending():
                state, _, reason = slurm("squeue", "--noheader", f"--jobs={own_job_id()}", "--format=%T|%r").strip().partition("|")
                # RUNNING: Slurm pre-empts it, but gives it some time first. COMPLETING: it is over already.
                if state != "RUNNING" and reason != "TimeLimit":
                    raise SystemExit(128 + signal.SIGTERM)
            requeue(own_job_id())
        except UserError as error:
            warn(f"{error}; asking again")
            time.sleep(SECONDS_BETWEEN_REQUESTS)
        else:
            raise SystemExit(0)


# --- The steps that follow -------------------------------------------------------------------------------------------------------


def after_file(results_dir: str) -> Path:
    """What is known of the job for the steps that follow the runs of a folder of results."""
    return Path(results_dir, ".sweep", "after.json")


def _submit_after(
    statuses: Sequence[Status],
    job_ids: Sequence[str],
    request: Request,
    signal_before: int,
    retries: int,
    steps: Sequence[str],
    keep: str,
    is_new: bool,
) -> None:
    """Submit the job that follows these jobs. It takes the place of one that waits already, with the runs of that one too."""
    experiments = list(dict.fromkeys(status.experiment for status in statuses))
    for experiment in experiments:
        freeze_config(experiment)  # if all are finished, nothing has done so yet
    path = after_file(experiments[0].config.results_dir)
    runs = {str(experiment.config_file): set(experiment.indices) for experiment in experiments}
    old = read_note(path)
    old_name, old_runs = str(old.get("name")), {config_file: set(indices) for config_file, indices in dict(old.get("runs", {})).items()}
    old_jobs = squeue([old_name]).get(old_name, [])
    if old_jobs and not is_new and _covers(old_runs, runs) and set(steps) <= set(old["steps"]) and keep == old["keep"]:
        print(f"{', '.join(steps)}: queued already, as job {old_jobs[0].id}.")
        return
    if old_jobs and not _covers(runs, old_runs):
        steps = [step for step in STEPS if step in steps or step in old["steps"]]
        keep = min(keep, old["keep"], key=KEEP.index)  # what deletes less
        runs = {config_file: runs.get(config_file, set()) | old_runs.get(config_file, set()) for config_file in [*runs, *old_runs]}
        experiments = [Experiment(file, (), load_config(file), tuple(sorted(indices))) for file, indices in runs.items()]
        job_ids = sorted({*job_ids, *(job.array_id for job in queued_runs(experiments).values())})
        print(f"In place of job {old_jobs[0].id}, and with the runs that it follows (--keep {keep}):")
    name = f"sweep-{secrets.token_hex(4)}"
    content = {"name": name, "steps": list(steps), "keep": keep, "runs": {file: sorted(indices) for file, indices in runs.items()}}
    call = run_steps, (list(content["runs"].items()), tuple(steps), keep, name, request.has_gpu)
    dependency = f"afterany:{':'.join(job_ids)}" if job_ids else None
    job_id = _sbatch(name, [call], _folder(experiments[0]), request, signal_before, retries, dependency)
    write_file(path, json.dumps(content).encode())
    if old_jobs:
        slurm("scancel", f"--name={old_name}")
    print(f"{', '.join(steps)}: job {job_id}{', after all others' if job_ids else ''}.")


def _covers(runs: Mapping[str, set[int]], others: Mapping[str, set[int]]) -> bool:
    """Whether all of these other runs, indices by config file, are among the runs."""
    return all(indices <= runs.get(config_file, set()) for config_file, indices in others.items())


def run_steps(runs: Sequence[tuple[str, Sequence[int]]], steps: Sequence[str], keep: str, name: str, has_gpu: bool = False) -> None:
    """What the job after all others does, with what is finished by then. Raises RuntimeError if something is missing or fails.

    runs: config file and indices of each experiment. name: the job's. has_gpu: whether it asked for one.
    """
    experiments = [Experiment(config_file, (), load_config(config_file), tuple(indices)) for config_file, indices in runs]
    path = after_file(experiments[0].config.results_dir)
    threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    here = Place("here", {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}, has_gpu)
    statuses = read_statuses(experiments, {})
    unfinished = [status for status in statuses if status.state != FINISHED]
    problems = [f"without {len(unfinished)} of {len(statuses)} runs, which are not finished"] if unfinished else []
    with Workers([here], Display(sys.stdout)) as workers:
        problems += do_steps(steps, experiments, keep, workers)
        if signal.SIGUSR1 in workers.signals:  # the time limit is near; what is analysed is not analysed again
            analysed = sum(is_analysed(experiment, index) for experiment in experiments for index in experiment.indices)
            if read_note(path).get("analysed_at_limit") == analysed:
                problems.append("nothing more done within a job's time limit")
            else:
                write_file(path, json.dumps({**read_note(path), "analysed_at_limit": analysed}).encode())
                _queue_again(lambda: signal.SIGTERM in workers.signals)
        elif workers.stop_signal is not None:
            _queue_again(lambda: True)
    note = read_note(path)
    if note.get("name") == name:  # else another job has taken its place
        write_note(path, {**note, "result": "; ".join(problems) or "done"})
    if problems:
        raise RuntimeError("; ".join(problems))


def after_text(experiments: Sequence[Experiment]) -> list[str]:
    """How the steps that follow stand, a line for each folder of results that has some."""
    lines = []
    for results_dir in dict.fromkeys(experiment.config.results_dir for experiment in experiments):
        note = read_note(after_file(results_dir))
        if note.get("steps"):
            name = str(note.get("name"))
            jobs = squeue([name]).get(name, []) if shutil.which("squeue") else []
            state = f"job {jobs[0].text}" if jobs else str(note.get("result", "ended without a word; see .sweep/"))
            lines.append(f"{', '.join(map(str, note['steps']))}: {state}")
    return lines
