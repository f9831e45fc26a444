"""How long a training step takes, what it is made of, and a bare loop beside it in the same process.

    python bench.py                              # full width, batch 90, this machine's device: a Markdown table
    python bench.py --width 8 --steps 50

Every variant trains on the same number of images. The variants take turns, a few steps each, and the table shows medians over the turns, so
that a machine whose speed drifts slows all of them alike. Columns:

- ms/step: a whole step as a run takes it: gather and augmentation, forward, backward, SGD, resets or noise, metrics.
- data, reset: the parts of it that are augmentation and continual backpropagation or noise, timed on their own; training is the rest.
- over bare: ms/step over that of the bare loop of the same precision: forward, loss, backward and torch.optim.SGD on one fixed batch, the
  same network, channels-last.
"""

import argparse
import datetime
import functools
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from incremental_cifar.augmentation import augmented, draw_transformations
from incremental_cifar.cifar100 import ImageSet
from incremental_cifar.command_line import OneLineArgumentParser, run_script
from incremental_cifar.config import UserError
from incremental_cifar.continual_backprop import ContinualBackprop
from incremental_cifar.resnet import build_network
from incremental_cifar.training import (
    WeightNoise,
    autocast,
    choose_device,
    device_name,
    evaluate,
    make_optimizer,
    set_arithmetic,
    train_step,
    unseen_mask,
)

CLASSES = np.arange(100)
ALGORITHMS = ("base_deep_learning_system", "continual_backpropagation", "shrink_and_perturb")
Timer = Callable[[Callable[[], object], int], float]


def make_timer(device: torch.device) -> Timer:
    """A function that runs another so many times and returns the mean seconds of one, waiting for the device before and after."""

    def seconds(run: Callable[[], object], repeats: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    return seconds


class BareLoop:
    """Forward, loss, backward and SGD on one fixed batch: what PyTorch itself needs for this network."""

    def __init__(self, width: int, images: torch.Tensor, labels: torch.Tensor, precision: str):
        self.network = build_network(0, width).to(images.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)
        self.images, self.labels, self.precision = images, labels, precision

    def step(self) -> None:
        with autocast(self.precision, self.images.device):
            logits, _ = self.network(self.images)
        loss = F.cross_entropy(logits.float(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class OurStep:
    """A step of a run, from bytes on the device to the metrics, and its parts one by one."""

    def __init__(self, algorithm: str, width: int, batch_size: int, image_set: ImageSet, precision: str):
        device = image_set.device
        self.image_set, self.batch_size, self.precision = image_set, batch_size, precision
        self.network = build_network(0, width).to(device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.network, 0.01, 0.9, 0.0005)
        # The paper's rate, but mature at once: every unit is a candidate from the start, and resets are as frequent as in a long run.
        is_cbp = algorithm == "continual_backpropagation"
        self.continual_backprop = ContinualBackprop(self.network, 0, 1e-5, maturity_threshold=1) if is_cbp else None
        self.weight_noise = WeightNoise(self.network, 0, 1e-5) if algorithm == "shrink_and_perturb" else None
        self.mask = unseen_mask(CLASSES, device)
        generator = torch.Generator().manual_seed(0)
        indices = image_set.indices_of(CLASSES)
        self.indices = indices[torch.randperm(len(indices), generator=generator)].to(device)
        self.transformations = draw_transformations(len(indices), generator).to(device)
        self.losses, self.accuracies = torch.zeros(2, 100_000, device=device)
        self.num_steps = 0
        _, features = self.network(augmented(image_set, self.indices[:batch_size], self.transformations.slice(0, batch_size))[0])
        self.features = [feature.detach().to(torch.bfloat16 if precision == "bf16" else torch.float32) for feature in features]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.num_steps * self.batch_size % (len(self.indices) - self.batch_size)
        stop = start + self.batch_size
        return augmented(self.image_set, self.indices[start:stop], self.transformations.slice(start, stop))

    def step(self) -> None:
        images, labels = self.batch()
        self.losses[self.num_steps], self.accuracies[self.num_steps] = train_step(
            self.network,
            self.optimizer,
            images,
            labels,
            self.mask,
            self.num_steps,
            self.precision,
            self.continual_backprop,
            self.weight_noise,
        )
        self.num_steps += 1

    def reset(self) -> None:
        if self.continual_backprop is not None:
            self.continual_backprop.step(self.features)
        if self.weight_noise is not None:
            self.weight_noise.add(self.num_steps)


def measure(
    device: torch.device, precisions: Sequence[str], width: int, batch_size: int, turns: int, repeats: int
) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the two tables: training steps and evaluation."""
    seconds = make_timer(device)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 10, 32, 32, 3), dtype=np.uint8)
    image_set = ImageSet(pixels, device)
    images, labels = image_set.get(torch.arange(batch_size, device=device) * 10 % 1000)
    training_rows, evaluation_rows = [], []
    for precision in precisions:
        set_arithmetic(precision, deterministic=True)
        bare = BareLoop(width, images, labels, precision)
        ours = {algorithm: OurStep(algorithm, width, batch_size, image_set, precision) for algorithm in ALGORITHMS}
        variants: dict[str, Callable[[], None]] = {"bare loop": bare.step} | {name: variant.step for name, variant in ours.items()}
        for step in variants.values():
            seconds(step, repeats)  # warm up
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(turns):
            for name, step in variants.items():
                times[name].append(seconds(step, repeats))
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, step_seconds in medians.items():
            parts = ["", "", ""]
            if name in ours:
                data = statistics.median(seconds(ours[name].batch, repeats) for _ in range(turns))
                reset = statistics.median(seconds(ours[name].reset, repeats) for _ in range(turns))
                parts = [f"{part * 1000:.2f}" for part in (data, step_seconds - data - reset, reset)]
            # The ratio of each turn's neighbours, so that drift cancels.
            over_bare = statistics.median(mine / theirs for mine, theirs in zip(times[name], times["bare loop"], strict=True))
            row = [precision, name, f"{step_seconds * 1000:.2f}", f"{batch_size / step_seconds:,.0f}", *parts, f"{over_bare:.3f}"]
            training_rows.append(row)
        evaluate_half = functools.partial(evaluate, bare.network, image_set, CLASSES[:50], precision)  # 500 images
        evaluation = statistics.median(seconds(evaluate_half, 1) for _ in range(3))
        evaluation_rows.append([precision, f"{500 / evaluation:,.0f}"])
    return training_rows, evaluation_rows


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
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU"
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{kibibytes / 2**20 if sys.platform != 'darwin' else kibibytes / 2**30:.2f} GiB"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineArgumentParser(description="Time a training step beside a bare loop.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--width", type=int, default=64, help="network_width (default 64, the paper's)")
    parser.add_argument("--batch-size", type=int, default=90, help="images per step (default 90)")
    parser.add_argument("--steps", type=int, default=None, help="steps per variant (default 8 on a CPU, 300 on a GPU)")
    parser.add_argument(
        "--precisions", nargs="+", default=None, choices=("fp32", "tf32", "bf16"), help="default: fp32 (CPU) or tf32, and bf16"
    )
    parsed = parser.parse_args(arguments)
    for name, least, most in (("width", 1, 1024), ("batch_size", 1, 999), ("steps", 1, 50_000)):
        value = getattr(parsed, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')}: got {value}; it must be from {least} to {most}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    device = choose_device(parsed.device)
    is_gpu = device.type == "cuda"
    precisions = parsed.precisions or (("tf32" if is_gpu else "fp32"), "bf16")
    repeats = 20 if is_gpu else 1
    turns = max(1, (parsed.steps or (300 if is_gpu else 8)) // repeats)
    training_rows, evaluation_rows = measure(device, precisions, parsed.width, parsed.batch_size, turns, repeats)
    print(f"{describe_machine(device)}; width {parsed.width}, batch {parsed.batch_size}, peak memory {peak_memory(device)}\n")
    header = ["precision", "variant", "ms/step", "images/s", "data ms", "training ms", "reset ms", "over bare"]
    print(markdown_table(header, training_rows) + "\n")
    print(markdown_table(["precision", "evaluation, images/s"], evaluation_rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
