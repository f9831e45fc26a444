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
STEPS_PER_WINDOW = 25  # training losses and accuracies are stored as means over so many steps


class UserError(Exception):
    """Something the person at the keyboard can mend; scripts print it as one line and end with exit status 2."""


Auto = bool | str  # true, false, or "auto": what `settled` makes of it when the run starts
Seed = int | None
Rule = tuple[Callable[[Any], bool], str]  # what a value must be beyond its type, and how to say so
LARGEST_FLOAT32 = 3.4028234663852886e38
DEVICE_NAMES = '"auto", "cpu", "cuda" or "cuda:N"'


def is_device_name(name: str) -> bool:
    return re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name) is not None


def _is_folder_name(name: str) -> bool:
    return name == "" or (not re.search(r"[/\\\0]", name) and name.strip(". ") != "" and len(name.encode()) <= 200)


def _at_least(least: int) -> Rule:
    return lambda value: value >= least, f"{least} or more"


def _between(least: int, most: int) -> Rule:
    return lambda value: least <= value <= most, f"from {least} to {most}"


def _one_of(*choices: str) -> Rule:
    return lambda value: value in choices, "one of " + ", ".join(f'"{choice}"' for choice in choices)


_ANYTHING: Rule = (lambda _: True, "")
_FOLDER_NAME: Rule = (_is_folder_name, "the name of one folder, of at most 200 bytes")
_POSITIVE: Rule = (lambda value: value > 0, "greater than 0")
_BELOW_1: Rule = (lambda value: 0 <= value < 1, "from 0 to below 1")
_QUANTILE: Rule = (lambda value: 0 < value <= 1, "greater than 0, and at most 1")
_SEED: Rule = (lambda value: value is None or 0 <= value < 2**32, f"from 0 to {2**32 - 1}")
_IMAGES = _between(1, TRAIN_IMAGES_PER_CLASS - 1)


def setting(default: Any, help: str, rule: Rule = _ANYTHING, **facts: str | bool) -> Any:
    """A field of `Config` with all there is to know of its setting; help: what it means, in Markdown. facts, where there are any:

    unit; method: the name of the method that it switches on, unless it is 0 or false; paper: that is the paper's, and can be
    combined with others of it; of: the key without which it has no effect; size: it says what a run's files hold; free: it may change
    between the start of a run and its resumption, since it cannot change the results (the device, their last bits; resuming elsewhere is
    allowed, with a warning).
    """
    return dataclasses.field(default=default, metadata={"help": help, "rule": rule, **facts})


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of one run, complete and checked. Released keys keep their name and meaning (`cfg/README.md`)."""

    # Where things are
    data_path: str = setting("", "Folder for `cifar-100-python/`, or the files in it. Empty: `data/` beside the scripts.", free=True)
    results_dir: str = setting("", "Folder of all experiments. Empty: `results/` beside the scripts.", free=True)
    experiment_name: str = setting("", "Folder in `results_dir`. Empty: the config file's name without `.json`.", _FOLDER_NAME, free=True)
    num_workers: int = setting(0, "Without effect, for released configs: all images live on the device.", _at_least(0), free=True)
    debug: bool = setting(True, "Without effect, for released configs: there it turns off what is off anyway.", free=True)
    track: str = setting("", "Keep a record in a tracker too. Empty: in none.", _one_of("", "tensorboard", "wandb", "trackio"), free=True)

    # The problem; the defaults are the paper's
    dataset: str = setting(
        "cifar100", "`synthetic`: built-in images in the same shape and number, without files.", _one_of("cifar100", "synthetic"), size=True
    )
    num_tasks: int = setting(20, "Tasks of the run; `num_tasks` x `classes_per_task` is at most 100.", _between(1, NUM_CLASSES), size=True)
    classes_per_task: int = setting(5, "Classes that each task adds to the training set.", _between(1, NUM_CLASSES), size=True)
    epochs_per_task: int = setting(200, "Length of a task.", _between(1, 100_000), unit="epochs", size=True)
    batch_size: int = setting(
        90, "Images per step. A last, smaller batch of an epoch is used.", _between(1, 50_000), unit="images", size=True
    )
    train_images_per_class: int = setting(
        450, "Training images per class: those that follow the validation images in file order.", _IMAGES, unit="images", size=True
    )
    validation_images_per_class: int = setting(
        50, "Validation images per class: the first of its 500 training images in file order.", _IMAGES, unit="images", size=True
    )
    test_images_per_class: int = setting(
        100, "Test images per class: the first in file order.", _between(1, TEST_IMAGES_PER_CLASS), unit="images", size=True
    )
    augment_test_data: bool = setting(
        False, "Transform test (not validation) images at random too, as the released code does; the paper transforms training images only."
    )
    network_width: int = setting(
        64, "Channels of the first stage; the others have 2, 4 and 8 times as many.", _between(1, 1024), unit="channels", size=True
    )
    class_order_seed: Seed = setting(None, "Decides in which order the classes come; null: the seed of the index does.", _SEED)
    training_seed: Seed = setting(None, "Decides initial weights, order and augmentation of images, noise, resets; null: as above.", _SEED)

    # Stochastic gradient descent
    stepsize: float = setting(0.1, "Step size at the start of every task; x 0.2 after 30 %, 60 % and 80 % of its epochs.", _POSITIVE)
    weight_decay: float = setting(0.0005, "L2 penalty, on all parameters (see `decay_batch_norm`).", _at_least(0))
    decay_batch_norm: bool = setting(True, "Whether `weight_decay` and `l2_init` act on batch norm's weights and biases too.")
    momentum: float = setting(0.9, "Momentum of SGD; kept across tasks.", _BELOW_1)

    # The paper's algorithms
    noise_std: float = setting(
        0.0,
        "Standard deviation of the noise added to all parameters in every step; 0: none.",
        _at_least(0),
        method="Shrink and perturb",
        paper=True,
    )
    use_cbp: bool = setting(
        False, "Draw the least useful mature units anew, very few in a step.", method="Continual backpropagation", paper=True
    )
    replacement_rate: float = setting(
        0.0, "Share of a layer's units that is reset; not 0.", _between(0, 1), unit="share per step", of="use_cbp"
    )
    utility_function: str = setting(
        "weight",
        "`weight`: mean absolute outgoing weight; `contribution`: that times the magnitude of the unit's feature.",
        _one_of("weight", "contribution"),
        of="use_cbp",
    )
    maturity_threshold: int = setting(
        0, "Time after its reset (or the start) in which a unit cannot be reset; not 0.", _at_least(0), unit="steps", of="use_cbp"
    )
    running_average_utility: bool = setting(
        False,
        "Average the feature's magnitude with decay 0.99 and clear it at a reset, as the paper says. False: its sum, as released.",
        of="use_cbp",
    )
    reset_head: bool = setting(
        False, "Draw the output layer anew at the end of every task but the last.", method="Head resetting", paper=True
    )
    reset_network: bool = setting(
        False, "Draw all layers anew at the end of every task but the last; includes `reset_head`.", method="Retrained network", paper=True
    )
    early_stopping: bool = setting(
        False, "At the end of a task, go back to its epoch of best validation accuracy (the first of equals), batch-norm buffers included."
    )

    # Methods of others
    reinit_freq: int = setting(
        0, "Time between reinitialisations of weights; 0: none.", _at_least(0), unit="steps", method="Selective weight reinitialization"
    )
    reinit_factor: float = setting(
        0.0, "Threshold of utility, as a share of a tensor's mean; or the proportion of its weights. Not 0.", _at_least(0), of="reinit_freq"
    )
    swr_utility: str = setting(
        "gradient", "Utility of a weight: its size times its gradient's, or its size.", _one_of("gradient", "magnitude"), of="reinit_freq"
    )
    pruning_method: str = setting(
        "threshold", "Reinitialise weights up to a threshold, or a proportion.", _one_of("threshold", "proportional"), of="reinit_freq"
    )
    reinit_strat: str = setting(
        "resample", "New weights are drawn as the initial ones, or the mean of these.", _one_of("resample", "mean"), of="reinit_freq"
    )
    redo_reinit_frequency: int = setting(0, "Time between resets of dormant units; 0: none.", _at_least(0), unit="steps", method="ReDo")
    redo_reinit_threshold: float = setting(
        0.0, "A unit is dormant if its mean activation is at most this times its layer's.", _at_least(0), of="redo_reinit_frequency"
    )
    l2_init: float = setting(0.0, "L2 penalty on the distance to the initial parameters; 0: none.", _at_least(0), method="L2 Init")
    use_upgd: bool = setting(False, "Change useful weights less, and perturb the others; `momentum` must be 0.", method="UPGD")
    upgd_beta_utility: float = setting(0.999, "Decay of the running average of utilities.", _BELOW_1, of="use_upgd")
    upgd_sigma: float = setting(0.001, "Standard deviation of the noise added to gradients.", _at_least(0), of="use_upgd")
    use_snr: bool = setting(False, "Reset units that are silent for longer than is usual for them.", method="Self-normalized resets")
    snr_percentile: float = setting(0.99, "Quantile of a unit's times of silence that is its threshold.", _QUANTILE, of="use_snr")
    snr_first_threshold: int = setting(111, "Threshold of every unit at the start.", _between(1, 10_000), unit="steps", of="use_snr")
    snr_max_threshold: int = setting(222, "Largest threshold, not below the first.", _between(1, 10_000), unit="steps", of="use_snr")
    snr_update_frequency: int = setting(1000, "Time between updates of the thresholds.", _at_least(1), unit="steps", of="use_snr")
    fire_iterations: int = setting(
        0, "Iterations that make weights nearly orthogonal at the end of every task but the last; 0: none.", _between(0, 100), method="FIRE"
    )
    soft_reset: float = setting(
        0.0,
        "Share of the way back to the initial parameters, at the end of every task but the last; 0: none.",
        _between(0, 1),
        method="Soft reset",
    )

    # How it is computed
    combine: bool = setting(False, "Allow methods at once of which not all are the paper's.", free=True)
    checkpoint_save_frequency: int = setting(0, "Time between checkpoints; 0: one task.", _at_least(0), unit="epochs", free=True)
    device: str = setting(
        "auto",
        "`auto`: the first GPU, or the CPU. Resuming elsewhere ends exactness to the bit.",
        (is_device_name, DEVICE_NAMES),
        free=True,
    )
    precision: str = setting(
        "tf32",
        "`tf32`: TF32 in convolutions, as released (on a CPU: `fp32`); `bf16`: bfloat16 in these and in products, on float32 weights.",
        _one_of("tf32", "fp32", "bf16"),
    )
    compile_network: Auto = setting(
        False,
        "Fuse the network's operations with `torch.compile`: other last bits, and about a minute more at the start. Needs a C++ compiler "
        "(CPU) or Triton (GPU). `auto`: on a GPU where Triton is there, unless compiling fails. A run keeps what it began with.",
    )
    fold_batch_norm: Auto = setting(
        "auto",
        "Evaluate, not train, with batch norm made part of the convolutions: faster on a GPU, and other last bits of losses (very rarely "
        "of an accuracy, and so of the epoch that early stopping takes). `auto`: on a GPU. A run keeps what it began with.",
    )
    cuda_graphs: bool = setting(True, "On a GPU, record a step once and replay it: the same results, faster.", free=True)
    deterministic: bool = setting(
        True, "The same index gives the same results on the same machine, to the bit. False: cuDNN chooses its kernels by timing them."
    )

    @property
    def methods(self) -> list[str]:
        """Names of the methods that are on, in the order of their fields; resetting the network includes its head, and counts once."""
        return [name for name, key in METHODS.items() if getattr(self, key) and not (key == "reset_head" and self.reset_network)]

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

# What runs did that were started before a setting existed, where it is not the default.
BEFORE_THEY_EXISTED = {"fold_batch_norm": False}

FOLDER_KEYS = ("data_path", "results_dir")

TYPE_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    Auto: 'true, false or "auto"',
    Seed: "an integer or null",
    type(None): "null",
    list: "a list",
    dict: "an object",
}
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
RULES: dict[str, Rule] = {key: field.metadata["rule"] for key, field in FIELDS.items()}
METHODS = {field.metadata["method"]: key for key, field in FIELDS.items() if "method" in field.metadata}
FREE_KEYS = frozenset(key for key, field in FIELDS.items() if "free" in field.metadata)
# The released code stores none of these: then the paper's hold, which are the defaults.
SIZE_KEYS = tuple(key for key, field in FIELDS.items() if "size" in field.metadata)
SEED_KEYS = tuple(key for key, field in FIELDS.items() if field.type == Seed)


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
    config = make_config(settings, source=str(path), experiment_name=Path(path).stem)
    if config.track and getattr(importlib.util.find_spec(config.track), "origin", None) is None:  # W&B makes a folder of that name
        raise UserError(f"--track {config.track}: this package is not installed; python -m pip install {config.track}")
    return config


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
        check_key(key, source)
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


def check_key(key: str, source: str) -> None:
    """Raise UserError, naming `source` and the nearest key, if there is no such setting."""
    if key not in FIELDS:
        close = difflib.get_close_matches(key, FIELDS, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else ""
        raise UserError(f'{source}: unknown key "{key}"{hint}; cfg/README.md lists the keys')


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
    return ", ".join(f"{key} ({json.dumps(there.get(key))} there, {json.dumps(here.get(key))} here)" for key in keys)


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
    """Sizes, seeds and data_path of a stored config, the defaults where it names none or is not there; and the keys of these it names.

    Other keys are passed over: the released code stores settings, and its running state, that are unknown here. Raises UserError.
    """
    settings = read_stored(path) or {}
    sizes = {key: settings[key] for key in (*SIZE_KEYS, *SEED_KEYS, "data_path") if key in settings}
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
    check_key(key, "--set")
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
    if expected in (int, Seed) and type(value) is float and value.is_integer():
        value = int(value)
    rule_holds, rule = RULES[key]
    wanted = TYPE_NAMES[expected] + (f", {rule}" if rule else "")
    right_type = type(value) is expected or (expected in (float, Seed) and type(value) is int)
    right_type |= (expected == Auto and (type(value) is bool or value == "auto")) or (expected == Seed and value is None)
    if not right_type:
        raise UserError(f"{source}: {key} is {shown}; it must be {wanted}")
    if expected is int and abs(value) >= 2**63:
        raise UserError(f"{source}: {key} is {shown}; it must be {wanted}, and fit into 64 bits")
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
    for switch, key, right in (
        ("use_cbp", "replacement_rate", "greater than 0 (the paper: 1e-5)"),
        ("use_cbp", "maturity_threshold", "1 or more (the paper: 1000)"),
        ("reinit_freq", "reinit_factor", "greater than 0 (its authors: 0.0005)"),
    ):
        if (value := getattr(config, switch)) and getattr(config, key) == 0:
            raise UserError(f"{source}: {switch} is {json.dumps(value)} but {key} is 0; it must be {right}")
    if config.reinit_freq and config.pruning_method == "proportional" and config.reinit_factor > 1:
        raise UserError(f'{source}: pruning_method is "proportional" but reinit_factor is {config.reinit_factor}; it must be at most 1')
    if config.use_upgd and config.momentum:
        raise UserError(f"{source}: use_upgd is true but momentum is {config.momentum}; it must be 0: UPGD has none")
    first, most = config.snr_first_threshold, config.snr_max_threshold
    if config.use_snr and first > most:
        raise UserError(f"{source}: snr_first_threshold is {first} but snr_max_threshold is {most}; it must be {first} or more")
    if len(config.methods) > 1 and not config.combine and not all("paper" in FIELDS[METHODS[name]].metadata for name in config.methods):
        methods = " and ".join(f"{name} ({METHODS[name]})" for name in config.methods)
        raise UserError(f"{source}: {methods} are on at once; turn all but one off, or set combine to true if that is meant")
