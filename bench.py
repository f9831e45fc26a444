"""How fast runs are, beside a bare loop in the same process: the tables in docs/cost.md.

    python bench.py                              # full width, batch 90, this machine's device, all of cfg/; under four minutes
    python bench.py --width 8 --precisions bf16  # smaller, quicker
    python bench.py --configs cfg/redo.json      # the base system and this
    python bench.py --released ~/loss-of-plasticity --data-path data    # and the released code's own training loop
    python bench.py --profile                    # and what a step's time goes into

Images are the built-in ones. Nothing is simplified: an epoch is that of a run, with its order, augmentation, algorithm and metrics, and
evaluation as a run does it. (What an algorithm does only once in many steps, or between tasks, is not in the steps that are timed.) The
variants take turns, and tables show the fastest turn of each: what else a machine does only slows. Each precision has a process of its own,
so that neither its memory nor a recording that failed is another's; a table is printed as soon as it is measured. The bare loop is forward,
loss, backward and torch.optim.SGD on one fixed batch, channels-last; on a GPU it is replayed from a CUDA graph too, and waits for nothing.
"""

import argparse
import contextlib
import datetime
import functools
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from incremental_cifar.augmentation import augmented, draw_transformations
from incremental_cifar.cifar100 import ImageSets
from incremental_cifar.command_line import OneLineArgumentParser, run_script, warn
from incremental_cifar.config import REPOSITORY, UserError, load_config, make_config, read_json
from incremental_cifar.cuda_graphs import CaptureError, Recorded
from incremental_cifar.learner import user_errors
from incremental_cifar.resnet import build_network
from incremental_cifar.training import (
    STEPS_PER_CHUNK,
    choose_device,
    device_name,
    evaluate,
    example_batch,
    make_optimizer,
    momentum_buffers,
    set_arithmetic,
    train_one_epoch,
)
from incremental_cifar_experiment import IncrementalCIFARExperiment

BARE, BASE, CONTINUAL = "bare loop", "base_deep_learning_system", "continual_backpropagation"
NUM_CLASSES_OF_TASKS = range(5, 101, 5)
EPOCHS_PER_TASK, IMAGES_PER_CLASS = 200, 450
CLASSES_OF_EPOCHS = (5, 50, 100)  # of the epochs that a GPU is timed on
RUNS_SIDE_BY_SIDE = (1, 2, 3, 4, 6)


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a function takes, waiting for the device before and after."""
    wait = functools.partial(torch.cuda.synchronize, device) if is_gpu(device) else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


class BareLoop:
    """Forward, loss, backward and SGD on one fixed batch: what PyTorch itself needs for this network."""

    def __init__(self, width: int, batch_size: int, precision: str, device: torch.device):
        self.network = build_network(0, width).to(device, memory_format=torch.channels_last)
        self.images, self.labels, _ = example_batch(batch_size, device)
        self.images.normal_(generator=torch.Generator(device).manual_seed(0))
        self.precision = precision
        self.remark = ""
        if not is_gpu(device):
            self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
            return
        self.optimizer = make_optimizer(self.network, 0.01, 0.9, 0.0005)
        changed = [*self.network.parameters(), *self.network.buffers(), *momentum_buffers(self.network, self.optimizer)]
        try:
            self.replay = Recorded(lambda images: (self.step(),), (self.images,), changed).replay
        except CaptureError as error:
            self.remark = " (not recorded)"
            warn(f"the bare loop cannot be recorded as a CUDA graph ({str(error).splitlines()[0]})")

    def step(self) -> Tensor:
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits, _ = self.network(self.images)
        loss = F.cross_entropy(logits.float(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    replay = step

    def learn(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.replay()


class BenchedRun:
    """A run of the experiment in a temporary folder, whose epochs are timed one by one."""

    def __init__(self, held: contextlib.ExitStack, path: Path, index: int, settings: dict[str, object], images: ImageSets | None):
        # The paper's rate, but mature at once: every unit is a candidate from the start, and resets are as frequent as in a long run.
        always = {"dataset": "synthetic", "results_dir": held.enter_context(tempfile.TemporaryDirectory()), "maturity_threshold": 1}
        config = make_config(read_json(path) | always | settings, source=str(path), experiment_name=path.stem)
        folder = os.path.join(config.results_dir, config.experiment_name)
        self.experiment = IncrementalCIFARExperiment(config, folder, index, verbose=False)
        self.experiment.prepare(held, images)
        self.device, self.config = self.experiment.device, self.experiment.config
        self.batch = example_batch(self.config.batch_size, self.device)

    @property
    def remark(self) -> str:
        """What to say beside this run's numbers: which of its steps were to be replayed from a CUDA graph and are not."""
        run = self.experiment.learner
        steps = {"step": run.training_step, "evaluation": run.evaluation_step}
        failed = [name for name, step in steps.items() if is_gpu(self.device) and self.config.cuda_graphs and step.recorded is None]
        return f" ({' and '.join(failed)} not recorded)" if failed else ""

    def num_steps(self, num_classes: int) -> int:
        return -(-num_classes * self.config.train_images_per_class // self.config.batch_size)

    def train(self, num_classes: int) -> None:
        """An epoch of training on so many classes."""
        run, learner = self.experiment, self.experiment.learner
        classes, losses, accuracies = run.class_order[:num_classes], learner.curves.step_losses, learner.curves.step_accuracies
        batch_size = self.config.batch_size
        train_one_epoch(learner.training_step, run.images.train, classes, batch_size, run.random_seed, 0, losses, accuracies, 0)

    def learn(self, num_steps: int) -> None:
        """So many steps alone, all on the same images."""
        for number in range(num_steps):
            self.experiment.learner.training_step(*self.batch, number)

    def evaluate(self, num_classes: int) -> None:
        """An epoch's evaluation: test and validation images of so many classes, results read from the device."""
        run = self.experiment
        for image_set in (run.images.test, run.images.validation):
            torch.stack(evaluate(run.learner.evaluation_step, image_set, run.class_order[:num_classes])).tolist()

    def transform(self, num_chunks: int) -> None:
        """The augmentation of so many chunks of steps alone."""
        run = self.experiment
        n = self.config.batch_size * STEPS_PER_CHUNK[self.device.type]
        indices = torch.arange(n, device=self.device) * 7 % (100 * run.images.train.images_per_class)
        transformations = draw_transformations(n, torch.Generator().manual_seed(0)).to(self.device)
        for _ in range(num_chunks):
            augmented(run.images.train, indices, transformations)

    @torch.no_grad()
    def reset(self, num_steps: int) -> None:
        """What the host has algorithms do after so many steps, alone: resets, noise."""
        for number in range(num_steps):
            for algorithm in self.experiment.learner.training_step.algorithms:
                algorithm.after_step(number)


class Bench:
    """All measurements of one precision on one device, as rows of tables that have this precision in a column before them."""

    def __init__(self, held: contextlib.ExitStack, device: torch.device, precision: str, parsed: argparse.Namespace):
        self.held, self.device = held, device
        self.is_gpu = is_gpu(device)
        self.batch_size, self.turns = parsed.batch_size, parsed.turns
        # The epochs whose steps are timed have 100 steps on a GPU. On a CPU they have one, so that variants take turns every second.
        self.classes = parsed.classes or (20 if self.is_gpu else 1)
        self.settings = {
            "device": str(device),
            "precision": precision,
            "network_width": parsed.width,
            "batch_size": parsed.batch_size,
            "train_images_per_class": IMAGES_PER_CLASS if self.is_gpu else min(parsed.batch_size, IMAGES_PER_CLASS),
            "compile_network": False,  # takes its time for every run: see `compiled_steps`
        }
        self.configs = parsed.configs
        self.images: ImageSets | None = None  # all runs share the first one's
        base = self.new_run()
        base.train(self.classes)
        base.evaluate(self.classes)
        self.peak_memory = peak_memory(device)  # of one run, before there are others
        bare = BareLoop(parsed.width, parsed.batch_size, precision, device)
        self.variants: dict[str, BareLoop | BenchedRun] = {BARE: bare, BASE: base}
        self.variants |= {algorithm: self.new_run(algorithm) for algorithm in self.configs if algorithm != BASE}
        self.typical = CONTINUAL if CONTINUAL in self.variants else BASE  # whose epochs are timed
        if self.is_gpu:
            self.variants["base, cuda_graphs=false"] = self.new_run(cuda_graphs=False)
            self.variants["base, deterministic=false"] = self.new_run(deterministic=False)
            set_arithmetic(precision, deterministic=True)

    def new_run(self, algorithm: str = BASE, index: int = 0, **settings: object) -> BenchedRun:
        run = BenchedRun(self.held, self.configs[algorithm], index, self.settings | settings, self.images)
        self.images = run.experiment.images
        return run

    def fastest(self, variants: dict[Hashable, Callable[[], object]]) -> dict[Hashable, float]:
        """Seconds of the fastest turn of each variant; they take turns, the first of which only warms up."""
        times = [[seconds(variant, self.device) for variant in variants.values()] for _ in range(1 + self.turns)]
        return dict(zip(variants, map(min, zip(*times[1:], strict=True)), strict=True))

    def seconds_of(self, part: Callable[[int], None]) -> float:
        """Seconds of one repetition of a part of a step, alone."""
        repeats = 50 if self.is_gpu else 5
        return self.fastest({part: functools.partial(part, repeats)})[part] / repeats

    def steps(self, names: Sequence[str]) -> list[list[str]]:
        """Rows of the table of training steps."""
        base = self.variants[BASE]
        num_steps = base.num_steps(self.classes)
        epochs = {name: functools.partial(self.variants[name].train, self.classes) for name in names if name != BARE}
        times = self.fastest({BARE: functools.partial(self.variants[BARE].learn, num_steps)} | epochs)
        data = self.seconds_of(base.transform) / STEPS_PER_CHUNK[self.device.type]
        rows = []
        for name, value in times.items():
            run, step = self.variants[name], value / num_steps
            parts = ["", "", ""]
            if name in self.configs:
                # On a GPU, what the host does meanwhile costs nothing: there, it is what a step takes longer than the base system's.
                reset = step - times[BASE] / num_steps if self.is_gpu else self.seconds_of(run.reset)
                parts = [f"{1000 * part:.2f}" for part in (data, step - data - reset, reset)]
            over = [f"{value / times[to]:.3f}" for to in (BARE, BASE)]
            rows.append([name + run.remark, f"{1000 * step:.2f}", f"{self.batch_size / step:,.0f}", *parts, *over])
        return rows

    def compiled_steps(self) -> list[list[str]]:
        """Rows of the table of training steps with the network compiled, and not."""
        name = "base, compile_network=true"
        self.variants[name] = self.new_run(compile_network=True)
        return self.steps([BASE, name])

    def epochs(self) -> tuple[list[list[str]], list[list[str]], dict[int, float]]:
        """Rows of the table of epochs with the projection to a full run, and of the table of evaluation with batch norm folded and not.

        And the seconds of training an epoch by number of classes.
        """
        num_classes = CLASSES_OF_EPOCHS if self.is_gpu else (self.classes,)
        run = self.variants[self.typical]
        default = run.config.fold_batch_norm
        runs = {default: run, not default: self.new_run(self.typical, fold_batch_norm=not default)}
        variants = {("training", classes): functools.partial(run.train, classes) for classes in num_classes}
        variants |= {
            (is_folded, classes): functools.partial(runs[is_folded].evaluate, classes)
            for classes in num_classes
            for is_folded in (False, True)
        }
        times = self.fastest(variants)
        longer = IMAGES_PER_CLASS / run.config.train_images_per_class  # so many times, an epoch of a run
        training = {classes: longer * times["training", classes] for classes in num_classes}
        evaluation = {classes: times[default, classes] for classes in num_classes}
        epochs, evaluations = [], []
        for classes in num_classes:
            what = f"{classes} class{'es' * (classes > 1)}"
            epochs.append((f"epoch of {what}{run.remark}", training[classes], evaluation[classes], "{:.3f} s".format))
            plain, folded = times[False, classes], times[True, classes]
            remark = runs[False].remark or runs[True].remark
            evaluations.append([what + remark, f"{plain:.3f} s", f"{folded:.3f} s", f"{plain / folded:.2f}"])
        totals = [EPOCHS_PER_TASK * sum(at(values, classes) for classes in NUM_CLASSES_OF_TASKS) for values in (training, evaluation)]
        epochs.append((f"4,000 epochs (projected): {duration(sum(totals))}", *totals, duration))
        rows = [[what, text(train), text(test), f"{100 * test / (train + test):.1f} %"] for what, train, test, text in epochs]
        return rows, evaluations, training

    def side_by_side(self) -> list[list[str]]:
        """Rows of the table of several runs at once on a GPU, in threads on streams of their own, as `--experiment-index 0-3` runs them."""
        runs = [self.variants[self.typical], *(self.new_run(self.typical, n) for n in range(1, max(RUNS_SIDE_BY_SIDE)))]
        streams = [torch.cuda.Stream(self.device) for _ in runs]

        def train(run: BenchedRun, stream: torch.cuda.Stream) -> None:
            with torch.cuda.stream(stream):
                run.train(self.classes)
                run.experiment.learner.curves.step_losses[0].item()  # waits for this stream

        def train_together(count: int) -> None:
            with ThreadPoolExecutor(count) as threads:
                list(threads.map(train, runs[:count], streams[:count]))  # raises what they raise

        times = self.fastest({count: functools.partial(train_together, count) for count in reversed(RUNS_SIDE_BY_SIDE)})
        images = runs[0].num_steps(self.classes) * self.batch_size
        return [
            [
                f"{count} run{'s' * (count > 1)}{runs[count - 1].remark}",
                f"{images * count / times[count]:,.0f}",
                f"{count * times[1] / times[count]:.2f}",
            ]
            for count in RUNS_SIDE_BY_SIDE
        ]

    def operations(self, variant: BareLoop | BenchedRun) -> dict[str, tuple[float, float]]:
        """Kernels and copies on a GPU, on a CPU operators (those that others call count too): of each, how many a step has and their ms.

        To be called when all is timed: what a profiler has watched may stay slower.
        """
        if not self.is_gpu:
            os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or it reports as an error that there is no GPU
        steps = 20 if self.is_gpu else 1
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * self.is_gpu], acc_events=True) as profiler:
            seconds(functools.partial(variant.learn, steps), self.device)
        seen = {}
        for event in profiler.key_averages():
            # On a GPU not those who launch: they would count twice.
            is_counted = event.device_type == torch.autograd.DeviceType.CUDA if self.is_gpu else event.key.startswith("aten::")
            microseconds = event.self_device_time_total if self.is_gpu else event.self_cpu_time_total
            if is_counted and not event.is_user_annotation:
                seen[event.key] = event.count / steps, microseconds / 1000 / steps
        return seen

    def counts(self) -> tuple[list[list[str]], list[list[str]]]:
        """Rows of the table of how many operations a step of each variant has, and of that of one variant's slowest."""
        rows = []
        for name, variant in self.variants.items():
            seen = self.operations(variant)
            rows.append([name + variant.remark, f"{sum(number for number, _ in seen.values()):,.0f}"])
            if name == self.typical:
                times = {key: milliseconds for key, (_, milliseconds) in seen.items()}
        if not times:
            warn("the profiler saw no kernels; it may lack the permission to")
        shown = sorted(times, key=times.__getitem__, reverse=True)[:10]
        return rows, [[key[:90], f"{times[key]:.3f}", f"{100 * times[key] / sum(times.values()):.1f} %"] for key in shown]


def at(measured: dict[int, float], num_classes: int) -> float:
    """Seconds at a number of classes: proportional to the measured one, or on the line between the neighbouring ones."""
    if len(measured) == 1:
        ((classes, value),) = measured.items()
        return value / classes * num_classes
    return float(np.interp(num_classes, list(measured), list(measured.values())))


def duration(total: float) -> str:
    if total < 120:
        return f"{total:.1f} s"
    return f"{total / 60:.1f} min" if total < 7200 else f"{total / 3600:.1f} h"


# --- The released code -----------------------------------------------------------------------------------------------------------

# Run in a process of its own, from a checkout that the user gives: two epochs of its own training loop, the second one counts.
RELEASED_DRIVER = """
import json, sys
checkout, data_path, results_dir, num_classes, settings = sys.argv[1:]
sys.path.insert(0, checkout)
from lop.incremental_cifar.incremental_cifar_experiment import IncrementalCIFARExperiment
experiment = IncrementalCIFARExperiment(json.loads(settings) | {"data_path": data_path}, results_dir, 0, verbose=False)
experiment.current_num_classes = int(num_classes)
experiment.num_epochs = 2
experiment.run()
print(float(experiment.results_dict["epoch_runtime"][1]))
"""


def time_released(checkout: Path, data_path: Path, num_classes: int) -> float:
    """Seconds of training in an epoch of the released code's continual backpropagation on so many classes. Raises UserError if it fails."""
    settings = (REPOSITORY / "cfg" / f"{CONTINUAL}.json").read_text()
    with tempfile.TemporaryDirectory() as results_dir:
        driver_arguments = [str(checkout), str(data_path), results_dir, str(num_classes), settings]
        finished = subprocess.run([sys.executable, "-c", RELEASED_DRIVER, *driver_arguments], capture_output=True, text=True)
    try:
        return float(finished.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        reason = (finished.stderr.strip() or "it printed no time").splitlines()[-1]
        raise UserError(f"--released: {checkout}: the released code failed there ({reason})") from None


def check_released(checkout: Path) -> None:
    needed = checkout / "lop" / "incremental_cifar" / "incremental_cifar_experiment.py"
    if not needed.is_file():
        raise UserError(f"--released: {needed} is not there; give the folder of a checkout of the released code, the one that holds lop/")


# --- Tables ----------------------------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too; numbers to the right."""
    header, *rows = ([cell.replace("|", "\\|") for cell in row] for row in (header, *rows))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    forms = [f"{'<' if column < 2 else '>'}{width}" for column, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(map(format, row, forms))} |" for row in (header, rule, *rows))


def describe_machine(device: torch.device) -> str:
    detail = f"CUDA {torch.version.cuda}" if is_gpu(device) else f"{torch.get_num_threads()} threads"
    return f"{device_name(device)}, {detail}, PyTorch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today()}"


def peak_memory(device: torch.device) -> str:
    """What one run has needed, said in words, in a process that has had no other; CUDA's own 0.5 GiB are not among the GPU's."""
    if is_gpu(device):
        return f"one run has the GPU reserve {torch.cuda.max_memory_reserved(device) / 2**30:.2f} GiB"
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"peak memory of a run {kibibytes / 2**20 if sys.platform != 'darwin' else kibibytes / 2**30:.2f} GiB"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineArgumentParser(description="Time training steps, epochs and runs side by side, beside a bare loop.")
    parser.add_argument("--configs", type=Path, nargs="+", metavar="FILE", help="timed beside the base system (default: all of cfg/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--width", type=int, default=64, help="network_width (default 64, the paper's)")
    parser.add_argument("--batch-size", type=int, default=90, help="images per step (default 90)")
    parser.add_argument("--classes", type=int, help="classes of the epochs whose steps are timed (default 1 on a CPU, 20)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each variant (default 5)")
    parser.add_argument("--compile", action="store_true", help="add a table with compile_network=true; compiling takes a minute")
    parser.add_argument("--profile", action="store_true", help="add a table of what a step's time goes into")
    parser.add_argument("--released", type=Path, metavar="PATH", help="a checkout of the released code, to time its training loop too")
    parser.add_argument("--data-path", type=Path, default=REPOSITORY / "data", help="CIFAR-100 for the released code (default data/)")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "tf32", "bf16"), help="default: fp32 (CPU) or tf32, and bf16")
    parsed = parser.parse_args(arguments)
    for name, least, most in (("width", 1, 1024), ("batch_size", 1, 45_000), ("classes", 1, 100), ("turns", 1, 1000)):
        value = getattr(parsed, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')}: got {value}; it must be from {least} to {most}")
    if parsed.released is not None:
        check_released(parsed.released)
    base = REPOSITORY / "cfg" / f"{BASE}.json"
    files = sorted(base.parent.glob("*.json")) if parsed.configs is None else parsed.configs
    parsed.configs = {}  # their paths by name
    for path in (base, *(path for path in files if path.resolve() != base)):
        name = load_config(path).experiment_name
        if parsed.configs.setdefault(name, path) != path:
            raise UserError(f"--configs: the experiment_name {name} appears twice")
    return parsed


def measure(device: torch.device, precision: str, parsed: argparse.Namespace) -> None:
    """Print all tables of one precision."""
    released_classes = 100 if is_gpu(device) else 5
    is_released = parsed.released is not None and precision != "bf16"  # the released code has no bf16
    if is_released:  # first of all, so that nothing else is lost if it fails
        released = time_released(parsed.released, parsed.data_path, released_classes)
    with user_errors(), contextlib.ExitStack() as held:
        bench = Bench(held, device, precision, parsed)

        def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
            print(markdown_table(("precision", *header), [(precision, *row) for row in rows]) + "\n", flush=True)

        print(f"{describe_machine(device)}; width {parsed.width}, batch {parsed.batch_size}, {precision}: {bench.peak_memory}\n")
        step_header = ("variant", "ms/step", "images/s", "data ms", "network ms", "reset ms", "over bare", "over base")
        show(step_header, bench.steps(list(bench.variants)))
        epochs, evaluations, training = bench.epochs()
        show(("epoch or run", "training", "evaluation", "evaluation's share"), epochs)
        show(("evaluation of", "plain", "batch norm folded", "times faster"), evaluations)
        if is_released:
            ours = at(training, released_classes)
            row = [f"{released_classes} classes", f"{released:.2f} s", f"{ours:.2f} s", f"{released / ours:.1f}"]
            show(("an epoch's training", "released code", "here", "times faster"), [row])
        if bench.is_gpu:
            show(("side by side", "images/s", "over one run"), bench.side_by_side())
        if parsed.compile:
            show(step_header, bench.compiled_steps())
        counts, slowest = bench.counts()
        show(("step of", "kernels" if bench.is_gpu else "operators"), counts)
        if parsed.profile:
            show(("slowest operations", "ms/step", "share"), slowest)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    device = choose_device(parsed.device)
    precisions = parsed.precisions or (("tf32" if is_gpu(device) else "fp32"), "bf16")
    if len(precisions) == 1:
        measure(device, precisions[0], parsed)
        return 0
    command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments), "--precisions"]
    statuses = [subprocess.run([*command, precision]).returncode for precision in precisions]
    return max(status if status >= 0 else 128 - status for status in statuses)


if __name__ == "__main__":
    sys.exit(run_script(main))
