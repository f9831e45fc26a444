"""Recording what a GPU does for one call of a function, and replaying it: the host then asks for one thing instead of a thousand.

    learn = Recorded(learn, (images, labels, mask), changed=[*network.parameters(), *network.buffers()])
    loss, accuracy = learn(images, labels, mask)          # read or copied before the next call

This is all that only CUDA can do here, and it changes no result: what is replayed are the kernels of the plain call, on the same memory.
A function can be recorded if it

- keeps what it changes in the same memory from call to call (parameters filled in place, a step size in a tensor),
- never waits for the device (no `.item()`, no branch on a tensor's value), and
- takes from the host nothing that changes: a Python number is recorded as it was.

Source: PyTorch notes, "CUDA semantics", section "CUDA Graphs".
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # before recording, so that libraries have chosen their kernels and have their workspaces

Recording = tuple[Callable[[], None], tuple[Tensor, ...]]  # what replays the function, and where its outputs then are


def record_cuda_graph(function: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Recording:
    """Call a function a few times, then record one more call of it on this GPU, without running that one."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        recording_stream = torch.cuda.Stream()
        recording_stream.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(recording_stream):
                for _ in range(WARM_UP_CALLS):
                    function()
            with torch.cuda.graph(graph, stream=recording_stream):
                outputs = function()
        finally:
            torch.cuda.set_stream(stream)  # PyTorch leaves the other one behind where recording fails
            stream.wait_stream(recording_stream)  # what comes next, perhaps a repair, comes after all this
        return graph.replay, outputs


class Recorded:
    """A function of tensors that is recorded once and replayed at every call.

    function: takes tensors and returns a tuple of tensors. examples: arguments of the shapes, dtypes and memory formats of the calls to
    come; calls with other shapes run the function itself. changed: all memory that the function changes besides its outputs; it is as
    before when the constructor is done. record: replaced in tests, which have no GPU.
    The outputs of a call are overwritten by the next. Raises RuntimeError if the function cannot be recorded, and from then on always:
    PyTorch 2.11 cannot record in a process in which it has failed to.
    """

    first_failure: ClassVar[str | None] = None

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        examples: Sequence[Tensor],
        changed: Sequence[Tensor],
        record: Callable[[Callable[[], tuple[Tensor, ...]], torch.device], Recording] = record_cuda_graph,
    ):
        if Recorded.first_failure is not None:
            raise RuntimeError(Recorded.first_failure)
        self.function = function
        self.inputs = [torch.empty_like(example).copy_(example) for example in examples]
        before = [tensor.detach().clone() for tensor in changed]
        try:
            self.replay, self.outputs = record(lambda: function(*self.inputs), examples[0].device)
        except RuntimeError as error:
            # "Failed due to a previous error" would hide that one.
            Recorded.first_failure = str(error.__context__ or error) or type(error).__name__
            raise
        finally:
            with torch.no_grad():
                for tensor, value in zip(changed, before, strict=True):
                    tensor.copy_(value)

    def __call__(self, *inputs: Tensor) -> Any:
        if any(given.shape != own.shape for given, own in zip(inputs, self.inputs, strict=True)):
            return self.function(*inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.replay()
        return self.outputs
