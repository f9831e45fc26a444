import copy

import numpy as np
import pytest
import torch

from incremental_cifar.algorithms.fire import Fire, orthogonalised
from incremental_cifar.resnet import build_network
from incremental_cifar.training import make_optimizer, momentum_buffers


def singular_values(weight):
    """Of each kernel position, as shares of what they would all be: sqrt(outputs / inputs) / (height x width)."""
    matrices = weight.detach().movedim((0, 1), (-2, -1))
    return torch.linalg.svdvals(matrices) * weight[0, 0].numel() / (weight.shape[0] / weight.shape[1]) ** 0.5


@pytest.mark.parametrize(
    ("weight", "iterations", "expected"),
    [
        ([[3.0, 0.0], [0.0, 4.0]], 1, [[0.792, 0.0], [0.0, 0.944]]),  # 3/5 and 4/5: 1.5 s - 0.5 s^3
        ([[3.0, 0.0], [0.0, -4.0]], 0, [[0.6, 0.0], [0.0, -0.8]]),
        ([[3.0, 0.0], [0.0, 4.0]], 20, [[1.0, 0.0], [0.0, 1.0]]),
        ([[0.0, 5.0]], 3, [[0.0, 0.5**0.5]]),  # one output, two inputs
        ([[0.0], [5.0]], 3, [[0.0], [2**0.5]]),
        ([[0.0, 0.0], [0.0, 0.0]], 3, [[0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_a_weight_by_hand(weight, iterations, expected):
    weight = torch.tensor(weight)
    torch.testing.assert_close(orthogonalised(weight, iterations), torch.tensor(expected))
    kernel = torch.zeros(*weight.shape, 3, 2)  # each position for itself, and divided by their number
    kernel[:, :, 2, 1] = weight
    wanted = torch.zeros_like(kernel)
    wanted[:, :, 2, 1] = torch.tensor(expected) / 6
    torch.testing.assert_close(orthogonalised(kernel, iterations), wanted)


def test_ten_iterations_come_near_to_the_nearest_orthogonal_weights_and_not_to_them():
    weight = build_network(0, width=8).layer2[0].conv2.weight.detach()  # (16, 16, 3, 3)
    after_ten = singular_values(orthogonalised(weight, 10))
    assert after_ten.max() < 1 + 1e-5 and after_ten.median() > 0.99
    assert after_ten.min() < 0.9  # by a decomposition it would be 1
    u, _, vh = torch.linalg.svd(weight.movedim((0, 1), (-2, -1)))
    torch.testing.assert_close(orthogonalised(weight, 40), (u @ vh).movedim((-2, -1), (0, 1)) / 9, rtol=0, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_weights_of_all_layers_change_and_momentum_goes_and_nothing_else(momentum):
    network = build_network(1, width=4).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, 0.1, momentum, 0.0005)
    for tensor in (*network.state_dict().values(), *momentum_buffers(network, optimizer)):
        tensor.add_(1)
    before = copy.deepcopy(network.state_dict())
    Fire(network, optimizer, 10).end_task(0)
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    weights = {name: parameter for name, parameter in network.named_parameters() if parameter.dim() > 1}
    assert changed == set(weights) and {"conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"} < changed
    for name, weight in weights.items():
        assert singular_values(weight).max().item() == pytest.approx(1, abs=1e-3), name
    buffers = momentum_buffers(network, optimizer)
    assert (buffers != []) == (momentum > 0) and not any(buffer.any() for buffer in buffers)


def test_it_acts_in_a_tiny_run_from_the_second_task_on(uninterrupted):
    def losses(algorithm):
        return np.load(uninterrupted(algorithm) / "test_loss_per_epoch/index-0.npy")

    fire, base = losses("fire"), losses("base_deep_learning_system")
    assert (fire[:4] == base[:4]).all() and (fire[4:] != base[4:]).all()
