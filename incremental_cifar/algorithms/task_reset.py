"""Head resetting and the retrained network: with every new task, the output layer or the whole network is drawn anew.

Source: paper, Methods, "Class-incremental CIFAR-100"; released incremental_cifar_experiment.py, extend_classes.
"""

import copy

from torch import nn

from incremental_cifar.algorithms.algorithm import Algorithm
from incremental_cifar.resnet import initialise
from incremental_cifar.seeds import Purpose, generator_for


class TaskReset(Algorithm):
    """Initialises a module of the network between tasks, in place, with draws that depend on the seed and the task alone.

    module: the network, or its output layer. Batch norm's running statistics and SGD's momentum stay, as released.
    """

    def __init__(self, module: nn.Module, random_seed: int):
        self.module = module
        self.random_seed = random_seed

    def end_task(self, task: int) -> None:
        fresh = copy.deepcopy(self.module).cpu()
        initialise(fresh, generator_for(self.random_seed, Purpose.TASK_RESET, task))
        self.module.load_state_dict(fresh.state_dict())
