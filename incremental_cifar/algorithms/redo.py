"""ReDo: every so many steps, the units that are nearly silent beside the others of their layer are reset.

    redo = ReDo(network, random_seed, reinit_frequency=1000, reinit_threshold=0.05)
    redo.observe(features)                      # in every step
    redo.after_step(step)

Source: Sokar et al., "The dormant neuron phenomenon in deep reinforcement learning" (2023); google/dopamine at 1dd1661d,
dopamine/labs/redo/weight_recyclers.py, class NeuronRecycler. Score and choice are theirs. Ours, or as others have it for SGD: all 17 layers
take part (in theirs, of a residual block only the first convolution), so that every method here has the same units; incoming weights
are drawn as this network was initialised; batch norm starts anew; momentum stays; the score is that of one batch, as they compute it.

What to expect: a silent unit of a block's second convolution is rare, since the shortcut that is added is never negative, and its reset
leaves the shortcut as it is. Nobody has tuned frequency and threshold on this protocol.
Letters in the shapes: u all 3,904 units of the 17 layers.
"""

import torch
from torch import Tensor

from incremental_cifar.algorithms.algorithm import Algorithm
from incremental_cifar.algorithms.units import UnitResets, mean_features
from incremental_cifar.resnet import ResNet18
from incremental_cifar.seeds import Purpose


class ReDo(Algorithm):
    """Resets the dormant units: those whose mean activation is at most a threshold times the mean of their layer.

    network: the network that is trained; changes in place. reinit_frequency: steps between resets. reinit_threshold: 0 or more; with 0 only
    units that were silent on the whole batch are dormant. New weights depend on random_seed and the step alone.
    """

    def __init__(self, network: ResNet18, random_seed: int, reinit_frequency: int, reinit_threshold: float):
        self.reinit_frequency = reinit_frequency
        self.reinit_threshold = reinit_threshold
        self.resets = UnitResets(network, random_seed, Purpose.UNIT_RECYCLE)
        self.means = torch.zeros(sum(self.resets.sizes), device=network.fc.weight.device)  # (u,), this step's: no state

    def observe(self, features: list[Tensor]) -> None:
        """Keep this batch's mean activation of every unit."""
        self.means.copy_(mean_features(features))

    def after_step(self, step: int) -> None:
        if (step + 1) % self.reinit_frequency == 0:
            self.resets.reset(self.dormant(), step)

    def dormant(self) -> Tensor:
        """Which units are dormant in the last batch: (u,) bool, on the device. All of a layer that is silent as a whole are."""
        scores = [means / (means.mean() + 1e-9) for means in self.means.split(self.resets.sizes)]
        return torch.cat(scores) <= self.reinit_threshold

    def metrics(self) -> dict[str, float]:
        return self.resets.metrics()
