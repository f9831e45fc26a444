"""One run of incremental CIFAR-100: a config and an index in; learning curves, models and checkpoints out.

    python incremental_cifar_experiment.py --config cfg/continual_backpropagation.json --experiment-index 0

Trains a ResNet-18 on the first 5, 10, ..., 100 classes of a random class order, 200 epochs each (`cfg/README.md` lists all settings).
The same command starts the run, resumes it after an interruption, and says so when it is finished. What appears in
results/<experiment_name>/ is described in `incremental_cifar/run_files.py` and in the README.

Source: Dohare et al., "Loss of plasticity in deep continual learning", Nature 632 (2024), Methods, "Class-incremental CIFAR-100".
"""

import contextlib
import copy
import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # mlproj-manager loads this file from anywhere

import numpy as np
import torch
from mlproj_manager.experiments import Experiment
from torch import Tensor
from tqdm import tqdm

from incremental_cifar.cifar100 import ImageSet, load_images
from incremental_cifar.command_line import OneLineArgumentParser, StopRequest, run_script, stop_requests, warn
from incremental_cifar.config import FREE_KEYS, Config, UserError, differing_keys, load_config, make_config
from incremental_cifar.continual_backprop import ContinualBackprop
from incremental_cifar.learning_curves import STEPS_PER_WINDOW, LearningCurves
from incremental_cifar.resnet import ResNet18, build_network, initialise
from incremental_cifar.run_files import RunFiles
from incremental_cifar.seeds import Purpose, draw_class_order, experiment_seed, generator_for
from incremental_cifar.training import (
    WeightNoise,
    choose_device,
    device_name,
    evaluate,
    make_optimizer,
    momentum_buffers,
    set_arithmetic,
    set_stepsize,
    stepsize_at,
    train_one_epoch,
    train_step,
)

# What mlproj-manager adds to the settings of an experiment that it runs.
RUNNER_KEYS = {"index", "verbose", "debug", "plot_results", "runs", "relevant_parameters", "results_path"}

# A training image costs a forward pass and a backward pass of twice its work; an evaluated image, a forward pass.
WORK_PER_TRAINING_IMAGE = 3


@contextlib.contextmanager
def out_of_memory_is_a_user_error() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full ({str(error).splitlines()[0]}); end what else runs there, or use another device or precision=bf16"
        ) from None


class IncrementalCIFARExperiment(Experiment):
    """One run of the experiment: `run()` trains to the end, from the last checkpoint if there is one, and `store_results()` stores.

    exp_params: the settings of `Config`, by name. results_dir: the experiment's folder. run_index: 0 to 99,999; decides seed, class order
    and initial weights. verbose: print accuracies and times instead of showing a progress bar.
    Raises UserError, before anything is written, if the settings cannot be used or differ from those the stored run was started with.
    """

    def __init__(self, exp_params: dict[str, Any], results_dir: str, run_index: int, verbose: bool = True):
        # Experiment.__init__ is not called: it would overwrite the stored config, in place and before any check.
        folder = Path(os.path.abspath(results_dir))
        settings = {key: value for key, value in exp_params.items() if key not in RUNNER_KEYS}
        settings |= {"results_dir": str(folder.parent), "experiment_name": folder.name}
        config = make_config(settings, source="exp_params")
        self.config = config
        self.exp_params = config.to_dict()
        self.results_dir = str(folder)
        self.run_index = run_index
        self.verbose = verbose
        self.results_dict: dict[str, np.ndarray] = {}

        self.random_seed = experiment_seed(run_index)
        self.class_order = draw_class_order(self.random_seed)  # (100,)
        self.files = RunFiles(folder, run_index)
        self.device = choose_device(config.device)
        self.check_stored_config()
        self.is_finished = run_index in self.files.finished_indices()

    @out_of_memory_is_a_user_error()
    def run(self) -> None:
        """Train from the start, or from the last checkpoint, to the end of the last task.

        If Ctrl-C, SIGTERM or SIGUSR1 asks for it, ends the process after the current epoch, with a checkpoint and status 130, 143 or 138.
        Raises UserError if the loss is no longer finite.
        """
        nothing_to_do = f"Index {self.run_index} of {self.results_dir} is finished; nothing to do."
        if self.is_finished:
            print(nothing_to_do)
            return
        set_arithmetic(self.config.precision, self.config.deterministic)
        self.load_data()
        with self.files.locked(), stop_requests() as stop:
            # Again, now that nobody else can change it: another process may have started or finished the run since.
            self.check_stored_config()
            self.is_finished = self.run_index in self.files.finished_indices()
            if self.is_finished:
                print(nothing_to_do)
                return
            self.build_learner()
            first_epoch = self.start_or_resume()
            with self.make_progress_bar(first_epoch) as self.progress:
                self.train(first_epoch, stop)
            self.store_results()

    def train(self, first_epoch: int, stop: StopRequest) -> None:
        """The tasks and their epochs, from this epoch of the run (counted from 0) on."""
        config = self.config
        for task in range(first_epoch // config.epochs_per_task, config.num_tasks):
            classes = self.class_order[: config.num_classes_seen(task)]
            task_start, task_end = task * config.epochs_per_task, (task + 1) * config.epochs_per_task
            for epoch in range(max(first_epoch, task_start), task_end):
                stepsize = stepsize_at(epoch - task_start, config.epochs_per_task, config.stepsize)
                set_stepsize(self.optimizer, stepsize)
                self.describe_epoch(task, epoch, stepsize)
                self.train_epoch(epoch, classes, stepsize)
                validation_accuracy = self.evaluate_epoch(epoch, classes, stepsize)
                if config.early_stopping:
                    self.best_network.update(self.network, validation_accuracy)
                if epoch + 1 == task_end:
                    self.end_task(task)
                is_last = epoch + 1 == config.num_epochs
                is_stopping = bool(stop)  # asked once: a signal may come at any time
                if is_stopping or is_last or (epoch + 1) % config.epochs_per_checkpoint == 0:
                    self.save_checkpoint(epoch + 1)
                if is_stopping and not is_last:
                    self.leave(stop, epoch + 1)

    def store_results(self) -> None:
        """Write the metrics of the run, then add its index to the finished ones; `run` has done so if it came to the end.

        Raises UserError if a model that a finished run has is not there.
        """
        if self.is_finished:
            return
        for task in range(self.config.num_tasks + 1):
            model = self.files.model_file(task * self.config.epochs_per_task)
            if not model.exists():
                raise UserError(f"{model}: this model was deleted while the run was in progress; restore it, or start another experiment")
        self.store_curves(self.config.num_epochs)
        self.files.mark_finished()
        self.is_finished = True
        print(f"Index {self.run_index} is finished; its results are in {self.results_dir}")

    def check_stored_config(self) -> None:
        """Raise UserError if the stored run was started with settings that can give other results."""
        stored = self.files.load_config()
        if stored is not None and (keys := differing_keys(stored, self.config)):
            differences = ", ".join(f"{key} ({getattr(stored, key)} there, {getattr(self.config, key)} here)" for key in keys)
            raise UserError(
                f"{self.files.config_file}: this run was started with other settings: {differences}; use those, or another experiment_name"
            )

    # --- Before the first epoch --------------------------------------------------------------------------------------------------

    def load_data(self) -> None:
        """Read the images and put training, validation and test set on the device."""
        config = self.config
        num_validation = config.validation_images_per_class
        num_train = config.train_images_per_class
        train, test = load_images(config.dataset, config.data_path, num_validation + num_train, config.test_images_per_class)
        self.validation_set = ImageSet(train[:, :num_validation], self.device)
        self.train_set = ImageSet(train[:, num_validation:], self.device)
        self.test_set = ImageSet(test, self.device)

    def build_learner(self) -> None:
        """Build the network with its initial weights, and what changes it: SGD, continual backpropagation, noise."""
        config = self.config
        network = build_network(self.random_seed, config.network_width)
        self.network: ResNet18 = network.to(self.device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.network, config.stepsize, config.momentum, config.weight_decay)
        self.continual_backprop = None
        if config.use_cbp:
            self.continual_backprop = ContinualBackprop(
                self.network,
                self.random_seed,
                config.replacement_rate,
                config.maturity_threshold,
                config.utility_function,
                config.running_average_utility,
            )
        weight_noise = WeightNoise(self.network, self.random_seed, config.noise_std) if config.noise_std > 0 else None
        self.train_batch = functools.partial(
            train_step,
            self.network,
            self.optimizer,
            precision=config.precision,
            continual_backprop=self.continual_backprop,
            weight_noise=weight_noise,
        )
        self.best_network = BestNetwork()
        self.curves = LearningCurves(config.steps_before(config.num_epochs), config.num_epochs, self.device)

    def start_or_resume(self) -> int:
        """Load the newest checkpoint, or write the files a run begins with; return the number of epochs already done."""
        self.environment = describe_environment(self.device)
        checkpoint = self.files.load_checkpoint()
        is_new = checkpoint is None
        if not is_new and checkpoint.get("settings") != self.settings():
            raise UserError(
                f"{self.files.checkpoint_folder}: the newest checkpoint of index {self.run_index} is of a run with other settings"
            )
        # Of a resumed run, what somebody deleted meanwhile.
        if is_new or not self.files.config_file.exists():
            self.files.save_config(self.config, self.environment)
        if is_new or not self.files.array_file("class_order").exists():
            self.files.save_array("class_order", self.class_order)
        if is_new or not self.files.model_file(0).exists():
            self.files.save_model(0, self.network)
        if is_new:
            return 0
        self.load_checkpoint(checkpoint)
        before, here = checkpoint["environment"], self.environment
        changed = [f"{key} {before.get(key)} -> {here[key]}" for key in EXACTNESS_KEYS if before.get(key) != here[key]]
        if changed:
            warn(f"resuming in another environment ({', '.join(changed)}): the last bits may differ from an uninterrupted run's")
        print(f"Resuming index {self.run_index} after epoch {checkpoint['epoch']} of {self.config.num_epochs}.")
        return checkpoint["epoch"]

    # --- One epoch ---------------------------------------------------------------------------------------------------------------

    def train_epoch(self, epoch: int, classes: np.ndarray, stepsize: float) -> None:
        """Train for one epoch; raise UserError if a loss in it was not finite."""
        start = time.perf_counter()
        first_step = self.config.steps_before(epoch)
        train_one_epoch(
            self.train_batch,
            self.train_set,
            classes,
            self.config.batch_size,
            self.random_seed,
            epoch,
            self.curves.step_losses,
            self.curves.step_accuracies,
            first_step,
            after_step=functools.partial(self.report_step, first_step),
        )
        losses = self.curves.step_losses[first_step : self.config.steps_before(epoch + 1)]
        all_finite = torch.isfinite(losses).all().item()  # waits for the device
        self.curves.record_epoch(epoch, epoch_runtime=time.perf_counter() - start)
        if not all_finite:
            raise self.diverged(epoch, stepsize)

    def diverged(self, epoch: int, stepsize: float) -> UserError:
        return UserError(
            f"the loss is no longer finite in epoch {epoch + 1} (step size {stepsize:g}); the run stops here and its last checkpoint "
            "stays; start another experiment with a smaller stepsize"
        )

    def evaluate_epoch(self, epoch: int, classes: np.ndarray, stepsize: float) -> float:
        """Measure and store loss and accuracy on the test and the validation images; return the validation accuracy.

        Raises UserError if a loss is not finite.
        """
        augmentation = generator_for(self.random_seed, Purpose.TEST_IMAGES, epoch) if self.config.augment_test_data else None
        accuracies = {}
        for name, image_set, generator in (("test", self.test_set, augmentation), ("validation", self.validation_set, None)):
            start = time.perf_counter()
            loss, accuracy = evaluate(self.network, image_set, classes, self.config.precision, generator)
            loss, accuracies[name] = torch.stack((loss, accuracy)).tolist()  # waits for the device
            runtime = time.perf_counter() - start
            if not np.isfinite(loss):
                raise self.diverged(epoch, stepsize)
            self.curves.record_epoch(
                epoch,
                **{f"{name}_loss_per_epoch": loss, f"{name}_accuracy_per_epoch": accuracies[name], f"{name}_evaluation_runtime": runtime},
            )
            self.progress.update(len(classes) * image_set.images_per_class)
        self.progress.set_postfix_str(f"epoch {epoch + 1}, test accuracy {accuracies['test']:.3f}")
        if self.verbose:
            print(f"\tvalidation accuracy: {accuracies['validation']:.4f}")
            print(f"\ttest accuracy: {accuracies['test']:.4f}")
            print(f"\tepoch run time: {self.curves.per_epoch['epoch_runtime'][epoch]:.2f} s", flush=True)
        return accuracies["validation"]

    # --- The end of a task -------------------------------------------------------------------------------------------------------

    def end_task(self, task: int) -> None:
        """Go back to the best network of the task, store it, and draw the head or the network anew for the next task."""
        config = self.config
        if config.early_stopping:
            self.best_network.restore(self.network)
        self.files.save_model((task + 1) * config.epochs_per_task, self.network)
        if task + 1 < config.num_tasks:
            if config.reset_network:
                self.draw_anew(self.network, task)
            elif config.reset_head:
                self.draw_anew(self.network.fc, task)

    def draw_anew(self, module: torch.nn.Module, task: int) -> None:
        """Initialise a part of the network, in place, with draws that depend on the seed and the task alone."""
        fresh = copy.deepcopy(module).cpu()
        initialise(fresh, generator_for(self.random_seed, Purpose.TASK_RESET, task))
        module.load_state_dict(fresh.state_dict())

    # --- Checkpoints and results -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, epoch: int) -> None:
        """Store all that a run needs to go on after `epoch` epochs as if nothing had happened, and the curves so far."""
        state = {
            "epoch": epoch,
            "settings": self.settings(),
            "network": self.network.state_dict(),
            "momentum": momentum_buffers(self.optimizer),
            "best_network": self.best_network.state_dict(),
            "curves": self.curves.state_dict(epoch, self.config.steps_before(epoch)),
            "environment": self.environment,
        }
        if self.continual_backprop is not None:
            state["continual_backprop"] = self.continual_backprop.state_dict()
        self.store_curves(epoch)
        self.files.save_checkpoint(epoch, state)

    def load_checkpoint(self, state: dict[str, Any]) -> None:
        """Fill a stored state into the live network, optimizer, continual backpropagation and curves."""
        self.network.load_state_dict(state["network"])
        for buffer, stored in zip(momentum_buffers(self.optimizer), state["momentum"], strict=True):
            buffer.copy_(stored)
        self.best_network.load_state_dict(state["best_network"])
        self.curves.load_state_dict(state["curves"])
        if self.continual_backprop is not None:
            self.continual_backprop.load_state_dict(state["continual_backprop"])

    def settings(self) -> dict[str, Any]:
        """What decides this run's results: its index and all settings that can change them."""
        return {"index": self.run_index, **{key: value for key, value in self.config.to_dict().items() if key not in FREE_KEYS}}

    def store_curves(self, num_epochs: int) -> None:
        """Write the metrics of the first so many epochs."""
        self.results_dict = self.curves.arrays(num_epochs, self.config.steps_before(num_epochs))
        for metric, array in self.results_dict.items():
            self.files.save_array(metric, array)

    def leave(self, stop: StopRequest, epoch: int) -> None:
        """End the process after a signal; the checkpoint is written."""
        self.progress.close()
        print(f"{stop.name}: stopped after epoch {epoch} with a checkpoint; the same command resumes.", flush=True)
        raise SystemExit(stop.exit_status)

    # --- What the terminal shows -------------------------------------------------------------------------------------------------

    def make_progress_bar(self, first_epoch: int) -> tqdm:
        """A bar that counts work, so that its remaining time holds although epochs grow with the number of classes."""
        config = self.config

        def work_before(epoch: int) -> int:
            images_per_class = WORK_PER_TRAINING_IMAGE * config.train_images_per_class
            images_per_class += config.validation_images_per_class + config.test_images_per_class
            return sum(config.num_classes_seen(earlier // config.epochs_per_task) for earlier in range(epoch)) * images_per_class

        return tqdm(
            total=work_before(config.num_epochs),
            initial=work_before(first_epoch),
            bar_format="{desc}{percentage:5.1f}% |{bar}| {elapsed}, {remaining} left{postfix}",
            smoothing=0.05,
            disable=self.verbose,
            dynamic_ncols=True,
        )

    def describe_epoch(self, task: int, epoch: int, stepsize: float) -> None:
        num_classes = self.config.num_classes_seen(task)
        self.progress.set_description(f"index {self.run_index}, task {task + 1}/{self.config.num_tasks} ({num_classes} classes)")
        if self.verbose:
            print(f"Epoch {epoch + 1}/{self.config.num_epochs}: task {task + 1}, {num_classes} classes, step size {stepsize:g}")

    def report_step(self, first_step: int, num_steps: int, num_images: int) -> None:
        self.progress.update(WORK_PER_TRAINING_IMAGE * num_images)
        done = first_step + num_steps
        if self.verbose and done % STEPS_PER_WINDOW == 0:
            print(f"\tstep {num_steps}: training accuracy {self.curves.window_accuracy(done - 1):.4f}", flush=True)


class BestNetwork:
    """A copy of the network, batch-norm buffers included, as it was at the epoch of best validation accuracy of a task."""

    def __init__(self) -> None:
        self.accuracy = -1.0
        self.parameters: dict[str, Tensor] = {}

    def update(self, network: ResNet18, validation_accuracy: float) -> None:
        """Copy the network if this accuracy is strictly greater than all before it in this task."""
        if validation_accuracy > self.accuracy:
            self.accuracy = validation_accuracy
            self.parameters = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def restore(self, network: ResNet18) -> None:
        """Put the copy back into the network and forget it: the next task starts over."""
        network.load_state_dict(self.parameters)
        self.accuracy, self.parameters = -1.0, {}

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "parameters": self.parameters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accuracy, self.parameters = state["accuracy"], state["parameters"]


# Of an environment's description, what decides whether a resumed run can equal an uninterrupted one to the bit.
EXACTNESS_KEYS = ("torch", "cuda", "cudnn", "device", "threads")


def describe_environment(device: torch.device) -> dict[str, str | int | None]:
    """Versions, device and commit that a run's numbers come from."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),  # a string subclass that weights_only=True would refuse
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "commit": commit,
    }


def parse_arguments(arguments: Sequence[str] | None) -> tuple[Config, int, bool]:
    """The config, the index and whether to be verbose. Raises UserError."""
    parser = OneLineArgumentParser(description="Run, or resume, one run of incremental CIFAR-100.")
    parser.add_argument("--config", required=True, metavar="PATH", help="JSON file of settings; cfg/ has one per algorithm")
    parser.add_argument(
        "--experiment-index", type=int, default=0, metavar="N", help="0, 1, ...: decides seed, class order and initial weights (default 0)"
    )
    parser.add_argument("--verbose", action="store_true", help="print accuracies and times instead of a progress bar")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help="settings that override the config's"
    )
    parsed = parser.parse_args(arguments)
    return load_config(parsed.config, parsed.overrides), parsed.experiment_index, parsed.verbose


def main(arguments: Sequence[str] | None = None) -> int:
    config, index, verbose = parse_arguments(arguments)
    folder = os.path.join(config.results_dir, config.experiment_name)
    experiment = IncrementalCIFARExperiment(config.to_dict(), folder, index, verbose)
    experiment.run()
    experiment.store_results()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
