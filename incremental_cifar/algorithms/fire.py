"""FIRE: with every new task, all weights are made nearly orthogonal, as near to what they were as that allows.

Source: isaac7778/FIRE at c37a0ac5 (2026), vision/interventions/fire.py; the division by the kernel's area is in the code alone.
Of each convolution, shortcuts included, and of the output layer, each kernel position is a matrix (outputs x inputs), whose singular values
all come near sqrt(outputs / inputs) / (height x width of the kernel), by Newton-Schulz iterations and not by a decomposition: after ten,
small singular values are still below that, which is part of the method. Biases and batch norm stay, running statistics included.

Ours: momentum becomes 0, which stands for the new optimizer that the authors make for each task.
What to expect: it acts between tasks alone and costs nothing. Nobody has tuned it on this protocol.
"""

import torch
from torch import Tensor, nn

from incremental_cifar.algorithms.algorithm import Algorithm


class Fire(Algorithm):
    """Orthogonalises a network's weights between tasks, in place, and clears SGD's momentum.

    iterations: of Newton and Schulz; the authors' number is 10.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.SGD, iterations: int):
        self.weights = [module.weight for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        self.optimizer = optimizer
        self.iterations = iterations

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        for weight in self.weights:
            weight.copy_(orthogonalised(weight, self.iterations))
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()


def orthogonalised(weight: Tensor, iterations: int) -> Tensor:
    """The weight with each kernel position made nearly orthogonal. weight: (outputs, inputs), or (outputs, inputs, h, w)."""
    num_outputs, num_inputs = weight.shape[:2]
    matrices = weight.movedim((0, 1), (-2, -1))  # (h, w, outputs, inputs)
    x = matrices.mT if num_outputs < num_inputs else matrices
    tiny = torch.finfo(x.dtype).tiny  # where all is 0, it stays 0
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(tiny)
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    x = x.mT if num_outputs < num_inputs else x
    return x.movedim((-2, -1), (0, 1)) * ((num_outputs / num_inputs) ** 0.5 / weight[0, 0].numel())
