"""How fast runs are, beside a bare loop in the same process: the tables under "Cost" in the README.

    python bench.py                              # full width, batch 90, this machine's device; under five minutes
    python bench.py --width 8 --precisions bf16  # smaller, quicker
    python bench.py --released ~/loss-of-plasticity --data-path data    # and the released code's own training loop
    python bench.py --profile                    # and what a step's time goes into

Images are the built-in ones. Nothing is simplified: an epoch is that of a run, with its order, augmentation, resets or noise and metrics,
and evaluation as a run does it. The variants take turns, and tables show the fastest turn of each: what else a machine does only slows.
The bare loop is forward, loss, backward and torch.optim.SGD on one fixed batch, channels-last; on a GPU it is replayed from a CUDA graph
too, and waits for nothing.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from incremental_cifar.augmentation import augmented, draw_transformations
from incremental_cifar.command_line import OneLineArgumentParser, run_script, warn
from incremental_cifar.config import REPOSITORY, UserError, load_config
from incremental_cifar.cuda_graphs import Recorded
from incremental_cifar.resnet import build_network
from incremental_cifar.training import (
    STEPS_PER_CHUNK,
    autocast,
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

ALGORITHMS = ("base_deep_learning_system", "continual_backpropagation", "head_resetting", "retrained_network", "shrink_and_perturb")
BASE = ALGORITHMS[0]
NUM_CLASSES_OF_TASKS = range(5, 101, 5)
EPOCHS_PER_TASK, IMAGES_PER_CLASS = 200, 450


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a function takes, waiting for the device before and after."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


class BareLoop:
    """Forward, loss, backward and SGD on one fixed batch: what PyTorch itself needs for this network."""

    def __init__(self, width: int, batch_size: int, precision: str, device: torch.device):
        self.network = build_network(0, width).to(device, memory_format=torch.channels_last)
        self.images, self.labels, _ = example_batch(batch_size, device)
        self.images.normal_(generator=torch.Generator(device).manual_seed(0))
        self.precision = precision
        if device.type == "cpu":
            self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
            return
        self.optimizer = make_optimizer(self.network, 0.01, 0.9, 0.0005)
        changed = [*self.network.parameters(), *self.network.buffers(), *momentum_buffers(self.optimizer)]
        try:
            self.replay = Recorded(lambda images: (self.step(),), (self.images,), changed).replay
        except RuntimeError as error:
            warn(f"the bare loop cannot be recorded as a CUDA graph ({str(error).splitlines()[0]})")

    def step(self) -> Tensor:
        with autocast(self.precision, self.images.device):
            logits, _ = self.network(self.images)
        loss = F.cross_entropy(logits.float(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    replay = step

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.replay()


class BenchedRun:
    """A run of the experiment in a temporary folder, whose epochs are timed one by one."""

    def __init__(self, held: contextlib.ExitStack, algorithm: str, index: int, settings: dict[str, object], images_of: "BenchedRun | None"):
        # The paper's rate, but mature at once: every unit is a candidate from the start, and resets are as frequent as in a long run.
        always = {"dataset": "synthetic", "results_dir": held.enter_context(tempfile.TemporaryDirectory()), "maturity_threshold": 1}
        overrides = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in (always | settings).items()]
        config = load_config(REPOSITORY / "cfg" / f"{algorithm}.json", overrides)
        folder = os.path.join(config.results_dir, config.experiment_name)
        self.experiment = IncrementalCIFARExperiment(config.to_dict(), folder, index, verbose=False)
        self.experiment.prepare(held, images_of=images_of.experiment if images_of is not None else None)
        self.device = self.experiment.device

    def num_steps(self, num_classes: int) -> int:
        return -(-num_classes * self.experiment.config.train_images_per_class // self.experiment.config.batch_size)

    def train(self, num_classes: int) -> None:
        """An epoch of training on so many classes."""
        run = self.experiment
        classes = run.class_order[:num_classes]
        curves, batch_size = run.curves, run.config.batch_size
        train_one_epoch(
            run.training_step, run.train_set, classes, batch_size, run.random_seed, 0, curves.step_losses, curves.step_accuracies, 0
        )

    def evaluate(self, num_classes: int) -> None:
        """An epoch's evaluation: test and validation images of so many classes, results read from the device."""
        run = self.experiment
        for image_set in (run.test_set, run.validation_set):
            torch.stack(evaluate(run.evaluation_step, image_set, run.class_order[:num_classes])).tolist()

    def transform(self, num_chunks: int) -> None:
        """The augmentation of so many chunks of steps alone."""
        run = self.experiment
        n = run.config.batch_size * STEPS_PER_CHUNK[self.device.type]
        indices = torch.arange(n, device=self.device) * 7 % (100 * run.train_set.images_per_class)
        transformations = draw_transformations(n, torch.Generator().manual_seed(0)).to(self.device)
        for _ in range(num_chunks):
            augmented(run.train_set, indices, transformations)

    def reset(self, num_steps: int) -> None:
        """What continual backpropagation or the noise does after the network in so many steps, alone."""
        step = self.experiment.training_step
        for number in range(num_steps):
            if step.continual_backprop is not None:
                step.continual_backprop.reset_due_units()
            if step.weight_noise is not None:
                step.weight_noise.add(number)


class Bench:
    """All measurements of one precision on one device."""

    def __init__(self, held: contextlib.ExitStack, device: torch.device, precision: str, parsed: argparse.Namespace):
        self.held, self.device, self.precision = held, device, precision
        self.is_gpu = device.type == "cuda"
        self.batch_size, self.turns = parsed.batch_size, parsed.turns or (5 if self.is_gpu else 10)
        self.settings = {
            "device": str(device),
            "precision": precision,
            "network_width": parsed.width,
            "batch_size": parsed.batch_size,
        }
        # The epochs whose steps are timed have 100 steps on a GPU. On a CPU they have one, so that variants take turns every second.
        self.classes = parsed.classes or (20 if self.is_gpu else 1)
        self.images_per_class = IMAGES_PER_CLASS if self.is_gpu else min(parsed.batch_size, IMAGES_PER_CLASS)
        self.settings["train_images_per_class"] = self.images_per_class
        self.first: BenchedRun | None = None
        self.is_compiled = parsed.compile
        set_arithmetic(precision, deterministic=True)
        self.runs = {BASE: self.new_run()}
        self.runs[BASE].train(self.classes)
        self.runs[BASE].evaluate(self.classes)
        self.peak_memory = peak_memory(device)  # of one run, before there are others
        self.bare = BareLoop(parsed.width, parsed.batch_size, precision, device)
        self.runs |= {algorithm: self.new_run(algorithm) for algorithm in ALGORITHMS[1:]}

    def new_run(self, algorithm: str = BASE, index: int = 0, **settings: object) -> BenchedRun:
        run = BenchedRun(self.held, algorithm, index, self.settings | settings, self.first)
        self.first = self.first or run
        return run

    def step_rows(self) -> list[list[str]]:
        """Rows of the table of training steps."""
        runs = dict(self.runs)
        if self.is_gpu:
            runs["base, plain, without CUDA graph"] = self.new_run(cuda_graphs=False)
            runs["base, deterministic=false"] = self.new_run(deterministic=False)
            set_arithmetic(self.precision, deterministic=True)
        if self.is_compiled:
            runs["base, compile_network=true"] = self.new_run(compile_network=True)
        num_steps = self.first.num_steps(self.classes)
        variants = {"bare loop": functools.partial(self.bare.run, num_steps)}
        variants |= {name: functools.partial(run.train, self.classes) for name, run in runs.items()}
        for epoch in variants.values():
            epoch()  # warm up
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(self.turns):
            for name, epoch in variants.items():
                times[name].append(seconds(epoch, self.device) / num_steps)
        rows = []
        for name, values in times.items():
            step = min(values)
            over = [step / min(times[to]) for to in ("bare loop", BASE)]
            parts = ["", "", ""]
            if name in ALGORITHMS:
                data = self.seconds_of(runs[name].transform) / STEPS_PER_CHUNK[self.device.type]
                # On a GPU, what the host does meanwhile costs nothing: there, it is what a step takes longer than the base system's.
                longer = step - min(times[BASE])
                reset = longer if self.is_gpu else self.seconds_of(runs[name].reset)
                parts = [f"{1000 * part:.2f}" for part in (data, step - data - reset, reset)]
            rows.append([self.precision, name, f"{1000 * step:.2f}", f"{self.batch_size / step:,.0f}", *parts, *(f"{o:.3f}" for o in over)])
        return rows

    def seconds_of(self, part: Callable[[int], None]) -> float:
        """Seconds of one repetition of a part of a step, alone."""
        repeats = 50 if self.is_gpu else 5
        return min(seconds(functools.partial(part, repeats), self.device) / repeats for _ in range(3))

    def epochs(self) -> tuple[list[list[str]], dict[int, float]]:
        """Rows of the table of epochs with the projection to a full run, and the seconds of training an epoch by number of classes."""
        num_classes = (5, 50, 100) if self.is_gpu else (self.classes,)
        run = self.runs["continual_backpropagation"]
        repeats = IMAGES_PER_CLASS / self.images_per_class
        training, evaluation = {}, {}
        for classes in num_classes:
            run.evaluate(classes)  # warm up
            turns = range(self.turns)
            training[classes] = repeats * min(seconds(functools.partial(run.train, classes), self.device) for _ in turns)
            evaluation[classes] = min(seconds(functools.partial(run.evaluate, classes), self.device) for _ in turns)
        rows = [
            [
                self.precision,
                f"epoch of {classes} class{'es' * (classes > 1)}",
                f"{training[classes]:.3f} s",
                f"{evaluation[classes]:.3f} s",
                f"{100 * evaluation[classes] / (training[classes] + evaluation[classes]):.1f} %",
            ]
            for classes in num_classes
        ]
        totals = [EPOCHS_PER_TASK * sum(at(values, classes) for classes in NUM_CLASSES_OF_TASKS) for values in (training, evaluation)]
        share = f"{100 * totals[1] / sum(totals):.1f} %"
        projected = f"4,000 epochs (projected): {duration(sum(totals))}"
        rows.append([self.precision, projected, duration(totals[0]), duration(totals[1]), share])
        return rows, training

    def side_by_side(self) -> list[list[str]]:
        """Rows of the table of several runs at once on a GPU, in threads on streams of their own, as `--experiment-index 0-3` runs them."""
        counts = (1, 2, 4)
        runs = [self.runs["continual_backpropagation"], *(self.new_run("continual_backpropagation", n) for n in range(1, counts[-1]))]

        def train_together(together: Sequence[BenchedRun]) -> None:
            def train(run: BenchedRun) -> None:
                with torch.cuda.stream(torch.cuda.Stream(self.device)):
                    run.train(self.classes)
                    run.experiment.curves.step_losses[0].item()  # waits for this stream

            with ThreadPoolExecutor(len(together)) as threads:
                list(threads.map(train, together))  # raises what they raise

        train_together(runs)  # warm up
        rates: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(self.turns):
            for count in counts:
                rates[count].append(count / seconds(functools.partial(train_together, runs[:count]), self.device))
        images = self.first.num_steps(self.classes) * self.batch_size
        return [
            [
                self.precision,
                f"{count} run{'s' * (count > 1)}",
                f"{images * max(values):,.0f}",
                f"{max(values) / max(rates[1]):.2f}",
            ]
            for count, values in rates.items()
        ]

    def profile(self, num_rows: int = 10) -> list[list[str]]:
        """Rows of the table of what the time of a training step goes into, the slowest first."""
        run, classes = self.runs["continual_backpropagation"], max(1, self.classes // 5)
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * self.is_gpu], acc_events=True) as profiler:
            seconds(functools.partial(run.train, classes), self.device)
        events = profiler.key_averages()
        if self.is_gpu:  # kernels alone: those who launched them would count them twice
            kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
            time_of = {event.key: event.self_device_time_total for event in kernels}  # microseconds
        else:
            time_of = {event.key: event.self_cpu_time_total for event in events}
        total = sum(time_of.values())
        if total == 0:
            warn("--profile: the profiler saw no kernels; it may lack the permission to")
        steps = run.num_steps(classes)
        rows = []
        for name in sorted(time_of, key=time_of.__getitem__, reverse=True)[:num_rows]:
            per_step, share = time_of[name] / steps / 1000, 100 * time_of[name] / total
            rows.append([self.precision, name[:90], f"{per_step:.3f}", f"{share:.1f} %"])
        return rows


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


def time_released(checkout: Path, data_path: Path, algorithm: str, num_classes: int) -> float:
    """Seconds of training in an epoch of the released code on so many classes. Raises UserError if it fails."""
    settings = json.loads((REPOSITORY / "cfg" / f"{algorithm}.json").read_text())
    with tempfile.TemporaryDirectory() as results_dir:
        driver_arguments = [str(checkout), str(data_path), results_dir, str(num_classes), json.dumps(settings)]
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
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def describe_machine(device: torch.device) -> str:
    detail = f"CUDA {torch.version.cuda}" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device_name(device)}, {detail}, PyTorch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today()}"


def peak_memory(device: torch.device) -> str:
    """The most memory in use so far: on the GPU, or of this process (which has read and transformed all images)."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{kibibytes / 2**20 if sys.platform != 'darwin' else kibibytes / 2**30:.2f} GiB"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineArgumentParser(description="Time training steps, epochs and runs side by side, beside a bare loop.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--width", type=int, default=64, help="network_width (default 64, the paper's)")
    parser.add_argument("--batch-size", type=int, default=90, help="images per step (default 90)")
    parser.add_argument("--classes", type=int, default=None, help="classes of the epochs whose steps are timed (default 1 on a CPU, 20)")
    parser.add_argument("--turns", type=int, default=None, help="turns of each variant (default 10 on a CPU, 5 on a GPU)")
    parser.add_argument("--compile", action="store_true", help="add a row with compile_network=true; compiling takes minutes")
    parser.add_argument("--profile", action="store_true", help="add a table of what a step's time goes into")
    parser.add_argument("--released", type=Path, metavar="PATH", help="a checkout of the released code, to time its training loop too")
    parser.add_argument("--data-path", type=Path, default=REPOSITORY / "data", help="CIFAR-100 for the released code (default data/)")
    parser.add_argument(
        "--precisions", nargs="+", default=None, choices=("fp32", "tf32", "bf16"), help="default: fp32 (CPU) or tf32, and bf16"
    )
    parsed = parser.parse_args(arguments)
    for name, least, most in (("width", 1, 1024), ("batch_size", 1, 45_000), ("classes", 1, 100), ("turns", 1, 1000)):
        value = getattr(parsed, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')}: got {value}; it must be from {least} to {most}")
    if parsed.released is not None:
        check_released(parsed.released)
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    device = choose_device(parsed.device)
    precisions = parsed.precisions or (("tf32" if device.type == "cuda" else "fp32"), "bf16")
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    step_header = ("precision", "variant", "ms/step", "images/s", "data ms", "network ms", "reset ms", "over bare", "over base")
    released_classes, released = (100 if device.type == "cuda" else 5), None
    if parsed.released is not None:  # first of all, so that nothing else is lost if it fails
        released = time_released(parsed.released, parsed.data_path, "continual_backpropagation", released_classes)
    memory = []
    for precision in precisions:
        with contextlib.ExitStack() as held:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            bench = Bench(held, device, precision, parsed)
            if device.type == "cuda" or not memory:  # of a process, it never falls
                memory.append(f"{bench.peak_memory} in {precision}")
            tables.setdefault(step_header, []).extend(bench.step_rows())
            epoch_rows, training = bench.epochs()
            tables.setdefault(("precision", "epoch or run", "training", "evaluation", "evaluation's share"), []).extend(epoch_rows)
            if device.type == "cuda":
                tables.setdefault(("precision", "side by side", "images/s", "over one run"), []).extend(bench.side_by_side())
            if parsed.profile:
                tables.setdefault(("precision", "slowest operations", "ms/step", "share"), []).extend(bench.profile())
            if released is not None and precision != "bf16":  # the released code has no bf16
                ours = at(training, released_classes)
                row = [precision, f"{released_classes} classes", f"{released:.2f} s", f"{ours:.2f} s", f"{released / ours:.1f}"]
                tables.setdefault(("precision", "an epoch's training", "released code", "here", "times faster"), []).append(row)
    print(f"{describe_machine(device)}; width {parsed.width}, batch {parsed.batch_size}, peak memory of a run {', '.join(memory)}")
    for header, rows in tables.items():
        print("\n" + markdown_table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
