"""A real Slurm of one node, this machine, for tests and for trying things out: no systemd, nothing in /etc, as root.

    python tests/slurm_cluster.py install           # Debian's packages slurm-wlm and munge, where they are missing
    eval "$(python tests/slurm_cluster.py start /tmp/slurm)"
    sbatch --wrap hostname; squeue
    python tests/slurm_cluster.py stop /tmp/slurm   # with all its jobs

In the folder lie slurm.conf, state/, logs/ and the link sockets (to a folder with a short path: paths of sockets must be short, and
munged's own user must reach them). Whoever has SLURM_CONF in the environment uses this cluster; several can run side by side.

As a module: `with cluster(folder) as environment`, or `start` and `stop`; `why_unavailable` gives the reason for which tests skip.

Two partitions, on the same CPUs: `normal`, the default, whose jobs are requeued to make room for those of `urgent`. Unlike most
clusters, it lets a requeued job start again after 6 seconds instead of 121, remembers finished jobs for a day (`squeue -t all`,
`scontrol show job`) instead of five minutes, has no accounting (`sacct` fails), and does not find those processes of an ended job
whose parent was killed. Time limits and warnings before them (`--signal`) are looked at every 30 seconds, as on every cluster.
"""

import argparse
import contextlib
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
DAEMONS = ("munged", "slurmctld", "slurmd")
START_SECONDS = 30
# In the environment of the daemons, by which `stop` knows them without files that could be out of date; its value is the folder.
MARK = "SLURM_CLUSTER_FOLDER"

_started: dict[Path, list[subprocess.Popen]] = {}  # the daemons that this process started, by folder

SLURM_CONF = """\
ClusterName=one-node
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits for as long as credentials are valid (120 s unless told otherwise), then starts again.
AuthInfo=socket={sockets}/munge/socket,cred_expire=5

StateSaveLocation={folder}/state
SlurmdSpoolDir={sockets}/spool
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/state/slurmd.pid
SlurmctldLogFile={folder}/logs/slurmctld.log
SlurmdLogFile={folder}/logs/slurmd.log
MailProg=/bin/true

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1

SchedulerType=sched/backfill
# Seconds; 60 and 30 unless told otherwise.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# From SIGTERM to SIGKILL, when a job has reached its time limit or is requeued.
KillWait={kill_wait}
OverTimeLimit=0
InactiveLimit=0
MinJobAge=86400
MessageTimeout=20
TCPTimeout=5
SlurmdTimeout=300

# As many CPUs and as much memory as stated here, whatever slurmd finds in a container.
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={megabytes} State=UNKNOWN
PartitionName=normal Nodes={host} Default=YES MaxTime=INFINITE DefaultTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=urgent Nodes={host} MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
"""


class SlurmError(RuntimeError):
    """Slurm cannot be installed or started; the message is one line."""


def _program(name: str) -> str | None:
    """The path of a program, also when the folders of administrators are missing from PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def why_unavailable() -> str | None:
    """Why Slurm cannot be started here, in one line; None if it can be tried."""
    if platform.system() != "Linux":
        return f"Slurm needs Linux, and this is {platform.system()}"
    if os.geteuid() != 0:
        return "a Slurm cluster can be started by root only"
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing): python tests/slurm_cluster.py install"
    try:
        subprocess.run(["true"], user="munge", group="munge", extra_groups=[], check=True)
    except KeyError:
        return "there is no user munge, which Debian's package munge makes"
    except (OSError, subprocess.SubprocessError) as error:
        return f"this root may not run programs as the user munge: {error}"
    return None


def install() -> None:
    """Install Debian's packages if a program is missing. Raises SlurmError if that is impossible."""
    if platform.system() != "Linux" or shutil.which("apt-get") is None:
        raise SlurmError("cannot install Slurm: this is not a Debian or a relative of it, with apt-get")
    if os.geteuid() != 0:
        raise SlurmError("cannot install Slurm: not root")
    if all(map(_program, PROGRAMS)):
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    options = ("-qq", "-o", "DPkg::Lock::Timeout=120")
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        result = subprocess.run(["apt-get", *options, *command], env=quiet, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode:
            raise SlurmError(f"cannot install Slurm: apt-get {command[0]}: {_last_line(result.stderr + result.stdout)}")
    if missing := why_unavailable():
        raise SlurmError(f"installed Slurm, but {missing}")


def start(folder: Path | str, cpus: int | None = None, kill_wait: int = 10) -> dict[str, str]:
    """Start a cluster whose files lie in a folder, which is made if it is missing; nothing happens if it is running already.

    cpus: how many the node offers, by default as many as the machine has. kill_wait: seconds from SIGTERM to SIGKILL.
    Returns what has to be added to the environment of programs that use it, once the node accepts jobs.
    A cluster started again in its folder goes on with its queue, as after a power cut: requeueable jobs that ran begin again.
    Raises SlurmError if it does not start, and leaves no process behind then.
    """
    if reason := why_unavailable():
        raise SlurmError(reason)
    folder = Path(folder).resolve()
    if re.search(r"[\s,#=]", str(folder)):
        raise SlurmError(f"slurm.conf cannot hold the path {folder}: it has a space, comma, # or = in it")
    if _accepts_jobs(folder):
        return environment(folder)
    stop(folder)
    attempts = 3
    while True:
        attempts -= 1
        try:
            _start_daemons(folder, cpus or os.cpu_count() or 1, kill_wait)
            return environment(folder)
        except BaseException as error:
            stop(folder)
            if isinstance(error, OSError):
                raise SlurmError(f"cannot start Slurm: {error}") from error
            # Another program may have taken a port between its choice and its use.
            if not (isinstance(error, SlurmError) and "in use" in str(error) and attempts):
                raise


def environment(folder: Path | str) -> dict[str, str]:
    """What makes Slurm's commands use the cluster of a folder."""
    return {"SLURM_CONF": str(Path(folder).resolve() / "slurm.conf")}


@contextlib.contextmanager
def cluster(folder: Path | str, cpus: int | None = None, kill_wait: int = 10) -> Iterator[dict[str, str]]:
    """A cluster for the length of a `with` block, which gets the environment to use it with; see `start`."""
    try:
        yield start(folder, cpus, kill_wait)
    finally:
        stop(folder)


def stop(folder: Path | str) -> None:
    """Kill all jobs and daemons of the cluster in a folder; nothing happens if there are none. The folder stays, with the queue.

    Raises SlurmError if a process survives SIGKILL for ten seconds.
    """
    folder = Path(folder).resolve()
    deadline = time.monotonic() + 10
    while remaining := processes_of(folder):
        if time.monotonic() > deadline:
            raise SlurmError(f"these processes of the cluster in {folder} cannot be killed: {remaining}")
        for process in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    for daemon in _started.pop(folder, []):
        daemon.wait()
    sockets = folder / "sockets"
    if sockets.is_symlink():
        shutil.rmtree(sockets.readlink(), ignore_errors=True)
        sockets.unlink()


def processes_of(folder: Path | str) -> list[int]:
    """The process ids of a cluster's daemons and of its jobs, with all that these have started; zombies excepted."""
    folder = Path(folder).resolve()
    mark = f"{MARK}={folder}".encode()
    conf = f"SLURM_CONF={environment(folder)['SLURM_CONF']}".encode()
    # Root in a container may not see the environment of another user's process, as munged is, but sees its arguments.
    sockets = folder / "sockets"
    munge_socket = f"--socket={sockets.readlink()}/munge/socket".encode() if sockets.is_symlink() else None
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        variables = arguments = []
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        # SLURMD_NODENAME is set in jobs only: those who merely use the cluster have SLURM_CONF too.
        is_in_a_job = conf in variables and any(variable.startswith(b"SLURMD_NODENAME=") for variable in variables)
        if mark in variables or is_in_a_job or munge_socket in arguments:
            found.append(int(entry.name))
    return found


def _start_daemons(folder: Path, cpus: int, kill_wait: int) -> None:
    """Write slurm.conf, start munged, slurmctld and slurmd, and wait until the node accepts jobs."""
    for name in ("state", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for old in (folder / "state").glob("*.pid"):
        old.unlink()
    sockets = _sockets_folder(folder)
    ports = _free_ports(2)
    megabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    host = socket.gethostname().split(".")[0]  # what Slurm calls this machine; never looked up, so it need not resolve
    text = SLURM_CONF.format(
        host=host,
        folder=folder,
        sockets=sockets,
        slurmctld_port=ports[0],
        slurmd_port=ports[1],
        cpus=cpus,
        megabytes=megabytes,
        kill_wait=kill_wait,
    )
    if _version() >= (23, 11):  # from there on, slurmd wants control groups unless told otherwise
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (folder / "slurm.conf").write_text(text)

    munge = sockets / "munge"
    munge_options = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    munged = ["munged", "--foreground", *(f"--{option}={munge / file}" for option, file in munge_options.items())]
    daemons = {
        "munged": _daemon(folder, munged, "munge"),
        "slurmctld": _daemon(folder, ["slurmctld", "-D"]),
        "slurmd": _daemon(folder, ["slurmd", "-D", "-N", host]),
    }
    deadline = time.monotonic() + START_SECONDS
    while not _accepts_jobs(folder):
        for name, process in daemons.items():
            if process.poll() is not None:
                raise SlurmError(f"{name} ended with status {process.returncode}: {_complaint(folder, name)}")
        if time.monotonic() > deadline:
            complaints = "; ".join(f"{name}: {_complaint(folder, name)}" for name in DAEMONS)
            raise SlurmError(f"the node accepts no jobs after {START_SECONDS} s; {complaints}")
        time.sleep(0.05)


def _daemon(folder: Path, command: list[str], user: str | None = None) -> subprocess.Popen:
    """Start a daemon in a session of its own; what it prints goes to logs/NAME.out."""
    name, *arguments = command
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
    variables |= environment(folder) | {MARK: str(folder)}
    with (folder / "logs" / f"{name}.out").open("wb") as output:
        process = subprocess.Popen(
            [_program(name) or name, *arguments],
            env=variables,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=[] if user else None,
        )
    _started.setdefault(folder, []).append(process)
    return process


def _sockets_folder(folder: Path) -> Path:
    """Make the folder of the sockets, with munge's key, and link to it from the cluster's folder."""
    sockets = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    sockets.chmod(0o755)
    (folder / "sockets").symlink_to(sockets)
    (sockets / "spool").mkdir()
    (sockets / "munge").mkdir()
    key = sockets / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    for path in (key.parent, key):
        shutil.chown(path, "munge", "munge")
    return sockets


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


def _accepts_jobs(folder: Path) -> bool:
    """Whether the cluster in a folder runs, and its node is up."""
    names = set()
    for process in processes_of(folder):
        with contextlib.suppress(OSError):  # it has ended
            names.add(Path(f"/proc/{process}/comm").read_text().strip())
    if not names >= set(DAEMONS):
        return False
    variables = {**os.environ, **environment(folder)}
    result = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=variables, capture_output=True, text=True)
    return bool({"idle", "mixed", "allocated", "completing"} & set(result.stdout.split()))


def _version() -> tuple[int, int]:
    """Slurm's version, for example (22, 5)."""
    output = subprocess.run([_program("slurmctld"), "-V"], capture_output=True, text=True).stdout  # slurm-wlm 22.05.8
    match = re.search(r"(\d+)\.(\d+)", output)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _complaint(folder: Path, name: str) -> str:
    """The last error in what a daemon has printed and logged; its last line if there is none."""
    files = (folder / "logs" / f"{name}.out", folder / "logs" / f"{name}.log")
    lines = "\n".join(file.read_text(errors="replace") for file in files if file.exists())
    errors = [line for line in lines.splitlines() if re.search("error|fatal|in use|denied|permitted", line, re.IGNORECASE)]
    return _last_line("\n".join(errors) or lines)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="install Debian's packages, if a program is missing")
    starting = commands.add_parser("start", help="start a cluster, and print the line that makes a shell use it")
    starting.add_argument("folder", nargs="?", help="where its files go; a new temporary folder unless given")
    starting.add_argument("--cpus", type=int, help="how many the node offers; as many as the machine has unless given")
    starting.add_argument("--kill-wait", type=int, default=10, help="seconds from SIGTERM to SIGKILL (10)")
    stopping = commands.add_parser("stop", help="kill the jobs and daemons of a cluster")
    stopping.add_argument("folder")
    arguments = parser.parse_args()
    try:
        if arguments.command == "install":
            install()
        elif arguments.command == "start":
            folder = arguments.folder or tempfile.mkdtemp(prefix="slurm-cluster-")
            variables = start(folder, arguments.cpus, arguments.kill_wait)
            print("export", *(f"{name}={shlex.quote(value)}" for name, value in variables.items()))
        else:
            stop(arguments.folder)
    except SlurmError as error:
        print(f"slurm_cluster: {error}", file=sys.stderr)
        return 1
    return 0


PATIENCE = 300  # seconds, of which a machine that is not busy needs a tenth


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


# In place of squeue: if FAKE_SECONDS is set, every job says that its time ends in so many seconds. In place of scontrol: a slow answer.
PROGRAMS = {
    "squeue": """case "$FAKE_SECONDS $*" in [0-9]*%e*) date -d "+$FAKE_SECONDS seconds" +%FT%T;; *) exec {program} "$@";; esac""",
    "scontrol": """{program} "$@"; status=$?; sleep 0.5; exit $status""",
}


@contextlib.contextmanager
def shell(folder: Path) -> Iterator[Callable[..., str]]:
    """A cluster in this folder, as a function that runs a command there and returns what it prints, errors last."""
    for name, lines in PROGRAMS.items():
        (folder / name).write_text("#!/bin/sh\n" + lines.format(program=shutil.which(name)) + "\n")
        (folder / name).chmod(0o755)
    with cluster(folder / "cluster", cpus=16) as variables:
        environment = os.environ | variables | {"PATH": f"{folder}:{os.environ['PATH']}"}

        def run(*command: object, status: int = 0) -> str:
            words = [*map(str, command)]
            completed = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
            assert completed.returncode == status, completed.stdout + completed.stderr
            return (completed.stdout + completed.stderr).strip()

        yield run


if __name__ == "__main__":
    sys.exit(main())
