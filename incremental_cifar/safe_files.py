"""Files that are complete or absent whatever happens, and locks between processes.

    write_file(Path("results/index-0.json"), b"{}")
    with lock(Path("results/.lock")) as holder:           # holder: None if we have the lock, else who has it

Locks are flock's: the system drops them when their process ends, however it ends, and Linux passes them on to the server of a network file
system (NFS; Lustre where it is mounted with flock). On a file system without locks, the existence of a second file is the lock; there a
process that is gone holds it no longer if it is certain that it is (Linux; same boot, same numbering of processes), else the message says
what to delete. In a folder that its group may write into, files and folders are the group's too, whatever the umask.

Needs the standard library only, so that plots can use it.
"""

import contextlib
import datetime
import errno
import fcntl
import itertools
import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from incremental_cifar.command_line import warn
from incremental_cifar.config import UserError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what flock says on a file system without locks
NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}  # what fsync says where it cannot be had


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that at every moment the old one, or the new one, is there whole. Raises UserError if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        make_folder(path.parent)
        if not os.access(partial, os.W_OK):
            partial.unlink(missing_ok=True)  # of another user's process that was killed
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            share(file.fileno(), path.parent)
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in NO_FLUSH:
                    raise
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write this file ({_reason(error, path)})") from None
    with contextlib.suppress(OSError):  # the file is written; not every file system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def around_block(path: Path, begin: str, end: str) -> tuple[bytes, bytes, bytes]:
    """A file's content in three: to the line `begin`, with it; between; and from the line `end` on, with it.

    Raises UserError unless both lines are there, once and in this order.
    """
    first, last = begin.encode(), end.encode()
    before, _, rest = path.read_bytes().partition(first)
    block, found, after = rest.partition(last)
    if not found or first in rest or last in before + after:
        raise UserError(f"{path}: what is written goes between two lines, each there once: {begin.strip()} and {end.strip()}")
    return before + first, block, last + after


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, if they are not there. Raises OSError."""
    if not folder.is_dir():
        if folder.parent != folder:
            make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        share(folder, folder.parent)


def share(made: int | Path, folder: Path) -> None:
    """Give what was made in a folder (its path, or the open file) the group's rights to that folder, if the group may write into it."""
    with contextlib.suppress(OSError):  # it is another user's, or we do not belong to that group
        above, own = os.stat(folder), os.stat(made)
        if above.st_mode & stat.S_IWGRP:
            rights = above.st_mode & (stat.S_IRWXG if stat.S_ISDIR(own.st_mode) else stat.S_IRGRP | stat.S_IWGRP)
            if own.st_gid != above.st_gid:
                os.chown(made, -1, above.st_gid)
            if own.st_mode | rights != own.st_mode:
                os.chmod(made, stat.S_IMODE(own.st_mode) | rights)


def _reason(error: OSError, path: Path) -> str:
    """Why a file cannot be written: what stands in the place of a folder above it, or else the error."""
    for folder in reversed(path.parents):
        if os.path.lexists(folder) and not os.path.isdir(folder):
            return broken_link(folder) or f"{folder.name} is not a folder"
    return error.strerror or str(error)


def broken_link(path: Path) -> str:
    """What is wrong with a link that leads nowhere; empty for everything else."""
    try:
        os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            if error.errno == errno.ELOOP:
                return f"{path} is a link that leads back to itself; remove it"
            remedy = "which is not there; make that folder, or remove the link" if error.errno == errno.ENOENT else f"({error.strerror})"
            return f"{path} is a link to {os.readlink(path)}, {remedy}"
    return ""


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
            reason = _reason(OSError(), path)
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = f"no permission to write in {folder}"
        elif os.path.lexists(path) and _only_owners_replace(path):
            reason = f"it is another user's, and {folder} is sticky: only its owner can replace it"
        if reason:
            raise UserError(f"{path}: cannot write this file ({reason})")


def _only_owners_replace(path: Path) -> bool:
    folder = os.stat(path.parent)
    return bool(folder.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, folder.st_uid, os.lstat(path).st_uid)


def write_note(path: Path, note: dict[str, Any]) -> None:
    """Write a small JSON object that is complete or absent. Not flushed to the disk, and errors are passed over: nothing depends on it."""
    partial = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(OSError):
        make_folder(path.parent)
        partial.write_text(json.dumps(note) + "\n")
        share(partial, path.parent)
        os.replace(partial, path)


def read_note(path: Path) -> dict[str, Any]:
    """What `write_note` wrote; empty if it cannot be read."""
    if not os.path.isfile(path):  # a pipe, say, would keep its reader waiting
        return {}
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[str | None]:
    """Hold the lock that this file stands for; yields None, or, if somebody else holds it and `wait` is false, who.

    While the lock is held, the file says who holds it (host, process, since when), unless it is another user's and cannot be replaced.
    Its holder may delete the file. Raises UserError if it cannot be written.
    """
    me = f"host {socket.gethostname()}, process {os.getpid()}, since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
    if identity := process_identity(os.getpid()):
        me += f"; {identity}"
    try:
        descriptor, holder = _open_and_lock(path, wait)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"{path}: cannot lock this file ({error.strerror})") from None
        with _lock_without_flock(path.with_suffix(".owner"), me, wait) as holder:
            yield holder
        return
    try:
        if holder is None:
            with contextlib.suppress(OSError):  # on a full disk the text is missing, but the lock is there
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, me.encode(), 0)
        yield holder
    finally:
        if holder is None:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
        os.close(descriptor)


def lock_holder(path: Path) -> str | None:
    """Who holds the lock that this file stands for, as in `lock`; None if nobody does. Whoever asks does not get in the way of `lock`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _named_in(descriptor) or "unknown" if _is_locked(descriptor) else None
    except OSError:
        return _owner(path.with_suffix(".owner"))
    finally:
        os.close(descriptor)


def _open_and_lock(path: Path, wait: bool) -> tuple[int, str | None]:
    """The open file of a lock, and who else holds it; None: we do. Raises UserError if it cannot be opened, OSError if not locked."""
    while True:
        can_write = True
        try:
            make_folder(path.parent)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except PermissionError:
                if not path.exists():
                    raise
                can_write = False  # another user's: to lock it, it is enough to read it, but on NFS
                descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot write this file ({_reason(error, path)})") from None
        try:
            share(descriptor, path.parent)
            holder = _flock(descriptor, wait)
            if holder is None and not can_write:
                with contextlib.suppress(OSError):
                    path.unlink()  # nobody holds it; ours takes its place
            if holder is not None or _is_file(descriptor, path):
                return descriptor, holder
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EBADF and not can_write:
                raise UserError(f"{path}: cannot write this file (it is another user's; its owner can allow it: chmod g+w)") from None
            raise
        os.close(descriptor)  # it was deleted meanwhile


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _flock(descriptor: int, wait: bool, patience: float = 2.0) -> str | None:
    """Lock an open file and return None, or return who has it locked; who that is may take him up to `patience` seconds to say."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return None
        except BlockingIOError:
            if _is_locked(descriptor):  # and not only asked about
                holder = _named_in(descriptor)
                if holder or time.monotonic() > deadline:
                    return holder or "unknown"
        time.sleep(0.02)


def _is_locked(descriptor: int) -> bool:
    """Whether some process holds the lock of this open file. Several can ask this at the same time."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def _named_in(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode(errors="replace").partition(";")[0].strip()


@contextlib.contextmanager
def _lock_without_flock(path: Path, me: str, wait: bool) -> Iterator[str | None]:
    """A lock by the existence of a file, for file systems that have no other."""
    for attempt in itertools.count():
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            break
        except FileExistsError:
            holder = _owner(path)
            if holder is None:
                path.unlink(missing_ok=True)
            elif not wait:
                yield holder
                return
            else:
                if attempt == 100:
                    warn(f"{path}: still waiting for {holder}")
                time.sleep(0.1)
    with contextlib.suppress(OSError):
        share(descriptor, path.parent)
        os.write(descriptor, me.encode())
    try:
        yield None
    finally:
        if _is_file(descriptor, path):  # else somebody deleted it, and it may be another's now
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _owner(path: Path) -> str | None:
    """Who holds the lock that is the existence of this file, and what to do if he is gone; None if nobody does."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError:
        text = ""
    return None if _is_gone(text) else f"{text.partition(';')[0].strip() or 'unknown'} (if that process is gone, delete {path})"


def _is_gone(text: str) -> bool:
    """Whether it is certain that the process that wrote this text of a lock has ended: its number is nobody's, or another's."""
    match = re.match(r"host .+, process (\d+), since [^;]*; ((.+), start \d+)$", text)
    if match is None or match[3] != _numbering():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's process
    return process_identity(int(match[1])) not in (match[2], "")


def process_identity(process: int) -> str:
    """What a process alone has, of all that ever have its number, here or elsewhere; empty if it has ended, or that cannot be seen."""
    numbering = _numbering()
    try:
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()  # from the third on: proc(5)
        return f"{numbering}, start {fields[19]}" if numbering and fields[0] not in "ZX" else ""
    except (OSError, IndexError):
        return ""


def _numbering() -> str:
    """What process numbers mean here: this boot of this machine, and the namespace; empty where that cannot be seen, as on macOS."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # what is mounted there is another namespace's
            return ""
        return f"boot {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}, {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
