"""What the scripts' command lines have in common: indices, errors of one line with exit status 2, signals that ask a run to stop."""

import argparse
import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from incremental_cifar.config import NUM_SEEDS, UserError


class OneLineArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows the arguments)")


def parse_indices(text: str, option: str = "--experiment-index") -> list[int]:
    """The indices of an option, as in "3", "0-3" or "0,2,5-7": sorted, without repeats. Raises UserError."""
    indices: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise UserError(
                f'{option}: got "{shown}"; it must be an integer from 0 to {NUM_SEEDS - 1}, a range as in 0-3, or several as in 0,2,5-7'
            )
        if len(indices) < NUM_SEEDS:  # else all are there: what follows need only be checked
            indices.update(range(first, last + 1))
    return sorted(indices)


class Terminal(io.FileIO):
    """A terminal's output; once its connection is lost it takes everything and shows nothing, so that this does not end a run."""

    def write(self, content: bytes) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(content)


def run_script(main: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None = None) -> int:
    """Run a script's `main`; turn a UserError, and what the system refuses, into one line on standard error and exit status 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            if stream.isatty():
                buffer = io.BufferedWriter(Terminal(stream.fileno(), "w", closefd=False))
                stream = io.TextIOWrapper(buffer, encoding=stream.encoding, line_buffering=True)
                setattr(sys, name, stream)
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not end a run
    try:
        with memory_errors():
            return main(arguments)
    except UserError as error:
        show_error(error)
        return 2
    except BrokenPipeError:  # whoever read the output, as `| head` does, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        show_error(error)
        return 2
    except KeyboardInterrupt:  # outside `stop_requests`: before the work began, or after it
        return 128 + signal.SIGINT


# How PyTorch and its oneDNN say, in a RuntimeError, that there is no memory; and Python, that there is none for a thread.
NO_MEMORY = (
    "out of memory|not enough memory|(can't|[Cc]annot) allocate memory|bad_alloc|could not (create|execute) a (primitive|memory object)|"
    "can't start new thread"
)


def is_memory_full(error: BaseException) -> bool:
    """Whether an error says that there is no memory, a GPU's or this machine's."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)) is not None)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn into a UserError what Python, NumPy and PyTorch raise where memory is full, and what only follows from that."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not is_memory_full(cause):
            cause = cause.__context__
        if cause is None:
            raise
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        if "CUDA" in reason:
            text = f"the GPU's memory is full ({reason}); end what else runs there, or use another device or precision=bf16"
        else:
            text = (
                f"this machine's memory, or what a process may have of it, is full ({reason}); end what else runs here, or raise its limit"
            )
        raise UserError(text) from None


def show_error(error: Exception, where: str = "") -> None:
    """Print a UserError, or what the system refuses, as one line on standard error. where: begins the line, as in "index 3: "."""
    is_about_a_file = isinstance(error, OSError) and error.filename is not None
    what = f"{error.filename}: {error.strerror}" if is_about_a_file else str(error)
    print("error: " + " ".join((where + what).split()), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a one-line warning on standard error, above progress bars if there are any."""
    show = sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print
    show("warning: " + message, file=sys.stderr)


# What asks a run to stop after its epoch: Ctrl-C, the wishes of batch systems, a lost connection.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopRequest:
    """Whether somebody asked this process to stop, and with which signal."""

    signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.signal_number).name

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, and so on, as shells report it."""
        return 128 + self.signal_number


def status_text(status: int) -> str:
    """How a process ended, in words; empty if well. status: as `subprocess` has it, negative if a signal ended it."""
    number = -status if status < 0 else status - 128 if status - 128 in STOP_SIGNALS else 0
    if number == 0:
        return f"exit status {status}" if status else ""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{'stopped' if number in STOP_SIGNALS else 'killed'} by {name}{' (perhaps memory was full)' * (number == signal.SIGKILL)}"


SECONDS_OF_ONE_SIGNAL = 2.0  # Slurm sends SIGTERM twice, milliseconds apart, when it pre-empts a job


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside this context, the first of STOP_SIGNALS is noted and answered in a line; the second ends the process.

    Within two seconds of the first signal, others are taken for the same request; a second Ctrl-C never is. A signal that was ignored
    before, as nohup has it with SIGHUP, stays so; but not SIGINT, which a shell has its background processes ignore.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    handled = [number for number in STOP_SIGNALS if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
    noted_at = 0.0

    def note(signal_number: int, frame: object) -> None:
        nonlocal noted_at
        if not request:
            request.signal_number, noted_at = signal_number, time.monotonic()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it at once
            hint = "; Ctrl-C again ends it now" if signal_number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # the terminal may be gone; print is not for signal handlers
                os.write(2, f"\n{request.name}: stopping after this epoch{hint}\n".encode())
        elif time.monotonic() - noted_at > SECONDS_OF_ONE_SIGNAL:
            signal.signal(signal_number, signal.SIG_DFL)
            os.kill(os.getpid(), signal_number)

    previous = {number: signal.signal(number, note) for number in handled}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
