"""The losses of an algorithm's first 25 steps at the paper's size, on GPUs whose losses were recorded: equal to the bit, ever after.

.venv/bin/python tests/test_first_losses.py        # on a GPU: adds it to reference/first_losses.json
"""

import functools
import json

import pytest
import torch
from conftest import ALGORITHMS, GPU, REFERENCE, REPOSITORY, TINY_ALGORITHM

from incremental_cifar.cifar100 import ImageSet, draw_synthetic_images
from incremental_cifar.config import load_config, settled
from incremental_cifar.learner import Learner
from incremental_cifar.seeds import draw_class_order, experiment_seed
from incremental_cifar.training import set_arithmetic, set_stepsize, train_one_epoch

RECORDED = REFERENCE / "first_losses.json"
NUM_STEPS = 25
# Two tasks of an epoch each: 9 steps, what algorithms do between tasks, and 18.
SIZES = {"dataset": "synthetic", "num_tasks": 2, "epochs_per_task": 1, "train_images_per_class": 162}


@functools.cache
def images_for(device, train_images_per_class):
    return ImageSet(draw_synthetic_images(train_images_per_class, 1)[0], device)


def first_losses(algorithm, precision, device, **settings):
    """The losses of the first 25 steps of index 0: a list of Python floats, which hold float32 exactly."""
    values = SIZES | {"device": device, "precision": precision} | TINY_ALGORITHM.get(algorithm, {}) | settings
    config = load_config(REPOSITORY / "cfg" / f"{algorithm}.json", [f"{key}={value}" for key, value in values.items()])
    config = settled(config, None, is_gpu=device.type == "cuda")
    set_arithmetic(precision, config.deterministic)
    images, seed = images_for(device, config.train_images_per_class), experiment_seed(0)
    learner = Learner(config, seed, device)
    set_stepsize(learner.optimizer, config.stepsize)
    for task in range(config.num_tasks):
        classes, steps = draw_class_order(seed)[: config.num_classes_seen(task)], config.steps_before(task)
        losses, accuracies = learner.curves.step_losses, learner.curves.step_accuracies
        train_one_epoch(learner.training_step, images, classes, config.batch_size, seed, task, losses, accuracies, steps)
        if task + 1 < config.num_tasks:
            learner.begin_task(task)
    return losses[:NUM_STEPS].tolist()


def gpu_name():
    return f"{torch.cuda.get_device_name(GPU)}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


def test_they_tell_algorithms_apart():
    """On a CPU, smaller; what is compared on a GPU is what algorithms do."""
    sizes = {"network_width": 2, "batch_size": 9, "train_images_per_class": 16}
    names = ("base_deep_learning_system", "continual_backpropagation", "head_resetting", "redo")
    losses = [first_losses(name, "fp32", torch.device("cpu"), **sizes) for name in names]
    assert all(len(of_one) == NUM_STEPS and min(of_one) > 0 and max(of_one) < 100 for of_one in losses)
    assert len({tuple(of_one) for of_one in losses}) == len(names)
    assert losses[0][:9] == losses[2][:9] and losses[0] == first_losses(names[0], "fp32", torch.device("cpu"), **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_a_gpu_first_losses_are_those_recorded(algorithm, precision):
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if gpu_name() not in recorded:
        pytest.skip(f"nothing is recorded of {gpu_name()}; see the first lines of {__file__}")
    assert first_losses(algorithm, precision, GPU) == recorded[gpu_name()][algorithm][precision]


if __name__ == "__main__":
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    recorded[gpu_name()] = {name: {precision: first_losses(name, precision, GPU) for precision in ("tf32", "bf16")} for name in ALGORITHMS}
    RECORDED.write_text(json.dumps(recorded) + "\n")
    print(f"{RECORDED}: {gpu_name()}")
