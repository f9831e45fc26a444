"""Where the files of a run are, and how they are written and read.

    files = RunFiles("results/base_deep_learning_system", index=0)
    files.save_array("class_order", class_order)          # results/base_deep_learning_system/class_order/index-0.npy

An experiment's folder, results_dir/experiment_name/, holds for each index K:

    config_files/index-K.json                 the complete config; versions, device and code of the start, and of each resumption
    config_files/index-K_epoch-E.diff         how the code differed from its commit at the start (E = 0) or a resumption, if it did
    <metric>/index-K.npy                      one folder per metric, see learning_curves.METRICS
    model_parameters/index-K_epoch-E.pt       state dicts: the initial network (E = 0) and the network at the end of each task
    experiment_checkpoints/index-K_epoch-E.pt what a run resumes from; the newest two
    progress/index-K.json                     how far the run is, for whoever watches; nothing depends on it
    experiment_indices.npy                    the finished indices, sorted; a run's index is added after everything else

Every file is complete or absent: it is written beside its place, flushed to disk, and moved over it. Files are read without executing
anything in them (no pickles). A checkpoint holds a checksum of its content; a damaged one is passed over for the one before it.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from incremental_cifar.command_line import is_memory_full, warn
from incremental_cifar.config import BEFORE_THEY_EXISTED, Config, UserError, check_same_settings, make_config, read_stored
from incremental_cifar.safe_files import check_destinations, lock, lock_holder, read_note, write_file, write_note

if TYPE_CHECKING:
    import torch  # otherwise imported where tensors are written or read: whoever only looks at runs need not wait seconds for it

CHECKPOINTS_KEPT = 2
RESTART = "incremental_cifar_experiment.py --restart"  # in messages, which other scripts show too

METRIC_FOLDERS = ("*_per_checkpoint", "*_per_epoch", "*_runtime")  # of what a run measures
ANALYSIS_FOLDERS = ("*_analysis", "accuracy_per_class_in_order")  # of what post_run_analysis.py finds out later


class RunFiles:
    """Every path of one run, and the safe ways to write and read them."""

    def __init__(self, folder: str | os.PathLike, index: int):
        self.folder = Path(folder)
        self.index = index
        self.config_file = self.folder / "config_files" / f"index-{index}.json"
        self.checkpoint_folder = self.folder / "experiment_checkpoints"
        self.indices_file = self.folder / "experiment_indices.npy"
        self.indices_lock_file = self.folder / ".experiment_indices.lock"
        self.lock_file = self.folder / f".index-{index}.lock"

    def array_file(self, metric: str) -> Path:
        return self.folder / metric / f"index-{self.index}.npy"

    def model_file(self, epoch: int) -> Path:
        return self.folder / "model_parameters" / f"index-{self.index}_epoch-{epoch}.pt"

    def checkpoint_file(self, epoch: int) -> Path:
        return self.checkpoint_folder / f"index-{self.index}_epoch-{epoch}.pt"

    # --- config ---

    def save_config(self, config: Config, environment: dict[str, Any]) -> None:
        content = {**config.to_dict(), "_environment": environment}
        write_file(self.config_file, (json.dumps(content, indent=1) + "\n").encode())

    def load_config(self) -> Config | None:
        """The config this run was started with, or None if it was not. Raises UserError if the file is not a config."""
        settings = read_stored(self.config_file)
        if settings is None:
            return None
        return make_config(BEFORE_THEY_EXISTED | settings, source=str(self.config_file), experiment_name=self.folder.name)

    def add_resumption(self, epoch: int, environment: dict[str, Any]) -> None:
        """Note in the stored config that the run goes on after this epoch, and in which environment."""
        content = read_stored(self.config_file) or {}
        earlier = content.get("_resumptions")
        content["_resumptions"] = [*(earlier if isinstance(earlier, list) else []), {"epoch": epoch, **environment}]
        write_file(self.config_file, (json.dumps(content, indent=1) + "\n").encode())

    # --- metrics ---

    def save_array(self, metric: str, array: np.ndarray) -> None:
        write_file(self.array_file(metric), array_bytes(array))

    def has_arrays(self, lengths: dict[str, int]) -> bool:
        """Whether each of these metrics is there whole, with so many values."""
        with contextlib.suppress(Exception):  # not there, or damaged in one of many ways
            paths = {self.array_file(metric): length for metric, length in lengths.items()}
            return all(path.is_file() and np.load(path, allow_pickle=False).shape == (length,) for path, length in paths.items())
        return False

    def is_analysed(self, num_tasks: int) -> bool:
        """Whether the analysis of a finished run is there whole: its settings are written last, a digest per model (null: it was gone)."""
        digests = read_note(self.folder / "analysis_settings" / self.config_file.name).get("model_sha256")
        return isinstance(digests, list) and len(digests) == num_tasks + 1 and None not in digests

    # --- models and checkpoints ---

    def save_model(self, epoch: int, network: "torch.nn.Module") -> None:
        """Store a network's state dict, on the CPU and contiguous, as the network of this epoch."""
        state = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
        write_file(self.model_file(epoch), state_bytes(state))

    def has_model(self, epoch: int) -> bool:
        """Whether the network of this epoch is there; of 0 bytes, as a full disk or a broken copy leaves it, it is not."""
        path = self.model_file(epoch)
        return path.is_file() and path.stat().st_size > 0

    def save_checkpoint(self, epoch: int, state: dict[str, Any]) -> None:
        """Write the checkpoint after `epoch` epochs with its checksum, read it back, then remove all but the newest two of this run."""
        path = self.checkpoint_file(epoch)
        write_file(path, state_bytes({**state, "sha256": state_digest(state)}))
        try:
            read_checkpoint(path)
        except DamagedFile as error:
            raise UserError(f"{path}: what was written cannot be read back ({error}); check the disk") from None
        checkpoints = self.checkpoints()
        kept = [file for earlier, file in checkpoints if earlier <= epoch][-CHECKPOINTS_KEPT:]  # later ones were damaged, or of no use
        for _, file in checkpoints:
            if file not in kept:
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:
                    warn(f"{file}: cannot delete this old checkpoint ({error.strerror})")

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, its tensors on the CPU; None if there is no checkpoint.

        A damaged one is reported and the one before it taken. Raises UserError if there are checkpoints but none is whole.
        """
        checkpoints = self.checkpoints()
        for _, path in reversed(checkpoints):
            try:
                return read_checkpoint(path)
            except DamagedFile as error:
                warn(f"{path}: this checkpoint is damaged ({error}); looking for the one before it")
        if checkpoints:
            raise UserError(
                f"{self.checkpoint_folder}: no checkpoint of index {self.index} is whole; delete them to start the run again ({RESTART})"
            )
        return None

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Epoch and path of this run's checkpoints, oldest first."""
        return self._by_epoch(self.checkpoint_folder)

    def models(self) -> list[tuple[int, Path]]:
        """Epoch and path of this run's models, oldest first."""
        return self._by_epoch(self.model_file(0).parent)

    def differences(self) -> list[tuple[int, Path]]:
        """Epoch and path of what `code_difference` gave at the run's start and resumptions, oldest first."""
        return self._by_epoch(self.config_file.parent, "diff")

    def _by_epoch(self, folder: Path, suffix: str = "pt") -> list[tuple[int, Path]]:
        pattern = re.compile(rf"index-{self.index}_epoch-(\d+)\.{suffix}")
        names = os.listdir(folder) if folder.is_dir() else []
        matches = [match for match in map(pattern.fullmatch, names) if match and (folder / match[0]).is_file()]
        return sorted((int(match[1]), folder / match[0]) for match in matches)

    # --- what is left of a run ---

    def check_resumable(self) -> None:
        """Raise UserError if a run got further here than a new one has before its first checkpoint, and there is none to resume it from.

        A run writes its config first, and its metrics after each checkpoint; so one that was killed before its first is still new.
        """
        left, reason = self._released_checkpoints(), "it is one of the released code; finish it there"
        if "_environment" not in (read_stored(self.config_file) or {"_environment"}):
            left.append(self.config_file)
        if not left:
            config = self.load_config()
            first_checkpoint = config.epochs_per_checkpoint if config else -1
            left, reason = self._arrays(*METRIC_FOLDERS), "its checkpoints are gone; restore them"
            left += [path for epoch, path in self.models() if epoch > first_checkpoint]
        if left and not self.checkpoints():
            raise UserError(
                f"{left[0]}: a run of index {self.index} was begun here and cannot be resumed, since {reason}, or begin it anew "
                f"by {RESTART}, which deletes what is here of it"
            )

    def forget(self) -> None:
        """Delete all that is there of this run. If that is interrupted, what is left is not taken for a finished or a new run."""
        if self.index in self.finished_indices():
            self.mark_finished(False)
        paths = [self.array_file("class_order"), *(path for _, path in self.checkpoints())]  # without the first, no run is finished
        paths += self._released_checkpoints()
        paths += [path for _, path in self.models() + self.differences()]
        paths += [*self._arrays(*ANALYSIS_FOLDERS), self.folder / "analysis_settings" / self.config_file.name, self.progress_file]
        paths += [self.config_file, *self._arrays(*METRIC_FOLDERS)]
        for path in paths:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "tracking" / f"index-{self.index}", ignore_errors=True)

    def tidy(self, keep: str, num_tasks: int) -> None:
        """Delete of a finished run what is not to be kept: of "all" nothing, of "models" its checkpoints, of "results" its models too.

        Models go only after the whole analysis.
        """
        if keep == "all" or self.index not in self.finished_indices():
            return
        for _, path in self.checkpoints() + (self.models() if keep == "results" and self.is_analysed(num_tasks) else []):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                warn(f"{path}: cannot delete this file ({error.strerror})")

    def _released_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoint_folder.glob(f"index-{self.index}_current_epoch-*.p"))

    def _arrays(self, *folders: str) -> list[Path]:
        return [path for folder in folders for path in sorted(self.folder.glob(f"{folder}/index-{self.index}.npy"))]

    # --- how far it is ---

    @property
    def progress_file(self) -> Path:
        return self.folder / "progress" / f"index-{self.index}.json"

    def save_progress(self, progress: dict[str, Any]) -> None:
        """Say how far the run is; nothing depends on this file."""
        write_note(self.progress_file, progress)

    def load_progress(self) -> dict[str, Any]:
        """What the run last said about itself (see `Progress.report`); empty if that cannot be read."""
        return read_note(self.progress_file)

    # --- one run, one process ---

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this run's lock; raise UserError, naming the holder, if another process does."""
        with lock(self.lock_file) as holder:
            if holder is not None:
                raise UserError(f"{self.lock_file}: another process is working on index {self.index} of this experiment: {holder}")
            for partial in self.folder.glob(f"*/.index-{self.index}[._]*.partial"):  # of a process that was killed while it wrote
                partial.unlink(missing_ok=True)
            yield

    def check_writable(self, metrics: Iterable[str], model_epochs: Iterable[int], last_epoch: int) -> None:
        """Raise UserError, before the work, if a file that a run writes on its way or at its end cannot be written."""
        check_destinations(
            self.config_file,
            *map(self.array_file, metrics),
            *map(self.model_file, model_epochs),
            self.checkpoint_file(last_epoch),
            self.indices_file,
        )
        with lock(self.indices_lock_file):
            pass

    # --- finished runs ---

    def finished_indices(self) -> list[int]:
        """Indices of this experiment's finished runs, sorted; also from a file of the released code. Raises UserError if unreadable."""
        if not self.indices_file.exists():
            return []
        if not self.indices_file.is_file():  # a folder, or a pipe that would be waited for
            raise UserError(f"{self.indices_file}: there is something else in the place of this file; move it away")
        try:
            indices = np.load(self.indices_file, allow_pickle=False)
            is_whole = indices.dtype.kind == "f" and np.isfinite(indices).all() and np.array_equal(indices, np.rint(indices))
            if indices.dtype.kind not in "iu" and not is_whole:
                raise ValueError(f"expected integers, found {indices.dtype}")
            # As released: one finished run gives an array without a dimension, and a repeated run an index that appears twice.
            return sorted({int(index) for index in np.atleast_1d(indices)})
        except Exception as error:  # np.load raises many kinds, depending on where a file is damaged
            reason = error if os.path.getsize(self.indices_file) else "it is empty, 0 bytes"
            raise UserError(
                f"{self.indices_file}: cannot read the list of finished runs ({reason}); delete it, and give the commands of those runs "
                "again: finished ones are recognised, others go on from their checkpoints"
            ) from None

    def mark_finished(self, finished: bool = True) -> None:
        """Add this index to the finished ones, or take it from them; several runs of one experiment may do so at once."""
        with lock(self.indices_lock_file, wait=True):
            others = set(self.finished_indices()) - {self.index}
            indices = np.array(sorted({*others, self.index} if finished else others), dtype=np.int64)
            write_file(self.indices_file, array_bytes(indices))


class Runs(NamedTuple):
    """Some indices of one config: all that a sweep has of it, or a pack, which one process trains."""

    source: str  # the config's file
    config: Config
    indices: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.config.experiment_name} index {self.indices_text}"

    @property
    def indices_text(self) -> str:
        return ",".join(map(str, self.indices))

    @property
    def folder(self) -> Path:
        return Path(self.config.results_dir, self.config.experiment_name)

    @property
    def files(self) -> list[RunFiles]:
        return [RunFiles(self.folder, index) for index in self.indices]

    @property
    def job_name(self) -> str:
        """What their jobs on Slurm are called: it tells this folder apart from all others."""
        readable = re.sub(r"[^\w.=-]", "_", self.config.experiment_name)[:60]
        return f"{readable}-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}"

    def packs(self, size: int) -> list["Runs"]:
        return [self._replace(indices=self.indices[first : first + size]) for first in range(0, len(self.indices), size)]

    def for_gpu(self, has_gpu: bool) -> "Runs":
        """The same where they are given a GPU, which `device` "auto" would do without if it does not work."""
        is_auto = has_gpu and self.config.device == "auto"
        return self._replace(config=dataclasses.replace(self.config, device="cuda")) if is_auto else self

    def check(self) -> None:
        """Raise UserError if one was started with settings that can give other results, or if nothing can be written in their folder."""
        check_destinations(self.folder / "logs" / "index-0.log")
        for files in self.files:
            check_same_settings(files.load_config(), self.config, files.config_file)

    def tidy(self, keep: str) -> None:
        """Delete of finished runs what is not to be kept, as `RunFiles.tidy`."""
        for files in self.files:
            files.tidy(keep, self.config.num_tasks)

    def unfinished(self) -> set[int]:
        return {*self.indices}.difference(RunFiles(self.folder, 0).finished_indices())

    def unanalysed(self) -> set[int]:
        """The indices that are finished, but not analysed."""
        analysed = (files.index for files in self.files if files.is_analysed(self.config.num_tasks))
        return {*self.indices}.difference(self.unfinished(), analysed)

    def holder(self) -> str | None:
        """Who works on one of them; None if nobody does."""
        return next(filter(None, (lock_holder(files.lock_file) for files in self.files)), None)

    def progress(self) -> list[object]:
        """What is another after one of them has come further: a checkpoint, its end, its analysis."""
        return [self.unfinished(), self.unanalysed(), *(files.checkpoints() for files in self.files)]


def how_it_stands(files: RunFiles, config: Config, job: str = "") -> tuple[str, str]:
    """The state of a run with this config, and what there is to say of it. job: its job on Slurm and the state of that, if there is one."""
    try:
        check_same_settings(files.load_config(), config, files.config_file)
        is_finished = files.index in files.finished_indices()
    except UserError as error:
        return "unusable", str(error)
    holder, said, checkpoints = lock_holder(files.lock_file), files.load_progress(), files.checkpoints()
    if is_finished:
        return ("analysed", "") if files.is_analysed(config.num_tasks) else ("finished", holder or job)
    if holder and f"process {said.get('process')}," in holder:
        seconds = said.get("seconds_left")
        left = "" if seconds is None else f"{datetime.timedelta(seconds=round(seconds))} left, "
        return "running", f"epoch {said.get('epoch')} of {said.get('num_epochs')}, {left}{holder}"
    if holder or ", running" in job:
        return "running", f"starting, {holder or job}"
    if job:
        return "queued", job
    name = re.compile(rf"index-(\d+,)*{files.index}(,\d+)*\.log|slurm-\d+_{files.index}\.out")
    logs = sorted((path for path in files.folder.glob("logs/*") if name.fullmatch(path.name)), key=lambda path: path.stat().st_mtime)
    newest = {log.suffix: log for log in logs}
    lines = {newest[kind]: last_line(newest[kind], files.index) for kind in (".log", ".out") if kind in newest}  # the run's own comes first
    for log, line in lines.items():
        if re.search("error: |exit status|killed by", line):
            return "failed", f"{line} ({log})"
    if checkpoints:
        return "interrupted", f"after epoch {checkpoints[-1][0]}"
    return "interrupted" if any(lines.values()) else "never started", ""


# A state of a run's progress bar. What another library writes begins right behind it.
BAR = re.compile(r"[^\r\n]*\| [\d:]+, [\d:?]+ left(, epoch \d+, test accuracy \d\.\d{3})?")


def last_line(log: Path, index: int | None = None) -> str:
    """The last error in a log since the last start in it (not another index's), or else the last line; not a progress bar, or empty."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - 20_000)
        file.seek(start)
        text = file.read().decode(errors="replace").replace("\x1b[A", "\n")
        text = re.sub(r"\A[^\r\n]*", "", text) if start else text  # the rest of a line, or of a state of the bar
        text = re.split(r"=== started: .*\n", text)[-1]
        lines = [line.strip() for line in re.split(r"[\r\n]+", BAR.sub("\n", text)) if line.strip() and line[:3] != "==="]
        named = {line: match[1].split(", ") for line in lines if (match := re.match(r"error: index ([\d, ]+): ", line))}
        errors = [line for line in lines if line.startswith("error: ") and (index is None or str(index) in named.get(line, [str(index)]))]
        return (errors or lines or [""])[-1]
    return ""


def array_bytes(array: np.ndarray) -> memoryview:
    """The content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getbuffer()


def state_bytes(state: dict[str, Any]) -> memoryview:
    """The content of a .pt file; made in memory, so that whatever the disk does shows up as an OSError of `write_file`."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


class DamagedFile(Exception):
    """A file is not what it was when it was written."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's state, its tensors on the CPU. Raises DamagedFile if it cannot be read or its checksum does not hold."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, depending on where a file is damaged
        if is_memory_full(error):
            raise
        raise DamagedFile(f"cannot be read: {type(error).__name__}") from None
    if not isinstance(state, dict) or state.pop("sha256", None) != state_digest(state):
        raise DamagedFile("its checksum does not hold")
    return state


def state_digest(state: Any) -> str:
    """SHA-256 over all values of nested dicts, lists, tensors, numbers and strings, with their types, shapes and names."""
    import torch

    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().numpy())
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)};".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, (list, tuple)):
            digest.update(f"list {len(value)};".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{type(value).__name__} {value!r};".encode())

    add(state)
    return digest.hexdigest()
