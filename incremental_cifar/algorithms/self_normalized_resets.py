"""Self-normalized resets: a unit that is silent for longer than is usual for it is reset.

    resets = SelfNormalizedResets(network, random_seed)
    resets.observe(features)                    # in every step
    resets.after_step(step)

Source: Farias and Jozefiak, "Self-normalized resets for plasticity in continual learning" (ICLR 2025); ajozefiak/SelfNormalizedResets at
8b84f0c2, src/algorithms/snr.py. A unit fires in a step if any activation of it in the batch is above 0. How long it was silent is counted
whenever a silence ends, be it of 0 steps: when it fires, or when it is reset. From these counts its threshold is set every so often.
The reset is that of all unit methods here (`units.reset_units`); momentum stays.

Ours: silence is counted in steps, not in images, and thresholds are set every so many steps, not tasks. In images, a unit that was never
silent gets a threshold of one image, less than a step holds: here the quantile is then 0 steps and the threshold the least one, 1 step.

What to expect: few resets. A unit of an early layer has 90 x 1,024 chances in a step to fire, batch norm centres it, and to the second
convolutions of the blocks a shortcut is added that is never negative. The paper's "dormant" units fire on less than 1 % of the images;
these are silent on all. Nobody has tuned it on this protocol. Letters in the shapes: u all 3,904 units of the 17 layers.
"""

import torch
from torch import Tensor

from incremental_cifar.algorithms.algorithm import Algorithm
from incremental_cifar.algorithms.units import UnitResets, mean_features
from incremental_cifar.resnet import ResNet18
from incremental_cifar.seeds import Purpose

EXPANSION = 2  # of the threshold of a unit whose silences the threshold cuts short


class SelfNormalizedResets(Algorithm):
    """Counts how long each unit is silent, and resets those whose silence reaches a threshold of their own.

    network: the network that is trained; changes in place. percentile: share of a unit's silences of 1 step or more that are at most its
    threshold, above 0 and at most 1. first_threshold, max_threshold: in steps, the first at least 1 and not above the other.
    update_frequency: steps between updates of the thresholds. New weights depend on random_seed and the step alone.
    """

    def __init__(
        self,
        network: ResNet18,
        random_seed: int,
        percentile: float = 0.99,
        first_threshold: int = 111,
        max_threshold: int = 222,
        update_frequency: int = 1000,
    ):
        self.percentile = percentile
        self.max_threshold = max_threshold
        self.update_frequency = update_frequency
        self.resets = UnitResets(network, random_seed, Purpose.SNR_RESET)
        num_units, device = sum(self.resets.sizes), network.fc.weight.device
        self.ages = torch.zeros(num_units, dtype=torch.int32, device=device)  # (u,) steps since a unit fired or was reset
        self.thresholds = torch.full_like(self.ages, first_threshold)
        self.bins = torch.arange(max_threshold + 1, dtype=torch.int32, device=device)
        self.histogram = torch.zeros(num_units, max_threshold + 1, dtype=torch.int32, device=device)  # (u, bins), since the last update
        self.due = torch.zeros(num_units, dtype=torch.bool, device=device)  # (u,), this step's: no state

    def observe(self, features: list[Tensor]) -> None:
        """Count the silences that end in this step, and note which units are due for a reset. No age is ever above the last bin."""
        fired = mean_features(features) > 0
        silence = self.ages + 1
        torch.logical_and(~fired, silence >= self.thresholds, out=self.due)
        ended = fired | self.due
        lengths = torch.where(fired, self.ages, silence)
        self.histogram += (self.bins == lengths[:, None]) & ended[:, None]
        self.ages.copy_(silence.masked_fill_(ended, 0))

    def after_step(self, step: int) -> None:
        self.resets.reset(self.due, step)
        if (step + 1) % self.update_frequency == 0:
            self.update_thresholds()

    def update_thresholds(self) -> None:
        """Set each unit's threshold by the quantile of its silences of 1 step or more, and count anew.

        That quantile if it is below the threshold; otherwise the threshold has cut silences short, and is doubled.
        """
        counts = self.histogram[:, 1:].cumsum(1).double()  # summed as integers: of floats, a GPU has no deterministic sum of this kind
        totals = counts[:, -1:]
        quantiles = 1 + (counts / totals < self.percentile).sum(1)
        quantiles.masked_fill_(totals[:, 0] == 0, 0)
        thresholds = torch.where(quantiles < self.thresholds, quantiles, EXPANSION * self.thresholds)
        self.thresholds.copy_(thresholds.clamp_(1, self.max_threshold))
        self.histogram.zero_()

    def metrics(self) -> dict[str, float]:
        return self.resets.metrics()

    def state_dict(self) -> dict[str, Tensor]:
        return {"ages": self.ages, "thresholds": self.thresholds, "histogram": self.histogram}
