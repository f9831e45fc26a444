"""What a stored network still has to learn with: dormant units, ranks of features, gradients, size of weights, accuracy per class.

    for layer in hidden_features(network, images, batch_norm="batch"):     # one of the 17 hidden layers after the other
        shares.append(active_share(layer))                                 # (c,) how often each of its units is active
    dormant_unit_fraction(shares, threshold=0.01)                          # of all units of all layers
    stable_rank(singular_values(torch.cat(layer)))                         # how many directions hold 99 % of the last hidden layer

Letters in the shapes: n images, c units, h and w positions, k classes seen. Nothing here draws random numbers or changes its arguments.
Source: paper, Methods, "Class-incremental CIFAR-100"; released incremental_cifar/post_run_analysis.py.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incremental_cifar.resnet import ResNet18
from incremental_cifar.training import unseen_mask

# A layer's output for so many images, 13 MB at most at full width, stays in a CPU's cache, and its memory is used again for the next.
# For all 1,000 images at once it would be 260 MB, fetched from the system and zeroed for every layer: twice the time.
IMAGES_PER_CHUNK = 50
IMAGES_PER_GRADIENT = 100  # about a batch of training, 90: the activations that its backward pass needs are 1.5 GB at full width


@torch.no_grad()
def hidden_features(network: ResNet18, images: Tensor, batch_norm: str) -> Iterator[list[Tensor]]:
    """The ReLU outputs of the 17 hidden layers on these images, layer by layer: what `network(images)` returns, of one layer at a time.

    images: (n, 3, 32, 32), normalised, on the network's device. batch_norm: "batch" normalises each layer with mean and variance over all
    n images and their positions, "running" with those that the network learned; neither changes them, and the network's own mode does
    not matter. Yields 17 lists of chunks of up to 50 images, (50, c, h, w) float32, the last layer (50, c): after the average pool.
    Hold on to none of them: at most four layers' outputs are then in memory, 0.8 GB for 1,000 images at full width.
    """

    def convolved(convolution: nn.Conv2d, norm: nn.BatchNorm2d, inputs: Sequence[Tensor]) -> list[Tensor]:
        outputs = [convolution(chunk) for chunk in inputs]  # (50, c, h, w)
        mean, variance = norm.running_mean, norm.running_var  # (c,)
        if batch_norm == "batch":
            # As released: batch statistics, though one would expect the running ones, with which a network is evaluated.
            count = sum(chunk.numel() for chunk in outputs) / norm.num_features
            mean = sum(chunk.sum((0, 2, 3)).double() for chunk in outputs) / count
            deviations = (chunk - mean.float()[:, None, None] for chunk in outputs)
            variance = sum(deviation.square_().sum((0, 2, 3)).double() for deviation in deviations) / count
        scale = norm.weight / torch.sqrt(variance + norm.eps)
        shift = norm.bias - mean * scale
        for chunk in outputs:
            chunk.mul_(scale.float()[:, None, None]).add_(shift.float()[:, None, None])
        return outputs

    x = convolved(network.conv1, network.bn1, images.split(IMAGES_PER_CHUNK))
    yield [torch.relu_(chunk) for chunk in x]
    blocks = list(network.blocks())
    for block in blocks:
        first = [torch.relu_(chunk) for chunk in convolved(block.conv1, block.bn1, x)]
        yield first
        shortcut = x if block.downsample is None else convolved(*block.downsample, x)
        x = convolved(block.conv2, block.bn2, first)
        x = [torch.relu_(chunk.add_(added)) for chunk, added in zip(x, shortcut, strict=True)]
        yield x if block is not blocks[-1] else [network.avgpool(chunk).flatten(1) for chunk in x]


def active_share(chunks: Sequence[Tensor]) -> Tensor:
    """Share of images and positions on which each unit of a layer is active, that is, not zero: (c,) float64, on the chunks' device.

    chunks: the layer's outputs, (n, c, h, w) or (n, c) each, on any device.
    """
    all_but_units = [dim for dim in range(chunks[0].dim()) if dim != 1]
    # Signs, summed in float32, are exact up to 2^24 and several times faster than counting booleans.
    num_active = sum(chunk.sign().abs_().sum(all_but_units).double() for chunk in chunks)  # (c,)
    return num_active * chunks[0].shape[1] / sum(chunk.numel() for chunk in chunks)


def dormant_unit_fraction(active_shares: Iterable[Tensor], threshold: float) -> float:
    """Share of all units, over all layers together, that are active on less than `threshold` of images and positions.

    active_shares: (c,) per layer, see `active_share`. threshold: from 0 (no unit is dormant) to 1 (every unit that is ever inactive is);
    a unit active on exactly this share is not dormant. Returns a fraction from 0 to 1.
    Source: released post_run_analysis.py, compute_dormant_units_proportion.
    """
    shares = torch.cat([layer.cpu() for layer in active_shares])
    return (shares < threshold).double().mean().item()


def singular_values(features: Tensor) -> np.ndarray:
    """Singular values of a layer's features, the largest first: (min(n, c),) float64.

    features: (n, c), finite, on any device. Computed on the CPU by LAPACK's divide and conquer, without singular vectors, in float64: the
    small ones are then as exact as the float32 features allow, and 1,000 x 512 values take well under a tenth of a second.
    """
    return torch.linalg.svdvals(features.cpu().double()).numpy()


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of the singular values divided by their sum: 1 if one direction holds all, m if m directions hold the same.

    singular_values: (m,) not negative, in any order. Returns a float from 1 to m.
    Source: Roy and Vetterli, "The effective rank" (2007); released post_run_analysis.py, compute_effective_rank.
    """
    total = singular_values.sum()
    if total == 0:
        return 1.0  # As released: features that are all zero have rank 1; one would expect 0.
    shares = singular_values / total
    shares = shares[shares > 0]  # also without small values that next to a huge one round to a share of 0
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(singular_values: np.ndarray, share: float = 0.99) -> int:
    """The least number of singular values, the largest first, that hold `share` of the sum of all.

    singular_values: (m,) not negative, in any order. Returns an integer from 1 to m.
    Source: paper, Methods; released post_run_analysis.py, compute_stable_rank.
    """
    total = singular_values.sum()
    if total == 0:
        return 1  # As released: features that are all zero have rank 1; one would expect 0.
    cumulated = np.cumsum(np.sort(singular_values)[::-1]) / total
    return int((cumulated[:-1] < share).sum()) + 1  # all of them together hold everything, whatever rounding says


def weight_magnitude(network: nn.Module) -> float:
    """Mean absolute value over all parameters of a network: every weight and bias once, buffers (running statistics) not.

    Summed in float64, so the order of the parameters does not matter.
    Source: released post_run_analysis.py, compute_average_weight_magnitude.
    """
    parameters = list(network.parameters())
    total = sum(parameter.detach().abs().sum(dtype=torch.float64).item() for parameter in parameters)
    return total / sum(parameter.numel() for parameter in parameters)


@torch.enable_grad()
def loss_gradients(network: ResNet18, images: Tensor, labels: Tensor, classes: Sequence[int] | np.ndarray, batch_norm: str) -> list[Tensor]:
    """Gradients of the mean cross entropy on these images with respect to all parameters, as a step of training would have them.

    images: (n, 3, 32, 32), normalised, labels: (n,), both on the network's device. classes: labels of the classes seen by then, those of
    the images among them; only their outputs count. The images go through the network in batches of up to 100, as even as can be, whose
    gradients are summed in their order. batch_norm: "batch" normalises each batch with its own mean and variance, through which the
    gradient passes, as in training (the gradient is then the mean of those of so many steps); "running" with what the network learned.
    Returns float32 gradients of the parameters' shapes and in their order, but of the output layer the rows of these classes alone, in the
    order of labels: those of the others are 0 whatever the network is like. With "batch", those of biases in front of batch norm are 0 but
    for rounding. Needs about 1.5 GB at full width.
    """
    network = copy.deepcopy(network).train(batch_norm == "batch")  # training moves running statistics
    mask = unseen_mask(classes, images.device)
    num_batches = -(-len(images) // IMAGES_PER_GRADIENT)
    for batch_images, batch_labels in zip(images.tensor_split(num_batches), labels.tensor_split(num_batches), strict=True):
        logits, _ = network(batch_images)
        loss = F.cross_entropy(logits + mask, batch_labels, reduction="sum") / len(images)
        loss.backward()
    seen = torch.isfinite(mask)
    return [p.grad[seen] if p is network.fc.weight or p is network.fc.bias else p.grad for p in network.parameters()]


def two_norm(tensors: Iterable[Tensor]) -> float:
    """2-norm of the entries of all tensors, taken together, in float64: the square root of the sum of their squares."""
    return math.hypot(*(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).item() for tensor in tensors))


def zero_share(tensors: Sequence[Tensor]) -> float:
    """Share of the entries of all tensors, taken together, that are exactly 0: a fraction from 0 to 1.

    Source, of gradients: released code of Kumar et al., "Maintaining plasticity in continual learning via regenerative regularization"
    (2023), BaseAgent.compute_activation_statistics.
    """
    num_zeros = sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in tensors)
    return num_zeros / sum(tensor.numel() for tensor in tensors)


def accuracy_per_class(logits: Tensor, labels: Tensor, classes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Share of each class's test images that the network gets right, among the classes seen so far.

    logits: (n, 100), a column per CIFAR label. labels: (n,) integers 0..99, CIFAR's own numbering; images of other classes are passed
    over. classes: (k,) labels of the classes seen so far, in the order in which the run met them; only their outputs count, as in
    training (with all 100, every output does, as released). Returns (k,) float32 fractions, in that order.
    Raises ValueError if a class has no image.
    Source: released post_run_analysis.py, compute_last_task_accuracy_per_class_in_order.
    """
    classes = torch.as_tensor(np.asarray(classes), dtype=torch.int64)
    labels = labels.cpu()
    is_correct = classes[logits.cpu()[:, classes].argmax(dim=1)] == labels  # (n,)
    is_of_class = classes[:, None] == labels  # (k, n)
    counts = is_of_class.sum(1)
    if not counts.all():
        raise ValueError(f"no image of class {int(classes[counts == 0][0])}")
    return ((is_of_class & is_correct).sum(1).double() / counts).float().numpy()
