"""What the methods share that look at single units: how active they are, and what resetting one is.

A unit is one of the network's 17 hidden layers' channels, as continual backpropagation and the dormant units of the analysis have it. The
second convolution of a residual block adds to the shortcut: its units are channels of a sum that several layers read, of which only the
next one on the main path is silenced at a reset. Letters in the shapes: n images, c units of a layer, u all 3,904 units.
"""

import torch
from torch import Tensor

from incremental_cifar.algorithms.flat import FlatTensor
from incremental_cifar.resnet import HiddenLayer, ResNet18, hidden_layers
from incremental_cifar.seeds import Purpose, derive_seed


def mean_features(features: list[Tensor]) -> Tensor:
    """Mean |feature| of every unit over batch and positions: (u,) float32, layer after layer; nothing waits for the device.

    features: outputs of ReLUs, and so their own absolute values.
    """
    # (n, c, h, w) is channels-last in memory.
    return torch.cat([feature.movedim(1, -1).flatten(0, -2).mean(0, dtype=torch.float32) for feature in features])


def reset_units(layer: HiddenLayer, units: Tensor, fresh: Tensor) -> None:
    """Give some units of a layer fresh incoming weights and silence their outgoing ones, in place; the optimizer's state stays.

    units: (n,) int64 on the network's device. fresh: (n, inputs, 3, 3), likewise. Biases become 0, batch norm starts anew.
    Source: released lop/algos/res_gnt.py, ResGnT.gen_new_features.
    """
    layer.incoming.weight.index_copy_(0, units, fresh)
    layer.incoming.bias.index_fill_(0, units, 0)
    layer.outgoing.weight.index_fill_(1, units, 0)
    layer.batch_norm.weight.index_fill_(0, units, 1)
    layer.batch_norm.bias.index_fill_(0, units, 0)
    layer.batch_norm.running_mean.index_fill_(0, units, 0)
    layer.batch_norm.running_var.index_fill_(0, units, 1)


class UnitResets:
    """Resets units that a mask on the device chooses, as `reset_units` does, without the host's knowing which; and counts them.

    network: changes in place. New incoming weights are N(0, 2 / fan in), the network's own initialisation. They are drawn on its device for
    all units, and used where the mask says so: what a unit gets depends on random_seed, purpose, the step and the kind of device alone.
    """

    def __init__(self, network: ResNet18, random_seed: int, purpose: Purpose):
        self.layers = hidden_layers(network)
        self.sizes = [layer.num_units for layer in self.layers]
        self.random_seed, self.purpose = random_seed, purpose
        self.fresh = FlatTensor([layer.incoming.weight for layer in self.layers])
        self.deviations = [(2 / piece[0].numel()) ** 0.5 for piece in self.fresh.pieces]
        device = self.fresh.values.device
        self.generator = torch.Generator(device)
        self.num_reset = torch.zeros((), dtype=torch.int64, device=device)  # since `metrics` was asked

    @torch.no_grad()
    def reset(self, mask: Tensor, step: int) -> None:
        """Reset the units of mask, (u,) bool on the network's device. step: counted from 0 over the whole run."""
        if mask.device.type == "cpu" and not mask.any():
            return  # as mostly; a GPU would have to be waited for, and changes nothing either
        self.num_reset += mask.sum()
        self.generator.manual_seed(derive_seed(self.random_seed, self.purpose, step))
        self.fresh.values.normal_(generator=self.generator)
        torch._foreach_mul_(self.fresh.pieces, self.deviations)
        masks = mask.split(self.sizes)
        # A layer's outgoing weights are the next one's incoming: between two units that are reset at once, the fresh weights stay.
        for layer, chosen in zip(self.layers, masks, strict=True):
            layer.outgoing.weight.masked_fill_(chosen.view(-1, *[1] * (layer.outgoing.weight.dim() - 2)), 0)
        for layer, chosen, fresh in zip(self.layers, masks, self.fresh.pieces, strict=True):
            weight = layer.incoming.weight
            torch.where(chosen.view(-1, 1, 1, 1), fresh, weight, out=weight)
        norms = [layer.batch_norm for layer in self.layers]
        to_one = [norm.weight for norm in norms] + [norm.running_var for norm in norms]
        to_zero = [layer.incoming.bias for layer in self.layers] + [norm.bias for norm in norms] + [norm.running_mean for norm in norms]
        torch._foreach_mul_(to_zero + to_one, [*(~mask).float().split(self.sizes)] * 5)
        torch._foreach_add_(to_one, [*mask.float().split(self.sizes)] * 2)

    def metrics(self) -> dict[str, float]:
        """The number of units reset since the last call; waits for the device."""
        num_reset = int(self.num_reset)
        self.num_reset.zero_()
        return {"units_reset_per_epoch": num_reset}
