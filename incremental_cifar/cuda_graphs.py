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

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # before recording, so that libraries have chosen their kernels and have their workspaces

Recording = tuple[Callable[[], None], tuple[Tensor, ...]]  # what replays the function, and where its outputs then are


def has_graphs(device: torch.device) -> bool:
    """Whether this device can record and replay what it does."""
    return device.type == "cuda"


class CaptureError(RuntimeError):
    """A function cannot be recorded as a CUDA graph; the message says why."""


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """What surrounds the recording itself, which any CUDA call beside it ends for good: in here, no garbage is collected.

    The garbage may hold an older graph, whose memory would be freed (PyTorch issues 161037 and 195397).
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    except RuntimeError as error:
        cause = error.__context__ or error  # "failed due to a previous error" would hide that one
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        raise CaptureError(str(cause) or type(cause).__name__) from error
    finally:
        if was_enabled:
            gc.enable()


def record_cuda_graph(function: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Recording:
    """Call a function a few times, then record one more call of it on this GPU, without running that one.

    Raises CaptureError if it cannot be recorded, and what the function raises when it is called.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        recording_stream = torch.cuda.Stream()
        recording_stream.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(recording_stream):
                for _ in range(WARM_UP_CALLS):
                    function()
            with capturing(), torch.cuda.graph(graph, stream=recording_stream):
                outputs = function()
        finally:
            torch.cuda.set_stream(stream)  # PyTorch leaves the other one behind where recording fails
            stream.wait_stream(recording_stream)  # what comes next, perhaps a repair, comes after all this
        return graph.replay, outputs


class Recorded:
    """A function of tensors, recorded once and replayed at every call.

    function: takes tensors and returns a tuple of tensors; it is not kept, so that whoever owns it can own the recording too without a
    cycle, and a graph dies with its owner. examples: arguments of the shapes, dtypes and memory formats of the calls to come. changed: all
    memory that the function changes besides its outputs; it is as before when the constructor is done. record: replaced in tests, which
    have no GPU.
    The outputs of a call are overwritten by the next. Raises CaptureError if the function cannot be recorded, and from then on always:
    PyTorch 2.11 cannot record in a process in which it has failed to. What the function itself raises, a full memory say, is no such
    failure, and is passed on.
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
            raise CaptureError(Recorded.first_failure)
        self.inputs = [torch.empty_like(example).copy_(example) for example in examples]
        before = [tensor.detach().clone() for tensor in changed]
        try:
            self.replay, self.outputs = record(lambda: function(*self.inputs), examples[0].device)
        except CaptureError as error:
            Recorded.first_failure = str(error)
            raise
        finally:
            with torch.no_grad():
                for tensor, value in zip(changed, before, strict=True):
                    tensor.copy_(value)

    def fits(self, first: Tensor) -> bool:
        """Whether a call with this first argument can be replayed; one with another shape must go to the function itself."""
        return first.shape == self.inputs[0].shape

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.replay()
        return self.outputs
