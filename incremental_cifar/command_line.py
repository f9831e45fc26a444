"""What the scripts' command lines have in common: errors of one line with exit status 2, and signals that ask a run to stop."""

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from incremental_cifar.config import UserError


class OneLineArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows the arguments)")


def run_script(main: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None = None) -> int:
    """Run a script's `main`; turn a UserError, and what the system refuses, into one line on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not end a run
    try:
        return main(arguments)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:  # whoever read the output, as `| head` does, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        print("error: " + " ".join(what.split()), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # outside `stop_requests`: before the work began, or after it
        return 128 + signal.SIGINT


def warn(message: str) -> None:
    """Print a one-line warning on standard error."""
    print("warning: " + message, file=sys.stderr, flush=True)


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
        """130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1, as shells report it."""
        return 128 + self.signal_number


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside this context, the first SIGINT, SIGTERM or SIGUSR1 (Slurm's warning) is noted; the second ends the process."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def note(signal_number: int, frame: object) -> None:
        request.signal_number = signal_number
        for number in handled:
            signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, note) for number in handled}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
