"""Shrink and perturb: weight decay shrinks, and noise after every step perturbs.

Source: paper, Methods, "Class-incremental CIFAR-100"; released incremental_cifar_experiment.py, inject_noise.
"""

import torch
from torch import nn

from incremental_cifar.algorithms.algorithm import Algorithm
from incremental_cifar.algorithms.flat import FlatTensor
from incremental_cifar.seeds import Purpose, derive_seed


class WeightNoise(Algorithm):
    """Adds N(0, std^2) to every parameter after every step, from a generator seeded by the run's seed and the step."""

    def __init__(self, network: nn.Module, random_seed: int, std: float):
        self.parameters = list(network.parameters())
        self.random_seed = random_seed
        self.std = std
        self.noise = FlatTensor(self.parameters)
        self.generator = torch.Generator(self.noise.values.device)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Add the noise of step `step` (counted from 0 over the whole run) to the parameters, in place."""
        self.generator.manual_seed(derive_seed(self.random_seed, Purpose.NOISE, step))
        self.noise.values.normal_(0, self.std, generator=self.generator)
        torch._foreach_add_(self.parameters, self.noise.pieces)
