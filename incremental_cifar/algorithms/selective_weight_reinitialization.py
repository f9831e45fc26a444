"""Selective weight reinitialization: every so many steps, each parameter tensor's least useful weights are drawn anew.

Source: Hernandez-Garcia, Dohare, Luo and Sutton, *Reinitializing weights vs units for maintaining plasticity in neural networks* (CoLLAs
2025); github.com/JFernando4/collas_2025_swr_paper at 5c8ef036, src/swr_functions/selective_weight_reinitialization.py, class
SelectiveWeightReinitialization. As there, all parameters take part, biases and batch norm's too, and momentum stays.

Ours: what is reinitialised gets the network's own initial distribution (`resnet.initialise`), batch norm's running statistics stay, and
of equal utilities, a proportion takes the lower index first.
What to expect: published with a vision transformer, and not on this protocol. In the network as it is drawn, an action redraws 0.1 to
0.2 % of a convolution. The output layer's rows of classes not yet seen have gradient 0, and are redrawn each time, so that weight decay
never shrinks them; likewise all weights into a silent unit, which is how it comes back. Biases in front of batch norm have gradient 0 but
for rounding, and count among the weights reset although nothing follows from it.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from incremental_cifar.algorithms.algorithm import Algorithm
from incremental_cifar.algorithms.flat import FlatTensor
from incremental_cifar.seeds import Purpose, derive_seed


def initial_distribution(network: nn.Module) -> list[tuple[float, float]]:
    """Mean and standard deviation of which `resnet.initialise` draws each of a network's parameters, in their order."""
    distributions = []
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                distributions.append((0.0, 0.0))
            elif isinstance(module, nn.BatchNorm2d):
                distributions.append((1.0, 0.0))
            else:
                squared_gain = 1 if isinstance(module, nn.Linear) else 2
                distributions.append((0.0, math.sqrt(squared_gain / parameter[0].numel())))
    return distributions


class SelectiveWeightReinitialization(Algorithm):
    """Measures the utility of every weight in every `frequency`-th step, and gives those of little utility initial values.

    utility: "gradient", |weight x gradient| with the weight after the update and the gradient before it, or "magnitude", |weight|.
    pruning: "threshold": all weights whose utility is at most factor times their tensor's mean; or "proportional": so large a share of each
    tensor, the odd weight by chance. strategy: "resample": drawn as they were at the start; or "mean": the mean of that.
    All draws depend on random_seed and the step alone.
    """

    def __init__(
        self,
        network: nn.Module,
        random_seed: int,
        frequency: int,
        factor: float,
        utility: str = "gradient",
        pruning: str = "threshold",
        strategy: str = "resample",
    ):
        self.parameters = list(network.parameters())
        self.distributions = initial_distribution(network)
        self.random_seed = random_seed
        self.frequency = frequency
        self.factor = factor
        self.utility = utility
        self.pruning = pruning
        self.strategy = strategy
        self.scratch = FlatTensor(self.parameters)  # this step's gradients, then new weights; never read before it is written
        self.generator = torch.Generator(self.scratch.values.device)
        self.num_reset = torch.zeros((), dtype=torch.int64, device=self.scratch.values.device)  # since `metrics` was asked

    @torch.no_grad()
    def observe(self, features: list[Tensor]) -> None:
        """Keep the gradients, which after the step can no longer be read."""
        if self.utility == "gradient":
            torch._foreach_copy_(self.scratch.pieces, [parameter.grad for parameter in self.parameters])

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """In every `frequency`-th step (counted from 0 over the whole run), reinitialise weights, in place."""
        if (step + 1) % self.frequency:
            return
        masks = self.choose_weights(step)
        self.generator.manual_seed(derive_seed(self.random_seed, Purpose.WEIGHT_REINIT, step))
        if self.strategy == "resample":
            self.scratch.values.normal_(generator=self.generator)
        else:
            self.scratch.values.zero_()
        for parameter, fresh, mask, (mean, std) in zip(self.parameters, self.scratch.pieces, masks, self.distributions, strict=True):
            parameter.copy_(torch.where(mask, fresh.mul_(std).add_(mean), parameter))
            self.num_reset.add_(mask.sum())

    @torch.no_grad()
    def choose_weights(self, step: int) -> list[Tensor]:
        """Which weights step `step` reinitialises: a bool tensor of each parameter's shape."""
        # NumPy's generator, because PyTorch's on a CPU would repeat here what the new weights are drawn from.
        coins = np.random.default_rng(derive_seed(self.random_seed, Purpose.WEIGHT_REINIT, step)).random(len(self.parameters))
        masks = []
        for parameter, gradient, coin in zip(self.parameters, self.scratch.pieces, coins, strict=True):
            utility = parameter.abs() if self.utility == "magnitude" else (parameter * gradient).abs()
            if self.pruning == "threshold":
                masks.append(utility <= self.factor * utility.mean())
            else:
                least = utility.flatten().sort(stable=True).indices[: int(self.factor * utility.numel() + coin)]
                masks.append(utility.new_zeros(utility.numel(), dtype=torch.bool).index_fill_(0, least, True).view_as(utility))
        return masks

    def metrics(self) -> dict[str, float]:
        num_reset = self.num_reset.item()
        self.num_reset.zero_()
        return {"weights_reset_per_epoch": num_reset}
