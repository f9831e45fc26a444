import os
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from incremental_cifar.command_line import status_text
from incremental_cifar.config import Config, UserError
from incremental_cifar.resnet import build_network
from incremental_cifar.run_files import RunFiles, how_it_stands, last_line, state_bytes, state_digest
from incremental_cifar.safe_files import read_note, write_file


def test_finished_indices_are_sorted_and_without_repeats(tmp_path):
    for index in (3, 0, 3, 11):
        RunFiles(tmp_path, index).mark_finished()
    indices = np.load(tmp_path / "experiment_indices.npy")
    assert indices.tolist() == [0, 3, 11] and indices.dtype == np.int64 and indices.ndim == 1


@pytest.mark.parametrize(
    ("stored", "expected"), [(np.array(4), [4]), (np.array([2, 0, 2]), [0, 2]), (np.array([3.0, 1.0]), [1, 3]), (np.empty(0), [])]
)
def test_finished_indices_of_the_released_code_are_understood(tmp_path, stored, expected):
    np.save(tmp_path / "experiment_indices.npy", stored)
    assert RunFiles(tmp_path, 0).finished_indices() == expected


def test_runs_that_finish_at_once_are_all_listed(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: RunFiles(tmp_path, index).mark_finished(), range(40)))
    assert RunFiles(tmp_path, 0).finished_indices() == list(range(40))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    write_file(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file: cannot write this file \(No space left on device\)"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]


def test_a_file_takes_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    seen = []
    replace = os.replace

    def record(partial, final):
        seen.append((Path(partial).read_bytes(), Path(final).exists()))
        replace(partial, final)

    monkeypatch.setattr(os, "replace", record)
    write_file(path, b"content")
    assert seen == [(b"content", False)] and path.read_bytes() == b"content"


def test_the_newest_two_checkpoints_are_kept_and_only_of_this_index(tmp_path):
    files, other = RunFiles(tmp_path, 1), RunFiles(tmp_path, 11)
    assert files.load_checkpoint() is None
    other.save_checkpoint(7, {"epoch": 7})
    for epoch in (5, 10, 15):
        files.save_checkpoint(epoch, {"epoch": epoch, "tensors": [torch.arange(3)]})
    assert sorted(os.listdir(files.checkpoint_folder)) == ["index-11_epoch-7.pt", "index-1_epoch-10.pt", "index-1_epoch-15.pt"]
    checkpoint = files.load_checkpoint()
    assert checkpoint["epoch"] == 15 and checkpoint["tensors"][0].tolist() == [0, 1, 2]


class Dangerous:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", pickle.dumps(Dangerous(), protocol=2), "no checksum"],
    ids=["empty", "text", "pickle", "no checksum"],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, content, capsys):
    files = RunFiles(tmp_path, 0)
    files.save_checkpoint(2, {"epoch": 2})
    write_file(files.checkpoint_file(3), content if isinstance(content, bytes) else state_bytes({"epoch": 3}))
    assert files.load_checkpoint() == {"epoch": 2}
    assert "index-0_epoch-3.pt: this checkpoint is damaged" in capsys.readouterr().err
    files.checkpoint_file(2).unlink()
    with pytest.raises(UserError, match="no checkpoint of index 0 is whole; delete them to start the run again"):
        files.load_checkpoint()


def test_the_older_checkpoint_stays_if_the_new_one_cannot_be_read_back(tmp_path, monkeypatch):
    files = RunFiles(tmp_path, 0)
    for epoch in (1, 2):
        files.save_checkpoint(epoch, {"epoch": epoch})
    monkeypatch.setattr("incremental_cifar.run_files.write_file", lambda path, content: write_file(path, bytes(content)[:-7]))
    with pytest.raises(UserError, match="cannot be read back"):
        files.save_checkpoint(3, {"epoch": 3})
    assert files.checkpoint_file(1).exists() and files.checkpoint_file(2).exists()
    assert files.load_checkpoint() == {"epoch": 2}


def test_a_damaged_later_checkpoint_does_not_count_as_kept(tmp_path):
    files = RunFiles(tmp_path, 0)
    for epoch in (1, 2):
        files.save_checkpoint(epoch, {"epoch": epoch})
    write_file(files.checkpoint_file(9), b"damaged")
    files.save_checkpoint(3, {"epoch": 3})
    assert [epoch for epoch, _ in files.checkpoints()] == [2, 3]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    files, other = RunFiles(tmp_path, 1), RunFiles(tmp_path, 11)
    for run in (files, other):
        run.checkpoint_folder.mkdir(exist_ok=True)
        partial = run.checkpoint_folder / f".index-{run.index}_epoch-5.pt.partial"
        partial.write_bytes(b"half")
    with files.locked():
        assert os.listdir(files.checkpoint_folder) == [".index-11_epoch-5.pt.partial"]


@pytest.mark.parametrize("content", [b"", bytes(136), b"\x93NUMPY"], ids=["empty", "zeros", "cut"])
def test_a_damaged_list_of_finished_runs_says_what_to_do(tmp_path, content):
    (tmp_path / "experiment_indices.npy").write_bytes(content)
    reason = r"\(it is empty, 0 bytes\)" if not content else ""
    with pytest.raises(UserError, match=rf"cannot read the list of finished runs {reason}.*; delete it, and give the commands of those"):
        RunFiles(tmp_path, 0).finished_indices()


@pytest.mark.parametrize("stored", [np.array([0.5]), np.array(["0"]), np.array([0, np.nan]), np.array([np.inf])])
def test_lists_of_finished_runs_hold_integers(tmp_path, stored):
    np.save(tmp_path / "experiment_indices.npy", stored)
    with pytest.raises(UserError, match=r"expected integers.*delete it, and give the commands of those runs again: finished"):
        RunFiles(tmp_path, 0).finished_indices()


@pytest.mark.parametrize("name", ["experiment_indices.npy", "config_files/index-0.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_something_else_in_the_place_of_a_file_is_one_line(tmp_path, name, make):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    files = RunFiles(tmp_path, 0)
    read = files.load_config if name.endswith(".json") else files.finished_indices
    with pytest.raises(UserError, match=f"{name}: (there is something else|cannot read the stored config of this run .not a file)"):
        read()


def test_digests_see_every_value_type_shape_and_name():
    state = {"a": torch.zeros(2, 3), "b": [1, 2.0, "x", None], "c": {"d": torch.tensor(1)}}
    variants = [
        {**state, "a": torch.zeros(3, 2)},
        {**state, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**state, "a": -torch.zeros(2, 3)},
        {**state, "b": [1, 2.0, "x"]},
        {**state, "b": [1.0, 2.0, "x", None]},
        {**state, "c": {"e": torch.tensor(1)}},
        {**state, "c": {"d": torch.tensor(2)}},
    ]
    digests = {state_digest(variant) for variant in [state, *variants]}
    assert len(digests) == 1 + len(variants)
    strided = {**state, "a": torch.zeros(3, 2).T}
    assert state_digest(strided) == state_digest(state)


def test_lists_of_finished_runs_are_read_without_pickle(tmp_path):
    np.save(tmp_path / "experiment_indices.npy", np.array([Dangerous()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot read the list of finished runs"):
        RunFiles(tmp_path, 0).finished_indices()


def test_models_are_plain_contiguous_state_dicts(tmp_path):
    network = build_network(0, width=2).to(memory_format=torch.channels_last)
    files = RunFiles(tmp_path, 0)
    files.save_model(200, network)
    stored = torch.load(tmp_path / "model_parameters" / "index-0_epoch-200.pt", weights_only=True)
    assert list(stored) == list(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert torch.equal(stored[name], tensor) and stored[name].is_contiguous() and stored[name].device.type == "cpu"


def test_how_a_run_stands(tmp_path):
    files, config = RunFiles(tmp_path, 1), Config(results_dir=str(tmp_path.parent), experiment_name=tmp_path.name)
    assert how_it_stands(files, config) == ("never started", "")
    assert how_it_stands(files, config, "7_1, pending (Priority)") == ("queued", "7_1, pending (Priority)")
    assert how_it_stands(files, config, "7_1, running") == ("running", "starting, 7_1, running")
    with files.locked():
        assert how_it_stands(files, config)[1].startswith(f"starting, host {os.uname().nodename}, process {os.getpid()}, since")
        files.save_progress({"epoch": 3, "num_epochs": 9, "seconds_left": 3725.2, "process": os.getpid()})
        assert re.match(r"\('running', 'epoch 3 of 9, 1:02:05 left, host ", str(how_it_stands(files, config)))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "index-10.log").write_text("error: another's\n")
    (tmp_path / "logs" / "index-0,1.log").write_text("=== started: now\nSIGTERM: stopped after epoch 3\n\n=== stopped by SIGTERM\n")
    assert how_it_stands(files, config) == ("interrupted", "")
    (tmp_path / "logs" / "slurm-7_1.out").write_text("slurmstepd: error: *** JOB 7 CANCELLED ***\n")
    os.utime(tmp_path / "logs" / "index-0,1.log", (0, 0))
    assert how_it_stands(files, config) == ("failed", f"slurmstepd: error: *** JOB 7 CANCELLED *** ({tmp_path / 'logs' / 'slurm-7_1.out'})")
    (tmp_path / "logs" / "index-0,1.log").write_text("=== started: now\nerror: index 1: why\nerror: index 0: else\n=== exit status 2\n")
    os.utime(tmp_path / "logs" / "index-0,1.log", (0, 0))  # the job's report of it comes later, and says less
    assert how_it_stands(files, config) == ("failed", f"error: index 1: why ({tmp_path / 'logs' / 'index-0,1.log'})")
    files.mark_finished()
    assert how_it_stands(files, config, "7_1, pending") == ("finished", "7_1, pending")


BAR = b"\rindex 0, task 1/2 (5 classes):   3.1% |          | 00:01, 01:02 left, epoch 2, test accuracy 0.100"
SEVERAL_BARS = b"\r  0.0% |          | 00:00, ? left\n\r  0.0% |          | 00:00, ? left\x1b[A" + BAR + b"\x1b[A"
TRACEBACK = b'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n    f()\n    ^^^\nRuntimeError: CUDA error: no\n'


@pytest.mark.parametrize(
    ("status", "log", "text", "line"),
    [
        (-6, b"begin\n" + BAR + b"double free or corruption (!prev)\n", "killed by SIGABRT", "double free or corruption (!prev)"),
        (134, BAR + b"\nfree(): invalid pointer\n" + SEVERAL_BARS, "exit status 134", "free(): invalid pointer"),
        (-11, SEVERAL_BARS, "killed by SIGSEGV", ""),
        (-9, BAR * 1000, "killed by SIGKILL (perhaps memory was full)", ""),
        (-40, b"", "killed by signal 40", ""),
        (-15, BAR, "stopped by SIGTERM", ""),
        (143, b"SIGTERM: stopped after epoch 3\n", "stopped by SIGTERM", "SIGTERM: stopped after epoch 3"),
        (1, SEVERAL_BARS + b"\n" + TRACEBACK + BAR, "exit status 1", "RuntimeError: CUDA error: no"),
        (2, b"error: index 0: why\nend\n", "exit status 2", "error: index 0: why"),
        (0, b"end", "", "end"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_what_a_process_died_of_is_said_in_words(status, log, text, line, tmp_path):
    path = tmp_path / "index-0.log"
    path.write_bytes(b"error: of an attempt before\n\n=== started: now: python\n" + log)
    assert (status_text(status), last_line(path)) == (text, line)


def test_a_note_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "note.json")  # nobody writes into it
    notes = []
    reader = threading.Thread(target=lambda: notes.append(read_note(tmp_path / "note.json")), daemon=True)
    reader.start()
    reader.join(10)
    assert notes == [{}]
