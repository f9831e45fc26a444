"""Several runs in one process, each in a thread of its own: what one leaves free of a GPU, the others fill."""

import contextlib
import threading
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from incremental_cifar.command_line import memory_errors, show_error, stop_requests
from incremental_cifar.config import MOST_RUNS_PER_GPU, UserError

if TYPE_CHECKING:
    from incremental_cifar_experiment import IncrementalCIFARExperiment


def run_side_by_side(experiments: "Sequence[IncrementalCIFARExperiment]") -> int:
    """Train several runs of one config in this process, each with the results it has alone; return the exit status.

    Every run has a thread, and on a GPU a stream of its own, so that its kernels fill what the others leave free. A run that fails is
    reported in a line and the others go on. The status is 0 if all runs are finished, 2 if one failed, else that of the signal.
    Raises UserError if there are too many for a GPU.
    """
    statuses = [0]

    def report(failures: dict[int, Exception]) -> None:
        show_failures(failures)
        statuses.extend(2 for _ in failures)

    def train(experiment: "IncrementalCIFARExperiment") -> None:
        # Both of these are a thread's own.
        try:
            torch.set_num_threads(num_threads)
            stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()
            with locks[experiment.run_index], stream:
                experiment.run_tasks(stop)
        except (UserError, OSError) as error:
            report({experiment.run_index: error})
        except SystemExit as leaving:
            statuses.append(leaving.code)
        except BaseException:  # our bug
            traceback.print_exc()
            statuses.append(1)

    device = experiments[0].device
    if device.type == "cuda" and len(experiments) > MOST_RUNS_PER_GPU:
        raise UserError(
            f"--experiment-index: {len(experiments)} runs; at most {MOST_RUNS_PER_GPU} can share a GPU in one process; start another one"
        )
    num_threads = torch.get_num_threads()
    with contextlib.ExitStack() as everything:
        failures: dict[int, Exception] = {}
        ready: list[IncrementalCIFARExperiment] = []
        locks = {experiment.run_index: everything.enter_context(contextlib.ExitStack()) for experiment in experiments}
        for experiment in experiments:
            experiment.share_terminal(position=len(ready))
            try:
                # One after the other, before any trains: nothing else may happen on a GPU while a CUDA graph is recorded.
                if experiment.prepare(locks[experiment.run_index], images=ready[0].images if ready else None):
                    ready.append(experiment)
            except (UserError, OSError) as error:
                failures[experiment.run_index] = error
        report(failures)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the threads' streams do not wait for this one
        stop = everything.enter_context(stop_requests())
        threads = [threading.Thread(target=train, args=(experiment,)) for experiment in ready]
        started = []
        for experiment, thread in zip(ready, threads, strict=True):
            try:
                with memory_errors():
                    thread.start()
                started.append(thread)
            except UserError as error:
                report({experiment.run_index: error})
        for thread in started:
            thread.join()
    return next((status for status in (1, 2) if status in statuses), max(statuses))


def show_failures(failures: dict[int, Exception]) -> None:
    """Say of every index that cannot go on why, in one line for all that have the same reason."""
    indices: dict[str, list[int]] = {}
    for index, error in failures.items():
        indices.setdefault(str(error), []).append(index)
    for same in indices.values():
        show_error(failures[same[0]], where=f"index {', '.join(map(str, same))}: ")
