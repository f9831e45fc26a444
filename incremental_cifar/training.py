"""One step, one epoch, evaluation: what a run spends its time on.

Nothing in a step waits for the device: losses and accuracies stay there until the end of the epoch, and every step of a run has the same
shapes (a last, smaller batch excepted). Letters in the shapes: n images, k classes seen so far.
Source: paper, Methods, "Class-incremental CIFAR-100"; released incremental_cifar_experiment.py, train and evaluate_network.
"""

import contextlib
import os
import platform
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incremental_cifar.augmentation import augmented, draw_transformations
from incremental_cifar.cifar100 import ImageSet
from incremental_cifar.config import DEVICE_NAMES, NUM_CLASSES, UserError, is_device_name
from incremental_cifar.continual_backprop import ContinualBackprop
from incremental_cifar.resnet import ResNet18
from incremental_cifar.seeds import Purpose, derive_seed, generator_for

EVALUATION_BATCH_SIZE = {"cpu": 100, "cuda": 1000}  # images per forward pass without gradients: what fits a cache, what fills a GPU

# (share of a task's epochs in tenths, factor of the step size from there on)
STEPSIZE_SCHEDULE = ((3, 0.2), (6, 0.2), (8, 0.2))


# --- The machine -----------------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device of this name: "auto", "cpu", "cuda" or "cuda:N". Raises UserError if that cannot be used."""
    if not is_device_name(name):
        raise UserError(f'device: got "{name}"; it must be {DEVICE_NAMES}')
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", torch.device(name).index or 0)
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f'device: "{name}" is not here, PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs; use device=cpu or '
            "device=auto"
        )
    capability = torch.cuda.get_device_capability(device)
    oldest = min((int(arch.removeprefix("sm_").rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")), default=0)
    if capability[0] * 10 + capability[1] < oldest:
        raise UserError(
            f"device: {torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and PyTorch "
            f"{torch.__version__} needs {oldest // 10}.{oldest % 10}; use device=cpu or an older PyTorch"
        )
    return device


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:  # Linux; platform.processor() says nothing there
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def set_arithmetic(precision: str, deterministic: bool) -> None:
    """Set PyTorch's global switches for a run's precision and reproducibility; to be called before any work on the device.

    "tf32" is what the released code ran in: PyTorch's defaults, TF32 in convolutions and full float32 in the output layer. With
    `deterministic`, the same computation gives the same bits again on the same machine.
    """
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for; read when it starts
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory it has not written
    torch.backends.cudnn.benchmark = not deterministic


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The context in which the network runs: with "bf16", its convolutions and products in bfloat16 on float32 weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


# --- Optimisation ----------------------------------------------------------------------------------------------------------------


def make_optimizer(network: nn.Module, stepsize: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """Stochastic gradient descent with momentum, its state on the device from the start.

    The step size is a tensor that `set_stepsize` fills, and momentum starts as zeros rather than as nothing (the first step is the same),
    so that resuming fills existing memory.
    """
    parameters = list(network.parameters())
    stepsize_tensor = torch.tensor(stepsize, device=parameters[0].device)
    optimizer = torch.optim.SGD(parameters, lr=stepsize_tensor, momentum=momentum, weight_decay=weight_decay, fused=True)
    for parameter in parameters if momentum > 0 else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def momentum_buffers(optimizer: torch.optim.SGD) -> list[Tensor]:
    """The optimizer's memory, a tensor per parameter in the parameters' order (none without momentum)."""
    parameters = optimizer.param_groups[0]["params"]
    return [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters if parameter in optimizer.state]


def stepsize_at(epoch: int, epochs_per_task: int, stepsize: float) -> float:
    """The step size of an epoch of a task, counted from 0: a fifth of the one before from 30 %, 60 % and 80 % of the epochs on.

    As released: it starts at `stepsize` again with every task. Unlike released, it is not rounded to five decimals.
    """
    for tenths, factor in STEPSIZE_SCHEDULE:
        if epoch * 10 >= tenths * epochs_per_task:
            stepsize *= factor
    return stepsize


def set_stepsize(optimizer: torch.optim.SGD, stepsize: float) -> None:
    for group in optimizer.param_groups:
        group["lr"].fill_(stepsize)


class WeightNoise:
    """Shrink and perturb's noise: N(0, std^2) added to every parameter, from a generator seeded by the run's seed and the step."""

    def __init__(self, network: nn.Module, random_seed: int, std: float):
        self.parameters = list(network.parameters())
        self.random_seed = random_seed
        self.std = std
        device = self.parameters[0].device
        self.generator = torch.Generator(device)
        flat = torch.empty(sum(parameter.numel() for parameter in self.parameters), device=device)
        self.flat = flat  # one draw for all parameters
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        self.noise = [piece.view_as(parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Add the noise of step `step` (counted from 0 over the whole run) to the parameters, in place."""
        self.generator.manual_seed(derive_seed(self.random_seed, Purpose.NOISE, step))
        self.flat.normal_(0, self.std, generator=self.generator)
        torch._foreach_add_(self.parameters, self.noise)


# --- One step and one epoch ------------------------------------------------------------------------------------------------------


def unseen_mask(classes: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """What is added to the logits so that only the classes seen so far count: (100,), 0 for those and -inf for the others.

    Loss, gradient and prediction are those of the logits of the seen classes alone; the shapes are the same in all tasks.
    """
    mask = torch.full((NUM_CLASSES,), -torch.inf)
    mask[torch.as_tensor(np.asarray(classes), dtype=torch.int64)] = 0.0
    return mask.to(device)


def train_step(
    network: ResNet18,
    optimizer: torch.optim.SGD,
    images: Tensor,
    labels: Tensor,
    mask: Tensor,
    step: int,
    precision: str = "fp32",
    continual_backprop: ContinualBackprop | None = None,
    weight_noise: WeightNoise | None = None,
) -> tuple[Tensor, Tensor]:
    """One step on one batch: forward, loss, backward, SGD, the reset of units, the noise. Changes the network in place.

    images: (n, 3, 32, 32). labels: (n,). mask: (100,), see `unseen_mask`. step: counted from 0 over the whole run.
    Returns the mean loss and the share of correct predictions on this batch, both before the update: scalars on the device.
    """
    with autocast(precision, images.device):
        logits, features = network(images)  # (n, 100), and what the hidden layers put out
    logits = logits.float() + mask
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if continual_backprop is not None:
        continual_backprop.step([feature.detach() for feature in features])
    if weight_noise is not None:
        weight_noise.add(step)
    return loss.detach(), (logits.detach().argmax(1) == labels).float().mean()


def train_one_epoch(
    train_batch: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]],
    train_set: ImageSet,
    classes: Sequence[int] | np.ndarray,
    batch_size: int,
    random_seed: int,
    epoch: int,
    losses: Tensor,
    accuracies: Tensor,
    first_step: int,
    after_step: Callable[[int, int], None] = lambda num_steps, num_images: None,
) -> None:
    """Train on all images of the classes seen so far once, in a random order, each randomly transformed.

    train_batch: `train_step` without the arguments that stay the same: (images, labels, mask, step) to (loss, accuracy).
    epoch: counted from 0 over the whole run; the order and the transformations depend on it and the seed alone.
    losses, accuracies: (at least first_step + steps of the epoch,) on the device; this epoch's entries are filled in.
    after_step: called after every step with the number of steps done and the number of images of the last one.
    """
    device = losses.device
    indices = train_set.indices_of(classes)
    generator = generator_for(random_seed, Purpose.EPOCH, epoch)
    indices = indices[torch.randperm(len(indices), generator=generator)].to(device)
    transformations = draw_transformations(len(indices), generator).to(device)
    mask = unseen_mask(classes, device)
    for num_steps, start in enumerate(range(0, len(indices), batch_size)):
        stop = min(start + batch_size, len(indices))
        images, labels = augmented(train_set, indices[start:stop], transformations.slice(start, stop))
        step = first_step + num_steps
        losses[step], accuracies[step] = train_batch(images, labels, mask, step)
        after_step(num_steps + 1, stop - start)


@torch.no_grad()
def evaluate(
    network: ResNet18,
    image_set: ImageSet,
    classes: Sequence[int] | np.ndarray,
    precision: str = "fp32",
    augmentation_generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy over all images of these classes, with the running statistics of batch norm.

    Only the outputs of these classes count. augmentation_generator: if given, the images are transformed at random with its draws.
    Returns two float32 scalars on the device.
    """
    device = network.fc.weight.device
    indices = image_set.indices_of(classes).to(device)
    mask = unseen_mask(classes, device)
    if augmentation_generator is not None:
        transformations = draw_transformations(len(indices), augmentation_generator).to(device)
    total_loss = torch.zeros((), device=device)
    num_correct = torch.zeros((), device=device)
    network.eval()
    batch_size = EVALUATION_BATCH_SIZE[device.type]
    for start in range(0, len(indices), batch_size):
        stop = min(start + batch_size, len(indices))
        if augmentation_generator is None:
            images, labels = image_set.get(indices[start:stop])
        else:
            images, labels = augmented(image_set, indices[start:stop], transformations.slice(start, stop))
        with autocast(precision, device):
            logits, _ = network(images)
        logits = logits.float() + mask
        total_loss += F.cross_entropy(logits, labels, reduction="sum")
        num_correct += (logits.argmax(1) == labels).sum()
    network.train()
    return total_loss / len(indices), num_correct / len(indices)
