"""One run of incremental CIFAR-100: a config and an index in; learning curves, models and checkpoints out.

    python incremental_cifar_experiment.py --config cfg/continual_backpropagation.json --experiment-index 0

Trains a ResNet-18 on the first 5, 10, ..., 100 classes of a random class order, 200 epochs each (`cfg/README.md` lists all settings).
The same command starts the run, resumes it after an interruption, and says so when it is finished. What appears in
results/<experiment_name>/ is described in `incremental_cifar/run_files.py` and in the README.

Source: Dohare et al., "Loss of plasticity in deep continual learning", Nature 632 (2024), Methods, "Class-incremental CIFAR-100".
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # mlproj-manager loads this file from anywhere

import incremental_cifar  # noqa: F401 (before all others: it names a user who has no name)

# isort: split
import numpy as np
import torch
from mlproj_manager.experiments import Experiment
from torch import Tensor
from tqdm import tqdm

from incremental_cifar.algorithms import epoch_metrics, make_algorithms
from incremental_cifar.cifar100 import ImageSet, load_images
from incremental_cifar.command_line import (
    OneLineArgumentParser,
    StopRequest,
    is_memory_full,
    memory_errors,
    parse_indices,
    run_script,
    show_error,
    stop_requests,
    warn,
)
from incremental_cifar.config import (
    BEFORE_THEY_EXISTED,
    FREE_KEYS,
    MOST_RUNS_PER_GPU,
    Config,
    UserError,
    check_same_settings,
    described_differences,
    load_config,
    make_config,
    settled,
    with_whole_folders,
)
from incremental_cifar.explain import Explain
from incremental_cifar.learning_curves import METRICS, STEPS_PER_WINDOW, LearningCurves, array_lengths
from incremental_cifar.resnet import ResNet18, build_network
from incremental_cifar.run_files import RESTART, RunFiles
from incremental_cifar.seeds import Purpose, draw_class_order, experiment_seed, generator_for
from incremental_cifar.training import (
    EvaluationStep,
    TrainingStep,
    choose_device,
    device_name,
    evaluate,
    make_optimizer,
    set_arithmetic,
    set_stepsize,
    stepsize_at,
    train_one_epoch,
)

# What mlproj-manager adds to the settings of an experiment that it runs.
RUNNER_KEYS = {"index", "verbose", "plot_results", "runs", "relevant_parameters", "results_path"}

# A training image costs a forward pass and a backward pass of twice its work; an evaluated image, a forward pass.
WORK_PER_TRAINING_IMAGE = 3

SECONDS_BETWEEN_REPORTS = 1.0  # at least, of the file that says how far a run is


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn into a UserError what PyTorch raises where the machine, not our code, falls short."""
    try:
        with memory_errors():
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(f"torch.compile failed ({first_line(error)}); use compile_network=false, or install a C++ compiler") from None


class IncrementalCIFARExperiment(Experiment):
    """One run of the experiment: `run()` trains to the end, from the last checkpoint if there is one, and `store_results()` stores.

    exp_params: a Config, or its settings by name, as a user wrote them. results_dir: the experiment's folder. run_index: 0 to 99,999;
    decides seed, class order and initial weights. verbose: print accuracies and times instead of showing a progress bar. restart: delete
    what is there of this index, and begin anew. without_models: go on although models of earlier tasks are gone.
    Raises UserError, before anything is written, if the settings cannot be used or differ from those the stored run was started with, or
    if that cannot be resumed.
    """

    def __init__(
        self,
        exp_params: dict[str, Any] | Config,
        results_dir: str,
        run_index: int,
        verbose: bool = True,
        restart: bool = False,
        without_models: bool = False,
    ):
        # Experiment.__init__ is not called: it would overwrite the stored config, in place and before any check.
        folder = Path(os.path.abspath(results_dir))
        if isinstance(exp_params, Config):
            settings = exp_params.to_dict()
        else:
            settings = {key: value for key, value in exp_params.items() if key not in RUNNER_KEYS | {"results_dir"}}
            settings = with_whole_folders(settings, source="exp_params")
        settings |= {"results_dir": str(folder.parent), "experiment_name": folder.name}
        config = make_config(settings, source="exp_params")
        self.results_dir = str(folder)
        self.run_index = run_index
        self.verbose = verbose
        self.restart = restart
        self.without_models = without_models
        self.results_dict: dict[str, np.ndarray] = {}

        self.random_seed = experiment_seed(run_index)
        self.class_order = draw_class_order(self.random_seed)  # (100,)
        self.files = RunFiles(folder, run_index)
        self.device = choose_device(config.device)
        stored = None if restart else self.files.load_config()
        self.may_do_without_compiler = config.compile_network == "auto" and stored is None
        self.config = settled(config, stored, is_gpu=self.device.type == "cuda")
        self.exp_params = self.config.to_dict()
        self.check_stored_run()
        self.models_gone: list[Path] = []  # those of which a warning told
        self.place = 0  # of this run's progress bar, among those of the runs in this process
        self.prefix = ""  # of everything that is printed

    def run(self) -> None:
        """Train from the start, or from the last checkpoint, to the end of the last task.

        If one of STOP_SIGNALS asks for it, ends the process after the current epoch, with a checkpoint and 128 + its number as status;
        before the first epoch, they end it at once.
        Raises UserError if the loss is no longer finite.
        """
        with contextlib.ExitStack() as held:
            if self.prepare(held):
                with stop_requests() as stop:
                    self.train_to_the_end(stop)

    @user_errors()
    def prepare(self, held: contextlib.ExitStack, images_of: "IncrementalCIFARExperiment | None" = None) -> bool:
        """Do all that comes before the first epoch; return whether there is anything left to train.

        held: takes the lock that keeps other processes from this run. images_of: a run whose images this one can use too.
        """
        with self.files.locked() if self.is_unlisted else contextlib.nullcontext():
            if self.is_unlisted:
                self.check_stored_run()
            if self.has_nothing_to_do():
                return False
        set_arithmetic(self.config.precision, self.config.deterministic)
        if images_of is None:
            self.load_data()
        else:
            self.train_set, self.validation_set, self.test_set = images_of.train_set, images_of.validation_set, images_of.test_set
        held.enter_context(self.files.locked())
        # Again, now that nobody else can change it: another process may have started or finished the run since.
        self.check_stored_run()
        if self.has_nothing_to_do():
            return False
        model_epochs = range(0, self.config.num_epochs + 1, self.config.epochs_per_task)
        self.files.check_writable(METRICS, model_epochs, self.config.num_epochs)
        self.build_learner()
        self.record_steps()
        self.first_epoch = self.start_or_resume()
        return True

    def has_nothing_to_do(self) -> bool:
        """Whether the run is finished, and say so; if the list of finished runs was lost, put the run into it again (we hold its lock)."""
        if self.is_unlisted:
            if not self.files.is_analysed(self.config.num_tasks):  # else a sweep may have deleted them
                self.check_models(self.config.num_epochs)
            self.files.mark_finished()
            self.is_finished, self.is_unlisted = True, False
            print(f"Index {self.run_index} of {self.results_dir} is finished, by its arrays; it is in experiment_indices.npy again.")
        elif self.is_finished:
            print(f"Index {self.run_index} of {self.results_dir} is finished; nothing to do.")
        return self.is_finished

    @user_errors()
    def train_to_the_end(self, stop: StopRequest) -> None:
        """Train a prepared run and store its results; if `stop` asks for it, leave with SystemExit after the current epoch."""
        self.begin_progress(self.first_epoch)
        with self.make_progress_bar(self.first_epoch) as self.progress:
            self.train(self.first_epoch, stop)
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
                self.report_progress(epoch + 1, at_once=is_stopping or is_last)
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
        self.check_models(self.config.num_epochs)
        self.files.mark_finished()
        self.is_finished = True
        print(f"Index {self.run_index} is finished; its results are in {self.results_dir}", flush=True)

    def check_stored_run(self) -> None:
        """See whether the stored run is finished. Raise UserError if its settings can give other results, or if it cannot be resumed."""
        self.is_finished = not self.restart and self.run_index in self.files.finished_indices()
        self.is_unlisted = False
        if self.restart:
            return
        stored = self.files.load_config()
        check_same_settings(stored, self.config, self.files.config_file)
        if not self.is_finished:
            # Only a run that came to its end has arrays of full length: the list of finished runs was lost.
            lengths = array_lengths(self.config.steps_before(self.config.num_epochs), self.config.num_epochs)
            self.is_unlisted = stored is not None and self.files.has_arrays(lengths)
            if not self.is_unlisted:
                self.files.check_resumable()

    def check_models(self, num_epochs: int) -> None:
        """Raise UserError if a model that a run has after so many epochs is not there, or warn, if it may go on without."""
        epochs = range(0, num_epochs + 1, self.config.epochs_per_task)
        missing = [self.files.model_file(epoch) for epoch in epochs if not self.files.has_model(epoch)]
        if missing and not self.without_models:
            raise UserError(
                f"{missing[0]}: this model is not there any more; restore it, or go on without it by "
                "incremental_cifar_experiment.py --without-models"
            )
        if missing != self.models_gone:
            self.models_gone = missing
            warn(f"{self.prefix}going on without {', '.join(path.name for path in missing)} in {missing[0].parent}")

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
        self.optimizer = make_optimizer(self.network, config.stepsize, config.momentum, config.weight_decay, config.decay_batch_norm)
        algorithms = make_algorithms(config, self.network, self.optimizer, self.random_seed)
        self.training_step = TrainingStep(self.network, self.optimizer, config.precision, algorithms)
        self.evaluation_step = EvaluationStep(self.network, self.training_step.half, config.fold_batch_norm)
        if config.compile_network:
            self.training_step.compile(config.batch_size, config.deterministic)
            self.evaluation_step.compile(config.deterministic)
        self.best_network = BestNetwork()
        num_steps = config.steps_before(config.num_epochs)
        self.curves = LearningCurves(num_steps, config.num_epochs, self.device, epoch_metrics(algorithms))

    def record_steps(self) -> None:
        """On a GPU, have the steps replayed from CUDA graphs; where that is impossible, warn and go on without."""
        self.is_recorded = False if self.has_graphs else None
        if not (self.has_graphs and self.config.cuda_graphs):
            return
        try:
            self.training_step.record(self.config.batch_size)
            self.is_recorded = True
            self.evaluation_step.record()
        except torch.OutOfMemoryError:
            raise
        except torch._dynamo.exc.TorchDynamoException as error:
            if not self.may_do_without_compiler:
                raise
            warn(f"{self.prefix}torch.compile failed ({first_line(error)}); this run goes on with compile_network=false")
            self.config = dataclasses.replace(self.config, compile_network=False)
            self.build_learner()
            self.record_steps()
        except RuntimeError as error:
            what = "an evaluation step" if self.is_recorded else "a step"
            warn(f"{self.prefix}{what} cannot be recorded as a CUDA graph ({first_line(error)}); going on without, more slowly")

    @property
    def has_graphs(self) -> bool:
        """Whether this run's device can record and replay steps."""
        return self.device.type == "cuda"

    def start_or_resume(self) -> int:
        """Load the newest checkpoint, or write the files a run begins with; return the number of epochs already done.

        What somebody deleted of a run meanwhile is written again, but models cannot be.
        """
        if self.restart:
            self.files.forget()
        self.environment = describe_environment(self.device, self.config.compile_network) | {"cuda_graphs": self.is_recorded}
        checkpoint = self.files.load_checkpoint()
        is_new = checkpoint is None
        if not is_new and (there := self.settings_of(checkpoint)) != (mine := self.settings()):
            keys = [key for key in mine | there if there.get(key) != mine.get(key)]
            raise UserError(
                f"{self.files.checkpoint_folder}: the newest checkpoint of index {self.run_index} is of a run with other settings"
                + (f": {described_differences(keys, there, mine)}" if there else "")
            )
        before, here = self.environment if is_new else checkpoint.get("environment"), self.environment
        before = before if isinstance(before, dict) else {}
        if is_new or not self.files.config_file.exists():
            self.files.save_config(self.config, before)
        if is_new or not self.files.array_file("class_order").exists():
            self.files.save_array("class_order", self.class_order)
        if is_new or not self.files.has_model(0):
            self.files.save_model(0, self.network)
        if is_new:
            return 0
        try:
            epoch = checkpoint["epoch"]
            self.check_models(epoch)
            self.load_checkpoint(checkpoint)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            if is_memory_full(error):
                raise
            raise UserError(
                f"{self.files.checkpoint_folder}: the newest checkpoint of index {self.run_index} does not fit this code "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); resume it with the code that wrote it (commit "
                f"{before.get('commit')}), or begin it anew by {RESTART}"
            ) from None
        self.store_curves(epoch)
        self.files.add_resumption(epoch, here)
        if change := changed_code(before, here):
            warn(f"{self.prefix}resuming with other code ({change}): results may differ from either's")
        changed = [f"{key} {before.get(key)} -> {here[key]}" for key in EXACTNESS_KEYS if before.get(key) != here[key]]
        if changed:
            warn(f"resuming in another environment ({', '.join(changed)}): the last bits may differ from an uninterrupted run's")
        print(f"Resuming index {self.run_index} after epoch {epoch} of {self.config.num_epochs}.")
        return epoch

    # --- One epoch ---------------------------------------------------------------------------------------------------------------

    def train_epoch(self, epoch: int, classes: np.ndarray, stepsize: float) -> None:
        """Train for one epoch; raise UserError if a loss in it was not finite."""
        start = time.perf_counter()
        first_step = self.config.steps_before(epoch)
        train_one_epoch(
            self.training_step,
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
        self.curves.record_epoch(epoch, **epoch_metrics(self.training_step.algorithms))
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
            loss, accuracy = evaluate(self.evaluation_step, image_set, classes, generator)
            loss, accuracies[name] = torch.stack((loss, accuracy)).tolist()  # waits for the device
            runtime = time.perf_counter() - start
            if not np.isfinite(loss):
                raise self.diverged(epoch, stepsize)
            self.curves.record_epoch(
                epoch,
                **{f"{name}_loss_per_epoch": loss, f"{name}_accuracy_per_epoch": accuracies[name], f"{name}_evaluation_runtime": runtime},
            )
            self.progress.update(len(classes) * image_set.images_per_class)
        self.progress.set_postfix_str(f"epoch {epoch + 1}, test accuracy {accuracies['test']:.3f}", refresh=False)
        if self.verbose:
            self.say(f"\tvalidation accuracy: {accuracies['validation']:.4f}")
            self.say(f"\ttest accuracy: {accuracies['test']:.4f}")
            self.say(f"\tepoch run time: {self.curves.per_epoch['epoch_runtime'][epoch]:.2f} s")
        return accuracies["validation"]

    # --- The end of a task -------------------------------------------------------------------------------------------------------

    def end_task(self, task: int) -> None:
        """Go back to the best network of the task, store it, and draw the head or the network anew for the next task."""
        config = self.config
        if config.early_stopping:
            self.best_network.restore(self.network)
        self.files.save_model((task + 1) * config.epochs_per_task, self.network)
        if task + 1 < config.num_tasks:
            with torch.no_grad():
                for algorithm in self.training_step.algorithms:
                    algorithm.end_task(task)

    # --- Checkpoints and results -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, epoch: int) -> None:
        """Store all that a run needs to go on after `epoch` epochs as if nothing had happened, and the curves so far."""
        state = {
            "epoch": epoch,
            "settings": self.settings(),
            **self.training_step.state_dict(),
            "best_network": self.best_network.state_dict(),
            "curves": self.curves.state_dict(epoch, self.config.steps_before(epoch)),
            "environment": self.environment,
        }
        self.files.save_checkpoint(epoch, state)
        self.store_curves(epoch)  # after it: metrics without a checkpoint are those of a run whose checkpoints are gone

    def load_checkpoint(self, state: dict[str, Any]) -> None:
        """Fill a stored state into the live network, optimizer, continual backpropagation and curves."""
        # Before the algorithms had a state each, one had.
        self.training_step.load_state_dict({"algorithms": {"ContinualBackprop": state.get("continual_backprop", {})}} | state)
        self.best_network.load_state_dict(state["best_network"])
        self.curves.load_state_dict(state["curves"])

    def settings(self) -> dict[str, Any]:
        """What decides this run's results: its index and all settings that can change them."""
        return {"index": self.run_index, **{key: value for key, value in self.config.to_dict().items() if key not in FREE_KEYS}}

    @staticmethod
    def settings_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The same of the run that wrote a checkpoint, with what settings that did not exist then amounted to."""
        defaults = {key: value for key, value in (Config().to_dict() | BEFORE_THEY_EXISTED).items() if key not in FREE_KEYS}
        stored = checkpoint.get("settings")
        return defaults | stored if isinstance(stored, dict) else {}

    def store_curves(self, num_epochs: int) -> None:
        """Write the metrics of the first so many epochs."""
        self.results_dict = self.curves.arrays(num_epochs, self.config.steps_before(num_epochs))
        for metric, array in self.results_dict.items():
            self.files.save_array(metric, array)

    def leave(self, stop: StopRequest, epoch: int) -> None:
        """End the process after a signal; the checkpoint is written."""
        self.progress.close()
        command = "the same command without --restart" if self.restart else "the same command"
        print(f"{self.prefix}{stop.name}: stopped after epoch {epoch} with a checkpoint; {command} resumes.", flush=True)
        raise SystemExit(stop.exit_status)

    # --- What the terminal shows -------------------------------------------------------------------------------------------------

    def make_progress_bar(self, first_epoch: int) -> tqdm:
        """A bar that counts work, so that its remaining time holds although epochs grow with the number of classes."""
        return tqdm(
            total=self.work_before(self.config.num_epochs),
            initial=self.work_before(first_epoch),
            bar_format="{desc}{percentage:5.1f}% |{bar}| {elapsed}, {remaining} left{postfix}",
            smoothing=0.05,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; in a log, every state of the bar is a line
            disable=self.verbose,
            position=self.place,
            dynamic_ncols=True,
        )

    def work_before(self, epoch: int) -> int:
        """Work of the run's first so many epochs, in forward passes of an image."""
        config = self.config
        images_per_class = WORK_PER_TRAINING_IMAGE * config.train_images_per_class
        images_per_class += config.validation_images_per_class + config.test_images_per_class
        task, epoch_of_task = divmod(epoch, config.epochs_per_task)
        classes = config.epochs_per_task * sum(map(config.num_classes_seen, range(task))) + epoch_of_task * config.num_classes_seen(task)
        return classes * images_per_class

    def begin_progress(self, first_epoch: int) -> None:
        """From here on, `report_progress` measures how fast the run is."""
        self.first_epoch, self.training_start = first_epoch, time.monotonic()
        self.report_progress(first_epoch, at_once=True)

    def report_progress(self, num_epochs: int, at_once: bool = False) -> None:
        """Write `progress/index-K.json`, at most once a second: how far, how accurate, how long still (seconds), where."""
        now = time.monotonic()
        if not at_once and now - self.last_report < SECONDS_BETWEEN_REPORTS:
            return
        self.last_report = now
        config = self.config
        done, before = self.work_before(num_epochs), self.work_before(self.first_epoch)
        seconds_per_work = (now - self.training_start) / (done - before) if done > before else None
        job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        self.files.save_progress(
            {
                "epoch": num_epochs,
                "num_epochs": config.num_epochs,
                "task": min(num_epochs // config.epochs_per_task + 1, config.num_tasks),
                "num_tasks": config.num_tasks,
                "test_accuracy": float(self.curves.per_epoch["test_accuracy_per_epoch"][num_epochs - 1]) if num_epochs else None,
                "seconds_left": None if seconds_per_work is None else seconds_per_work * (self.work_before(config.num_epochs) - done),
                "host": socket.gethostname(),
                "process": os.getpid(),
                "slurm_job": "_".join(job) if all(job) else os.environ.get("SLURM_JOB_ID"),
                "time": time.time(),
            }
        )

    def describe_epoch(self, task: int, epoch: int, stepsize: float) -> None:
        num_classes = self.config.num_classes_seen(task)
        description = f"index {self.run_index}, task {task + 1}/{self.config.num_tasks} ({num_classes} classes)"
        self.progress.set_description(description, refresh=False)
        if self.verbose:
            self.say(f"Epoch {epoch + 1}/{self.config.num_epochs}: task {task + 1}, {num_classes} classes, step size {stepsize:g}")

    def report_step(self, first_step: int, num_steps: int, num_images: int) -> None:
        self.progress.update(WORK_PER_TRAINING_IMAGE * num_images)
        done = first_step + num_steps
        if self.verbose and done % STEPS_PER_WINDOW == 0:
            self.say(f"\tstep {num_steps}: training accuracy {self.curves.window_accuracy(done - 1):.4f}")

    def say(self, text: str) -> None:
        print(self.prefix + text, flush=True)


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
EXACTNESS_KEYS = ("torch", "triton", "cuda", "cudnn", "device", "threads", "cuda_graphs")


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_environment(device: torch.device, is_compiled: bool) -> dict[str, str | int | None]:
    """Versions, device and code that a run's numbers come from. is_compiled: Triton makes kernels of the network."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),  # a string subclass that weights_only=True would refuse
        "triton": installed_version("triton") if is_compiled else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "commit": commit,
        "code": CODE,
    }


def code_digest() -> str:
    """What tells the code of runs apart, committed or not: the first digits of a SHA-256 over its files."""
    script = Path(__file__).resolve()
    digest = hashlib.sha256()
    for path in (script, *sorted(script.parent.glob("incremental_cifar/[a-z_]*.py"))):
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)};".encode() + content)
    return digest.hexdigest()[:12]


CODE = code_digest()  # as it is imported now: files may change while a run works


def changed_code(before: dict[str, Any], here: dict[str, Any]) -> str:
    """How the code differs between two environments, by commits or, where these do not tell, by digests; empty if it does not.

    Environments that were stored without a digest are compared by their commits.
    """
    commits = before.get("commit"), here["commit"]
    tells = None not in commits and commits[0] != commits[1]
    if not (before["code"] != here["code"] if "code" in before else tells):
        return ""
    return f"commit {commits[0]} -> {commits[1]}" if tells else f"digest of the files {before['code']} -> {here['code']}"


def run_side_by_side(experiments: Sequence[IncrementalCIFARExperiment]) -> int:
    """Train several runs of one config in this process, each with the results it has alone; return the exit status.

    Every run has a thread, and on a GPU a stream of its own, so that its kernels fill what the others leave free. A run that fails is
    reported in a line and the others go on. The status is 0 if all runs are finished, 2 if one failed, else that of the signal.
    Raises UserError if there are too many for a GPU.
    """
    statuses = [0]

    def report(failures: dict[int, Exception]) -> None:
        show_failures(failures)
        statuses.extend(2 for _ in failures)

    def train(experiment: IncrementalCIFARExperiment) -> None:
        # Both of these are a thread's own.
        try:
            torch.set_num_threads(num_threads)
            stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()
            with held[experiment.run_index], stream:
                experiment.train_to_the_end(stop)
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
        held = {experiment.run_index: everything.enter_context(contextlib.ExitStack()) for experiment in experiments}
        for experiment in experiments:
            experiment.place, experiment.prefix = len(ready), f"index {experiment.run_index}: "
            try:
                # One after the other, before any trains: nothing else may happen on a GPU while a CUDA graph is recorded.
                if experiment.prepare(held[experiment.run_index], images_of=ready[0] if ready else None):
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


def parse_arguments(arguments: Sequence[str] | None) -> tuple[Config, list[int], dict[str, bool]]:
    """The config, the indices and the options of every run. Raises UserError."""
    parser = OneLineArgumentParser(description="Run, or resume, one run of incremental CIFAR-100, or several side by side.")
    parser.add_argument("--config", required=True, metavar="PATH", help="JSON file of settings; cfg/ has one per algorithm")
    parser.add_argument(
        "--experiment-index",
        default="0",
        metavar="N",
        help="0, 1, ...: decides seed, class order and initial weights (default 0); 0-3 or 0,2: several runs in one process",
    )
    parser.add_argument("--verbose", action="store_true", help="print accuracies and times instead of a progress bar")
    parser.add_argument("--restart", action="store_true", help="delete what is there of these indices, and begin them anew")
    parser.add_argument("--without-models", action="store_true", help="resume, and finish, although stored models are gone")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help="settings that override the config's"
    )
    parser.add_argument("--explain", nargs="+", action=Explain, metavar="KEY", help="say what settings mean (all: every one); no run")
    parsed = parser.parse_args(arguments)
    options = {name: getattr(parsed, name) for name in ("verbose", "restart", "without_models")}
    return load_config(parsed.config, parsed.overrides), parse_indices(parsed.experiment_index), options


def main(arguments: Sequence[str] | None = None) -> int:
    config, indices, options = parse_arguments(arguments)
    folder = os.path.join(config.results_dir, config.experiment_name)
    experiments = []
    failures: dict[int, Exception] = {}
    for index in indices:
        try:
            experiments.append(IncrementalCIFARExperiment(config, folder, index, **options))
        except (UserError, OSError) as error:  # the other runs can be trained
            if len(indices) == 1:
                raise
            failures[index] = error
    show_failures(failures)
    if len(indices) > 1:
        status = run_side_by_side(experiments) if experiments else 2
        return status if len(experiments) == len(indices) or status == 1 else 2
    experiments[0].run()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
