"""What a run's numbers come from besides its settings: date, versions, device and code; and how those of two processes differ."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import platform
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from incremental_cifar.config import REPOSITORY
from incremental_cifar.training import device_name

# Of an environment's description, what decides whether a resumed run can equal an uninterrupted one to the bit.
EXACTNESS_KEYS = ("torch", "triton", "cuda", "cudnn", "device", "threads", "cuda_graphs")

GIT = ("git", "--no-optional-locks", "-C", str(REPOSITORY))
GIT_SECONDS = 10  # as long as a run waits for git, which takes milliseconds where the disk is not at fault
LONGEST_DIFFERENCE = 1 << 20  # bytes


def describe_environment(device: torch.device, is_compiled: bool, is_recorded: bool | None) -> dict[str, str | int | bool | None]:
    """Versions, device and code that a run's numbers come from.

    is_compiled: Triton makes kernels of the network. is_recorded: steps are replayed from a CUDA graph; None where there are none.
    """
    git = [*GIT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    is_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),  # a string subclass that weights_only=True would refuse
        "triton": installed_version("triton") if is_compiled else None,
        "cuda": torch.version.cuda if is_gpu else None,
        "cudnn": torch.backends.cudnn.version() if is_gpu else None,
        "device": device_name(device),
        "threads": None if is_gpu else torch.get_num_threads(),
        "commit": commit,
        "code": CODE,
        "cuda_graphs": is_recorded,
    }


def code_difference() -> bytes:
    """How the tracked files here differ from the commit (`git diff HEAD`), and the Python files that git neither tracks nor ignores.

    Empty if there is nothing of that, or without git or a checkout. Of a difference longer than LONGEST_DIFFERENCE, or one that git does
    not give within GIT_SECONDS, a line that says so.
    """
    command = [*GIT, "diff", "--relative", "--no-color", "--no-ext-diff", "--no-textconv", "HEAD"]
    try:
        git = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return b""
    too_late = threading.Timer(GIT_SECONDS, git.kill)
    too_late.daemon = True
    too_late.start()
    with git:
        difference = git.stdout.read(LONGEST_DIFFERENCE + 1)
        if len(difference) > LONGEST_DIFFERENCE:
            git.kill()
    too_late.cancel()
    if len(difference) > LONGEST_DIFFERENCE:
        return f"# not stored: git diff HEAD is longer than {LONGEST_DIFFERENCE:,} bytes\n".encode()
    if git.returncode < 0:
        return f"# not stored: git diff HEAD took longer than {GIT_SECONDS} s\n".encode()
    return difference + new_code() if git.returncode == 0 else b""


def new_code() -> bytes:
    """The Python files here that git neither tracks nor ignores, as a difference; if that is too long or takes too long, a line."""
    deadline, difference = time.monotonic() + GIT_SECONDS, b""

    def git(*arguments: str | bytes) -> bytes:
        return subprocess.run([*GIT, *arguments], capture_output=True, timeout=deadline - time.monotonic()).stdout

    with contextlib.suppress(subprocess.TimeoutExpired):
        for name in git("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py").split(b"\0")[:-1]:
            difference += git("diff", "--no-index", "--no-color", "--no-ext-diff", "--no-textconv", "--", "/dev/null", name)
            if len(difference) > LONGEST_DIFFERENCE:
                break
        else:
            return difference
    return f"# not stored: Python files that git does not know, over {LONGEST_DIFFERENCE:,} bytes or {GIT_SECONDS} s\n".encode()


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_digest() -> str:
    """What tells the code of runs apart, committed or not: the first digits of a SHA-256 over its files."""
    digest = hashlib.sha256()
    for path in (REPOSITORY / "incremental_cifar_experiment.py", *sorted((Path(__file__).parent).rglob("*.py"))):
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)};".encode() + content)
    return digest.hexdigest()[:12]


CODE = code_digest()  # as it is imported now: files may change while a run works


def changed_code(before: dict[str, Any], here: dict[str, Any]) -> str:
    """How the code differs between two environments, by commits or, where these do not tell, by digests; empty if it does not.

    Environments that were stored without a digest are compared by their commits.
    """
    commits = before.get("commit"), here["commit"]
    tells = None not in commits and commits[0] != commits[1]
    if not (before["code"] != here["code"] if "code" in before else tells):
        return ""
    return f"commit {commits[0]} -> {commits[1]}" if tells else f"digest of the files {before['code']} -> {here['code']}"


def changed_exactness(before: dict[str, Any], here: dict[str, Any]) -> str:
    """How two environments differ in what decides about the last bits; empty if they do not."""
    return ", ".join(f"{key} {before.get(key)} -> {here[key]}" for key in EXACTNESS_KEYS if before.get(key) != here[key])
