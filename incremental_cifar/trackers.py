"""A run's record in the tracker that its setting `track` names; docs/numbers.md says what there is to know, and how to add another one."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from incremental_cifar.command_line import warn
from incremental_cifar.config import Config
from incremental_cifar.learning_curves import LearningCurves
from incremental_cifar.run_files import RunFiles
from incremental_cifar.safe_files import read_note, write_note


class TensorBoard:
    def begin(self, folder: Path, key: str, config: dict[str, Any]) -> int | None:
        """Begin a record, or go on with that of this key, which no other run has; return how many epochs it holds, if any."""
        from torch.utils.tensorboard import SummaryWriter

        for path in folder.glob("events.out.tfevents.*"):  # of a killed process, which may have come further than the run
            path.unlink()
        # What its thread raises, its methods raise too.
        threading.excepthook = lambda failed: "AsyncWriter" in type(failed.thread).__name__ or threading.__excepthook__(failed)
        self.writer = SummaryWriter(folder, purge_step=0)  # whoever looks at those files now forgets them
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

    def record(self, epoch: int, values: dict[str, float]) -> None:
        """Add what was measured in an epoch, counted from 1, by metric."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def end(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def begin(self, folder: Path, key: str, config: dict[str, Any]) -> int:
        import wandb

        (folder / "wandb").mkdir(exist_ok=True)  # where that fails, W&B would write elsewhere
        mode = None if os.environ.get("WANDB_MODE") in ("offline", "disabled") or wandb.login(prompt=False) else "offline"  # it would ask
        for path in folder.glob(f"wandb/offline-run-*-{key}") if os.environ.get("WANDB_MODE") != "disabled" else ():
            shutil.rmtree(path)  # what is in these goes into the one begun here
        project, group = os.environ.get("WANDB_PROJECT", "incremental-cifar"), config["experiment_name"]
        how = wandb.Settings(run_id=key, resume="allow", reinit="create_new", run_group=group, console="off", quiet=True, finish_timeout=60)
        self.run = wandb.init(project=project, name=f"{group} {config['index']}", config=config, dir=folder, mode=mode, settings=how)
        return max(self.run.step - 1, 0)  # steps are epochs; offline, there are none yet

    def record(self, epoch: int, values: dict[str, float]) -> None:
        self.run.log({"epoch": epoch, **values}, step=epoch)

    def end(self) -> None:
        self.run.finish()


class Trackio(WeightsAndBiases):
    def begin(self, folder: Path, key: str, config: dict[str, Any]) -> int:
        import trackio

        name, group = f"{config['experiment_name']} {config['index']} {key}", config["experiment_name"]
        self.run = trackio.init("incremental-cifar", name, group=group, config=config, resume="allow", embed=False)
        return max(self.run._next_step - 1, 0)  # nothing public says it


class Tracking:
    """The record of a run in its tracker, if it has one: every epoch once, also where a resumed run repeats it or it was lost."""

    def __init__(self, files: RunFiles, config: Config, curves: LearningCurves, label: str):
        self.config, self.curves, self.label = config, curves, label
        trackers = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}
        self.tracker: Any = trackers[config.track]() if config.track else None
        if self.tracker is not None:
            note = files.folder / "tracking" / f"index-{files.index}" / f"{config.track}.json"
            key = read_note(note).get("key") or os.urandom(4).hex()
            write_note(note, {"key": key})
            self.num_epochs = self.call("begin", note.parent, key, {"index": files.index, **config.to_dict()}) or 0

    def update(self, num_epochs: int) -> None:
        """Add what the record lacks of the run's first so many epochs."""
        while self.tracker is not None and self.num_epochs < num_epochs:
            self.call("record", self.num_epochs + 1, self.curves.epoch_values(self.num_epochs, self.config))
            self.num_epochs += 1

    def close(self) -> None:
        self.call("end")

    def call(self, method: str, *arguments: Any) -> Any:
        """What the tracker answers. What it raises is said once, and ends the record; a resumed run adds what it lacks."""
        try:
            return getattr(self.tracker, method)(*arguments) if self.tracker is not None else None
        except (Exception, SystemExit) as error:  # of whatever kind a package of others raises
            self.tracker, reason = None, " ".join(str(error).split())[:200] or type(error).__name__
            warn(f"{self.label}--track {self.config.track}: {reason}; the run goes on without it")
