"""What a run measures while it trains: losses, accuracies and times, kept on the device during an epoch and read once at its end."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from incremental_cifar.config import NUM_CLASSES, STEPS_PER_WINDOW, Config


class Metric(NamedTuple):
    length: str  # at the paper's sizes
    dtype: str
    meaning: str


# The arrays of a finished run. A run in progress has, as of its last checkpoint, those of its epochs so far.
METRICS = {
    "train_loss_per_checkpoint": Metric("42,000", "float32", "mean training loss over 25 steps, before each step's update"),
    "train_accuracy_per_checkpoint": Metric("42,000", "float32", "mean training accuracy over 25 steps, a fraction"),
    "epoch_runtime": Metric("4,000", "float32", "time of an epoch's training, seconds"),
    "test_loss_per_epoch": Metric("4,000", "float32", "mean loss on the test images of the classes seen so far"),
    "test_accuracy_per_epoch": Metric("4,000", "float32", "accuracy on them, a fraction"),
    "test_evaluation_runtime": Metric("4,000", "float32", "time of that evaluation, seconds"),
    "validation_loss_per_epoch": Metric("4,000", "float32", "mean loss on the validation images of the classes seen so far"),
    "validation_accuracy_per_epoch": Metric("4,000", "float32", "accuracy on them, a fraction"),
    "validation_evaluation_runtime": Metric("4,000", "float32", "time of that evaluation, seconds"),
    "class_order": Metric("100", "int64", "CIFAR's labels in the order in which this run meets them"),
}
PER_EPOCH_METRICS = tuple(name for name in METRICS if name.endswith(("_per_epoch", "_runtime")))


def array_lengths(num_steps: int, num_epochs: int) -> dict[str, int]:
    """The lengths of METRICS in a finished run of so many steps and epochs."""
    lengths = dict.fromkeys(METRICS, num_steps // STEPS_PER_WINDOW)
    return lengths | dict.fromkeys(PER_EPOCH_METRICS, num_epochs) | {"class_order": NUM_CLASSES}


class LearningCurves:
    """The curves of one run: a value per step on the device, and values per epoch on the host.

    A released name that misleads: `train_loss_per_checkpoint` holds means over windows of 25 steps; a checkpoint, everywhere else, is
    what a run resumes from. Windows are counted over the whole run, so where an epoch has no multiple of 25 steps, one may reach into
    the next epoch; steps that fill no window at the end of the run are not stored. names: of what the run's algorithms count per epoch.
    """

    def __init__(self, num_steps: int, num_epochs: int, device: torch.device, names: Iterable[str] = ()):
        self.step_losses = torch.zeros(num_steps, device=device)
        self.step_accuracies = torch.zeros(num_steps, device=device)
        self.per_epoch = {name: np.full(num_epochs, np.nan, dtype=np.float32) for name in (*PER_EPOCH_METRICS, *names)}

    def record_epoch(self, epoch: int, **values: float) -> None:
        """Store an epoch's values under the metrics' names; `epoch` counts from 0."""
        for name, value in values.items():
            self.per_epoch[name][epoch] = value

    def window_accuracy(self, last_step: int) -> float:
        """Mean training accuracy over the 25 steps up to `last_step`; waits for the device."""
        return self.step_accuracies[last_step + 1 - STEPS_PER_WINDOW : last_step + 1].mean().item()

    def epoch_values(self, epoch: int, config: Config) -> dict[str, float]:
        """What was measured in an epoch, of its steps the means, without what is NaN; waits for the device."""
        of_steps = {"train_loss_per_epoch": self.step_losses, "train_accuracy_per_epoch": self.step_accuracies}
        values = {name: each[config.steps_before(epoch) : config.steps_before(epoch + 1)].mean().item() for name, each in of_steps.items()}
        return values | {name: float(values[epoch]) for name, values in self.per_epoch.items() if not np.isnan(values[epoch])}

    def arrays(self, num_epochs: int, num_steps: int) -> dict[str, np.ndarray]:
        """The metrics, as they are stored, of the first so many epochs and steps of the run."""
        return {
            "train_loss_per_checkpoint": window_means(self.step_losses[:num_steps]),
            "train_accuracy_per_checkpoint": window_means(self.step_accuracies[:num_steps]),
            **{name: values[:num_epochs] for name, values in self.per_epoch.items()},
        }

    def state_dict(self, num_epochs: int, num_steps: int) -> dict[str, Any]:
        """The curves of the first so many epochs and steps, as tensors."""
        return {
            "step_losses": self.step_losses[:num_steps].clone(),
            "step_accuracies": self.step_accuracies[:num_steps].clone(),
            "per_epoch": {name: torch.from_numpy(values[:num_epochs].copy()) for name, values in self.per_epoch.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill in the curves of a stored state, in place; a metric that it does not hold stays NaN up to there; others are passed over."""
        for mine, stored in ((self.step_losses, state["step_losses"]), (self.step_accuracies, state["step_accuracies"])):
            mine[: len(stored)] = stored
        for name, values in state["per_epoch"].items():
            if name in self.per_epoch:
                self.per_epoch[name][: len(values)] = values.numpy()


def window_means(values: torch.Tensor) -> np.ndarray:
    """Means of a value per step over windows of 25 steps: (steps // 25,) float32."""
    num_windows = len(values) // STEPS_PER_WINDOW
    windows = values[: num_windows * STEPS_PER_WINDOW].cpu().numpy().reshape(num_windows, STEPS_PER_WINDOW)
    return windows.mean(axis=1, dtype=np.float64).astype(np.float32)
