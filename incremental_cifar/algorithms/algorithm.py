"""What an algorithm is here: the places in a step and in a run where it can act, and what it keeps."""

from typing import Any

import torch
from torch import Tensor


class Algorithm:
    """One method's part in the training of a network. Every hook does nothing unless it is overridden.

    A step is: forward and backward pass, `change_gradients`, SGD, `observe`, `after_step`. All hooks run without gradients (`no_grad`).

    The first two are recorded with the step on a GPU, once, and replayed: they do the same in every step, on tensors that stay in their
    place, without asking the device for a value (no `.item()`, no branch on a tensor) and without a number of the host's that changes.
    Only there can gradients be read. The other hooks are called by the host each time: they may count and decide, but what a run should
    not wait for is not asked of the device there either.
    """

    def change_gradients(self) -> None:
        """After the backward pass, before SGD: read and change the parameters' `grad`, in place."""

    def observe(self, features: list[Tensor]) -> None:
        """After SGD, where the gradients can still be read.

        features: the 17 hidden layers' outputs, as `ResNet18` gives them, of the pass that made the gradients; bfloat16 in bf16.
        """

    def after_step(self, step: int) -> None:
        """At the end of a step, counted from 0 over the whole run."""

    def end_task(self, task: int) -> None:
        """Between a task, counted from 0, and the next: after early stopping, when the network is stored."""

    def metrics(self) -> dict[str, float]:
        """What the epoch that has just ended adds to the run's arrays: a number per name that ends in `_per_epoch`.

        Called once at the start of a run, for the names, and after every epoch; may wait for the device. Counts start anew with each call.
        A name that several algorithms have gets their sum.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on besides the network and SGD's momentum: tensors, numbers, lists and dicts of them.

        Checkpoints hold it, and what the steps before a recording change is put back from it: its tensors must be the very ones that the
        hooks change, and a count that `change_gradients` or `observe` keeps belongs to it too.
        """
        return {}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill in a stored state, in place. To be overridden where the state holds more than tensors by their names."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
