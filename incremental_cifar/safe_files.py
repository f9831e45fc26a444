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
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

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
            holder = path.read_text(errors="replace").strip() if path.exists() else ""
            match = re.match(r"host (.+), process (\d+),", holder)
            if match and match[1] == socket.gethostname() and not _is_alive(int(match[2])):
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
