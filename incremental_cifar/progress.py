"""What a run shows of itself while it trains: a bar or lines of text on the terminal, and a small file for those who look from outside."""

import os
import socket
import sys
import time

from tqdm import tqdm

from incremental_cifar.config import Config
from incremental_cifar.learning_curves import STEPS_PER_WINDOW, LearningCurves
from incremental_cifar.run_files import RunFiles

# A training image costs a forward pass and a backward pass of twice its work; an evaluated image, a forward pass.
WORK_PER_TRAINING_IMAGE = 3
SECONDS_BETWEEN_REPORTS = 1.0  # at least, of the file that says how far a run is


def work_before(config: Config, epoch: int) -> int:
    """Work of a run's first so many epochs, in forward passes of an image."""
    images_per_class = WORK_PER_TRAINING_IMAGE * config.train_images_per_class
    images_per_class += config.validation_images_per_class + config.test_images_per_class
    task, epoch_of_task = divmod(epoch, config.epochs_per_task)
    classes = config.epochs_per_task * sum(map(config.num_classes_seen, range(task))) + epoch_of_task * config.num_classes_seen(task)
    return classes * images_per_class


class Progress:
    """The progress of one run from an epoch on. is_verbose: lines instead of a bar.

    label: begins every line. position: of the bar, among those of the runs in this process.
    """

    def __init__(
        self, files: RunFiles, config: Config, curves: LearningCurves, first_epoch: int, is_verbose: bool, label: str, position: int
    ):
        self.files, self.config, self.curves = files, config, curves
        self.first_epoch, self.first_step = first_epoch, 0  # of this process; of this epoch
        self.is_verbose, self.label = is_verbose, label
        self.start = time.monotonic()
        self.last_report = 0.0
        self.report(first_epoch, at_once=True)
        # It counts work, so that its remaining time holds although epochs grow with the number of classes.
        self.bar = tqdm(
            total=work_before(config, config.num_epochs),
            initial=work_before(config, first_epoch),
            bar_format="{desc}{percentage:5.1f}% |{bar}| {elapsed}, {remaining} left{postfix}",
            smoothing=0.05,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; in a log, every state of the bar is a line
            disable=is_verbose,
            position=position,
            dynamic_ncols=True,
        )

    def begin_epoch(self, task: int, epoch: int, stepsize: float) -> None:
        self.first_step = self.config.steps_before(epoch)
        num_classes = self.config.num_classes_seen(task)
        text = f"index {self.files.index}, task {task + 1}/{self.config.num_tasks} ({num_classes} classes)"
        self.bar.set_description(text, refresh=False)
        self.say(f"Epoch {epoch + 1}/{self.config.num_epochs}: task {task + 1}, {num_classes} classes, step size {stepsize:g}")

    def end_step(self, num_steps: int, num_images: int) -> None:
        """After the epoch's first so many steps. num_images: of the last of them."""
        self.bar.update(WORK_PER_TRAINING_IMAGE * num_images)
        done = self.first_step + num_steps
        if self.is_verbose and done % STEPS_PER_WINDOW == 0:
            self.say(f"\tstep {num_steps}: training accuracy {self.curves.window_accuracy(done - 1):.4f}")

    def end_evaluation(self, num_images: int) -> None:
        self.bar.update(num_images)

    def end_epoch(self, epoch: int) -> None:
        """After the epoch's evaluation; its values are in the curves."""
        values = {name: values[epoch] for name, values in self.curves.per_epoch.items()}
        self.bar.set_postfix_str(f"epoch {epoch + 1}, test accuracy {values['test_accuracy_per_epoch']:.3f}", refresh=False)
        if self.is_verbose:  # it waits for the device
            self.say(f"\ttraining loss: {self.curves.epoch_values(epoch, self.config)['train_loss_per_epoch']:.4f}")
        self.say(f"\tvalidation accuracy: {values['validation_accuracy_per_epoch']:.4f}, loss: {values['validation_loss_per_epoch']:.4f}")
        self.say(f"\ttest accuracy: {values['test_accuracy_per_epoch']:.4f}, loss: {values['test_loss_per_epoch']:.4f}")
        self.say(f"\tepoch run time: {values['epoch_runtime']:.2f} s")

    def say(self, text: str) -> None:
        if self.is_verbose:
            print(self.label + text, flush=True)

    def report(self, num_epochs: int, at_once: bool = False) -> None:
        """Write `progress/index-K.json`, at most once a second unless verbose: how far, how accurate, how long still (seconds), where."""
        now = time.monotonic()
        if not (at_once or self.is_verbose) and now - self.last_report < SECONDS_BETWEEN_REPORTS:
            return
        self.last_report = now
        config = self.config
        done, before = work_before(config, num_epochs), work_before(config, self.first_epoch)
        left = (now - self.start) / (done - before) * (work_before(config, config.num_epochs) - done) if done > before else None
        if left is not None:
            self.say(f"\ttime left: {tqdm.format_interval(left)}")
        job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        self.files.save_progress(
            {
                "epoch": num_epochs,
                "num_epochs": config.num_epochs,
                "task": min(num_epochs // config.epochs_per_task + 1, config.num_tasks),
                "num_tasks": config.num_tasks,
                "test_accuracy": float(self.curves.per_epoch["test_accuracy_per_epoch"][num_epochs - 1]) if num_epochs else None,
                "seconds_left": left,
                "host": socket.gethostname(),
                "process": os.getpid(),
                "slurm_job": "_".join(job) if all(job) else os.environ.get("SLURM_JOB_ID"),
                "time": time.time(),
            }
        )
