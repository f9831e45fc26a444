"""Soft reset: with every new task, all parameters go back a part of the way to their initial values (shrink and perturb, once per task).

Source: github.com/isaac7778/FIRE at c37a0ac5, vision/interventions/shrink_and_perturb.py, with 0.8 of the way;
github.com/dojeon-ai/Hare-Tortoise at 4ec5ebbe, src/trainers/base.py. Both go to the stored initial network, where Ash and Adams, *On
warm-starting neural network training* (2020), add fresh noise; both make the optimizer anew, and leave batch norm's statistics.

Ours: for a new optimizer stands a momentum of 0. All of the way (1) is not the retrained network: that one draws other weights for every
task, and keeps its momentum.
What to expect: nobody has published this method on this protocol. In FIRE's class-incremental CIFAR-100, with another network, it ends
nearly as high as resetting everything.
"""

import torch
from torch import nn

from incremental_cifar.algorithms.algorithm import Algorithm


class SoftReset(Algorithm):
    """Moves a network's parameters to share x initial + (1 - share) x present values between tasks, and sets SGD's momentum to 0.

    network: with the parameters it has at the start of the run: a resumed run fills them in later. share: above 0, up to 1.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.SGD, share: float):
        self.parameters = list(network.parameters())
        self.initial = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = optimizer
        self.share = share

    @torch.no_grad()
    def end_task(self, task: int) -> None:
        torch._foreach_lerp_(self.parameters, self.initial, self.share)
        for state in self.optimizer.state.values():  # a momentum buffer per parameter; nothing without momentum
            state["momentum_buffer"].zero_()
