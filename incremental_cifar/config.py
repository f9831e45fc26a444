"""The settings of a run: reading them from a JSON file, checking them, completing them with the paper's defaults.

    config = load_config("cfg/continual_backpropagation.json", overrides=["num_tasks=3", "device=cpu"])

A key per field of `Config`; keys that begin with `_` are comments. Whatever is wrong is a `UserError` of one line that names the
file, the key, the value and what would be right, so that a run never starts on settings its user did not mean.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_CLASSES = 100
NUM_SEEDS = 100_000  # what mlproj_manager.util.get_random_seeds returns: an index is from 0 to one less
TRAIN_IMAGES_PER_CLASS = 500  # of CIFAR-100: validation and training images together
TEST_IMAGES_PER_CLASS = 100


class UserError(Exception):
    """Something the person at the keyboard can mend; scripts print it as one line and end with exit status 2."""


Auto = bool | str  # true, false, or "auto": what `settled` makes of it when the run starts


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of one run, complete and checked. Released keys keep their name and meaning (`cfg/README.md`)."""

    # Where things are
    data_path: str = ""  # folder that holds (or will hold) cifar-100-python/; "": data/ beside the scripts
    results_dir: str = ""  # folder of all experiments; "": results/ beside the scripts
    experiment_name: str = ""  # folder of this experiment inside results_dir; "": the config file's name
    num_workers: int = 0  # accepted so that released configs load; there are no workers, the images live on the device
    debug: bool = True  # likewise without effect

    # The problem; the defaults are the paper's
    dataset: str = "cifar100"  # "cifar100", or "synthetic": a built-in set of the same shape that needs no file
    num_tasks: int = 20
    classes_per_task: int = 5  # classes added with each task
    epochs_per_task: int = 200
    batch_size: int = 90  # images per step
    train_images_per_class: int = 450  # those that follow the validation images in file order
    validation_images_per_class: int = 50  # the first of a class's 500 training images in file order
    test_images_per_class: int = 100  # the first in file order
    augment_test_data: bool = False  # transform test images at random too, as the released code does
    network_width: int = 64  # channels of the first stage; the others have 2, 4 and 8 times as many

    # Stochastic gradient descent
    stepsize: float = 0.1  # at the start of a task; x0.2 after 30 %, 60 % and 80 % of its epochs
    weight_decay: float = 0.0005  # L2 penalty, on all parameters
    momentum: float = 0.9

    # Shrink and perturb (the shrinking is the weight decay)
    noise_std: float = 0.0  # standard deviation of the noise added to every parameter after every step; 0: none

    # Continual backpropagation
    use_cbp: bool = False
    replacement_rate: float = 0.0  # share of a layer's units that is reset per step
    utility_function: str = "weight"  # "weight" or "contribution"
    maturity_threshold: int = 0  # steps for which a reset unit is protected
    running_average_utility: bool = False  # the paper's running average of feature magnitudes instead of the released code's sum

    # At the end of a task
    reset_head: bool = False  # draw the output layer anew
    reset_network: bool = False  # draw the whole network anew
    early_stopping: bool = False  # first go back to the task's epoch of best validation accuracy

    # How it is computed
    checkpoint_save_frequency: int = 0  # epochs between checkpoints; 0: one task
    device: str = "auto"  # "auto": the first GPU if there is one; "cpu", "cuda", "cuda:N"
    precision: str = "tf32"  # "tf32" (as released; on a CPU the same as fp32), "fp32" or "bf16"
    compile_network: Auto = False  # fuse the network's operations with torch.compile: other last bits, a minute more at the start
    fold_batch_norm: Auto = "auto"  # evaluate with batch norm made part of the convolutions: other last bits of losses
    cuda_graphs: bool = True  # on a GPU, record a step once and replay it: the same results, faster
    deterministic: bool = True  # the same index gives the same results, to the bit, on the same machine

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole run."""
        return self.num_tasks * self.epochs_per_task

    def num_classes_seen(self, task: int) -> int:
        """Classes in the training set of task `task` (counted from 0)."""
        return self.classes_per_task * (task + 1)

    def steps_per_epoch(self, task: int) -> int:
        """Steps in one epoch of task `task`; a last, smaller batch counts."""
        return -(-self.num_classes_seen(task) * self.train_images_per_class // self.batch_size)

    def steps_before(self, epoch: int) -> int:
        """Steps of the whole run before its epoch `epoch` (counted from 0): the number of that epoch's first step."""
        task, epoch_of_task = divmod(epoch, self.epochs_per_task)
        steps = sum(self.steps_per_epoch(earlier) for earlier in range(task)) * self.epochs_per_task
        return steps + (epoch_of_task * self.steps_per_epoch(task) if epoch_of_task else 0)

    @property
    def epochs_per_checkpoint(self) -> int:
        """Epochs between checkpoints: `checkpoint_save_frequency`, or one task."""
        return self.checkpoint_save_frequency or self.epochs_per_task

    def to_dict(self) -> dict[str, Any]:
        """All settings as they are written to `config_files/index-K.json`."""
        return dataclasses.asdict(self)


# In one process: PyTorch has 32 streams to give to it, and a run takes three; two runs that shared one would not be exact any more.
MOST_RUNS_PER_GPU = 10

# Keys that may change between the start of a run and its resumption, since they cannot change the results (of the device, the
# last bits: resuming elsewhere is allowed, with a warning).
FREE_KEYS = frozenset(
    {"data_path", "results_dir", "experiment_name", "num_workers", "debug", "checkpoint_save_frequency", "device", "cuda_graphs"}
)

# What runs did that were started before a setting existed, where it is not the default.
BEFORE_THEY_EXISTED = {"fold_batch_norm": False}

# The settings that say what a run's files hold. The released code stores none of them: then the paper's hold, which are the defaults.
SIZE_KEYS = (
    "dataset",
    "num_tasks",
    "classes_per_task",
    "epochs_per_task",
    "batch_size",
    "train_images_per_class",
    "validation_images_per_class",
    "test_images_per_class",
    "network_width",
)

FOLDER_KEYS = ("data_path", "results_dir")

DEVICE_NAMES = '"auto", "cpu", "cuda" or "cuda:N"'


def is_device_name(name: str) -> bool:
    return re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name) is not None


LARGEST_FLOAT32 = 3.4028234663852886e38
Rule = tuple[Callable[[Any], bool], str]


def _at_least(least: int) -> Rule:
    return lambda value: value >= least, f"{least} or more"


def _between(least: int, most: int) -> Rule:
    return lambda value: least <= value <= most, f"from {least} to {most}"


def _one_of(*choices: str) -> Rule:
    return lambda value: value in choices, "one of " + ", ".join(f'"{choice}"' for choice in choices)


# What a value must be beyond its type, and how to say so.
RULES: dict[str, Rule] = {
    "experiment_name": (
        lambda value: value == "" or (not re.search(r"[/\\\0]", value) and value.strip(". ") != "" and len(value.encode()) <= 200),
        "the name of one folder, of at most 200 bytes",
    ),
    "num_workers": _at_least(0),
    "dataset": _one_of("cifar100", "synthetic"),
    "num_tasks": _between(1, NUM_CLASSES),
    "classes_per_task": _between(1, NUM_CLASSES),
    "epochs_per_task": _between(1, 100_000),
    "batch_size": _between(1, NUM_CLASSES * TRAIN_IMAGES_PER_CLASS),
    "train_images_per_class": _between(1, TRAIN_IMAGES_PER_CLASS - 1),
    "validation_images_per_class": _between(1, TRAIN_IMAGES_PER_CLASS - 1),
    "test_images_per_class": _between(1, TEST_IMAGES_PER_CLASS),
    "network_width": _between(1, 1024),
    "stepsize": (lambda value: value > 0, "greater than 0"),
    "weight_decay": _at_least(0),
    "momentum": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    "noise_std": _at_least(0),
    "replacement_rate": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "utility_function": _one_of("weight", "contribution"),
    "maturity_threshold": _at_least(0),
    "checkpoint_save_frequency": _at_least(0),
    "device": (is_device_name, DEVICE_NAMES),
    "precision": _one_of("tf32", "fp32", "bf16"),
}

TYPE_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    Auto: 'true, false or "auto"',
    type(None): "null",
    list: "a list",
    dict: "an object",
}
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def load_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> Config:
    """Read a JSON config file, apply `KEY=VALUE` overrides, check everything and complete it with the defaults.

    In folders, ~ and environment variables are put in. Raises UserError with one line if the file cannot be read or any setting in it, or
    in `overrides`, cannot be used.
    """
    settings = read_json(Path(path))
    overriding: dict[str, Any] = {}
    for override in overrides:
        key, value = _parse_override(override)
        if key in overriding:
            raise UserError(f'--set: key "{key}" appears twice; keep one of them')
        overriding[key] = value
    settings = with_whole_folders({key: value for key, value in settings.items() if key not in overriding}, source=str(path))
    settings |= with_whole_folders(overriding, source="--set")
    return make_config(settings, source=str(path), experiment_name=Path(path).stem)


def grid_points(grids: Iterable[str]) -> list[tuple[str, ...]]:
    """The points of a grid, as overrides: ["a=1,2", "b=3"] gives ("a=1", "b=3") and ("a=2", "b=3"); no grid, one empty point.

    Raises UserError.
    """
    axes: dict[str, list[str]] = {}
    for grid in grids:
        key, _, text = grid.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not key or "" in values or key in axes or key in {"experiment_name", *FOLDER_KEYS}:
            raise UserError(f'--grid: expected KEY=VALUE1,VALUE2,... of a setting that is there once and names no place, got "{grid}"')
        axes[key] = [f"{key}={value}" for value in values]
    return list(itertools.product(*axes.values()))


def overrides_of(config: Config) -> list[str]:
    """All settings as KEY=VALUE: what behind --set gives this config, whatever the file says."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in config.to_dict().items()]


def make_config(settings: dict[str, Any], source: str, experiment_name: str = "experiment") -> Config:
    """Check a dict of settings and complete it; `source` names where it comes from in messages.

    Keys that begin with `_` are passed over. `experiment_name` is the name used when the settings have none. Folders are taken as they are
    written (see `with_whole_folders`). Raises UserError.
    """
    values = {key: value for key, value in settings.items() if not key.startswith("_")}
    for key, value in values.items():
        if key not in FIELDS:
            raise UserError(f'{source}: unknown key "{key}"{_did_you_mean(key)}; cfg/README.md lists the keys')
        values[key] = _checked(key, value, source)
    defaults = {
        "experiment_name": experiment_name,
        "data_path": str(REPOSITORY / "data"),
        "results_dir": str(REPOSITORY / "results"),
    }
    for key, default in defaults.items():
        values[key] = values.get(key) or _checked(key, default, source)
    for key in FOLDER_KEYS:
        values[key] = os.path.abspath(values[key])
    config = Config(**values)
    _check_combinations(config, source)
    return config


def with_whole_folders(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """The settings that a user wrote, with ~ and environment variables put into their folders. Raises UserError, naming `source`."""
    folders = {key: _checked(key, settings[key], source) for key in FOLDER_KEYS if settings.get(key)}
    return settings | {key: whole_path(text, f"{source}: {key}") for key, text in folders.items()}


def whole_path(text: str, where: str) -> str:
    """A folder's path from the root, of what a user wrote, with ~ and environment variables put in; once, whatever these hold.

    A folder that is there may have a $ in its name. where: what the text is, in messages. Raises UserError.
    """
    user = text.partition("/")[0] if text.startswith("~") else ""
    home = os.path.expanduser(user)
    if user and home == user:
        missing = f'there is no user "{user[1:]}"' if user != "~" else "the environment variable HOME is not set"
        raise UserError(f'{where} is "{text}"; {missing}; write the folder out, as in ./{user} where that is its name')

    def put_in(match: re.Match) -> str:
        name = match["name"] or match["braced"]
        folder = home + match.string[: match.end()] + match["rest"]
        if os.path.isabs(folder) and os.path.lexists(folder):
            return match[0]
        if not os.environ.get(name):
            raise UserError(f'{where} is "{text}"; the environment variable {name} is not set: set it, or write the folder out')
        return os.environ[name]

    variable = r"\$(?:(?P<name>\w+)|\{(?P<braced>\w+)\})(?=(?P<rest>[^/]*))"
    return os.path.abspath(home + re.sub(variable, put_in, text[len(user) :]))


def differing_keys(stored: Config, config: Config) -> list[str]:
    """Keys that can change results and differ between the config a run was started with and the present one."""
    return [key for key in FIELDS if key not in FREE_KEYS and getattr(config, key) not in (getattr(stored, key), "auto")]


def settled(config: Config, stored: Config | None, is_gpu: bool) -> Config:
    """The config with "auto" decided: as the run was started, or, if it was not, as it is faster on this device."""
    has_compiler = is_gpu and importlib.util.find_spec("triton") is not None
    best = {"compile_network": has_compiler, "fold_batch_norm": is_gpu}
    return dataclasses.replace(
        config, **{key: getattr(stored, key) if stored else best[key] for key in best if getattr(config, key) == "auto"}
    )


def check_same_settings(stored: Config | None, config: Config, where: Path) -> None:
    """Raise UserError if `stored`, which stands in the file `where`, can give other results than `config`; None agrees with all."""
    if stored is not None and (keys := differing_keys(stored, config)):
        differences = described_differences(keys, stored.to_dict(), config.to_dict())
        raise UserError(f"{where}: this run was started with other settings: {differences}; use those, or another experiment_name")


def described_differences(keys: Iterable[str], there: dict[str, Any], here: dict[str, Any]) -> str:
    """The settings of these names in two places, for messages."""
    return ", ".join(f"{key} ({there.get(key)} there, {here.get(key)} here)" for key in keys)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it cannot be read, is something else, or has a key (but a comment) twice."""
    try:
        settings = _json_content(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read this config file ({error.strerror}); cfg/ holds one per algorithm") from None
    except (UnicodeDecodeError, RecursionError):
        raise UserError(f"{path}: not a JSON text file; cfg/ holds examples") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a JSON object of keys and values, found {TYPE_NAMES.get(type(settings), 'a number')}")
    return settings


def read_stored(path: Path, what: str = "config") -> dict[str, Any] | None:
    """The JSON object that a run stored; None if there is no such file. Raises UserError, saying `what` it should be, for anything else."""
    try:
        if os.path.lexists(path) and not path.is_file():  # a pipe, say, would keep its reader waiting
            raise ValueError("not a file")
        settings = _json_content(path)
        if not isinstance(settings, dict):
            raise ValueError("not an object of keys and values")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot read the stored {what} of this run ({getattr(error, 'strerror', None) or error})") from None
    return settings


def read_sizes(path: Path) -> tuple[Config, set[str]]:
    """The sizes (SIZE_KEYS) in a stored config, the paper's where it names none or is not there; and the keys that it names.

    Other keys are passed over: the released code stores settings, and its running state, that are unknown here. Raises UserError.
    """
    settings = read_stored(path) or {}
    sizes = {key: settings[key] for key in SIZE_KEYS if key in settings}
    return make_config(sizes, source=str(path)), set(sizes)


def _json_content(path: Path) -> Any:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content and not key.startswith("_"):
                raise UserError(f'{path}: key "{key}" appears twice; keep one of them')
            content[key] = value
        return content

    return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f'--set: expected KEY=VALUE, got "{override}"')
    if key not in FIELDS:
        raise UserError(f'--set: unknown key "{key}"{_did_you_mean(key)}; cfg/README.md lists the keys')
    if FIELDS[key].type is str:
        return key, _checked(key, text, "--set")
    value: Any = text  # a string where none belongs: the check below says what does
    for read in (int, float, json.loads):  # numbers as Python takes them: .1 and +3 too
        with contextlib.suppress(ValueError, RecursionError):
            value = read(text)
            break
    return key, _checked(key, value, "--set")


def _checked(key: str, value: Any, source: str) -> Any:
    """Return `value` in its field's type. Integers are numbers and 3.0 is an integer, but true and false are neither."""
    expected = FIELDS[key].type
    shown = json.dumps(value) if len(json.dumps(value)) <= 60 else json.dumps(value)[:57] + "..."
    if expected is int and type(value) is float and value.is_integer():
        value = int(value)
    rule_holds, rule = RULES.get(key, (lambda _: True, ""))
    wanted = TYPE_NAMES[expected] + (f", {rule}" if rule else "")
    right_type = type(value) is expected or (expected is float and type(value) is int)
    right_type |= expected == Auto and (type(value) is bool or value == "auto")
    if not right_type:
        raise UserError(f"{source}: {key} is {shown}; it must be {wanted}")
    if expected is float:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not abs(value) <= LARGEST_FLOAT32:
            raise UserError(f"{source}: {key} is {shown}; it must be {wanted}, and finite in single precision")
    if expected is str and ("\0" in value or value.encode(errors="replace").decode() != value):
        raise UserError(f"{source}: {key} is {shown}; it must be a string of Unicode text without NUL characters")
    if not rule_holds(value):
        raise UserError(f"{source}: {key} is {shown}; it must be {wanted}")
    return value


def _check_combinations(config: Config, source: str) -> None:
    classes = config.num_tasks * config.classes_per_task
    if classes > NUM_CLASSES:
        raise UserError(
            f"{source}: num_tasks {config.num_tasks} x classes_per_task {config.classes_per_task} is {classes} classes; "
            f"CIFAR-100 has {NUM_CLASSES}"
        )
    images = config.train_images_per_class + config.validation_images_per_class
    if images > TRAIN_IMAGES_PER_CLASS:
        raise UserError(
            f"{source}: train_images_per_class {config.train_images_per_class} + validation_images_per_class "
            f"{config.validation_images_per_class} is {images}; a class has {TRAIN_IMAGES_PER_CLASS} training images"
        )
    if config.use_cbp and config.replacement_rate == 0:
        raise UserError(f"{source}: use_cbp is true but replacement_rate is 0; it must be greater than 0 (the paper: 1e-5)")
    if config.use_cbp and config.maturity_threshold == 0:
        raise UserError(f"{source}: use_cbp is true but maturity_threshold is 0; it must be 1 or more (the paper: 1000)")


def _did_you_mean(key: str) -> str:
    close = difflib.get_close_matches(key, FIELDS, n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
