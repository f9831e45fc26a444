"""The network of the experiment: an 18-layer residual network for 32 x 32 images, its initialisation and its hidden layers.

    network = ResNet18()                                   # widths 64, 128, 256, 512; weights as PyTorch draws them
    initialise(network)
    logits, features = network(images)                     # (n, 100) and the 17 hidden layers' activations

Letters in the shapes: n images, c units (channels), h and w positions.
Source: paper, Methods, "Class-incremental CIFAR-100"; released lop/nets/torchvision_modified_resnet.py. Names and shapes in the
state dict are torchvision's, so models stored by the released code load here and the other way round.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 100
BLOCKS_PER_STAGE = (2, 2, 2, 2)


class Downsample(nn.Conv2d):
    """The shortcut's 1x1 convolution with a stride: it sees one row and one column of its input in `stride`.

    On a CPU oneDNN's strided one (3.10, in PyTorch 2.11 to 2.14) writes past its buffers in the weight gradient, or computes a wrong one,
    where channels do not fill its blocks of 16 (with AVX2: of 8). There the rows and columns are picked first and convolved without a
    stride: the same numbers, but longer for the widths at which all blocks are full.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.in_channels % 16 == 0:
            return super().forward(x)
        vertical, horizontal = self.stride
        return F.conv2d(x[:, :, ::vertical, ::horizontal], self.weight, self.bias)


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's, but for its counter of batches: the network adds to those of all its layers at once, in one kernel instead of 20."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm, around which the input is added again (torchvision's BasicBlock, with biases).

    Where `stride` or the number of channels changes, the input passes a 1x1 convolution and batch norm (`downsample`) first.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=True)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=True)
        self.bn2 = BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activations of the block's two hidden layers, (n, c, h, w) each; the second is also the block's output."""
        first = torch.relu_(self.bn1(self.conv1(x)))
        shortcut = x if self.downsample is None else self.downsample(x)
        second = torch.relu_(self.bn2(self.conv2(first)).add_(shortcut))
        return first, second


class ResNet18(nn.Module):
    """Residual network with 17 convolutional hidden layers and one linear output layer over all 100 classes.

    width: channels of the first stage; the four stages have width, 2 width, 4 width and 8 width channels (64: the paper's network,
    11.2 million parameters).
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=True)
        self.bn1 = BatchNorm2d(width)
        in_channels = width
        for stage, num_blocks in enumerate(BLOCKS_PER_STAGE):
            channels = width * 2**stage
            blocks = []
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                # The order of construction is the order of random draws: a block's downsample comes before the block itself.
                downsample = None
                if stride != 1 or in_channels != channels:
                    downsample = nn.Sequential(
                        Downsample(in_channels, channels, kernel_size=1, stride=stride, bias=True), BatchNorm2d(channels)
                    )
                blocks.append(ResidualBlock(in_channels, channels, stride, downsample))
                in_channels = channels
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, NUM_CLASSES)
        self.norms = [module for module in self.modules() if isinstance(module, BatchNorm2d)]

        # torchvision's constructor ends like this; its draws are replaced by `initialise`, but they advance the generator.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def blocks(self) -> Iterator[ResidualBlock]:
        """The eight residual blocks, from the input to the output."""
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            yield from stage

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits (n, 100) and the features: the 17 hidden layers' ReLU outputs, in order.

        images: (n, 3, 32, 32), normalised. Features are (n, c, h, w), the last one (n, 8 width): it is taken after the average pool.
        """
        if self.training:
            torch._foreach_add_([norm.num_batches_tracked for norm in self.norms], 1)
        x = torch.relu_(self.bn1(self.conv1(images)))  # (n, width, 32, 32)
        features = [x]
        for block in self.blocks():
            first, x = block(x)
            features += [first, x]
        pooled = self.avgpool(x).flatten(1)  # (n, 8 width, 4, 4) -> (n, 8 width)
        features[-1] = pooled
        return self.fc(pooled), features


class HiddenLayer(NamedTuple):
    """Where the units of one hidden layer have their weights: all a method needs that looks at single units.

    incoming: convolution whose output channels are the units. batch_norm: the normalisation of its output.
    outgoing: the next main-path convolution, whose input channels are the units, or the output layer.
    """

    incoming: nn.Conv2d
    batch_norm: nn.BatchNorm2d
    outgoing: nn.Conv2d | nn.Linear

    @property
    def num_units(self) -> int:
        return self.incoming.out_channels


def hidden_layers(network: ResNet18) -> list[HiddenLayer]:
    """The 17 hidden layers in the order of `features`; the downsample convolutions are not on the main path and are passed over."""
    convolutions, norms = [network.conv1], [network.bn1]
    for block in network.blocks():
        convolutions += [block.conv1, block.conv2]
        norms += [block.bn1, block.bn2]
    return [HiddenLayer(*layer) for layer in zip(convolutions, norms, [*convolutions[1:], network.fc], strict=True)]


def initialise(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the weights of a network, or of one of its layers, anew, in place; children before parents.

    Convolutions and the output layer: Kaiming-normal over the fan in, with the gain of a ReLU and of a linear unit; biases 0.
    Batch norm: weight 1, bias 0. As released: its running statistics stay, though one would expect them to start anew too.
    `generator` must be on the CPU (None: PyTorch's own), and the module too: the numbers are then the same whatever device the run is on.
    Source: released lop/nets/torchvision_modified_resnet.py, kaiming_init_resnet_module.
    """

    def initialise_layer(layer: nn.Module) -> None:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear", generator=generator)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)

    module.apply(initialise_layer)


def build_network(random_seed: int, width: int = 64) -> ResNet18:
    """The initial network of a run, on the CPU; equal to the released code's, to the bit, at width 64.

    Draws from PyTorch's CPU generator as it is after `torch.manual_seed(random_seed)`, and leaves the generator as it found it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_seed)
        network = ResNet18(width)
        initialise(network)
    return network
