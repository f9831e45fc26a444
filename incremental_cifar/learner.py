"""What changes while a run trains: the network, what changes it, and what is measured of it; all that a checkpoint holds."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from incremental_cifar.algorithms import epoch_metrics, make_algorithms
from incremental_cifar.command_line import is_memory_full, memory_errors, warn
from incremental_cifar.config import Config, UserError
from incremental_cifar.learning_curves import LearningCurves
from incremental_cifar.resnet import ResNet18, build_network
from incremental_cifar.run_files import state_bytes
from incremental_cifar.training import EvaluationStep, TrainingStep, make_optimizer


def network_of(config: Config, random_seed: int = 0) -> ResNet18:
    """The initial network of a run with these settings, on the CPU: what trains it and what reads its models build it here."""
    return build_network(random_seed, config.network_width)


class Learner:
    """The network of a run with its initial weights, SGD, the algorithms, the task's best network, the learning curves."""

    def __init__(self, config: Config, random_seed: int, device: torch.device):
        self.config = config
        self.network: ResNet18 = network_of(config, random_seed).to(device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.network, config.stepsize, config.momentum, config.weight_decay, config.decay_batch_norm)
        self.algorithms = make_algorithms(config, self.network, self.optimizer, random_seed)
        self.training_step = TrainingStep(self.network, self.optimizer, config.precision, self.algorithms)
        self.evaluation_step = EvaluationStep(self.network, self.training_step.half, config.fold_batch_norm)
        if config.compile_network:
            self.training_step.compile(config.batch_size, config.deterministic)
            self.evaluation_step.compile(config.deterministic)
        self.best_network = BestNetwork()
        num_steps = config.steps_before(config.num_epochs)
        self.check_states()
        self.curves = LearningCurves(num_steps, config.num_epochs, device, names=epoch_metrics(self.algorithms))

    def check_states(self) -> None:
        """Raise ValueError, hours before the first checkpoint does, if an algorithm's state cannot be stored and filled in again."""
        for name, algorithm in self.training_step.named_algorithms():
            try:
                algorithm.load_state_dict(torch.load(io.BytesIO(state_bytes(algorithm.state_dict())), weights_only=True))
            except Exception as error:
                if is_memory_full(error):
                    raise
                raise ValueError(f"{name}.state_dict: what it gives cannot be stored and filled in again ({first_line(error)})") from error

    def record(self, label: str) -> None:
        """Have the steps replayed from CUDA graphs from here on; where that is impossible, warn and go on without.

        label: begins the warning. Raises what torch.compile and a full memory raise.
        """
        what = "a step"
        try:
            self.training_step.record(self.config.batch_size)
            what = "an evaluation step"
            self.evaluation_step.record()
        except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException):
            raise
        except RuntimeError as error:
            warn(f"{label}{what} cannot be recorded as a CUDA graph ({first_line(error)}); going on without, more slowly")

    @property
    def is_recorded(self) -> bool:
        """Whether training steps are replayed."""
        return self.training_step.recorded is not None

    @torch.no_grad()
    def begin_task(self, task_before: int) -> None:
        """Let the algorithms do what they do between this task and the next."""
        for algorithm in self.algorithms:
            algorithm.end_task(task_before)

    def state_dict(self, num_epochs: int) -> dict[str, Any]:
        """All that a run needs to go on after so many epochs as if nothing had happened."""
        return {
            **self.training_step.state_dict(),
            "best_network": self.best_network.state_dict(),
            "curves": self.curves.state_dict(num_epochs, self.config.steps_before(num_epochs)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Fill in a stored state, in place."""
        if "algorithms" not in state:  # before each algorithm had a state, one had
            state = state | {"algorithms": {"ContinualBackprop": state.get("continual_backprop", {})}}
        self.training_step.load_state_dict(state)
        self.best_network.load_state_dict(state["best_network"])
        self.curves.load_state_dict(state["curves"])


class BestNetwork:
    """A copy of the network, batch-norm buffers included, as it was at the epoch of best validation accuracy of a task."""

    def __init__(self) -> None:
        self.accuracy = -1.0
        self.parameters: dict[str, Tensor] = {}

    def update(self, network: ResNet18, validation_accuracy: float) -> None:
        """Copy the network if this accuracy is strictly greater than all before it in this task."""
        if validation_accuracy > self.accuracy:
            self.accuracy = validation_accuracy
            self.parameters = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def restore(self, network: ResNet18) -> None:
        """Put the copy back into the network and forget it: the next task starts over."""
        network.load_state_dict(self.parameters)
        self.accuracy, self.parameters = -1.0, {}

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "parameters": self.parameters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accuracy, self.parameters = state["accuracy"], state["parameters"]


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn into a UserError what PyTorch raises where the machine, not our code, falls short."""
    try:
        with memory_errors():
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(f"torch.compile failed ({first_line(error)}); use compile_network=false, or install a C++ compiler") from None
