"""What a run's numbers come from besides its settings: versions, device and code; and how those of two processes differ."""

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from incremental_cifar.config import REPOSITORY
from incremental_cifar.training import device_name

# Of an environment's description, what decides whether a resumed run can equal an uninterrupted one to the bit.
EXACTNESS_KEYS = ("torch", "triton", "cuda", "cudnn", "device", "threads", "cuda_graphs")


def describe_environment(device: torch.device, is_compiled: bool, is_recorded: bool | None) -> dict[str, str | int | bool | None]:
    """Versions, device and code that a run's numbers come from.

    is_compiled: Triton makes kernels of the network. is_recorded: steps are replayed from a CUDA graph; None where there are none.
    """
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    is_gpu = device.type == "cuda"
    return {
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
