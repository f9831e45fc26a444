"""UPGD (utility-based perturbed gradient descent): useful weights change little, and the others more, and with noise.

For every weight p with gradient g, in step t = 1, 2, ..., and with M the largest u of all weights:

    u = beta u + (1 - beta) (-g p)                   how much, to first order, the loss would rise without this weight
    gate = 1 - sigmoid(u / (1 - beta^t) / M)
    p = (1 - stepsize x weight_decay) p - stepsize (g + sigma x noise) gate            noise: N(0, 1)

Source: Elsayed and Mahmood, *Addressing loss of plasticity and catastrophic forgetting in continual learning* (2024);
github.com/mohmdelsayed/upgd at b75e90ad, core/optim/weight_upgd/first_order.py, class FirstOrderGlobalUPGD.

Ours: without momentum, and with gradients times the gate, that is SGD's own step; the noise follows it. sigma is 0.001, where its authors
try 0.01 and more: at step size 0.1 and weight decay 0.0005 that noise alone keeps weights at a standard deviation of about 0.005.
What to expect: nobody has published this method on this protocol. Nearly all u are far below M, and nearly all gates close to 0.5: the
step size is in effect half of what it says. M is that of the averages before their correction by 1 - beta^t: in the first steps, a
utility counts 1 / (1 - beta) times as much as later. Hold it against the base system without momentum.
"""

from typing import Any

import torch
from torch import Tensor, nn

from incremental_cifar.algorithms.algorithm import Algorithm
from incremental_cifar.algorithms.flat import FlatTensor
from incremental_cifar.seeds import Purpose, derive_seed


class UPGD(Algorithm):
    """Scales the gradients of all parameters by their gates, and adds the noise after SGD's step.

    optimizer: SGD without momentum, whose step size (a tensor) the noise follows. beta: decay of the utilities' average, from 0 to below 1.
    sigma: standard deviation of the noise, as of a gradient. The noise depends on random_seed and the step alone.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.SGD, random_seed: int, beta: float, sigma: float):
        self.parameters = list(network.parameters())
        self.stepsize: Tensor = optimizer.param_groups[0]["lr"]
        self.random_seed = random_seed
        self.beta = beta
        self.sigma = sigma
        self.utilities = FlatTensor(self.parameters)
        self.beta_power = torch.ones((), dtype=torch.float64, device=self.utilities.values.device)  # beta^t
        self.gates = FlatTensor(self.parameters)  # of this step; never read before they are written
        self.noise = FlatTensor(self.parameters)
        self.generator = torch.Generator(self.noise.values.device)

    @torch.no_grad()
    def change_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters]
        utilities, gates = self.utilities.values, self.gates.values
        utilities.mul_(self.beta)
        torch._foreach_addcmul_(self.utilities.pieces, gradients, self.parameters, value=self.beta - 1)
        self.beta_power.mul_(self.beta)
        largest = utilities.max()
        largest = torch.where(largest == 0, 1, largest)  # all are 0 while there is but one class: half open, like most gates ever
        scale = -1 / ((1 - self.beta_power) * largest)
        torch.mul(utilities, scale.float(), out=gates).sigmoid_()  # 1 - sigmoid(x) is sigmoid(-x)
        torch._foreach_mul_(gradients, self.gates.pieces)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take stepsize x sigma x noise x gate off the parameters, in place. step: counted from 0 over the whole run."""
        self.generator.manual_seed(derive_seed(self.random_seed, Purpose.UPGD_NOISE, step))
        self.noise.values.normal_(0, self.sigma, generator=self.generator).mul_(self.stepsize)
        torch._foreach_addcmul_(self.parameters, self.noise.pieces, self.gates.pieces, value=-1)

    def state_dict(self) -> dict[str, Any]:
        return {"utilities": self.utilities.values, "beta_power": self.beta_power}
