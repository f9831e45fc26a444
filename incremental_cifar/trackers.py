"""A run's record in a tracker, if one is asked for; its package is imported only then.

    with Tracking("tensorboard", files, config, curves, label="") as tracking:
        tracking.update(num_epochs)                       # after every epoch

Another tracker is a class with the three methods of those below, and a row in TRACKERS, under the name that pip knows its package by.
"""

import importlib.util
import json
import os
import secrets
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
    """What a tracker keeps of one run, in one or several processes."""

    folder: Path  # for its files
    experiment: str
    index: int
    key: str  # tells it apart from those of other runs, and of this one before --restart
    num_epochs: int  # that it holds already
    config: dict[str, Any] | None  # None: it holds that already


class TensorBoard:
    """Event files, which `tensorboard --logdir results` shows."""

    def __init__(self, record: Record):
        from torch.utils.tensorboard import SummaryWriter

        # Readers pass over what an earlier process wrote of the epochs from this one on.
        self.writer = SummaryWriter(record.folder, purge_step=record.num_epochs and record.num_epochs + 1)
        if record.config is not None:
            self.writer.add_text("config", f"```\n{json.dumps(record.config, indent=1)}\n```")

    def record(self, epoch: int, values: dict[str, float]) -> None:
        """The values of an epoch, counted from 1, by the names of their metrics."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def end(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; its own variables (WANDB_MODE, WANDB_PROJECT, ...) count."""

    def __init__(self, record: Record):
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=record.experiment,
            name=f"{record.experiment} {record.index}",
            id=record.key,
            resume="allow",
            reinit="create_new",  # runs side by side have one each
            config=record.config,
            dir=os.environ.get("WANDB_DIR", record.folder),
            settings=wandb.Settings(console="off", finish_timeout=SECONDS_TO_FINISH),
        )

    def record(self, epoch: int, values: dict[str, float]) -> None:
        self.run.log({"epoch": epoch, **values}, step=epoch)

    def end(self) -> None:
        self.run.finish()


class Trackio:
    """A run of Trackio, on this machine unless its own variables (TRACKIO_SPACE_ID, ...) say otherwise."""

    def __init__(self, record: Record):
        import trackio

        name = f"{record.experiment} {record.index} {record.key}"  # by which a run goes on
        self.run = trackio.init(PROJECT, name, group=record.experiment, config=record.config, resume="allow", embed=False)

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

    A note in the run's folder says how many epochs a record holds: a resumed run passes over those that it repeats, since they are the same
    numbers, and adds, from its curves, those that the record lacks. What a tracker raises is said once, and ends the record until then.
    """

    def __init__(self, name: str | None, files: RunFiles, config: Config, curves: LearningCurves, label: str):
        self.name, self.config, self.curves, self.label = name, config, curves, label
        folder = files.folder / "tracking" / f"index-{files.index}"
        self.note_file = folder / f"{name}.json"
        note = read_note(self.note_file)
        self.note = {"key": note.get("key", secrets.token_hex(4)), "num_epochs": note.get("num_epochs", 0)}
        self.tracker: Any = None
        if name is not None:
            settings = None if self.note["num_epochs"] else {"index": files.index, **config.to_dict()}
            try:
                make_folder(folder)
                self.tracker = TRACKERS[name](Record(folder, files.folder.name, files.index, **self.note, config=settings))
                write_note(self.note_file, self.note)
            except Exception as error:  # of whatever kind a package of others raises
                self.give_up(error)

    def update(self, num_epochs: int) -> None:
        """Add what the record lacks of the run's first so many epochs."""
        try:
            while self.tracker is not None and self.note["num_epochs"] < num_epochs:
                epoch = self.note["num_epochs"]
                steps = slice(self.config.steps_before(epoch), self.config.steps_before(epoch + 1))
                self.tracker.record(epoch + 1, self.curves.epoch_values(epoch, steps))
                self.note["num_epochs"] += 1
                write_note(self.note_file, self.note)
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        self.tracker = None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warn(f"{self.label}--track {self.name}: {reason}; the run goes on without it, and the same command adds what is missing later")

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.tracker is not None:
                self.tracker.end()
        except Exception as error:
            self.give_up(error)
