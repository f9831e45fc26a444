"""What the algorithms do beyond SGD: one file each, one small interface (`Algorithm`), and here the `if` that switches each one on."""

import re
from collections.abc import Iterable

import torch

from incremental_cifar.algorithms.algorithm import Algorithm
from incremental_cifar.algorithms.continual_backprop import ContinualBackprop
from incremental_cifar.algorithms.fire import Fire
from incremental_cifar.algorithms.l2_init import L2Init
from incremental_cifar.algorithms.redo import ReDo
from incremental_cifar.algorithms.selective_weight_reinitialization import SelectiveWeightReinitialization
from incremental_cifar.algorithms.self_normalized_resets import SelfNormalizedResets
from incremental_cifar.algorithms.soft_reset import SoftReset
from incremental_cifar.algorithms.task_reset import TaskReset
from incremental_cifar.algorithms.upgd import UPGD
from incremental_cifar.algorithms.weight_noise import WeightNoise
from incremental_cifar.config import Config
from incremental_cifar.learning_curves import METRICS
from incremental_cifar.resnet import ResNet18


def make_algorithms(config: Config, network: ResNet18, optimizer: torch.optim.SGD, random_seed: int) -> list[Algorithm]:
    """What a config adds to SGD; the hooks run in the order of this list.

    The network must be on its device and in its memory format, with the weights it has at the start of the run.
    """
    algorithms: list[Algorithm] = []
    if config.l2_init > 0:
        algorithms.append(L2Init(optimizer.param_groups[0]["params"], config.l2_init))  # those that weight decay acts on
    if config.use_upgd:
        algorithms.append(UPGD(network, optimizer, random_seed, config.upgd_beta_utility, config.upgd_sigma))
    if config.use_cbp:
        algorithms.append(
            ContinualBackprop(
                network,
                random_seed,
                config.replacement_rate,
                config.maturity_threshold,
                config.utility_function,
                config.running_average_utility,
            )
        )
    if config.redo_reinit_frequency > 0:
        algorithms.append(ReDo(network, random_seed, config.redo_reinit_frequency, config.redo_reinit_threshold))
    if config.use_snr:
        algorithms.append(
            SelfNormalizedResets(
                network,
                random_seed,
                config.snr_percentile,
                config.snr_first_threshold,
                config.snr_max_threshold,
                config.snr_update_frequency,
            )
        )
    if config.reinit_freq > 0:
        algorithms.append(
            SelectiveWeightReinitialization(
                network,
                random_seed,
                config.reinit_freq,
                config.reinit_factor,
                config.swr_utility,
                config.pruning_method,
                config.reinit_strat,
            )
        )
    if config.noise_std > 0:
        algorithms.append(WeightNoise(network, random_seed, config.noise_std))
    if config.reset_network:
        algorithms.append(TaskReset(network, random_seed))
    elif config.reset_head:
        algorithms.append(TaskReset(network.fc, random_seed))
    if config.fire_iterations > 0:
        algorithms.append(Fire(network, optimizer, config.fire_iterations))
    if config.soft_reset > 0:
        algorithms.append(SoftReset(network, optimizer, config.soft_reset))
    return algorithms


@torch.no_grad()
def epoch_metrics(algorithms: Iterable[Algorithm]) -> dict[str, float]:
    """What the algorithms counted in the epoch that has just ended, by the names of the arrays; of what two of them count, the sum.

    Raises ValueError if a name is not one that an algorithm can have for its own.
    """
    total: dict[str, float] = {}
    for algorithm in algorithms:
        for name, value in algorithm.metrics().items():
            if name in METRICS or not re.fullmatch(r"\w+_per_epoch", name, re.ASCII):
                raise ValueError(f"{type(algorithm).__name__}.metrics: {name!r} must end in _per_epoch and be no metric of every run")
            total[name] = total.get(name, 0) + value
    return total
