"""A run's record in a tracker, if one is asked for; its package is imported only then.

    with Tracking("tensorboard", files, config, curves, label="") as tracking:
        tracking.update(num_epochs)                       # after every epoch

Another tracker is a class with the three methods of those below, and a row in TRACKERS, under the name that pip knows its package by.
"""

import importlib.util
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from incremental_cifar.command_line import warn
from incremental_cifar.config import Config, UserError
from incremental_cifar.learning_curves import LearningCurves
from incremental_cifar.run_files import RunFiles
from incremental_cifar.safe_files import make_folder, read_note, write_note

PROJECT = "incremental-cifar"
SECONDS_TO_FINISH = 60  # for what W&B has not sent yet when a run ends


class Record(NamedTuple):
    """What a tracker is told of a run."""

    folder: Path  # for its files
    experiment: str
    index: int
    key: str  # the run's own; another after --restart
    config: dict[str, Any]


class TensorBoard:
    """Event files, which `tensorboard --logdir results` shows."""

    def begin(self, record: Record) -> int:
        """Begin a record, or go on with that of this key; return how many epochs it holds."""
        from torch.utils.tensorboard import SummaryWriter

        for path in record.folder.glob("events.out.tfevents.*"):  # a killed process may have written more than the run still has
            path.unlink()
        self.writer = SummaryWriter(record.folder, purge_step=0)  # whoever looks at these now forgets them
        self.writer.add_text("config", f"```\n{json.dumps(record.config, indent=1)}\n```")
        return 0

    def record(self, epoch: int, values: dict[str, float]) -> None:
        """Add the values of an epoch, counted from 1, by the names of their metrics."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def end(self) -> None:
        """What there is to do when the process is done with the run."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; its own variables (WANDB_MODE, WANDB_PROJECT, ...) count."""

    def begin(self, record: Record) -> int:
        import wandb

        folder = os.environ.get("WANDB_DIR", record.folder)
        for path in Path(folder).glob(f"wandb/offline-run-*-{record.key}"):  # the one begun here holds all that is in these
            shutil.rmtree(path)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=record.experiment,
            name=f"{record.experiment} {record.index}",
            id=record.key,
            resume="allow",
            reinit="create_new",  # runs side by side have one each
            config=record.config,
            dir=folder,
            settings=wandb.Settings(console="off", finish_timeout=SECONDS_TO_FINISH),
        )
        return max(self.run.step - 1, 0)  # steps are epochs; offline, none are there yet

    def record(self, epoch: int, values: dict[str, float]) -> None:
        self.run.log({"epoch": epoch, **values}, step=epoch)

    def end(self) -> None:
        self.run.finish()


class Trackio:
    """A run of Trackio, on this machine unless its own variables (TRACKIO_SPACE_ID, ...) say otherwise."""

    def begin(self, record: Record) -> int:
        import trackio

        name = f"{record.experiment} {record.index} {record.key}"  # by which it goes on
        self.run = trackio.init(PROJECT, name, group=record.experiment, config=record.config, resume="allow", embed=False)
        return max(self.run._next_step - 1, 0)  # nothing public says it

    def record(self, epoch: int, values: dict[str, float]) -> None:
        self.run.log(values, step=epoch)

    def end(self) -> None:
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}
TRACKER_NAMES = ", ".join(TRACKERS)


def tracker_name(name: str) -> str:
    """Return the name of a tracker; raise UserError if there is none of that name, or if its package is not installed."""
    if name not in TRACKERS:
        raise UserError(f'--track: got "{name}"; it must be one of {TRACKER_NAMES}')
    if importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name}: this package is not installed; python -m pip install {name}")
    return name


class Tracking:
    """The record of a run in the tracker of this name; None: there is none.

    Every epoch is there once, in order: those that a record holds are passed over where a resumed run repeats them, since they are the same
    numbers, and those that it lacks come from the curves. What a tracker raises is said once, and ends the record until the run is resumed.
    """

    def __init__(self, name: str | None, files: RunFiles, config: Config, curves: LearningCurves, label: str):
        self.name, self.config, self.curves, self.label = name, config, curves, label
        self.tracker: Any = None
        self.num_epochs = 0  # that the record holds
        if name is None:
            return
        folder = files.folder / "tracking" / f"index-{files.index}"
        key = read_note(folder / f"{name}.json").get("key") or secrets.token_hex(4)
        try:
            make_folder(folder)
            write_note(folder / f"{name}.json", {"key": key})
            tracker = TRACKERS[name]()
            settings = {"index": files.index, **config.to_dict()}
            self.num_epochs = tracker.begin(Record(folder, files.folder.name, files.index, key, settings))
            self.tracker = tracker
        except Exception as error:  # of whatever kind a package of others raises
            self.give_up(error)

    def update(self, num_epochs: int) -> None:
        """Add what the record lacks of the run's first so many epochs."""
        try:
            while self.tracker is not None and self.num_epochs < num_epochs:
                steps = slice(*map(self.config.steps_before, (self.num_epochs, self.num_epochs + 1)))
                self.tracker.record(self.num_epochs + 1, self.curves.epoch_values(self.num_epochs, steps))
                self.num_epochs += 1
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        self.tracker = None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warn(f"{self.label}--track {self.name}: {reason}; the run goes on without it, and adds what is missing when it is resumed")

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.tracker is not None:
                self.tracker.end()
        except Exception as error:
            self.give_up(error)
