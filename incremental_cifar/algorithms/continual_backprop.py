"""Continual backpropagation: in every step, the least useful mature units of the network, very few, are drawn anew.

    continual_backprop = ContinualBackprop(network, random_seed, replacement_rate=1e-5, maturity_threshold=1000)
    continual_backprop.observe(features)        # after the optimizer's step, with the features of the same forward pass
    continual_backprop.after_step(step)

Source: paper, Methods, "Continual backpropagation"; released lop/algos/res_gnt.py, class ResGnT.

How it is kept from slowing the training down: how many units a layer resets in a step follows from counts alone, so the host knows it
without asking the device, and only the choice of units happens there. An ordinary step costs one mean per layer.
Letters in the shapes: n images, c units of a layer, h and w positions, u all 3,904 units of the 17 layers.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from incremental_cifar.algorithms.algorithm import Algorithm
from incremental_cifar.algorithms.units import mean_features, reset_units
from incremental_cifar.resnet import ResNet18, hidden_layers
from incremental_cifar.seeds import Purpose, generator_for

MAGNITUDE_WEIGHT = 0.01  # 1 - 0.99, the paper's decay rate


class ResetSchedule:
    """How many units of one layer are reset in each step: counts that the host can keep.

    A unit is eligible when more than `maturity_threshold` steps have passed since its reset (at first: since the start of the run).
    Every step with an eligible unit adds `replacement_rate` x `num_units` to an accumulator, whose integer part is taken off as the
    number of units to reset. Should that be more than are eligible, all eligible ones are reset and the rest is forgotten (the
    released code fails there).
    """

    def __init__(self, num_units: int, replacement_rate: float, maturity_threshold: int):
        self.increment = replacement_rate * num_units
        self.maturity_threshold = maturity_threshold
        self.accumulator = 0.0
        self.set_births([0] * num_units, step=0)

    def set_births(self, births: list[int], step: int) -> None:
        """Count anew who is eligible after `step` steps, from the step of every unit's last reset (0: never)."""
        young = sorted(birth for birth in births if step - birth <= self.maturity_threshold)
        self.num_eligible = len(births) - len(young)
        self.young = deque((birth, 1) for birth in young)  # (step of the reset, number of units), oldest first

    def num_due(self, step: int) -> int:
        """Units to reset in step `step` (counted from 1); to be called once for every step, in order."""
        while self.young and step - self.young[0][0] > self.maturity_threshold:
            self.num_eligible += self.young.popleft()[1]
        if self.num_eligible == 0:
            return 0
        self.accumulator += self.increment
        num_due = int(self.accumulator)
        self.accumulator -= num_due
        num_due = min(num_due, self.num_eligible)
        if num_due > 0:
            self.num_eligible -= num_due
            self.young.append((step, num_due))
        return num_due


class ContinualBackprop(Algorithm):
    """The utility of every hidden unit of a network, and the reset of those of least utility.

    network: the network that is trained; its weights and batch-norm buffers change in place. replacement_rate: share of a layer's units
    per step. maturity_threshold: steps for which a unit is protected after its reset. utility_function: "contribution" or "weight".
    running_average_utility: average the features' magnitude with decay 0.99 and clear it at a reset, as the paper says; otherwise sum it
    up for ever, as released. New weights depend on random_seed and the step alone.
    """

    def __init__(
        self,
        network: ResNet18,
        random_seed: int,
        replacement_rate: float,
        maturity_threshold: int,
        utility_function: str = "contribution",
        running_average_utility: bool = False,
    ):
        self.layers = hidden_layers(network)
        self.sizes = [layer.num_units for layer in self.layers]
        self.random_seed = random_seed
        self.maturity_threshold = maturity_threshold
        self.utility_function = utility_function
        self.running_average_utility = running_average_utility
        self.step_count = 0
        self.num_reset = 0  # since `metrics` was asked
        self.schedules = [ResetSchedule(size, replacement_rate, maturity_threshold) for size in self.sizes]
        device = network.fc.weight.device
        # (u,) each, layer after layer. A unit's age is the number of steps since its birth, so that nothing need be counted up.
        self.births = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)
        self.magnitudes = torch.zeros(sum(self.sizes), device=device)
        self.layer_births = self.births.split(self.sizes)
        self.layer_magnitudes = self.magnitudes.split(self.sizes)

    def ages(self) -> Tensor:
        """Steps since each unit's last reset, or since the start of the run: (u,) int64."""
        return self.step_count - self.births

    @torch.no_grad()
    def observe(self, features: list[Tensor]) -> None:
        """Add this step's mean |feature| over batch and positions to every unit's magnitude; all on the device."""
        if self.running_average_utility:
            self.magnitudes.mul_(1 - MAGNITUDE_WEIGHT)
        # As released: the magnitude is a plain sum, neither decayed by 0.99 nor cleared at a reset; one would expect both.
        self.magnitudes.add_(mean_features(features), alpha=MAGNITUDE_WEIGHT)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Choose in all layers the units that this step resets, then reset them, layer by layer."""
        chosen = self.choose_units()
        if chosen:
            generator = generator_for(self.random_seed, Purpose.UNIT_RESET, self.step_count)
            for layer_index, units in chosen.items():
                self.reset_units(layer_index, units, generator)

    @torch.no_grad()
    def choose_units(self) -> dict[int, Tensor]:
        """Begin the next step and choose the units it resets: for each layer that has some, their indices (int64, on the device).

        Of equal utilities, the unit of lower index is chosen. Marks the chosen units as new, but leaves the network alone.
        """
        self.step_count += 1
        chosen = {}
        for layer_index, schedule in enumerate(self.schedules):
            num_due = schedule.num_due(self.step_count)
            if num_due > 0:
                births = self.layer_births[layer_index]
                mature = self.step_count - births > self.maturity_threshold
                utility = self.utility(layer_index).masked_fill(~mature, torch.inf)
                chosen[layer_index] = utility.sort(stable=True).indices[:num_due]
                self.num_reset += num_due
        for layer_index, units in chosen.items():
            self.layer_births[layer_index].index_fill_(0, units, self.step_count)
        return chosen

    def utility(self, layer_index: int) -> Tensor:
        """The utility of a layer's units, (c,): mean |outgoing weight|, with "contribution" times the feature's magnitude."""
        outgoing = self.layers[layer_index].outgoing.weight  # (outputs, c) or (outputs, c, 3, 3)
        utility = outgoing.detach().abs().transpose(0, 1).flatten(1).mean(1)
        if self.utility_function == "contribution":
            utility = utility * self.layer_magnitudes[layer_index]
        return utility

    @torch.no_grad()
    def reset_units(self, layer_index: int, units: Tensor, generator: torch.Generator) -> None:
        """Reset some units of a layer (`units.reset_units`). units: (n,) int64 on the network's device. generator: on the CPU."""
        weight = self.layers[layer_index].incoming.weight  # (c, inputs, 3, 3)
        fresh = torch.randn(len(units), *weight.shape[1:], generator=generator) * (2 / weight[0].numel()) ** 0.5
        reset_units(self.layers[layer_index], units, fresh.to(weight.device, non_blocking=True))
        if self.running_average_utility:
            self.layer_magnitudes[layer_index].index_fill_(0, units, 0)

    def metrics(self) -> dict[str, float]:
        num_reset, self.num_reset = self.num_reset, 0
        return {"units_reset_per_epoch": num_reset}

    def state_dict(self) -> dict[str, Any]:
        return {
            "step_count": self.step_count,
            "births": self.births,
            "magnitudes": self.magnitudes,
            "accumulators": [schedule.accumulator for schedule in self.schedules],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_count = state["step_count"]
        self.births.copy_(state["births"])
        self.magnitudes.copy_(state["magnitudes"])
        births = state["births"].cpu().split(self.sizes)
        for schedule, accumulator, layer_births in zip(self.schedules, state["accumulators"], births, strict=True):
            schedule.accumulator = accumulator
            schedule.set_births(layer_births.tolist(), self.step_count)
