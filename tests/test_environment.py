"""How the code differs from its commit: what is stored of that with a run, and when."""

import os
import subprocess
import types

import numpy as np
import pytest

from incremental_cifar import environment, stored_run
from incremental_cifar.config import Config
from incremental_cifar.environment import code_difference
from incremental_cifar.resnet import build_network
from incremental_cifar.run_files import RunFiles
from incremental_cifar.stored_run import StoredRun


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, in whose subfolder the code lies."""
    folder = tmp_path / "repository" / "code"
    folder.mkdir(parents=True)
    monkeypatch.setattr(environment, "GIT", ("git", "--no-optional-locks", "-C", str(folder)))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    (folder / "step.py").write_text("one\n")
    (folder.parent / "elsewhere.txt").write_text("one\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q", ".."], ["add", ".."], [*author, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


def test_the_difference_is_that_of_the_files_here_and_of_new_ones(checkout):
    assert code_difference() == b""
    (checkout / "new.txt").write_text("new\n")
    (checkout.parent / "elsewhere.txt").write_text("two\n")
    (checkout / ".gitignore").write_text("ignored.py\n")
    (checkout / "ignored.py").write_text("new\n")
    assert code_difference() == b""
    (checkout / "step.py").write_text("two\n")
    assert code_difference().endswith(b"--- a/step.py\n+++ b/step.py\n@@ -1 +1 @@\n-one\n+two\n")
    (checkout / "algorithms").mkdir()
    (checkout / "algorithms/mine é.py").write_text("first\n\nlast")  # of no commit yet
    (checkout / "__init__.py").touch()
    (checkout / "tab\there.py").write_bytes(b"\xff\r\n")
    os.symlink("an-editors-lock", checkout / ".#mine.py")
    names = ("step.py", "algorithms/mine é.py", "__init__.py", "tab\there.py")
    contents = {name: (checkout / name).read_bytes() for name in names}
    difference = code_difference()
    for name in (*names, ".#mine.py"):
        (checkout / name).unlink()
    subprocess.run(["git", "checkout", "-q", "step.py"], cwd=checkout, check=True)
    subprocess.run(["git", "apply", "--directory=code"], cwd=checkout.parent, input=difference, check=True)
    assert {name: (checkout / name).read_bytes() for name in names} == contents and os.readlink(checkout / ".#mine.py")
    (checkout / "long.py").write_text("x\n" * environment.LONGEST_DIFFERENCE)
    changed, _, new = code_difference().partition(b"+two\n")
    assert changed and new == b"# not stored: Python files that git does not know, over 1,048,576 bytes or 10 s\n"
    (checkout / "step.py").write_text("two\n" * environment.LONGEST_DIFFERENCE)
    assert code_difference() == b"# not stored: git diff HEAD is longer than 1,048,576 bytes\n"


def test_without_git_or_with_a_slow_one_a_run_goes_on(checkout, tmp_path, monkeypatch):
    (checkout / "step.py").write_text("two\n")
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(environment, "GIT_SECONDS", 0.1)
    monkeypatch.setattr(environment, "GIT", (str(slow),))
    assert code_difference() == b"# not stored: git diff HEAD took longer than 0.1 s\n"
    for git in (("no-such-git",), ("git", "-C", "/")):  # not there; not a checkout
        monkeypatch.setattr(environment, "GIT", git)
        assert code_difference() == b""


def test_a_difference_is_stored_once_and_is_that_of_the_epochs_that_follow(tmp_path, monkeypatch):
    files, other = RunFiles(tmp_path, 1), RunFiles(tmp_path, 11)
    stored = StoredRun(files, Config())
    folder = tmp_path / "config_files"

    def store(epoch: int, difference: bytes, of: StoredRun = stored) -> dict[str, bytes]:
        monkeypatch.setattr(stored_run, "code_difference", lambda: difference)
        of.store_code_difference(epoch)
        return {path.name: path.read_bytes() for path in sorted(folder.glob("index-1_*"))}

    store(0, b"another index", StoredRun(other, Config()))
    assert store(0, b"") == {}
    assert store(0, b"a") == {"index-1_epoch-0.diff": b"a"}
    assert store(4, b"a") == store(6, b"") == {"index-1_epoch-0.diff": b"a"}  # as before; committed
    assert store(10, b"b") == {"index-1_epoch-0.diff": b"a", "index-1_epoch-10.diff": b"b"}
    assert store(10, b"c")["index-1_epoch-10.diff"] == b"c"  # resumed there once more
    assert store(8, b"a") == {"index-1_epoch-0.diff": b"a"}  # its later checkpoint was damaged
    files.forget()
    assert [path.name for path in folder.iterdir()] == ["index-11_epoch-0.diff"]


def test_a_run_stores_the_difference_it_starts_with(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_run, "code_difference", lambda: b"a")
    stored = StoredRun(RunFiles(tmp_path, 0), Config())
    stored.begin(types.SimpleNamespace(network=build_network(0, width=1)), np.arange(100), {})
    assert (tmp_path / "config_files" / "index-0_epoch-0.diff").read_bytes() == b"a"
