"""What there is of a run on disk before this process trains it: nothing, all of it, or something to go on from."""

from pathlib import Path
from typing import Any

from incremental_cifar.command_line import is_memory_full, warn
from incremental_cifar.config import BEFORE_THEY_EXISTED, FREE_KEYS, Config, UserError, check_same_settings, described_differences
from incremental_cifar.environment import changed_code, changed_exactness, code_difference
from incremental_cifar.learner import Learner
from incremental_cifar.learning_curves import array_lengths
from incremental_cifar.run_files import RESTART, RunFiles
from incremental_cifar.safe_files import write_file


class StoredRun:
    """What is stored of a run with this config, if anything is; `is_finished` says whether it came to its end.

    restart: take all there is for nothing. without_models: go on although models of earlier tasks are gone.
    Raises UserError if the stored run's settings can give other results, or if it cannot be resumed.
    """

    def __init__(self, files: RunFiles, config: Config, restart: bool = False, without_models: bool = False):
        self.files, self.config = files, config
        self.restart, self.without_models = restart, without_models
        self.label = ""  # begins every warning
        self.models_gone: list[Path] = []  # those of which a warning told
        self.is_finished = self.is_unlisted = False
        self.check()

    def check(self) -> None:
        """Look again: another process may have started or finished the run."""
        self.is_finished = not self.restart and self.files.index in self.files.finished_indices()
        self.is_unlisted = False  # finished, but the list of finished runs was lost
        if self.restart:
            return
        stored = self.files.load_config()
        check_same_settings(stored, self.config, self.files.config_file)
        if not self.is_finished:
            # Only a run that came to its end has arrays of full length.
            lengths = array_lengths(self.config.steps_before(self.config.num_epochs), self.config.num_epochs)
            self.is_unlisted = stored is not None and self.files.has_arrays(lengths)
            if not self.is_unlisted:
                self.files.check_resumable()

    def has_nothing_to_do(self) -> bool:
        """Whether the run is finished, and say so; if the list of finished runs was lost, put the run into it again (we hold its lock)."""
        index, folder = self.files.index, self.files.folder
        if self.is_unlisted:
            if not self.files.is_analysed(self.config.num_tasks):  # else a sweep may have deleted them
                self.check_models(self.config.num_epochs)
            self.files.mark_finished()
            self.is_finished, self.is_unlisted = True, False
            print(f"Index {index} of {folder} is finished, by its arrays; it is in experiment_indices.npy again.")
        elif self.is_finished:
            print(f"Index {index} of {folder} is finished; nothing to do.")
        return self.is_finished

    def finish(self) -> None:
        """Put the run into the list of finished ones. Raises UserError if a model that a finished run has is not there."""
        if not self.is_finished:
            self.check_models(self.config.num_epochs)
            self.files.mark_finished()
            self.is_finished = True
            print(f"Index {self.files.index} is finished; its results are in {self.files.folder}", flush=True)

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
            warn(f"{self.label}going on without {', '.join(path.name for path in missing)} in {missing[0].parent}")

    def settings(self) -> dict[str, Any]:
        """What decides this run's results: its index and all settings that can change them."""
        return {"index": self.files.index, **{key: value for key, value in self.config.to_dict().items() if key not in FREE_KEYS}}

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest whole checkpoint; None if the run is to begin. Raises UserError if there is one of a run with other settings."""
        if self.restart:
            self.files.forget()
        checkpoint = self.files.load_checkpoint()
        if checkpoint is None:
            return None
        # Settings that did not exist when it was written are what they amounted to then.
        defaults = {key: value for key, value in (Config().to_dict() | BEFORE_THEY_EXISTED).items() if key not in FREE_KEYS}
        stored = checkpoint.get("settings")
        there, mine = defaults | stored if isinstance(stored, dict) else {}, self.settings()
        if there != mine:
            keys = [key for key in mine | there if there.get(key) != mine.get(key)]
            raise UserError(
                f"{self.files.checkpoint_folder}: the newest checkpoint of index {self.files.index} is of a run with other settings"
                + (f": {described_differences(keys, there, mine)}" if there else "")
            )
        return checkpoint

    def begin(self, learner: Learner, class_order: Any, environment: dict[str, Any], is_new: bool = True) -> None:
        """Write the files a run begins with; of a run that goes on, those that somebody deleted (but models cannot be)."""
        if is_new or not self.files.config_file.exists():
            self.files.save_config(self.config, environment)
        if is_new or not self.files.array_file("class_order").exists():
            self.files.save_array("class_order", class_order)
        if is_new or not self.files.has_model(0):
            self.files.save_model(0, learner.network)
        if is_new:
            self.store_code_difference(0)

    def resume(self, learner: Learner, checkpoint: dict[str, Any], environment: dict[str, Any]) -> int:
        """Fill a checkpoint into the learner and return how many epochs it has done; warn where results may differ from here on."""
        before = environment_of(checkpoint)
        try:
            epoch = checkpoint["epoch"]
            self.check_models(epoch)
            learner.load_state_dict(checkpoint)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            if is_memory_full(error):
                raise
            raise UserError(
                f"{self.files.checkpoint_folder}: the newest checkpoint of index {self.files.index} does not fit this code "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); resume it with the code that wrote it (commit "
                f"{before.get('commit')}), or begin it anew by {RESTART}"
            ) from None
        self.files.add_resumption(epoch, environment)
        self.store_code_difference(epoch)
        if change := changed_code(before, environment):
            warn(f"{self.label}resuming with other code ({change}): results may differ from either's")
        if change := changed_exactness(before, environment):
            warn(f"resuming in another environment ({change}): the last bits may differ from an uninterrupted run's")
        print(f"Resuming index {self.files.index} after epoch {epoch} of {self.config.num_epochs}.")
        return epoch

    def store_code_difference(self, epoch: int) -> None:
        """Store how the code differs from its commit from this epoch on, unless it did so before; what was stored of later ones is void."""
        before, difference = b"", code_difference()
        for earlier, path in self.files.differences():
            if earlier < epoch:
                before = path.read_bytes()
            else:
                path.unlink(missing_ok=True)
        if difference not in (b"", before):
            write_file(self.files.config_file.with_name(f"index-{self.files.index}_epoch-{epoch}.diff"), difference)


def environment_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The environment in which a checkpoint's run began; empty if it does not say."""
    environment = checkpoint.get("environment")
    return environment if isinstance(environment, dict) else {}
