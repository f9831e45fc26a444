"""One run of incremental CIFAR-100: a config and an index in; learning curves, models and checkpoints out.

    python incremental_cifar_experiment.py --config cfg/continual_backpropagation.json --experiment-index 0

Trains a ResNet-18 on the first 5, 10, ..., 100 classes of a random class order, 200 epochs each (`cfg/README.md` lists all settings).
The same command starts the run, resumes it after an interruption, and says so when it is finished. What appears in
results/<experiment_name>/ is described in `incremental_cifar/run_files.py` and in docs/files.md.

Source: Dohare et al., "Loss of plasticity in deep continual learning", Nature 632 (2024), Methods, "Class-incremental CIFAR-100".
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # mlproj-manager loads this file from anywhere

import incremental_cifar  # noqa: F401 (before all others: it names a user who has no name)

# isort: split
import numpy as np
import torch
from mlproj_manager.experiments import Experiment

from incremental_cifar.algorithms import epoch_metrics
from incremental_cifar.cifar100 import ImageSets, load_image_sets
from incremental_cifar.command_line import OneLineArgumentParser, StopRequest, parse_indices, run_script, stop_requests, warn
from incremental_cifar.config import Config, UserError, load_config, make_config, settled, with_whole_folders
from incremental_cifar.cuda_graphs import has_graphs
from incremental_cifar.environment import describe_environment
from incremental_cifar.explain import Explain
from incremental_cifar.learner import Learner, first_line, user_errors
from incremental_cifar.learning_curves import METRICS
from incremental_cifar.progress import Progress
from incremental_cifar.run_files import RunFiles
from incremental_cifar.seeds import Purpose, draw_class_order, experiment_seed, generator_for
from incremental_cifar.side_by_side import run_side_by_side, show_failures
from incremental_cifar.stored_run import StoredRun, environment_of
from incremental_cifar.trackers import Tracking
from incremental_cifar.training import choose_device, evaluate, set_arithmetic, set_stepsize, stepsize_at, train_one_epoch

# What mlproj-manager adds to the settings of an experiment that it runs.
RUNNER_KEYS = {"index", "verbose", "plot_results", "runs", "relevant_parameters", "results_path"}


class IncrementalCIFARExperiment(Experiment):
    """One run of the experiment: `run()` trains to the end, from the last checkpoint if there is one, and stores the results.

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
        self.results_dict: dict[str, np.ndarray] = {}

        self.random_seed = experiment_seed(run_index) if config.training_seed is None else config.training_seed
        self.class_order = draw_class_order(experiment_seed(run_index) if config.class_order_seed is None else config.class_order_seed)
        self.files = RunFiles(folder, run_index)
        self.device = choose_device(config.device)
        stored_config = None if restart else self.files.load_config()
        self.may_do_without_compiler = config.compile_network == "auto" and stored_config is None
        self.config = settled(config, stored_config, is_gpu=self.device.type == "cuda")
        self.exp_params = self.config.to_dict()
        self.stored = StoredRun(self.files, self.config, restart, without_models)
        self.label = ""  # begins all that is printed
        self.bar_position = 0  # among the bars of the runs in this process

        # What `prepare` makes before the first epoch.
        self.images: ImageSets | None = None
        self.learner: Learner | None = None
        self.progress: Progress | None = None
        self.environment: dict[str, Any] = {}
        self.first_epoch = 0

    def run(self) -> None:
        """Train from the start, or from the last checkpoint, to the end of the last task.

        If one of STOP_SIGNALS asks for it, ends the process after the current epoch, with a checkpoint and 128 + its number as status;
        before the first epoch, they end it at once.
        Raises UserError if the loss is no longer finite.
        """
        with contextlib.ExitStack() as locks:
            if self.prepare(locks):
                with stop_requests() as stop:
                    self.run_tasks(stop)

    # --- Before the first epoch --------------------------------------------------------------------------------------------------

    @user_errors()
    def prepare(self, locks: contextlib.ExitStack, images: ImageSets | None = None) -> bool:
        """Do all that comes before the first epoch; return whether there is anything left to train.

        locks: takes the lock that keeps other processes from this run. images: those of another run with these sizes, if there is one.
        """
        stored, config = self.stored, self.config
        with self.files.locked() if stored.is_unlisted else contextlib.nullcontext():
            if stored.is_unlisted:
                stored.check()
            if stored.has_nothing_to_do():
                return False
        set_arithmetic(config.precision, config.deterministic)
        self.images = images or load_image_sets(config, self.device)
        locks.enter_context(self.files.locked())
        # Again, now that nobody else can change it: another process may have started or finished the run since.
        stored.check()
        if stored.has_nothing_to_do():
            return False
        self.learner = Learner(config, self.random_seed, self.device)
        model_epochs = range(0, config.num_epochs + 1, config.epochs_per_task)
        self.files.check_writable({*METRICS, *self.learner.curves.per_epoch}, model_epochs, config.num_epochs)
        self.record_steps()
        self.start_or_resume()
        return True

    def record_steps(self) -> None:
        """On a GPU, have the steps replayed from CUDA graphs; where that is impossible, warn and go on without."""
        if not (has_graphs(self.device) and self.config.cuda_graphs):
            return
        try:
            self.learner.record(self.label)
        except torch._dynamo.exc.TorchDynamoException as error:
            if not self.may_do_without_compiler:
                raise
            warn(f"{self.label}torch.compile failed ({first_line(error)}); this run goes on with compile_network=false")
            self.config = self.stored.config = dataclasses.replace(self.config, compile_network=False)
            self.learner = Learner(self.config, self.random_seed, self.device)
            self.record_steps()

    def start_or_resume(self) -> None:
        """Load the newest checkpoint, or write the files a run begins with."""
        is_recorded = self.learner.is_recorded if has_graphs(self.device) else None
        self.environment = describe_environment(self.device, bool(self.config.compile_network), is_recorded)
        checkpoint = self.stored.load_checkpoint()
        if checkpoint is None:
            self.stored.begin(self.learner, self.class_order, self.environment)
            return
        self.stored.begin(self.learner, self.class_order, environment_of(checkpoint), is_new=False)
        self.first_epoch = self.stored.resume(self.learner, checkpoint, self.environment)
        self.store_curves(self.first_epoch)

    # --- The run -----------------------------------------------------------------------------------------------------------------

    @user_errors()
    def run_tasks(self, stop: StopRequest) -> None:
        """Train a prepared run to its end, from `first_epoch` on (epochs are counted from 0 over the whole run), and store the results.

        If `stop` asks for it, leaves with SystemExit after the current epoch.
        """
        config, learner = self.config, self.learner
        self.tracking = Tracking(self.files, config, learner.curves, self.label)
        self.progress = Progress(self.files, config, learner.curves, self.first_epoch, self.verbose, self.label, self.bar_position)
        with self.progress.bar, contextlib.closing(self.tracking):
            self.tracking.update(self.first_epoch)
            for task in range(self.first_epoch // config.epochs_per_task, config.num_tasks):
                classes = self.class_order[: config.num_classes_seen(task)]
                task_start, task_end = task * config.epochs_per_task, (task + 1) * config.epochs_per_task
                for epoch in range(max(self.first_epoch, task_start), task_end):
                    stepsize = stepsize_at(epoch - task_start, config.epochs_per_task, config.stepsize)
                    set_stepsize(learner.optimizer, stepsize)
                    self.progress.begin_epoch(task, epoch, stepsize)
                    self.train(epoch, classes, stepsize)
                    validation_accuracy = self.measure(epoch, classes, stepsize)
                    if config.early_stopping:
                        learner.best_network.update(learner.network, validation_accuracy)
                    if epoch + 1 == task_end:
                        self.end_task(task)
                    self.end_epoch(epoch + 1, stop)
        self.store_results()

    def train(self, epoch: int, classes: np.ndarray, stepsize: float) -> None:
        """Train for one epoch; raise UserError if a loss in it was not finite."""
        config, curves = self.config, self.learner.curves
        start = time.perf_counter()
        first_step = config.steps_before(epoch)
        train_one_epoch(
            self.learner.training_step,
            self.images.train,
            classes,
            config.batch_size,
            self.random_seed,
            epoch,
            curves.step_losses,
            curves.step_accuracies,
            first_step,
            after_step=self.progress.end_step,
        )
        losses = curves.step_losses[first_step : config.steps_before(epoch + 1)]
        all_finite = torch.isfinite(losses).all().item()  # waits for the device
        curves.record_epoch(epoch, epoch_runtime=time.perf_counter() - start, **epoch_metrics(self.learner.algorithms))
        if not all_finite:
            raise diverged(epoch, stepsize)

    def measure(self, epoch: int, classes: np.ndarray, stepsize: float) -> float:
        """Measure and keep loss and accuracy on the test and the validation images; return the validation accuracy.

        Raises UserError if a loss is not finite.
        """
        augmentation = generator_for(self.random_seed, Purpose.TEST_IMAGES, epoch) if self.config.augment_test_data else None
        accuracy = 0.0
        for name, image_set, generator in (("test", self.images.test, augmentation), ("validation", self.images.validation, None)):
            start = time.perf_counter()
            loss, accuracy = torch.stack(evaluate(self.learner.evaluation_step, image_set, classes, generator)).tolist()  # waits
            runtime = time.perf_counter() - start
            if not np.isfinite(loss):
                raise diverged(epoch, stepsize)
            self.learner.curves.record_epoch(
                epoch, **{f"{name}_loss_per_epoch": loss, f"{name}_accuracy_per_epoch": accuracy, f"{name}_evaluation_runtime": runtime}
            )
            self.progress.end_evaluation(len(classes) * image_set.images_per_class)
        self.progress.end_epoch(epoch)
        return accuracy

    def end_task(self, task: int) -> None:
        """Go back to the best network of the task and store it; then what the algorithms do before the next task."""
        learner, config = self.learner, self.config
        if config.early_stopping:
            learner.best_network.restore(learner.network)
        self.files.save_model((task + 1) * config.epochs_per_task, learner.network)
        if task + 1 < config.num_tasks:
            learner.begin_task(task)

    def end_epoch(self, num_epochs: int, stop: StopRequest) -> None:
        """After so many epochs: say how far the run is, write a checkpoint if one is due, and leave if `stop` asks for it."""
        is_last = num_epochs == self.config.num_epochs
        is_stopping = bool(stop)  # asked once: a signal may come at any time
        self.progress.report(num_epochs, at_once=is_stopping or is_last)
        self.tracking.update(num_epochs)
        if is_stopping or is_last or num_epochs % self.config.epochs_per_checkpoint == 0:
            self.save_checkpoint(num_epochs)
        if is_stopping and not is_last:
            self.progress.bar.close()
            command = "the same command without --restart" if self.stored.restart else "the same command"
            print(f"{self.label}{stop.name}: stopped after epoch {num_epochs} with a checkpoint; {command} resumes.", flush=True)
            raise SystemExit(stop.exit_status)

    def save_checkpoint(self, num_epochs: int) -> None:
        """Store all that a run needs to go on after so many epochs as if nothing had happened, and the curves so far."""
        state = {"epoch": num_epochs, "settings": self.stored.settings(), "environment": self.environment}
        self.files.save_checkpoint(num_epochs, state | self.learner.state_dict(num_epochs))
        self.store_curves(num_epochs)  # after it: metrics without a checkpoint are those of a run whose checkpoints are gone

    def store_curves(self, num_epochs: int) -> None:
        """Write the metrics of the first so many epochs."""
        self.results_dict = self.learner.curves.arrays(num_epochs, self.config.steps_before(num_epochs))
        for metric, array in self.results_dict.items():
            self.files.save_array(metric, array)

    def store_results(self) -> None:
        """Add the run to the finished ones; `run` has done so if it came to the end."""
        self.stored.finish()

    def share_terminal(self, position: int) -> None:
        """Let all that this run prints say which run it is, and put its bar at this place among others."""
        self.bar_position = position
        self.label = self.stored.label = f"index {self.run_index}: "


def diverged(epoch: int, stepsize: float) -> UserError:
    return UserError(
        f"the loss is no longer finite in epoch {epoch + 1} (step size {stepsize:g}); the run stops here and its last checkpoint "
        "stays; start another experiment with a smaller stepsize"
    )


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
    parser.add_argument("--verbose", action="store_true", help="print losses, accuracies and times instead of a progress bar")
    parser.add_argument("--restart", action="store_true", help="delete what is there of these indices, and begin them anew")
    parser.add_argument("--without-models", action="store_true", help="resume, and finish, although stored models are gone")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides", help="settings that override the config's"
    )
    parser.add_argument("--track", metavar="tensorboard|wandb|trackio", type="track={}".format, action="append", dest="overrides")
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
