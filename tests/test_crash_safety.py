"""What a run survives: kill -9 at any moment, a full disk, damaged checkpoints, other processes, hostile settings.

`make test` tries each a few times; `make stress` as often as the table in docs/reliability.md says. The hooks that choose a moment are
here: the code under test has none.
"""

import builtins
import contextlib
import errno
import functools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ALGORITHMS, REPOSITORY, STRESS, processes, stored_results, stress_counts, tiny_arguments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incremental_cifar import command_line, safe_files
from incremental_cifar.config import FIELDS, Auto, Config, UserError, load_config, make_config
from incremental_cifar.run_files import RunFiles, state_digest

KILLS_PER_ALGORITHM = 12 if STRESS else 2  # half of them inside a write
DAMAGES = 200 if STRESS else 60
ROUNDS = 50 if STRESS else 5
SCRIPT_ROUNDS = 50 if STRESS else 2


# --- kill -9 ---------------------------------------------------------------------------------------------------------------------


def kill_in_write(number: int, moment: str) -> None:
    """Make this process kill itself in its so-many-th write of a file: half-way, before or after the file takes its name."""
    count = 0

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def counting_open(path, mode="r", *args, **kwargs):
        nonlocal count
        file = builtins.open(path, mode, *args, **kwargs)  # noqa: SIM115 (it is handed on)
        if mode == "wb":
            count += 1
            if count == number and moment == "half-way":
                return HalfWritten(file, die)
        return file

    replace = os.replace

    def counting_replace(*args):
        if count == number and moment == "before":
            die()
        replace(*args)
        if count == number and moment == "after":
            die()

    safe_files.open = counting_open
    os.replace = counting_replace


class HalfWritten:
    """A file of which half the content is written, and then the process ends."""

    def __init__(self, file, die):
        self.file, self.die = file, die

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(memoryview(content)[: len(content) // 2])
        self.file.flush()
        self.die()


@pytest.mark.parametrize("algorithm", ALGORITHMS if STRESS else ALGORITHMS[1 :: -(-len(ALGORITHMS) // 2)])  # or two
def test_killed_at_any_moment_and_resumed_a_run_is_what_it_would_have_been(algorithm, uninterrupted, tmp_path, script):
    """Kills at random times and inside random writes; whenever a run reaches its end, it is compared and a new one begins."""
    choice = random.Random(algorithm)
    expected = stored_results(uninterrupted(algorithm))
    kills = {"time": 0, "write": 0}
    finished = 0
    folder = tmp_path / "0"
    while sum(kills.values()) < KILLS_PER_ALGORITHM or finished == 0 or folder.exists():
        arguments = tiny_arguments(algorithm, folder, checkpoint_save_frequency=1)
        enough = sum(kills.values()) >= KILLS_PER_ALGORITHM
        in_write = kills["write"] <= kills["time"]
        hook = None
        if not enough and in_write:
            hook = functools.partial(kill_in_write, choice.randint(1, 70), choice.choice(["half-way", "before", "after"]))
        run = script(arguments, hook)
        if not enough and not in_write:
            run.process.join(choice.uniform(0.2, 1.2))
            run.process.kill()
        status = run.wait()
        if status == -signal.SIGKILL:
            kills["write" if in_write else "time"] += 1
            continue
        assert status == 0, run.output()
        actual = stored_results(folder / algorithm)
        assert actual.keys() == expected.keys()
        assert [name for name in actual if actual[name] != expected[name]] == []
        finished += 1
        folder = tmp_path / str(finished)
    done, inside = (int(part) for part in stress_counts.get("kill -9, of them inside a write", "0, 0").split(", "))
    stress_counts["kill -9, of them inside a write"] = f"{done + sum(kills.values())}, {inside + kills['write']}"
    stress_counts["runs resumed to the end after them, all equal to the bit"] = str(
        int(stress_counts.get("runs resumed to the end after them, all equal to the bit", 0)) + finished
    )
    assert kills["write"] >= KILLS_PER_ALGORITHM // 2


# --- a full disk -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a file system here: " + mounted.stderr.decode().strip())
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_before_writing(folder: str, disk: str, number: int) -> None:
    """Fill the disk just before this process writes its so-many-th file into a folder of this name."""
    count = 0

    def open_after_filling(path, mode="r", *args, **kwargs):
        nonlocal count
        count += mode == "wb" and Path(path).parent.name == folder
        if count == number:
            with contextlib.suppress(OSError), builtins.open(Path(disk) / "ballast", "wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(1000))
        return builtins.open(path, mode, *args, **kwargs)

    safe_files.open = open_after_filling


FULL_DISK_CASES = [
    ("config_files", 1),
    ("class_order", 1),
    ("model_parameters", 1),
    ("model_parameters", 3),
    ("experiment_checkpoints", 1),
    ("experiment_checkpoints", 2),
    ("test_loss_per_epoch", 2),
    ("epoch_runtime", 4),
]


@pytest.mark.parametrize(("folder", "number"), FULL_DISK_CASES if STRESS else FULL_DISK_CASES[3:7:2])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(folder, number, small_disk, uninterrupted, script):
    algorithm = "continual_backpropagation"
    arguments = tiny_arguments(algorithm, small_disk, checkpoint_save_frequency=3)
    run = script(arguments, functools.partial(fill_before_writing, folder, str(small_disk), number))
    assert run.wait() == 2
    lines = [line for line in run.output().splitlines() if line.startswith(("error", "Traceback"))]
    assert len(lines) == 1 and f"/{folder}/index-0" in lines[0] and "cannot write this file (No space left on device)" in lines[0]
    assert not list(small_disk.rglob("*.partial"))
    assert script(arguments).wait() == 2  # still full
    (small_disk / "ballast").unlink()
    run = script(arguments)
    assert run.wait() == 0, run.output()
    assert stored_results(small_disk / algorithm) == stored_results(uninterrupted(algorithm))
    stress_counts["disk full during a config, model, checkpoint or metric; resumed"] = str(
        int(stress_counts.get("disk full during a config, model, checkpoint or metric; resumed", 0)) + 1
    )


# --- damaged checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_never_resumed_from(tmp_path, script, capfd):
    """Cut or flipped at random places: either its content is still what was written, or the one before it is used."""
    run = script([*tiny_arguments("continual_backpropagation", tmp_path, checkpoint_save_frequency=1), "--verbose"])
    run.wait_for_output("Epoch 7/")
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    files = RunFiles(tmp_path / "continual_backpropagation", 0)
    (before, _), (newest, path) = files.checkpoints()
    digests = {epoch: state_digest(torch.load(files.checkpoint_file(epoch), weights_only=True)) for epoch in (before, newest)}
    content = path.read_bytes()
    choice = random.Random(0)
    used = {before: 0, newest: 0}
    for number in range(DAMAGES):
        place = choice.randrange(len(content))
        length = choice.choice([1, 1, 8, 1000])
        damaged = bytearray(content)
        if number % 4 == 0:
            del damaged[place:]
        elif number % 4 == 1:
            damaged[place : place + length] = choice.randbytes(len(damaged[place : place + length]))
        elif number % 4 == 2:
            damaged[place] ^= 1 << choice.randrange(8)
        else:
            del damaged[place : place + length]
        path.write_bytes(damaged)
        state = files.load_checkpoint()
        used[state["epoch"]] += 1
        error = capfd.readouterr().err
        assert state["epoch"] == newest or f"{path}: this checkpoint is damaged" in error
        state["sha256"] = state_digest(state)
        assert state_digest(state) == digests[state["epoch"]]
    assert used[before] > DAMAGES // 2
    stress_counts["checkpoints cut or flipped; of them still whole in content"] = f"{DAMAGES}, {used[newest]}"


# --- shared folders, and safeguards that not every file system has --------------------------------------------------------------


@pytest.mark.parametrize("error", ["EINVAL", "ENOSYS", "ENOTSUP", "EIO"])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_file_system_that_cannot_flush_is_written_to(tmp_path, monkeypatch, what, error):
    """But a file that the disk fails to take is an error."""
    number = getattr(errno, error)

    def cannot(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (what == "folder"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", cannot)
    path = tmp_path / "file"
    fails = (what, error) == ("file", "EIO")
    with pytest.raises(UserError, match=r"cannot write this file \(Input/output error\)") if fails else contextlib.nullcontext():
        safe_files.write_file(path, b"content")
    assert os.listdir(tmp_path) == ([] if fails else ["file"])


GROUP, MEMBERS = 54321, (54322, 54323)


@pytest.fixture
def group_folder():
    """A folder of a group, with a setgid bit and without."""
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(folder, MEMBERS[0], GROUP)
    folder.chmod(0o770)
    yield folder
    shutil.rmtree(folder)


def work_as(member: int, umask: int, folder: str, index: int) -> None:
    """As a member of the group, do what a run does with the files that all runs of an experiment share."""
    os.setgroups([GROUP])
    os.setgid(member)  # a group of his own comes first
    os.setuid(member)
    os.umask(umask)
    os.chdir("/")
    files = RunFiles(folder, index)
    with files.locked():
        files.save_array("class_order", torch.arange(3).numpy())
        files.save_progress({"epoch": 1})
        files.mark_finished()


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("left", ["nothing", "lock", "partial"])
def test_members_of_a_group_share_an_experiment_whatever_their_umasks(group_folder, umask, left):
    """Also where an older version, or a process that was killed, left a file that only its owner may write."""
    name = {"lock": ".experiment_indices.lock", "partial": ".experiment_indices.npy.partial"}.get(left)
    experiment = group_folder / "new" / "experiment"
    if name:
        experiment = group_folder
        (experiment / name).write_bytes(b"")
        (experiment / name).chmod(0o644)
    for index, member in enumerate(MEMBERS):
        process = processes.Process(target=work_as, args=(member, umask, str(experiment), index))
        process.start()
        process.join(60)
        assert process.exitcode == 0
    assert RunFiles(experiment, 0).finished_indices() == [0, 1]
    assert all(path.stat().st_mode & 0o060 == 0o060 and path.stat().st_gid == GROUP for path in experiment.rglob("*"))


@pytest.mark.parametrize(
    "blocked",
    [".experiment_indices.lock/", "test_loss_per_epoch", "experiment_checkpoints", "model_parameters/index-0_epoch-8.pt/"],
)
def test_what_a_run_needs_at_its_end_is_tried_at_its_start(tmp_path, script, blocked):
    """Something else is in the place of a file or folder that is written late."""
    path = tmp_path / "base_deep_learning_system" / blocked
    path.parent.mkdir(parents=True)
    if blocked.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(b"")
    run = script([*tiny_arguments("base_deep_learning_system", tmp_path), "--verbose"])
    assert run.wait() == 2
    (line,) = run.output().splitlines()
    assert line.startswith("error: ") and "cannot write this file" in line and blocked.strip("/") in line
    assert not list(tmp_path.rglob("*.pt/*")) and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("link", ["results", "results/base_deep_learning_system"])
def test_a_link_to_a_folder_that_is_not_there_is_named(tmp_path, script, link):
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "gone")
    run = script(tiny_arguments("base_deep_learning_system", tmp_path / "results"))
    assert run.wait() == 2
    expected = f"({tmp_path / link} is a link to {tmp_path / 'gone'}, which is not there; make that folder, or remove the link)"
    assert expected in run.output() and run.output().count("\n") == 1
    assert not (tmp_path / "gone").exists()


# --- other processes -------------------------------------------------------------------------------------------------------------


def finish(folder: str, index: int, barrier: multiprocessing.Barrier) -> None:
    barrier.wait()
    RunFiles(folder, index).mark_finished()


def test_runs_that_finish_at_the_same_moment_are_all_listed(tmp_path):
    for number in range(ROUNDS):
        barrier = processes.Barrier(4)
        finishing = [processes.Process(target=finish, args=(str(tmp_path / str(number)), index, barrier)) for index in range(4)]
        for process in finishing:
            process.start()
        for process in finishing:
            process.join(60)
        assert RunFiles(tmp_path / str(number), 0).finished_indices() == [0, 1, 2, 3]
    stress_counts["four runs that finish at the same moment, none lost"] = str(ROUNDS)


def test_of_two_processes_on_one_run_one_wins(tmp_path, script):
    for number in range(SCRIPT_ROUNDS):
        arguments = tiny_arguments("base_deep_learning_system", tmp_path / str(number), num_tasks=2)
        runs = [script(arguments), script(arguments)]
        statuses = [run.wait() for run in runs]
        winner, loser = runs if statuses[0] == 0 else reversed(runs)
        assert sorted(statuses) == [0, 2], [run.output() for run in runs]
        assert f"process {winner.process.pid}, since 20" in loser.output() and loser.output().count("error") == 1
    stress_counts["two processes on the same run, one wins"] = f"{SCRIPT_ROUNDS} of {SCRIPT_ROUNDS}"


def test_the_lock_of_a_killed_process_does_not_block(tmp_path, script):
    arguments = [*tiny_arguments("base_deep_learning_system", tmp_path, num_tasks=1), "--verbose"]
    run = script(arguments)
    run.wait_for_output("Epoch 2/")
    run.process.kill()
    run.wait()
    lock_file = tmp_path / "base_deep_learning_system" / ".index-0.lock"
    assert f"process {run.process.pid}," in lock_file.read_text()
    assert script(arguments).wait() == 0
    assert lock_file.read_text() == ""


def test_a_holder_that_has_not_said_yet_who_it_is_is_waited_for(tmp_path):
    """Between taking the lock and writing its name, the winner of two processes is nobody: the loser asks again."""
    path = tmp_path / "run.lock"
    with open(path, "wb", buffering=0) as winner:
        safe_files.fcntl.flock(winner, safe_files.fcntl.LOCK_EX)
        late = threading.Timer(0.2, winner.write, [b"host a, process 1, since 2026"])
        late.start()
        with safe_files.lock(path) as holder:
            assert holder == "host a, process 1, since 2026"
        late.join()


def test_whoever_only_asks_does_not_keep_others_from_a_lock(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text(f"host {socket.gethostname()}, process {os.getpid()}, since long ago")  # of a process that was killed
    with open(path, "rb") as asker:
        safe_files.fcntl.flock(asker, safe_files.fcntl.LOCK_SH)
        done = threading.Timer(0.1, safe_files.fcntl.flock, [asker, safe_files.fcntl.LOCK_UN])
        done.start()
        with safe_files.lock(path) as holder:
            assert holder is None
        done.join()


def test_a_lock_that_is_deleted_while_it_is_waited_for_is_taken_in_its_place(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    flock, is_waiting = safe_files.fcntl.flock, threading.Event()

    def noted(descriptor, operation):
        if operation == safe_files.fcntl.LOCK_EX:
            is_waiting.set()
        flock(descriptor, operation)

    def wait_for_it():
        with safe_files.lock(path, wait=True):
            return safe_files.lock_holder(path)

    with ThreadPoolExecutor(1) as pool:
        with safe_files.lock(path):
            monkeypatch.setattr(safe_files.fcntl, "flock", noted)
            waiting = pool.submit(wait_for_it)
            assert is_waiting.wait(20)
            path.unlink()
        assert f"process {os.getpid()}, since 20" in waiting.result()


IN_A_CONTAINER = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
from incremental_cifar import safe_files
def no_locks(*args):
    raise OSError(95, "Operation not supported")
if sys.argv[3] == "no flock":
    safe_files.fcntl.flock = no_locks
path = pathlib.Path(sys.argv[2])
with safe_files.lock(path) as holder:
    print(safe_files.lock_holder(path), holder, sep="\\n")
"""


@pytest.mark.parametrize("flock", ["flock", "no flock"])
def test_a_container_with_the_hosts_name_sees_what_runs_outside_it(tmp_path, monkeypatch, flock):
    """It numbers processes on its own: there, this process's number is nobody's."""
    container = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*container, "true"], capture_output=True).returncode != 0:
        pytest.skip("cannot number processes anew here")
    if flock == "no flock":
        monkeypatch.setattr(safe_files.fcntl, "flock", no_locks)
    path = tmp_path / "run.lock"
    with safe_files.lock(path):
        command = [*container, sys.executable, "-c", IN_A_CONTAINER, str(REPOSITORY), str(path), flock]
        asked, taken = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for said in (asked, taken):
            assert f"process {os.getpid()}, since 20" in said and "boot" not in said
            assert (f"if that process is gone, delete {tmp_path / 'run.owner'}" in said) == (flock == "no flock")
        assert safe_files.lock_holder(path) is not None
    assert safe_files.lock_holder(path) is None


def no_locks(*args):
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("changed", ["an older version", "boot ", r"pid:\[", "nothing"])
def test_without_flock_only_a_process_that_is_certainly_gone_loses_its_lock(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(safe_files.fcntl, "flock", no_locks)
    path, owner = tmp_path / "run.lock", tmp_path / "run.owner"
    with safe_files.lock(path):
        text = owner.read_text()
    ended = subprocess.Popen(["true"])
    ended.wait()
    text = text.replace(f"process {os.getpid()},", f"process {ended.pid},")
    text = text.partition(";")[0] if changed == "an older version" else re.sub(rf"({changed}\S*?)\d", r"\g<1>x", text)
    owner.write_text(text)
    with safe_files.lock(path) as holder:
        if changed == "nothing" and sys.platform == "linux":
            assert holder is None
        else:
            assert holder == f"{text.partition(';')[0]} (if that process is gone, delete {owner})" and owner.read_text() == text


def test_without_flock_a_long_wait_says_for_whom(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(safe_files.fcntl, "flock", no_locks)
    owner = tmp_path / "run.owner"
    owner.write_text("host elsewhere, process 1, since long ago")
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 200:
            owner.unlink()

    monkeypatch.setattr(safe_files.time, "sleep", sleep)
    with safe_files.lock(tmp_path / "run.lock", wait=True) as holder:
        assert holder is None
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and f"waiting for host elsewhere, process 1, since long ago (if that process is gone, delete {owner})" in said
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows when a process was started")
def test_without_flock_the_number_of_an_ended_process_may_be_anothers(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_files.fcntl, "flock", no_locks)
    path, owner = tmp_path / "run.lock", tmp_path / "run.owner"
    with safe_files.lock(path):
        text = owner.read_text()
    owner.write_text(re.sub(r"start \d+$", "start 1", text))
    with safe_files.lock(path) as holder:
        assert holder is None


def test_without_flock_the_existence_of_a_file_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_files.fcntl, "flock", no_locks)
    path = tmp_path / "run.lock"
    with safe_files.lock(path) as holder:
        assert holder is None
        with safe_files.lock(path) as second:
            assert f"process {os.getpid()}," in second and "delete" in second
    with safe_files.lock(path) as holder:
        assert holder is None
        ended = subprocess.Popen(["true"])
        ended.wait()
        owner = tmp_path / "run.owner"
        owner.write_text(owner.read_text().replace(f"process {os.getpid()},", f"process {ended.pid},"))
        with safe_files.lock(path) as second:  # its process is gone from this host
            assert second is None or sys.platform != "linux"


def test_a_second_signal_ends_a_run_at_once_and_leaves_it_usable(uninterrupted, tmp_path, script):
    arguments = [*tiny_arguments("shrink_and_perturb", tmp_path, checkpoint_save_frequency=1), "--verbose"]
    run = script(arguments)
    run.wait_for_output("Epoch 5/")
    started = time.monotonic()
    run.send(signal.SIGINT)
    time.sleep(0.01)
    run.send(signal.SIGINT)
    assert run.wait() in (-signal.SIGINT, 130)  # 130: the epoch ended between the two
    assert time.monotonic() - started < 5
    assert script(arguments).wait() == 0
    assert stored_results(tmp_path / "shrink_and_perturb") == stored_results(uninterrupted("shrink_and_perturb"))


def test_a_signal_that_is_sent_twice_at_once_is_one_request(monkeypatch):
    """As Slurm does when it pre-empts a job; two seconds later it is a second one."""
    ended = []
    monkeypatch.setattr(command_line.os, "kill", lambda process, number: ended.append(number))
    clock = [100.0]
    monkeypatch.setattr(command_line.time, "monotonic", lambda: clock[0])
    with command_line.stop_requests() as stop:
        assert not stop
        for seconds in (0, 0.001, 1.9):
            clock[0] = 100.0 + seconds
            signal.raise_signal(signal.SIGTERM)
        assert stop and stop.exit_status == 143 and ended == []
        clock[0] = 103.0
        signal.raise_signal(signal.SIGUSR1)
        assert ended == [signal.SIGUSR1] and stop.name == "SIGTERM"
    with command_line.stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.exit_status == 130 and signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second Ctrl-C ends it
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL and ended == [signal.SIGUSR1]


# --- hostile settings ------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)
fuzz = settings(max_examples=5000 if STRESS else 300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=8), json_values, max_size=6))
def test_any_object_is_a_complete_config_or_one_line(values):
    try:
        config = make_config(values, source="fuzz")
    except UserError:
        return
    for key, field in FIELDS.items():
        value = getattr(config, key)
        if field.type == Auto:
            assert type(value) is bool or value == "auto"
        else:  # of a union, one of its types
            assert type(value) in (typing.get_args(field.type) or (field.type,))
        assert field.type is not float or math.isfinite(value)
    assert config.num_tasks * config.classes_per_task <= 100
    assert make_config(json.loads(json.dumps(config.to_dict())), source="again") == config


@fuzz
@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,.0123456789eE+-truefalsn_ksizp', max_size=60).map(str.encode))
def test_any_file_is_a_config_or_one_line(tmp_path, content):
    path = tmp_path / "fuzz.json"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert isinstance(load_config(path), Config)


@fuzz
@given(st.text(max_size=40))
def test_any_override_is_a_setting_or_one_line(tmp_path, override):
    path = tmp_path / "fuzz.json"
    path.write_text("{}")
    for text in (override, *(f"{key}={override}" for key in ("stepsize", "num_tasks", "use_cbp", "device", "experiment_name"))):
        with contextlib.suppress(UserError):
            assert isinstance(load_config(path, [text]), Config)
