"""A number per weight of a network, in one piece of memory."""

from collections.abc import Sequence

import torch
from torch import Tensor


class FlatTensor:
    """A float32 number for each entry of some tensors: as one vector, `values` (n,), and as views of it, `pieces`, of their shapes.

    Each piece has the memory format of its tensor: only then do operations on all of them take a few kernels, and one draw of `values` is
    several times faster than one of channels-last tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        sizes = [tensor.numel() for tensor in tensors]
        self.values = torch.zeros(sum(sizes), device=tensors[0].device)
        self.pieces = [
            piece.as_strided(tensor.shape, tensor.stride(), piece.storage_offset())
            for piece, tensor in zip(self.values.split(sizes), tensors, strict=True)
        ]
