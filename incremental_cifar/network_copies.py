"""What computes in a network's place, and is refreshed from it: a bfloat16 copy, and a copy whose batch norm is part of its convolutions.

    half = Bfloat16Copy(network)
    half.refresh()                                   # before a step: the network's weights, rounded
    half.network(images)[0].float().sum().backward()
    half.pass_gradients_on()                         # now they are those of the network's parameters, in float32

    folded = FoldedCopy(network, torch.float32)
    folded.refresh()                                 # before an evaluation
    logits, _ = folded.network(images)

All memory stays in its place, so that what uses a copy can be recorded.
"""

from collections.abc import Callable

import torch
from torch import nn

from incremental_cifar.resnet import BatchNorm2d, ResNet18


def weighted_layers(network: ResNet18) -> list[nn.Conv2d | nn.Linear]:
    """All convolutions, those of the shortcuts too, and the output layer, in the order of the state dict."""
    return [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def normalised_convolutions(network: ResNet18) -> list[tuple[nn.Conv2d, nn.Module]]:
    """Every convolution with the batch norm behind it, those of the shortcuts too."""
    pairs = [(network.conv1, network.bn1)]
    for block in network.blocks():
        pairs += [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if block.downsample is not None:
            pairs.append(tuple(block.downsample))
    return pairs


def copied(network: ResNet18, dtype: torch.dtype, norm_for: Callable[[BatchNorm2d], nn.Module]) -> ResNet18:
    """A network with weights of its own, of this type, in the same memory formats; and for each batch norm what is given in its place."""
    with torch.device("meta"):  # draws and holds nothing
        own = ResNet18(network.conv1.out_channels)
    for mine, original in zip(weighted_layers(own), weighted_layers(network), strict=True):
        for name, parameter in original.named_parameters():
            setattr(mine, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype)))
    for mine, original in zip(list(own.modules()), list(network.modules()), strict=True):
        for name, child in original.named_children():
            if isinstance(child, BatchNorm2d):
                setattr(mine, name, norm_for(child))
    own.norms = [module for module in own.modules() if isinstance(module, BatchNorm2d)]
    return own


class Bfloat16Copy:
    """A network with bfloat16 weights of its own in convolutions and output layer, and with the very batch norms of the original.

    `network` takes bfloat16 images. It computes what the original does under autocast, to the bit, but all its weights are rounded by one
    kernel rather than by 42, and all gradients come back in float32 by another.
    """

    def __init__(self, original: ResNet18):
        self.network = copied(original, torch.bfloat16, norm_for=lambda norm: norm)
        self.originals = [parameter for layer in weighted_layers(original) for parameter in layer.parameters()]
        self.copies = [parameter for layer in weighted_layers(self.network) for parameter in layer.parameters()]
        self.gradients = [torch.zeros_like(parameter) for parameter in self.originals]

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the original's weights, and have no gradients."""
        torch._foreach_copy_(self.copies, self.originals)
        for parameter in self.copies:
            parameter.grad = None

    @torch.no_grad()
    def pass_gradients_on(self) -> None:
        """Give the original's parameters the gradients of their copies, in float32; those of batch norm it has already."""
        torch._foreach_copy_(self.gradients, [parameter.grad for parameter in self.copies])
        for parameter, gradient in zip(self.originals, self.gradients, strict=True):
            parameter.grad = gradient


class FoldedCopy:
    """A network for evaluation alone: every convolution does what it and its batch norm, with running statistics, do in the original.

    dtype: in which it computes; its weights are folded in float32 and then rounded. Equal to the original but for the last bits.
    """

    def __init__(self, original: ResNet18, dtype: torch.dtype):
        self.network = copied(original, dtype, norm_for=lambda norm: nn.Identity())
        self.originals = normalised_convolutions(original)
        self.folded = [convolution for convolution, _ in normalised_convolutions(self.network)]
        self.outputs = list(zip(self.network.fc.parameters(), original.fc.parameters(), strict=True))

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold the original's weights and statistics as they are now."""
        convolutions, norms = zip(*self.originals, strict=True)
        deviations = torch._foreach_sqrt(torch._foreach_add([norm.running_var for norm in norms], norms[0].eps))
        scales = torch._foreach_div([norm.weight for norm in norms], deviations)  # (c,) each
        weights = torch._foreach_mul([layer.weight for layer in convolutions], [scale[:, None, None, None] for scale in scales])
        centred = torch._foreach_sub([layer.bias for layer in convolutions], [norm.running_mean for norm in norms])
        biases = torch._foreach_addcmul([norm.bias for norm in norms], centred, scales)
        torch._foreach_copy_([layer.weight for layer in self.folded], weights)
        torch._foreach_copy_([layer.bias for layer in self.folded], biases)
        for mine, original in self.outputs:
            mine.copy_(original)
