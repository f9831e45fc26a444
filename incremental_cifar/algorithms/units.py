"""What the methods share that look at single units: how active they are, and what resetting one is.

A unit is one of the network's 17 hidden layers' channels, as continual backpropagation and the dormant units of the analysis have it. The
second convolution of a residual block adds to the shortcut: its units are channels of a sum that several layers read, of which only the
next one on the main path is silenced at a reset. Letters in the shapes: n images, c units of a layer, u all 3,904 units.
"""

import torch
from torch import Tensor

from incremental_cifar.resnet import HiddenLayer


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
