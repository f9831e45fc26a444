"""One step, one epoch, evaluation: what a run spends its time on.

Nothing in a step waits for the device: losses and accuracies stay there until the end of the epoch, and every step of a run has the same
shapes (a last, smaller batch excepted), so that on a GPU it can be recorded once and replayed (`cuda_graphs.py`). Letters in the shapes:
n images, k classes seen so far.
Source: paper, Methods, "Class-incremental CIFAR-100"; released incremental_cifar_experiment.py, train and evaluate_network.
"""

import contextlib
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incremental_cifar.algorithms import Algorithm
from incremental_cifar.augmentation import augmented, draw_transformations
from incremental_cifar.cifar100 import IMAGE_SIZE, ImageSet
from incremental_cifar.config import DEVICE_NAMES, MOST_RUNS_PER_GPU, NUM_CLASSES, UserError, is_device_name
from incremental_cifar.cuda_graphs import Recorded
from incremental_cifar.network_copies import Bfloat16Copy, FoldedCopy
from incremental_cifar.resnet import ResNet18
from incremental_cifar.seeds import Purpose, generator_for

# Images per forward pass without gradients: what fits a CPU's cache, and what fills a GPU and divides the paper's numbers of images.
EVALUATION_BATCH_SIZE = {"cpu": 100, "cuda": 250}
# Steps whose images are transformed together: on a GPU, so that these many small operations fill it. The images are the same.
STEPS_PER_CHUNK = {"cpu": 1, "cuda": 25}

Forward = Callable[[Tensor], tuple[Tensor, list[Tensor]]]  # images to logits and features, as `ResNet18` does it

CUBLAS_WORKSPACES = (":4096:8", ":16:8")  # with which it is deterministic

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
        remedy = "device=cuda:0" if torch.cuda.device_count() else "a GPU, a driver and a PyTorch that go together"
        raise UserError(
            f'device: "{name}" is not here, PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs; use device=cpu, or '
            f"{remedy}"
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
    # Read once, when cuBLAS starts: so it is set for every run, since a later one in this process may want it.
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if deterministic and workspace not in CUBLAS_WORKSPACES and torch.cuda.is_available():
        raise UserError(
            f'CUBLAS_WORKSPACE_CONFIG: the environment says "{workspace}", with which cuBLAS is not deterministic; it must be '
            f"{' or '.join(CUBLAS_WORKSPACES)}; unset it, or use deterministic=false"
        )
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory it has not written
    torch.backends.cudnn.benchmark = not deterministic


def compiled(forward: Forward, batch_size: int, deterministic: bool) -> Forward:
    """A network's forward and backward pass with its elementwise operations fused; on the same parameters, with other last bits.

    Compiles at the first call, for about a minute. Batches of other sizes go through the network as it is: compiling for each would stop at
    a limit, and where it stopped would depend on where a run was interrupted.
    """
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = 8 * MOST_RUNS_PER_GPU  # of one function: the network's, which all runs of a process share
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._inductor.config.deterministic = deterministic  # no choice of kernels by timing them
    fused = torch.compile(forward, dynamic=False)
    return lambda images: (fused if len(images) == batch_size else forward)(images)


# --- Optimisation ----------------------------------------------------------------------------------------------------------------


def make_optimizer(
    network: nn.Module, stepsize: float, momentum: float, weight_decay: float, decay_batch_norm: bool = True
) -> torch.optim.SGD:
    """Stochastic gradient descent with momentum, its state on the device from the start.

    The step size is a tensor that `set_stepsize` fills, and momentum starts as zeros rather than as nothing (the first step is the same),
    so that resuming fills existing memory. decay_batch_norm: whether weight decay takes in batch norm's weights and biases.
    """
    parameters = list(network.parameters())
    stepsize_tensor = torch.tensor(stepsize, device=parameters[0].device)
    groups = [{"params": parameters}]
    if not decay_batch_norm:
        free = {parameter for module in network.modules() if isinstance(module, nn.BatchNorm2d) for parameter in module.parameters()}
        groups = [
            {"params": [parameter for parameter in parameters if parameter not in free]},
            {"params": [parameter for parameter in parameters if parameter in free], "weight_decay": 0},
        ]
    optimizer = torch.optim.SGD(groups, lr=stepsize_tensor, momentum=momentum, weight_decay=weight_decay, fused=True)
    for parameter in parameters if momentum > 0 else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def momentum_buffers(network: nn.Module, optimizer: torch.optim.SGD) -> list[Tensor]:
    """The optimizer's memory, a tensor per parameter in the network's order (none without momentum)."""
    return [optimizer.state[parameter]["momentum_buffer"] for parameter in network.parameters() if parameter in optimizer.state]


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


# --- One step and one epoch ------------------------------------------------------------------------------------------------------


def unseen_mask(classes: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """What is added to the logits so that only the classes seen so far count: (100,), 0 for those and -inf for the others.

    Loss, gradient and prediction are those of the logits of the seen classes alone; the shapes are the same in all tasks.
    """
    mask = torch.full((NUM_CLASSES,), -torch.inf)
    mask[torch.as_tensor(np.asarray(classes), dtype=torch.int64)] = 0.0
    return mask.to(device)


class TrainingStep:
    """One step on one batch: forward, loss, backward, SGD, and what the algorithms do in between. Changes the network in place.

    network, optimizer: see `ResNet18` and `make_optimizer`. precision: "fp32", "tf32" or "bf16". algorithms: see `make_algorithms`.
    """

    def __init__(self, network: ResNet18, optimizer: torch.optim.SGD, precision: str = "fp32", algorithms: Sequence[Algorithm] = ()):
        self.network = network
        self.optimizer = optimizer
        self.algorithms = algorithms
        self.observers = [algorithm for algorithm in algorithms if type(algorithm).observe is not Algorithm.observe]
        self.half = Bfloat16Copy(network) if precision == "bf16" else None
        self.forward: Forward = network if self.half is None else self.half.network
        self.recorded: Recorded | None = None

    def __call__(self, images: Tensor, labels: Tensor, mask: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """images: (n, 3, 32, 32). labels: (n,). mask: (100,), see `unseen_mask`. step: counted from 0 over the whole run.

        Returns the mean loss and the share of correct predictions on this batch, both before the update: scalars on the device, which
        the next step may overwrite.
        """
        learn = self.learn_from_batch if self.recorded is None or not self.recorded.fits(images) else self.recorded
        loss, accuracy = learn(images, labels, mask)
        with torch.no_grad():
            for algorithm in self.algorithms:
                algorithm.after_step(step)
        return loss, accuracy

    def learn_from_batch(self, images: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a step that is the same in every step, on the device alone: all of it can be recorded."""
        if self.half is not None:
            self.half.refresh()
            images = images.bfloat16()
        logits, features = self.forward(images)  # (n, 100), and what the hidden layers put out
        logits = logits.float() + mask
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        if self.half is not None:
            self.half.pass_gradients_on()
        with torch.no_grad():
            for algorithm in self.algorithms:
                algorithm.change_gradients()
            self.optimizer.step()
            features = [feature.detach() for feature in features] if self.observers else []
            for algorithm in self.observers:
                algorithm.observe(features)
        return loss.detach(), (logits.detach().argmax(1) == labels).float().mean()

    def compile(self, batch_size: int, deterministic: bool) -> None:
        """From here on, run the network compiled in the steps with this batch size; see `compiled`."""
        self.forward = compiled(self.forward, batch_size, deterministic)

    def record(self, batch_size: int) -> None:
        """From here on, replay the steps with this batch size from a CUDA graph. Raises RuntimeError if that is impossible."""
        example = example_batch(batch_size, self.network.fc.weight.device)
        self.recorded = Recorded(self.learn_from_batch, example, changed=tensors_in(self.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on: what a checkpoint holds, and what recording a step puts back. Its tensors are the live ones."""
        return {
            "network": self.network.state_dict(),
            "momentum": momentum_buffers(self.network, self.optimizer),
            "algorithms": {name: algorithm.state_dict() for name, algorithm in self.named_algorithms()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill in a stored state, in place."""
        self.network.load_state_dict(state["network"])
        for buffer, stored in zip(momentum_buffers(self.network, self.optimizer), state["momentum"], strict=True):
            buffer.copy_(stored)
        for name, algorithm in self.named_algorithms():
            algorithm.load_state_dict(state["algorithms"].get(name, {}))

    def named_algorithms(self) -> Iterator[tuple[str, Algorithm]]:
        """Each with its class's name, and its number behind it where there are several of a class."""
        seen = Counter[str]()
        for algorithm in self.algorithms:
            name = type(algorithm).__name__
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name} {seen[name]}", algorithm


def tensors_in(state: Any) -> list[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors_in(value)]


def example_batch(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and mask of a made-up batch: what is recorded has their shapes, dtypes and memory formats.

    The images are random, so that whatever a step changes, it changes in the calls before the recording too: what is not put back
    afterwards shows in the results.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(NUM_CLASSES, (n,), generator=generator).to(device)
    return images, labels, torch.zeros(NUM_CLASSES, device=device)


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

    train_batch: a `TrainingStep`: (images, labels, mask, step) to (loss, accuracy).
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
    images_per_chunk = batch_size * STEPS_PER_CHUNK[device.type]
    num_steps = 0
    for start in range(0, len(indices), images_per_chunk):
        stop = min(start + images_per_chunk, len(indices))
        images, labels = augmented(train_set, indices[start:stop], transformations.slice(start, stop))
        for batch_images, batch_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            step = first_step + num_steps
            losses[step], accuracies[step] = train_batch(batch_images, batch_labels, mask, step)
            num_steps += 1
            after_step(num_steps, len(batch_labels))


class EvaluationStep:
    """Loss and correct predictions of one batch, with the running statistics of batch norm. Leaves the network as it is.

    half: the copy that trains, if the precision is bf16. is_folded: make batch norm part of the convolutions, which saves a GPU
    passes over memory and moves the last bits.
    """

    def __init__(self, network: ResNet18, half: Bfloat16Copy | None = None, is_folded: bool = False):
        self.dtype = torch.float32 if half is None else torch.bfloat16
        self.copy = FoldedCopy(network, self.dtype) if is_folded else half
        self.network = network if self.copy is None else self.copy.network
        self.forward: Forward = self.network
        device = network.fc.weight.device.type
        self.batch_size = EVALUATION_BATCH_SIZE[device]
        if is_folded and device == "cpu":
            self.batch_size //= 2  # faster, by what the folded network does per image in the cache; plain losses keep their bits
        self.recorded: Recorded | None = None

    def refresh(self) -> None:
        """Evaluate the network as it is now; to be called when it has changed."""
        if self.copy is not None:
            self.copy.refresh()

    def __call__(self, images: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """images: (n, 3, 32, 32). labels: (n,). mask: (100,), see `unseen_mask`.

        Returns the sum of the losses and the number of correct predictions: scalars on the device, which the next call may overwrite.
        """
        is_replayed = self.recorded is not None and self.recorded.fits(images)
        return self.recorded(images, labels, mask) if is_replayed else self.evaluate_batch(images, labels, mask)

    @torch.no_grad()
    def evaluate_batch(self, images: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        self.network.eval()
        try:
            logits, _ = self.forward(images.to(self.dtype))
        finally:
            self.network.train()
        logits = logits.float() + mask
        return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()

    def compile(self, deterministic: bool) -> None:
        """From here on, run the network compiled on full batches; see `compiled`."""
        self.forward = compiled(self.forward, self.batch_size, deterministic)

    def record(self) -> None:
        """From here on, replay full batches from a CUDA graph. Raises RuntimeError if that is impossible."""
        device = self.network.fc.weight.device
        self.recorded = Recorded(self.evaluate_batch, example_batch(self.batch_size, device), changed=[])


def evaluate(
    evaluation_step: EvaluationStep,
    image_set: ImageSet,
    classes: Sequence[int] | np.ndarray,
    augmentation_generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy over all images of these classes.

    Only the outputs of these classes count. augmentation_generator: if given, the images are transformed at random with its draws.
    Returns two float32 scalars on the device.
    """
    device = image_set.device
    indices = image_set.indices_of(classes).to(device)
    mask = unseen_mask(classes, device)
    if augmentation_generator is not None:
        transformations = draw_transformations(len(indices), augmentation_generator).to(device)
    evaluation_step.refresh()
    total_loss = torch.zeros((), device=device)
    num_correct = torch.zeros((), device=device)
    batch_size = evaluation_step.batch_size
    for start in range(0, len(indices), batch_size):
        stop = min(start + batch_size, len(indices))
        if augmentation_generator is None:
            images, labels = image_set.get(indices[start:stop])
        else:
            images, labels = augmented(image_set, indices[start:stop], transformations.slice(start, stop))
        batch_loss, batch_correct = evaluation_step(images, labels, mask)
        total_loss += batch_loss
        num_correct += batch_correct
    return total_loss / len(indices), num_correct / len(indices)
