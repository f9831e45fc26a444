"""L2 Init (regenerative regularization): the parameters are pulled towards their initial values, rather than towards 0.

Source: Kumar, Marklund and Van Roy, *Maintaining plasticity in continual learning via regenerative regularization* (2023);
github.com/skumar9876/L2_Init at 3f86d26f, agents/agents.py, class L2InitAgent. Its penalty is strength / 2 times the squared distance to
the run's own initial parameters, batch norm's left out, and takes the place of weight decay.

Ours: the penalty's gradient is added to the loss's, so that the losses stored are the cross entropy, as everywhere. Published strengths
are for Adam, from 1e-5 to 1e-2; cfg/l2_init.json has weight decay's, 0.0005, at which both penalties pull equally hard.
What to expect: nobody has published this method on this protocol. The output layer's rows of classes not yet seen, which weight decay
shrinks to nothing in early tasks, stay what they were at the start.
"""

from collections.abc import Iterable

import torch
from torch import nn

from incremental_cifar.algorithms.algorithm import Algorithm


class L2Init(Algorithm):
    """Adds strength x (parameter - initial parameter) to the gradients.

    parameters: those that are pulled, with the values they have at the start of the run: a resumed run fills them in later.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], strength: float):
        self.parameters = list(parameters)
        self.initial = [parameter.detach().clone() for parameter in self.parameters]
        self.strength = strength

    @torch.no_grad()
    def change_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters]
        torch._foreach_add_(gradients, self.parameters, alpha=self.strength)
        torch._foreach_sub_(gradients, self.initial, alpha=self.strength)
