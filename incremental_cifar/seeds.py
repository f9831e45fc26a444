"""Random numbers that depend on a run's seed and on what they are for, never on what was drawn before.

    generator = generator_for(random_seed, Purpose.EPOCH, epoch)

Each epoch, step and task has generators of its own, so a resumed run draws what an uninterrupted one draws without any generator's
state in the checkpoint. All generators but those of noise and of resets by mask are on the CPU: a run draws the same numbers there on every
device.
"""

from enum import IntEnum

import numpy as np
import torch

from incremental_cifar.config import NUM_CLASSES, NUM_SEEDS, UserError


class Purpose(IntEnum):
    """What random numbers are for; the values are part of the results and never change."""

    EPOCH = 1  # order of the training images and their transformations; counted in epochs
    TEST_IMAGES = 2  # transformations of the test images, where they are wanted; counted in epochs
    UNIT_RESET = 3  # incoming weights of the units that continual backpropagation resets; counted in steps
    NOISE = 4  # shrink and perturb; counted in steps
    TASK_RESET = 5  # the output layer's or the network's new weights at the end of a task; counted in tasks
    ANALYSIS = 6  # images on which a stored network is analysed; counted in tasks
    UNIT_RECYCLE = 7  # incoming weights of the units that ReDo resets; counted in steps
    SNR_RESET = 8  # the same of self-normalized resets
    WEIGHT_REINIT = 9  # weights that selective weight reinitialization draws anew; counted in steps
    UPGD_NOISE = 10  # utility-based perturbed gradient descent; counted in steps


def experiment_seed(index: int) -> int:
    """The seed of the run with this index, equal to the released code's (`get_random_seeds()[index]`).

    Raises UserError if there is no such index. Leaves PyTorch's generators as they are, which `get_random_seeds` itself does not.
    """
    if not 0 <= index < NUM_SEEDS:
        raise UserError(f"--experiment-index: got {index}; it must be an integer from 0 to {NUM_SEEDS - 1}")
    from mlproj_manager.util import get_random_seeds

    with torch.random.fork_rng(devices=[]):
        return int(get_random_seeds()[index])


def draw_class_order(random_seed: int) -> np.ndarray:
    """The order in which a run meets the 100 classes: (100,) int64, a permutation of CIFAR's labels, as in the released code."""
    return np.random.RandomState(random_seed).permutation(NUM_CLASSES)


def derive_seed(random_seed: int, purpose: Purpose, count: int) -> int:
    """A seed, from 0 to 2^63 - 1, for one purpose at one epoch, step or task of a run."""
    words = np.random.SeedSequence((random_seed, int(purpose), count)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def generator_for(random_seed: int, purpose: Purpose, count: int) -> torch.Generator:
    """A new CPU generator for one purpose at one epoch, step or task of a run."""
    return torch.Generator().manual_seed(derive_seed(random_seed, purpose, count))
