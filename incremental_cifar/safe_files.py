"""Files that are complete or absent whatever happens, and locks between processes.

    write_file(Path("results/index-0.json"), b"{}")
    with lock(Path("results/.lock")) as holder:           # holder: None if we have the lock, else who has it

Locks are flock's: the system drops them when their process ends, however it ends, and Linux passes them on to the server of a network file
system (NFS; Lustre where it is mounted with flock). On a file system without locks, the existence of a second file is the lock; there a
process that is gone holds it no longer if it ran on this host, and the message says what to delete if it ran on another.

Needs the standard library only, so that plots can use it.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from incremental_cifar.config import UserError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what flock says on a file system without locks


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that at every moment the old one, or the new one, is there whole. Raises UserError if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write this file ({error.strerror or error})") from None


def check_destinations(*paths: Path) -> None:
    """Raise UserError if one of these files could not be written, so that this is known before the work."""
    for path in paths:
        reason = ""
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:  # a name that is too long, or that no file can have
            reason = getattr(error, "strerror", None) or str(error)
        folder = path.parent
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent
        if os.path.exists(path) and not os.path.isfile(path):
            reason = "what has its name is not a file"
        elif not os.path.isdir(folder):
            reason = f"{folder.name} is not a folder"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = f"no permission to write in {folder}"
        if reason:
            raise UserError(f"{path}: cannot write this file ({reason})")


def write_note(path: Path, note: dict[str, Any]) -> None:
    """Write a small JSON object that is complete or absent. Not flushed to the disk, and errors are passed over: nothing depends on it."""
    partial = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(note) + "\n")
        os.replace(partial, path)


def read_note(path: Path) -> dict[str, Any]:
    """What `write_note` wrote; empty if it cannot be read."""
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[str | None]:
    """Hold the lock that this file stands for; yields None, or, if somebody else holds it and `wait` is false, who.

    While the lock is held, the file says who holds it (host, process, since when). Raises UserError if it cannot be written.
    """
    me = f"host {socket.gethostname()}, process {os.getpid()}, since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot write this file ({error.strerror})") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield _read_holder(descriptor)
            return
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"{path}: cannot lock this file ({error.strerror})") from None
            with _lock_without_flock(path.with_suffix(".owner"), me, wait) as holder:
                yield holder
            return
        with contextlib.suppress(OSError):  # on a full disk the text is missing, but the lock is there
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, me.encode(), 0)
        try:
            yield None
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def lock_holder(path: Path) -> str | None:
    """Who holds the lock that this file stands for, as in `lock`; None if nobody does.

    Whoever asks holds the lock himself for some microseconds, but only if the text of a process that was killed is in the file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)  # to lock on NFS, one must be able to write
    except OSError:
        return None
    try:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        if not holder:
            holder = _read_text(path.with_suffix(".owner"))  # on a file system without locks
            return holder if holder and not _is_gone(holder) else None
        if _is_gone(holder):
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # BlockingIOError: it is held
            return holder
        return None
    finally:
        os.close(descriptor)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _is_gone(holder: str) -> bool:
    """Whether it can be seen from here that this holder of a lock is a process that has ended."""
    match = re.match(r"host (.+), process (\d+),", holder)
    return match is not None and match[1] == socket.gethostname() and not _is_alive(int(match[2]))


def _read_holder(descriptor: int, patience: float = 2.0) -> str:
    """Who holds a lock; its holder may have had no time yet to say so, so wait for that up to `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        if holder or time.monotonic() > deadline:
            return holder or "unknown"
        time.sleep(0.02)


@contextlib.contextmanager
def _lock_without_flock(path: Path, me: str, wait: bool) -> Iterator[str | None]:
    """A lock by the existence of a file, for file systems that have no other."""
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            break
        except FileExistsError:
            holder = _read_text(path)
            if _is_gone(holder):
                path.unlink(missing_ok=True)
            elif not wait:
                yield f"{holder or 'unknown'} (if that process is gone, delete {path})"
                return
            else:
                time.sleep(0.1)
    with contextlib.suppress(OSError):
        os.write(descriptor, me.encode())
    os.close(descriptor)
    try:
        yield None
    finally:
        path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
